"""A step program: the compiled pieces of a captured step and the plan that calls them, apart from any trace.

`plan_of` reads the plan off a compiled capture: inputs by name (a step's tensors, KV tensors by index, parameters and
buffers of the model), calls of pieces, their results. `StepProgram` runs a plan on a model without Dynamo. A plan is
JSON; what it cannot express (a tensor constant, several outputs) raises `Unplannable`, and the capture is not stored.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fusecomp.lowerings.launch import compiling_ahead
from fusecomp.patterns.base import fake_value
from fusecomp.patterns.linear import stack_parameters
from fusecomp.pieces import CompiledPieces
from fusecomp.runtime.identity import NEUTRAL

STEP, KV, PARAMETER, BUFFER, SIZE, MERGED = "step", "kv", "parameter", "buffer", "size", "merged"
STEP_INPUTS = ("tokens", "logit_indices", "cu_q_lens", "seq_lens", "block_tables", "host_meta")
INPUT, CALL, ITEM = "input", "call", "item"
Ref = list[Any]  # [kind, name or index]; [SIZE, ref of the tensor, dim]; [MERGED, [[parameter or None, rows], ...]]


# Place, piece or None, its arguments or (place, index), and the places that nothing reads afterwards.
Instruction = tuple[int, Callable | None, Any, list[int]]


class Unplannable(Exception):
    """The capture does something that a plan cannot express; the message says what."""


@dataclass(frozen=True)
class Plan:
    """Instructions in order, each with the number of its place, and the number of the one that holds the logits.

    Instructions: ["input", ref], ["call", kind of piece, arguments], ["item", number, index]. An argument is
    ["at", number] or ["is", constant].
    """

    instructions: list[list[Any]]
    logits: int

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        return {"instructions": self.instructions, "logits": self.logits}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Plan:
        """From the store."""
        return cls(value["instructions"], value["logits"])


def references(model: nn.Module, step: Sequence[Tensor], kv_caches: Sequence[Tensor]) -> dict[int, Ref]:
    """Identity of every tensor that a step's graph may take -> what it is."""
    refs: dict[int, Ref] = {}
    for name, tensor in zip(STEP_INPUTS, step, strict=True):
        refs[id(tensor)] = [STEP, name]
    for i, tensor in enumerate(kv_caches):
        refs[id(tensor)] = [KV, i]
    for name, tensor in model.named_parameters():
        refs[id(tensor)] = [PARAMETER, name]
    for name, tensor in model.named_buffers():
        refs[id(tensor)] = [BUFFER, name]
    return refs


