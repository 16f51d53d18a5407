"""How the weights of a layer are rounded: scales of their input channels, ranges of groups, zero points or none.

Legend: N rows, K columns of a weight, E experts, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusecomp.quant.online.folding import Fold, Norm, Reader, Rows, Run, norm_forms, prove, row_forms
from fusecomp.quant.online.observe import ExpertInputs, Observed, sample_rows
from fusecomp.quant.online.rounding import round_trip
from fusecomp.quant.online.schemes import Scheme
from fusecomp.quant.online.search import Weight, input_sizes, search_clip, search_scale
from fusecomp.quant.online.targets import Target

UNMET = "calibration text did not reach it"
UNPROVEN = "channels not scaled: nothing before could be proven to take their scales"


@dataclass(eq=False)
class Rounding:
    """How one weight becomes codes.

    Attributes:
        columns: what its columns are multiplied by, [K] or [E, K] fp32; rows, [N] or [E, N], as well.
        clip: [..., N, G], the share of each group's range that codes span.
        symmetric: of int4: without zero points.
        notes: for the report.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None
    clip: Tensor | None = None
    symmetric: bool = True
    note: str = ""

    def prepared(self, values: Tensor, here: slice) -> Tensor:
        """Values [..., N, K] fp32, some experts of a weight or all of a linear's, scaled."""
        for factors, dim in ((self.columns, -2), (self.rows, -1)):
            if factors is not None:
                by = factors[here] if factors.dim() == 2 else factors
                values = values * by.unsqueeze(dim)
        return values


@dataclass(frozen=True, eq=False)
class Group:
    """Targets that read one input: `x` [..., K], or of experts' inner weights, what each expert read."""

    targets: tuple[Target, ...]
    x: Tensor | None
    inputs: ExpertInputs | None


