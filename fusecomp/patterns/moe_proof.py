"""Proof that a part of a graph computes mixed experts: it is run in fp64 and compared with the canonical op.

Trials differ in the number of tokens, in how tokens spread over experts (evenly, all on the same ones: capacity shows)
and in magnitude (clamps show). Wide experts are proven narrow: `concrete.run` checks that every shape follows.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, N up rows (F, or 2F gated).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from fusecomp._compat import real_tensors
from fusecomp.ops.experts import ACTIVATIONS, experts_reference, gpt_oss
from fusecomp.patterns.base import fake_value
from fusecomp.patterns.concrete import NotConcrete, Sizes, run
from fusecomp.patterns.dataflow import Cut, is_size
from fusecomp.patterns.expert_weights import Layout, layouts
from fusecomp.patterns.functional import size_key

AGREEMENT = 1e-9
EVEN, RANDOM, SAME = "even", "random", "same"
TOKENS, MANY_TOKENS, MAX_TOKENS = 6, 48, 4096
WIDE, WIDEST = 1 << 20, 88  # weights of more elements are proven with sizes above the second made narrow
NARROW_HIDDEN, NARROW_INNER = 22, 13
MAX_NUMBERS = 8


@dataclass(frozen=True)
class RoutedPart:
    """A part of a graph that may compute mixed experts.

    Attributes:
        cut: computes the mixture [.., C] from the nodes below.
        x: hidden states [.., C].
        index: chosen experts [.., K], or [..] for one a token.
        weights: their weights, as `index`; or [.., E], zero away from the chosen experts, when `dense`.
        dense: whether they are.
        distinct: whether the experts of one token are known to differ.
        top_k: K.
        up, down: expert weights, three-dimensional.
        up_bias, down_bias: [E, N] and [E, C], with or without a dimension of size 1.
        unread: other leaves, of which only the shape matters.
    """

    cut: Cut
    x: Node
    index: Node
    weights: Node
    dense: bool
    distinct: bool
    top_k: int
    up: Node
    down: Node
    up_bias: Node | None
    down_bias: Node | None
    unread: tuple[Node, ...]

    @property
    def out(self) -> Node:
        return self.cut.members[-1]

    @property
    def experts(self) -> int:
        return fake_value(self.up).shape[0]


@dataclass(frozen=True)
class ExpertsForm:
    """What a proven part computes.

    Attributes:
        act, gated, interleaved, transposed: as the canonical op takes them.
        scales_input: weights multiply the experts' input instead of their output.
    """

    act: str
    gated: bool
    interleaved: bool
    transposed: bool
    scales_input: bool


@dataclass(frozen=True)
class Trial:
    """Values for one evaluation.

    Attributes:
        label: completes "differs from silu experts ...".
        tokens: how many.
        spread: how they choose experts: evenly, at random, or all the same.
        scale: magnitude of hidden states.
    """

    label: str
    tokens: int
    spread: str = RANDOM
    scale: float = 1.0


def prove(part: RoutedPart) -> ExpertsForm | tuple[int, str]:
    """What `part` computes; or how many trials the likeliest form passes, and why it is not the canonical op."""
    hidden = fake_value(part.x).shape[-1]
    readings = layouts(fake_value(part.up).shape, fake_value(part.down).shape, hidden)
    best = (0, "what it computes is no mixture of experts in the vocabulary")
    with real_tensors(), torch.no_grad():
        try:
            outcomes = [_Outcome(part, trial) for trial in _trials(part)]
        except NotConcrete as error:
            return 0, str(error)
        for layout in readings:
            for form in _forms(part, layout):
                agreed = next((i for i, o in enumerate(outcomes) if not o.agrees(layout, form)), len(outcomes))
                if agreed < len(outcomes):
                    best = max(best, (agreed, f"differs from {form.act} experts {outcomes[agreed].trial.label}"))
                elif layout.transposed[0] != layout.transposed[1]:
                    return agreed, "one of its weights is stored [experts, in, out], the other [experts, out, in]"
                elif form.scales_input and part.top_k > 1:
                    return agreed, "weights multiply what experts read, for more than one expert a token"
                else:
                    return form
    return best


def _forms(part: RoutedPart, layout: Layout) -> Iterator[ExpertsForm]:
    gated = layout.rows == 2 * layout.inner
    numbers = [n for n in constants(part.cut) if 0 < n < inf][:MAX_NUMBERS]
    acts = [*ACTIVATIONS, *(gpt_oss(alpha, limit) for alpha, limit in permutations(numbers, 2) if gated)]
    for scales_input in (False, True):
        for interleaved in (False, True) if gated else (False,):
            for act in acts:
                yield ExpertsForm(act, gated, interleaved, layout.transposed[0], scales_input)


def constants(cut: Cut) -> list[float]:
    """Numbers that the cut's operations are given, each once, in order."""
    found: dict[float, None] = {}

    def note(arg: Any) -> Any:
        if isinstance(arg, int | float) and not isinstance(arg, bool):
            found[float(arg)] = None
        return arg

    for node in cut.members:
        map_aggregate((node.args, node.kwargs), note)
    return sorted(found)