def merged_reference(merged: Tensor, model: nn.Module) -> Ref:
    """What a stacked weight is made of: (parameter or None for zeros, rows) in order.

    Raises:
        Unplannable: its memory holds something else.
    """
    memory, row = merged.untyped_storage().data_ptr(), merged.stride(0)
    inside = [(p.storage_offset(), p.shape[0], name) for name, p in model.named_parameters() if _lies_in(p, memory)]
    parts: list[list[Any]] = []
    at, end = merged.storage_offset(), merged.storage_offset() + merged.numel()
    for offset, rows, name in sorted(inside):
        if at <= offset < end:
            if gap := offset - at:
                parts.append([None, gap // row])
            parts.append([name, rows])
            at = offset + rows * row
    if at > end or not any(name for name, _ in parts):
        raise Unplannable("a stacked weight is not made of the model's parameters")
    return [MERGED, [*parts, *([[None, (end - at) // row]] if at < end else [])]]


def _lies_in(parameter: Tensor, memory: int) -> bool:
    return parameter.untyped_storage().data_ptr() == memory


def merge_parameters(parts: Sequence[Sequence[Any]], parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """The stacked weight that `merged_reference` describes; the parameters become views of it."""
    given = [None if name is None else parameters[name] for name, _ in parts]
    like = next(p for p in given if p is not None)
    return stack_parameters(given, [rows for _, rows in parts], like)


def plan_of(pieces: CompiledPieces, graph: Graph, inputs: Sequence[Any], refs: Mapping[int, Ref]) -> Plan:
    """The plan of a compiled capture.

    Args:
        graph: the captured graph before it was cut; its placeholders know their sizes.
        inputs: the values of its placeholders.
        refs: what `references` found, and whatever else the passes made inputs of.

    Raises:
        Unplannable: the graph has an input, a call or an output that cannot be expressed.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(inputs):
        raise Unplannable(f"the graph has {len(placeholders)} inputs and was given {len(inputs)}")
    given = zip(placeholders, inputs, strict=True)
    by_name = {node.name: _input_ref(node, value, refs) for node, value in given if isinstance(value, Tensor)}
    for node in placeholders:
        if node.name not in by_name:
            by_name[node.name] = _size_ref(node, placeholders, by_name)
    number: dict[Node, int] = {}
    instructions: list[list[Any]] = []
    instruction: list[Any]
    for node in pieces.whole.graph.nodes:
        if node.op == "output":
            results = node.args[0]
            if not (isinstance(results, tuple | list) and len(results) == 1 and isinstance(results[0], Node)):
                raise Unplannable("the graph has outputs besides the logits")
            return Plan(instructions, number[results[0]])
        if node.op == "placeholder":
            instruction = [INPUT, by_name[node.name]]
        elif node.op == "call_module" and node.target in pieces.kinds and not node.kwargs:
            instruction = [CALL, pieces.kinds[node.target], [_argument(a, number) for a in node.args]]
        elif node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int):
            instruction = [ITEM, number[node.args[0]], node.args[1]]
        else:
            what = "a tensor constant" if node.op == "get_attr" else f"{node.op} {node.target}"
            raise Unplannable(f"the graph holds {what} outside its pieces")
        number[node] = len(instructions)
        instructions.append(instruction)
    raise Unplannable("the graph has no output")


def _input_ref(node: Node, value: Tensor, refs: Mapping[int, Ref]) -> Ref:
    if id(value) not in refs:
        raise Unplannable(f"input {node.name} is a tensor that is neither a parameter nor a buffer of the model")
    return refs[id(value)]


def _size_ref(node: Node, placeholders: list[Node], by_name: Mapping[str, Ref]) -> Ref:
    symbol = fake_value(node)
    if isinstance(symbol, torch.SymInt):
        for other in placeholders:
            fake = fake_value(other)
            for dim, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol.node.expr:
                    return [SIZE, by_name[other.name], dim]
    raise Unplannable(f"input {node.name} is neither a tensor nor one of their sizes")


def _argument(value: Any, number: Mapping[Node, int]) -> list[Any]:
    if isinstance(value, Node):
        return ["at", number[value]]
    if value is None or isinstance(value, bool | int | float | str):
        return ["is", value]
    raise Unplannable(f"a piece is called with a {type(value).__name__}")


class StepProgram:
    """Runs a plan on a model: `program(step tensors, kv_caches) -> logits`.

    Under `compile_ahead` only the first piece of each kind is called, and the others share its results: equal pieces
    launch equal kernels. Parameters and buffers are looked up by name once; `changed` says when the model has been
    given others since.

    Args:
        pieces: kind -> callable.

    Raises:
        KeyError: the plan names what the model or `pieces` lack.
    """

    def __init__(self, plan: Plan, pieces: Mapping[str, Callable], model: nn.Module) -> None:
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self._fixed: list[tuple[int, Tensor]] = []
        self._given: list[tuple[int, bool, int]] = []  # place, whether a KV tensor, which
        self._sizes: list[tuple[int, int, int]] = []  # place, place of the tensor, dim
        inputs = [(i, facts[0]) for i, (op, *facts) in enumerate(plan.instructions) if op == INPUT]
        places = {str(ref): i for i, ref in inputs}
        for i, (kind, *name) in inputs:
            if kind == STEP:
                self._given.append((i, False, STEP_INPUTS.index(name[0])))
            elif kind == KV:
                self._given.append((i, True, name[0]))
            elif kind == SIZE:
                self._sizes.append((i, places[str(name[0])], name[1]))
            elif kind == MERGED:
                self._fixed.append((i, merge_parameters(name[0], parameters)))
            else:
                self._fixed.append((i, (parameters if kind == PARAMETER else buffers)[name[0]]))
        self._instructions = list(_with_last_uses(plan, pieces))
        self._length, self._logits = len(plan.instructions), plan.logits
        self._watched = list(_watch(model))
        self._layouts = [(name, t, t.dtype, t.device, t.shape) for name, t in (*parameters.items(), *buffers.items())]

    def __call__(self, step: Sequence[Tensor], kv_caches: Sequence[Tensor]) -> Tensor:
        values: list[Any] = [None] * self._length
        ahead, met = compiling_ahead(), dict[int, Any]()
        for i, tensor in self._fixed:
            values[i] = tensor
        for i, is_kv, which in self._given:
            values[i] = (kv_caches if is_kv else step)[which]
        for i, of, dim in self._sizes:
            values[i] = values[of].shape[dim]
        for i, piece, facts, last_uses in self._instructions:
            if piece is None:
                values[i] = values[facts[0]][facts[1]]
            elif id(piece) in met:
                values[i] = met[id(piece)]
            else:
                values[i] = piece(*[values[value] if how == "at" else value for how, value in facts])
                if ahead:
                    met[id(piece)] = values[i]
            for dead in last_uses:
                values[dead] = None
        return values[self._logits]

    def changed(self) -> str:
        """The first attribute, parameter or buffer of the model that is not what it was; empty when none is."""
        for place, name, value, where in self._watched:
            if place.get(name) is not value and not _equal(place.get(name), value):
                return f"{where}{name}"
        for name, tensor, *layout in self._layouts:
            if [tensor.dtype, tensor.device, tensor.shape] != layout:
                return name
        return ""


def _with_last_uses(plan: Plan, pieces: Mapping[str, Callable]) -> Iterable[Instruction]:
    """The calls and items of a plan, in order."""
    last: dict[int, int] = {}
    for i, (op, *facts) in enumerate(plan.instructions):
        used = [v for how, v in facts[1] if how == "at"] if op == CALL else facts[:1] if op == ITEM else []
        last.update(dict.fromkeys((i, *used), i))
    last[plan.logits] = len(plan.instructions)
    ends: dict[int, list[int]] = {}
    for value, end in last.items():
        ends.setdefault(end, []).append(value)
    for i, (op, *facts) in enumerate(plan.instructions):
        if op == CALL:
            yield i, pieces[facts[0]], [tuple(argument) for argument in facts[1]], ends.get(i, [])
        elif op == ITEM:
            yield i, None, (facts[0], facts[1]), ends.get(i, [])


def _watch(model: nn.Module) -> Iterable[tuple[dict[str, Any], str, Any, str]]:
    """(dictionary, name, value, name of its owner) of everything that belongs to the model's identity."""
    configs: dict[int, Any] = {}
    for path, module in model.named_modules():
        where = f"{path}." if path else ""
        for place in (module._parameters, module._buffers, module._modules):
            for name, value in place.items():
                yield place, name, value, where
        for name, value in vars(module).items():
            if name not in NEUTRAL:
                yield vars(module), name, value, where
            if name == "config":
                configs[id(value)] = value
    for config in configs.values():
        for name, value in vars(config).items():
            if "implementation" not in name:  # `Implementations.use` switches those
                yield vars(config), name, value, "config."


def _equal(actual: Any, expected: Any) -> bool:
    """Whether a plain value was only assigned again."""
    plain = isinstance(expected, bool | int | float | str | tuple)
    return plain and type(actual) is type(expected) and actual == expected