class Planner:
    """Plans layer after layer. What was found of a layer is tried first in the next; what failed is not tried again."""

    def __init__(self, scheme: Scheme, head_dims: Sequence[int], portable: bool) -> None:
        self.scheme, self.head_dims = scheme, head_dims
        # Layers of one kind share a compiled program, so all are rounded alike; experts' zero points are read by no
        # other engine.
        self._symmetric: dict[bool, bool | None] = {True: True if portable else None, False: None}
        self._refuted: set[tuple] = set()
        self._proven: set[tuple] = set()

    def plain(self, targets: Sequence[Target]) -> dict[Target, Rounding]:
        """Without calibration."""
        for experts in (False, True):
            chosen = [t for t in targets if t.experts == experts]
            if self.scheme.grouped and chosen and self._symmetric[experts] is None:
                errors = [sum(self._plain_error(t, symmetric) for t in chosen) for symmetric in (True, False)]
                self._symmetric[experts] = errors[0] <= errors[1]
        return {t: Rounding(symmetric=self._symmetric[t.experts] is not False) for t in targets}

    def calibrated(
        self, prefix: str, targets: Sequence[Target], observed: Observed, run: Run, before: Tensor
    ) -> dict[Target, Rounding]:
        """With what was observed of the layer `prefix`, whose output was `before`; `run` gives it again.

        Scales are folded into norms and parameters that stay, here; those of targets are left to their rounding.
        """
        groups = self._groups(targets, observed)
        met = {t for group in groups for t in group.targets}
        roundings = {t: Rounding(note="" if t in met else UNMET) for t in targets}
        folds = self._prove(prefix, groups, targets, observed, run, before)
        for group in groups:
            weights = self._weights(group, observed)
            self._choose_symmetry(group, weights)
            for target, weight in weights.items():
                weight.symmetric = roundings[target].symmetric = self._symmetric[target.experts] is not False
            fold = folds.get(group)
            if fold is not None:
                self._scale(group, fold, weights, roundings)
            elif self._wants_scales(group):
                for target in group.targets:
                    roundings[target].note = UNPROVEN
            if self.scheme.grouped:
                for target, weight in weights.items():
                    s = roundings[target].columns
                    roundings[target].clip, _ = search_clip(weight, s)
        rest = [t for t in targets if t not in met]
        for target, rounding in self.plain(rest).items():
            roundings[target].symmetric = rounding.symmetric
        return roundings

    # ------------------------------------------------------------------ groups and their places

    def _groups(self, targets: Sequence[Target], observed: Observed) -> list[Group]:
        groups: list[tuple[list[Target], Tensor]] = []
        inner: list[Group] = []
        for target in targets:
            x = observed.reads.get(target.owner)
            if target.experts:
                seen = observed.experts.get(target.name)
                own = [
                    s
                    for name, s in observed.experts.items()
                    if name.rpartition(".")[0] == target.name.rpartition(".")[0]
                ]
                if seen is None:
                    x = None
                elif seen.first > min(s.first for s in own):
                    inner.append(Group((target,), None, seen))
                    continue
            if x is None or x.shape[-1] != target.weight.shape[-1]:
                continue
            for members, other in groups:
                if observed.same(x, other):
                    members.append(target)
                    break
            else:
                groups.append(([target], x))
        return [Group(tuple(members), x, None) for members, x in groups] + inner

    def _wants_scales(self, group: Group) -> bool:
        return self.scheme.grouped or not any(target.experts for target in group.targets)

    def _prove(
        self,
        prefix: str,
        groups: list[Group],
        targets: Sequence[Target],
        observed: Observed,
        run: Run,
        before: Tensor,
    ) -> dict[Group, Fold]:
        """A proven place for the scales of each group that has one."""
        wanting = [group for group in groups if self._wants_scales(group)]
        ways: dict[Group, list[tuple[tuple, Fold]]] = {}
        for group in wanting:
            keyed = [(self._key(prefix, fold), fold) for fold in self._ways(group, targets, observed)]
            keyed = [(key, fold) for key, fold in keyed if key not in self._refuted]
            ways[group] = sorted(keyed, key=lambda way: way[0] not in self._proven)
        found: dict[Group, Fold] = {}
        first = {group: found_ways.pop(0) for group, found_ways in ways.items() if found_ways}
        held = {id(fold) for fold in prove([fold for _, fold in first.values()], run, before)}
        for group, (key, fold) in first.items():
            self._remember(key, id(fold) in held)
            if id(fold) in held:
                found[group] = fold
        for group in wanting:
            while group not in found and ways[group]:
                key, fold = ways[group].pop(0)
                if prove([fold], run, before):
                    found[group] = fold
                self._remember(key, group in found)
        return found

    def _remember(self, key: tuple, holds: bool) -> None:
        (self._proven if holds else self._refuted).add(key)

    @staticmethod
    def _key(prefix: str, fold: Fold) -> tuple:
        readers = tuple(t.name.removeprefix(prefix) for t in fold.targets)
        if isinstance(fold.source, Norm):
            return readers, fold.source.offset
        source = fold.source
        return readers, source.target.name.removeprefix(prefix), source.meaning

    def _ways(self, group: Group, targets: Sequence[Target], observed: Observed) -> Iterator[Fold]:
        k = group.targets[0].weight.shape[-1]
        if group.x is None:  # an inner weight of experts: made of the rows of the weights before it
            owner = group.targets[0].owner
            for source in targets:
                if source.owner is owner and source is not group.targets[0]:
                    for form in row_forms(source, k, ()):
                        yield Fold(form, group.targets, ())
            return
        others = []
        for module in observed.readers(group.x):
            owned = {t.leaf for t in group.targets if t.owner is module}
            for leaf, parameter in module._parameters.items():
                if owned or parameter is None or parameter.dim() < 2:
                    continue
                if parameter.dim() > 2 or parameter.shape[-1] != k:
                    return
                others.append(Reader(module, leaf))
        writer = observed.writer(group.x)
        if writer is not None:
            for norm in norm_forms(writer, group.x):
                yield Fold(norm, group.targets, tuple(others))
        start = min(observed.order.index(t.owner) for t in group.targets)
        earlier = [t for t in targets if t.owner in observed.order[:start] and not t.experts]
        for source in sorted(earlier, key=lambda t: -observed.order.index(t.owner)):
            for form in row_forms(source, k, self.head_dims):
                yield Fold(form, group.targets, tuple(others))

    # ------------------------------------------------------------------ numbers

    @staticmethod
    def _weights(group: Group, observed: Observed) -> dict[Target, Weight]:
        rows = None if group.x is None else sample_rows(group.x)
        weights = {}
        for target in group.targets:
            how = target.scheme, target.parameter.dtype
            if target.experts:
                weights[target] = Weight(*how, target.weight, None, observed.experts.get(target.name))
            else:
                weights[target] = Weight(*how, target.weight.float(), rows, None)
        return weights

    def _choose_symmetry(self, group: Group, weights: dict[Target, Weight]) -> None:
        """The first group met decides for all of its kind, by the error of its outputs."""
        for experts in (False, True):
            chosen = [w for t, w in weights.items() if t.experts == experts]
            if not self.scheme.grouped or not chosen or self._symmetric[experts] is not None:
                continue
            errors = []
            for symmetric in (True, False):
                for weight in chosen:
                    weight.symmetric = symmetric
                errors.append(sum(search_clip(w, None)[1] for w in chosen))
            self._symmetric[experts] = errors[0] <= errors[1]

    def _scale(
        self, group: Group, fold: Fold, weights: dict[Target, Weight], roundings: dict[Target, Rounding]
    ) -> None:
        """Find the scales of a group and apply them wherever nothing is rounded later."""
        x = sample_rows(group.x) if group.x is not None else group.inputs
        assert x is not None

        def constrain(s: Tensor) -> Tensor:
            s = fold.source.shared(s) if isinstance(fold.source, Rows) else s
            return s.log2().round().exp2() if fold.powers_of_two else s

        searched = [w for w in weights.values() if w.rows is not None or w.inputs is not None]
        s = search_scale(searched, input_sizes(x, self.scheme), constrain)
        if s is None:
            for target in group.targets:
                roundings[target].note = "channels not scaled: no scales were better"
            return
        if isinstance(fold.source, Norm):
            s = fold.source.set(s)
        else:
            roundings[fold.source.target].rows = fold.source.factors(s)
            if fold.source.bias is not None:
                factors = fold.source.factors(s)
                fold.source.bias.data.mul_(factors.to(fold.source.bias.dtype))
        fold.apply_to_readers(s, targets=False)
        for target in group.targets:
            roundings[target].columns = s
            roundings[target].note = f"scales of its channels in {fold.where}"

    def _plain_error(self, target: Target, symmetric: bool) -> float:
        weight = target.weight[:1] if target.experts else target.weight
        values = weight.float()
        found = round_trip(values, target.scheme, target.parameter.dtype, symmetric)
        return float((found - values).square().sum() / values.square().sum().clamp(min=1e-30))