def _trials(part: RoutedPart) -> list[Trial]:
    """From the mildest on, so that the first one that differs says what is special."""
    rows = prod(size_key(s) for s in fake_value(part.x).shape[:-1])
    static = rows if isinstance(rows, int) else None
    least, most = (static, static) if static is not None else _bounds(part)
    many = MANY_TOKENS
    widths = {*fake_value(part.up).shape, *fake_value(part.down).shape}
    for number in constants(part.cut):  # a capacity may be among them: there must be more tokens than that
        if number.is_integer() and number not in widths and many <= number < MAX_TOKENS:
            many = 2 * int(number)

    def tokens(count: int) -> int:
        return max(least, min(count, most))

    some, many, one = tokens(TOKENS), tokens(many), tokens(1)
    large = [20.0, 1e3, 3e4, *(3 * n for n in constants(part.cut) if 1 < n < 1e6)]
    return [
        Trial("on ordinary values", some, EVEN),
        Trial("for a single token", one, EVEN),
        Trial("where tokens choose experts unevenly", some),
        Trial("where all tokens choose the same experts", some, SAME),
        Trial("for many tokens", many, EVEN),
        Trial("where many tokens choose the same experts", many, SAME),
        *(Trial("on large values", some, scale=scale) for scale in large),
    ]


def _bounds(part: RoutedPart) -> tuple[int, int]:
    """Least and largest number of tokens along the dimension that varies, as far as the graph knows."""
    size = next(s for s in fake_value(part.x).shape if isinstance(s, torch.SymInt))
    symbol = sorted(size.node.expr.free_symbols, key=str)[0]
    known = size.node.shape_env.var_to_range.get(symbol)
    lower, upper = (int(known.lower), known.upper) if known is not None else (1, MAX_TOKENS)
    return max(1, lower), int(upper) if upper < MAX_TOKENS else MAX_TOKENS


