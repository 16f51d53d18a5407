"""Traces a prefix of a deep model's layers, and makes the plan of all of them from it.

Tracing takes time per layer, though most layers are the same code on other weights. A layer may stand for another when
everything a trace could tell them apart by is equal, and what is left is checked:

- class and attributes of every module in it, layouts of its tensors, its proven mask, and its element of every list in
  the configuration that has one element a layer, are equal; only `layer_idx` differs (`outline`);
- the trace has not read any `layer_idx`: Dynamo's guards say what it read (`reads_layer_index`);
- every neighbourhood of two layers was traced at least twice, at different depths, compiled to the same piece, and took
  its arguments from the same places, relative to its depth (`extend`);
- the logits of the whole plan agree with those the model itself computed in the probe (`CompiledStep.confirm`).

Whatever fails, all layers are traced, and the report says why.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

from torch import nn
from torch.fx import Graph

from fusecomp.backend import count_by_place, total_cost
from fusecomp.ops import Cost
from fusecomp.patterns.base import module_path
from fusecomp.report import FusionReport, Match, NearMiss
from fusecomp.runtime.program import BUFFER, CALL, INPUT, ITEM, KV, MERGED, PARAMETER, SIZE, Plan, Ref, Unplannable

# Fewer layers than this are not worth it.
FEWEST_LAYERS = 6
PREVIOUS, THIS = "\0previous", "\0this"  # stand for the two layers that a piece lies between
Place = TypeVar("Place", Match, NearMiss)


@dataclass(frozen=True)
class Outline:
    """A model whose attention calls are, one by one, in the children of one `ModuleList`.

    Attributes:
        path: name of that list in the model.
        kinds: per layer, what a trace could tell it apart by; equal for layers that may stand for each other.
        prefix: layers to trace.
    """

    path: str
    kinds: list[str]
    prefix: int

    def stand_in(self, layer: int) -> int:
        """The traced layer whose place in the graph is like that of `layer`: last for last, inner for inner."""
        if layer == len(self.kinds) - 1:
            return self.prefix - 1
        return max(i for i in range(self.prefix - 1) if self.kinds[i] == self.kinds[layer])


def outline(model: nn.Module, parts: Mapping[str, Any]) -> Outline | str:
    """The outline of a model from its identity, or why it has none; empty when it has few layers."""
    calls = [call[0] for call in parts["probe"]["calls"]]
    depth = len(calls)
    if depth < FEWEST_LAYERS:
        return ""
    if calls != list(range(depth)):
        return "its attention calls are not one a layer, in order"
    path = next((n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _holds(m, depth)), None)
    if path is None:
        return "its layers are not the elements of one list"
    kinds = [json.dumps(_layer(path, i, depth, parts), sort_keys=True) for i in range(depth)]
    prefix = next((k for k in range(4, depth * 3 // 4 + 1) if _suffices(kinds, k)), None)
    return "its layers do not repeat" if prefix is None else Outline(path, kinds, prefix)


def _holds(layers: nn.ModuleList, depth: int) -> bool:
    """Whether element i holds exactly one module that says it is layer i."""
    own = [{getattr(m, "layer_idx", None) for m in layer.modules()} - {None} for layer in layers]
    return own == [{i} for i in range(depth)]


def _layer(path: str, layer: int, depth: int, parts: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{path}.{layer}"

    def own(named: Mapping[str, Any]) -> dict[str, Any]:
        """What belongs to the layer, by the name it has inside it."""
        return {name.removeprefix(prefix): v for name, v in named.items() if f"{name}.".startswith(f"{prefix}.")}

    modules = {n: {k: v for k, v in m.items() if k != "layer_idx"} for n, m in own(parts["modules"]).items()}
    tensors = {n: [*t[:-1], t[-1].removeprefix(prefix)] for n, t in own(parts["tensors"]).items()}
    probe = parts["probe"]
    return {
        "modules": modules,
        "tensors": tensors,
        "mask": probe["masks"].get(str(layer)),
        "call": probe["calls"][layer][1:],
        "config": list(_elements(parts["model config"], layer, depth)),
    }


def _elements(config: Any, layer: int, depth: int) -> Iterable[Any]:
    """Element `layer` of every list of `depth` elements, as `identity` describes lists."""
    if isinstance(config, dict):
        for value in config.values():
            yield from _elements(value, layer, depth)
    elif isinstance(config, list):
        if len(config) == depth + 1 and config[0] in ("list", "tuple"):
            yield config[layer + 1]
        else:
            for value in config:
                yield from _elements(value, layer, depth)


def _suffices(kinds: Sequence[str], prefix: int) -> bool:
    """Whether the first `prefix` layers show every neighbourhood twice, and end as all layers do."""
    seen, needed = Counter(pairwise(kinds[1:prefix])), set(pairwise(kinds[prefix - 1 :]))
    return kinds[prefix - 1] == kinds[-1] and all(seen[pair] >= 2 for pair in needed)


def shortened(model: nn.Module, path: str, prefix: int) -> nn.Module:
    """A model that shares everything with `model`, but whose list `path` ends after `prefix` elements."""
    root = _shallow(model)
    module = root
    for name in path.split("."):
        module._modules[name] = _shallow(module._modules[name])  # type: ignore[arg-type]
        module = module._modules[name]  # type: ignore[assignment]
    module._modules = dict(list(module._modules.items())[:prefix])
    return root


def _shallow(module: nn.Module) -> nn.Module:
    # `copy.copy` would run a class's own way of copying, which may build anything.
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def reads_layer_index(read: Iterable[str]) -> bool:
    """Whether a trace has read which layer it is in."""
    return any(re.search(r"\blayer_idx\b", name) for name in read)


@dataclass(frozen=True)
class _Piece:
    """One call of a plan: arguments are ("input", ref), ("output", number of a piece, item) or ("is", constant)."""

    kind: str
    arguments: tuple[tuple, ...]


def extend(plan: Plan, whole: Outline) -> Plan:
    """The plan of all layers from that of the first `whole.prefix`.

    Raises:
        Unplannable: pieces that should be alike are not.
    """
    pieces, (last, item) = _read(plan)
    kinds, prefix, depth = whole.kinds, whole.prefix, len(whole.kinds)
    if len(pieces) != prefix + 1 or last != prefix:
        raise Unplannable(f"{prefix} layers gave {len(pieces)} pieces")
    relative = [_relative(piece, i, whole.path) if i >= 2 else () for i, piece in enumerate(pieces)]
    compiled = [piece.kind for piece in pieces[:-1]]
    for i in range(prefix, depth):
        pair = (kinds[i - 1], kinds[i])
        shown = [j for j in range(2, prefix) if (kinds[j - 1], kinds[j]) == pair]
        alike = {(compiled[j], relative[j]) for j in shown}
        if len(alike) != 1:
            raise Unplannable("equal layers were compiled differently")
        if not any(compiled[j - 1] == compiled[i - 1] for j in shown):
            raise Unplannable("equal layers follow different ones")
        compiled.append(compiled[shown[-1]])
        template = _Piece(compiled[-1], relative[shown[-1]])
        if i == prefix:
            tail = pieces.pop()
        pieces.append(_absolute(template, i, whole.path))
    if compiled[prefix - 1] != compiled[depth - 1]:
        raise Unplannable("the last layers follow different ones")
    pieces.append(_absolute(_Piece(tail.kind, relative[prefix]), depth, whole.path))
    return _write(pieces, (depth, item))


def _relative(piece: _Piece, number: int, path: str) -> tuple[tuple, ...]:
    """The arguments of the piece between layers `number - 1` and `number`, with those layers' names replaced."""
    names = {number - 1: PREVIOUS, number: THIS}

    def argument(kind: str, *where: Any) -> tuple:
        if kind == "input":
            return kind, json.dumps(_renamed(where[0], path, names))
        if kind == "output" and where[0] not in (0, number - 1):
            raise Unplannable("a layer takes what an earlier one computed")
        return (kind, PREVIOUS, where[1]) if kind == "output" and where[0] == number - 1 else (kind, *where)

    return tuple(argument(*a) for a in piece.arguments)