def sizes_for(part: RoutedPart, tokens: int) -> Sizes:
    """Sizes of an evaluation at about `tokens` tokens; what is computed by large weights becomes narrow."""
    symbols: dict[Any, int] = {}
    for node in (part.x, *part.cut.leaves):
        shape = fake_value(node).shape if isinstance(fake_value(node), Tensor) else ()
        for size in shape:
            for symbol in sorted(getattr(size_key(size), "free_symbols", ()), key=str):
                symbols.setdefault(symbol, 2 if symbols else tokens)
    up, down, hidden = fake_value(part.up).shape, fake_value(part.down).shape, fake_value(part.x).shape[-1]
    if prod(up) + prod(down) <= WIDE:
        return Sizes(symbols, {})
    layout = layouts(up, down, hidden)[0]
    inner, rows = layout.inner, layout.rows
    taken = {part.experts, part.top_k, *(s for s in fake_value(part.x).shape[:-1] if isinstance(s, int))}
    narrow: dict[int, int] = {}
    if inner > WIDEST and not {inner, rows} & taken:
        narrow = {inner: NARROW_INNER, rows: NARROW_INNER * (rows // inner)}
    if hidden in narrow or 2 * hidden in narrow:  # equal sizes stay equal, or there is no telling them apart
        narrow = {wide: NARROW_HIDDEN * wide // hidden for wide in (hidden, *narrow)}
    elif hidden > WIDEST and hidden not in {inner, rows} | taken:
        narrow[hidden] = NARROW_HIDDEN
    return Sizes(symbols, narrow)


class _Outcome:
    """One trial: the values drawn, and what the part makes of them."""

    def __init__(self, part: RoutedPart, trial: Trial) -> None:
        self.part, self.trial = part, trial
        sizes = sizes_for(part, trial.tokens)
        self._random = torch.Generator().manual_seed(len(trial.label))
        shapes = {node: sizes.shape(fake_value(node)) for node in _tensors(part)}
        self.values = {node: self._normal(shape) for node, shape in shapes.items()}
        for node in (part.up, part.down):
            self.values[node] /= max(shapes[node][1:]) ** 0.5
        self.values[part.x] *= trial.scale
        rows = prod(shapes[part.x][:-1])
        index = self._choices(rows)
        weights = self._normal(index.shape)
        self.index, self.weights = index, weights
        if part.dense:
            weights = torch.zeros(rows, part.experts, dtype=torch.float64).scatter(1, index, weights)
        self.values[part.weights] = weights.reshape(shapes[part.weights])
        self.values[part.index] = index.to(fake_value(part.index).dtype).reshape(sizes.shape(fake_value(part.index)))
        given: dict[Node, Any] = dict(self.values)
        given |= {node: torch.full_like(self.values[node], torch.nan) for node in part.unread}
        given |= {leaf: sizes.value(fake_value(leaf)) for leaf in part.cut.leaves if is_size(leaf)}
        self.made = run(part.cut.members, given, sizes).reshape(rows, -1)

    def _normal(self, shape: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=self._random, dtype=torch.float64)

    def _choices(self, rows: int) -> Tensor:
        """Experts of each token [rows, K]."""
        experts, k = self.part.experts, self.part.top_k
        if self.trial.spread == SAME:
            return torch.arange(experts - k, experts).expand(rows, k).contiguous()
        if self.trial.spread == EVEN:
            return (torch.arange(rows * k) % experts).view(rows, k)
        if self.part.distinct:
            return torch.rand(rows, experts, generator=self._random).argsort(dim=1)[:, :k].contiguous()
        return torch.randint(experts, (rows, k), generator=self._random)

    def agrees(self, layout: Layout, form: ExpertsForm) -> bool:
        """Whether the canonical op makes the same of the values."""
        part, values = self.part, self.values
        x = values[part.x].reshape(len(self.index), -1)
        up, down = (
            weight if is_in_first == layout.transposed[0] else weight.transpose(1, 2)
            for weight, is_in_first in zip((values[part.up], values[part.down]), layout.transposed, strict=True)
        )
        biases = [None if b is None else values[b].reshape(part.experts, -1) for b in (part.up_bias, part.down_bias)]
        weights, index = self.weights, self.index
        if form.scales_input:
            x = (x[:, None] * weights[..., None]).flatten(0, 1)
            index, weights = index.reshape(-1, 1), torch.ones(index.numel(), 1, dtype=torch.float64)
        flags = (form.act, form.gated, form.interleaved, form.transposed)
        wanted = experts_reference(x, index, weights, up, biases[0], down, biases[1], *flags)
        wanted = wanted.view(len(self.index), -1, wanted.shape[1]).sum(1)
        return bool(((self.made - wanted).abs() <= AGREEMENT * wanted.abs().max()).all())


def _tensors(part: RoutedPart) -> list[Node]:
    given = (part.x, part.weights, part.up, part.down, part.up_bias, part.down_bias, *part.unread)
    return [node for node in given if node is not None]


def vanishes(part: RoutedPart, made: Cut, index: Node) -> bool:
    """Whether the dense weights of `part`, computed by `made`, are zero away from `index`, whose experts differ."""
    with real_tensors(), torch.no_grad():
        for seed, scale in enumerate((1.0, 0.01, 30.0)):
            random = torch.Generator().manual_seed(seed)
            sizes = sizes_for(part, TOKENS)
            try:
                given: dict[Node, Any] = {leaf: sizes.value(fake_value(leaf)) for leaf in made.leaves if is_size(leaf)}
                for leaf in made.leaves:
                    if leaf not in given:
                        shape = sizes.shape(fake_value(leaf))
                        given[leaf] = scale * torch.randn(shape, generator=random, dtype=torch.float64)
                until = made.members.index(index) + 1
                chosen = run(made.members[:until], given, sizes).reshape(-1, part.top_k).long()
                dense = run(made.members, given, sizes).reshape(-1, part.experts)
            except NotConcrete:
                return False
            repeated = chosen.sort(dim=1).values.diff(dim=1) == 0
            if bool(repeated.any()) or bool((dense.scatter(1, chosen, 0.0) != 0).any()):
                return False
    return True