def _absolute(piece: _Piece, number: int, path: str) -> _Piece:
    names = {PREVIOUS: number - 1, THIS: number}

    def argument(kind: str, *where: Any) -> tuple:
        if kind == "input":
            return kind, _renamed(json.loads(where[0]), path, names)
        return (kind, number - 1, where[1]) if kind == "output" and where[0] == PREVIOUS else (kind, *where)

    return _Piece(piece.kind, tuple(argument(*a) for a in piece.arguments))


def _renamed(ref: Ref, path: str, names: Mapping[Any, Any]) -> Ref:
    """`ref` with layers replaced by `names`; one that has no name there is an error."""
    kind, *where = ref
    if kind == KV:
        if where[0] not in names:
            raise Unplannable("a layer takes another layer's KV tensor")
        return [kind, names[where[0]]]
    if kind == SIZE:
        return [kind, _renamed(where[0], path, names), where[1]]
    if kind == MERGED:
        return [kind, [[n if n is None else _renamed_name(n, path, names), rows] for n, rows in where[0]]]
    return [kind, _renamed_name(where[0], path, names)] if kind in (PARAMETER, BUFFER) else ref


def _renamed_name(name: str, path: str, names: Mapping[Any, Any]) -> str:
    found = re.fullmatch(rf"{re.escape(path)}\.([^.]+)\.(.*)", name)
    if found is None:
        return name
    layer: Any = int(found[1]) if found[1].isdigit() else found[1]
    if layer not in names:
        raise Unplannable("a layer takes another layer's weights")
    return f"{path}.{names[layer]}.{found[2]}"


def _read(plan: Plan) -> tuple[list[_Piece], tuple[int, int]]:
    """The calls of a plan, and (piece, item) of the logits."""
    pieces: list[_Piece] = []
    values: list[Any] = []
    for op, *facts in plan.instructions:
        if op == INPUT:
            values.append(("input", facts[0]))
        elif op == CALL:
            arguments = [values[v] if how == "at" else ("is", v) for how, v in facts[1]]
            values.append(("call", len(pieces)))
            pieces.append(_Piece(facts[0], tuple(arguments)))
        else:
            values.append(("output", values[facts[0]][1], facts[1]))
    return pieces, values[plan.logits][1:]


def _write(pieces: Sequence[_Piece], logits: tuple[int, int]) -> Plan:
    """The plan that makes these calls."""
    instructions: list[list[Any]] = []
    places: dict[str, int] = {}

    def place(key: Any, instruction: list[Any]) -> int:
        name = json.dumps(key)
        if name not in places:
            places[name] = len(instructions)
            instructions.append(instruction)
        return places[name]

    def argument(kind: str, *where: Any) -> list[Any]:
        if kind == "input":
            if where[0][0] == SIZE:
                place(where[0][1], [INPUT, where[0][1]])
            return ["at", place(where[0], [INPUT, where[0]])]
        if kind == "output":
            return ["at", place(["output", *where], [ITEM, places[json.dumps(["call", where[0]])], where[1]])]
        return ["is", where[0]]

    for number, piece in enumerate(pieces):
        arguments = [argument(*a) for a in piece.arguments]
        place(["call", number], [CALL, piece.kind, arguments])
    return Plan(instructions, argument("output", *logits)[1])


def extend_report(report: FusionReport, whole: Outline, before: Mapping[str, Counter[str]], after: Graph) -> None:
    """Count and list what was done to the traced layers for those they stand for.

    Args:
        before: ops by module before the passes.
        after: the graph of the traced layers after them.
    """
    depth, last = len(whole.kinds), whole.prefix - 1
    added = {layer: whole.stand_in(layer) for layer in range(last, depth)}
    report.layers = depth
    report.matches = _extended(report.matches, whole.path, last, added)
    report.near_misses = _extended(report.near_misses, whole.path, last, added)
    more = [whole.stand_in(layer) for layer in range(last, depth - 1)]  # of an inner layer each
    report.ops_before = _counted(report.ops_before, before, whole.path, more)
    report.ops_after = _counted(report.ops_after, count_by_place(after), whole.path, more)
    cost = total_cost(after.nodes)
    for stand_in, times in Counter(more).items():
        own = total_cost(n for n in after.nodes if _inside(module_path(n), whole.path, stand_in))
        cost = cost + Cost(times * own.bytes, times * own.flops)
    report.cost_bytes, report.cost_flops = str(cost.bytes), str(cost.flops)


def _counted(ops: dict[str, int], places: Mapping[str, Counter[str]], path: str, more: Sequence[int]) -> dict[str, int]:
    """`ops`, and those of each layer in `more` once more."""
    counts = Counter(ops)
    for layer in more:
        for place, own in places.items():
            if _inside(place, path, layer):
                counts.update(own)
    return dict(sorted(counts.items()))


def _inside(place: str, path: str, layer: int) -> re.Match[str] | None:
    return re.search(rf"(?:^|\.){re.escape(path)}\.({layer})(?:\.|$)", place)


def _extended(places: Sequence[Place], path: str, last: int, added: Mapping[int, int]) -> list[Place]:
    """`places` up to the last traced layer, and those that traced layers stand for, pattern by pattern."""
    extended = []
    for pattern in dict.fromkeys(p.pattern for p in places):
        own = [p for p in places if p.pattern == pattern]
        extended += [p for p in own if not _inside(p.where, path, last)]
        for layer, stand_in in added.items():
            for p in own:
                if found := _inside(p.where, path, stand_in):
                    where = f"{p.where[: found.start(1)]}{layer}{p.where[found.end(1) :]}"
                    extended.append(replace(p, where=where))
    return extended
