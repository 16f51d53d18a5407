"""Matmul + pointwise chain -> canonical `linear`. The epilogue is generated from the graph; no case is listed.

Starting at a matmul's result (or at the two halves of one, where a gate and an up projection were merged) the region
grows over pointwise operations on values of the result's own shape. It ends where one value leaves it. What else the
region reads (a residual, a bias, a scale) must not depend on the matmul, and becomes an operand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.linear import COLUMN, FULL, ROW, SCALAR, LinearShape, Program
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.functional import CAST, FLOATS, RESHAPES, aten, is_call, token_shape

DEQUANTIZE = OPS.dequantize.default
MATMULS = (aten.mm.default, aten.addmm.default)
MAX_STEPS, MAX_OPERANDS = 48, 6

BINARY = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.gt.Scalar: "gt",
    aten.gt.Tensor: "gt",
    aten.ge.Scalar: "ge",
    aten.ge.Tensor: "ge",
    aten.lt.Scalar: "lt",
    aten.lt.Tensor: "lt",
    aten.le.Scalar: "le",
    aten.le.Tensor: "le",
    aten.where.self: "where",
}
UNARY = {
    getattr(aten, name).default: name
    for name in [  # of both aten and a program
        "neg",
        "abs",
        "exp",
        "log",
        "log1p",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "sigmoid",
        "tanh",
        "erf",
    ]
}
CLAMPS = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


@dataclass
class MatmulRegion:
    """A matmul and what follows it.

    Attributes:
        node: the matmul.
        x, weight: its operands: x [T, K], and the placeholder [G * N, K], or what is dequantized from placeholders,
            whose transpose it multiplies by.
        exit: the one value that leaves the region.
        program: what the region computes.
        operands: further inputs, in the program's order.
        reason: why the matmul itself cannot be expressed, or empty.
    """

    node: Node
    x: Node | None = None
    weight: Node | None = None
    exit: Node | None = None
    program: Program | None = None
    operands: list[Node] = field(default_factory=list)
    reason: str = ""


class LinearEpilogue(Pattern):
    """One matmul by a weight [N, K], with the longest single-output pointwise chain behind it."""

    name = "linear"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[MatmulRegion]:
        # Lazily: a rewrite changes what follows, and each region is read when its turn comes.
        return (read_region(node) for node in list(graph.nodes) if is_call(node, *MATMULS))

    def guard(self, candidate: MatmulRegion, context: PassContext) -> str | None:
        return candidate.reason or None

    def emit(self, candidate: MatmulRegion, gm: GraphModule, context: PassContext) -> str:
        program, exit_node = candidate.program, candidate.exit
        assert program is not None and exit_node is not None and candidate.x is not None
        graph, width = gm.graph, token_shape(exit_node)[1]  # type: ignore[index]
        with graph.inserting_before(exit_node):
            operands = [
                functional.as_rows(operand, width) if layout == FULL else flat(operand)
                for operand, layout in zip(candidate.operands, program.operands, strict=True)
            ]
            args = (candidate.x, candidate.weight, None, None, operands, program.to_text())
            new = functional.call(graph, OPS.linear.default, args, candidate.node)
            new = functional.reshaped(new, exit_node)
        replace_and_prune(exit_node, new)
        return program.describe()

    def operation(self, candidate: MatmulRegion) -> str:
        program, weight = candidate.program, fake_value(candidate.weight)
        assert program is not None
        if is_call(candidate.weight, DEQUANTIZE):
            return ""  # it becomes a quantized linear, which says its own
        rows, k = weight.shape
        dtype = str(weight.dtype).removeprefix("torch.")
        return str(LinearShape(rows // program.groups, k, program.groups, program.kind, dtype))

    def examples(self) -> list[Example]:
        from fusecomp.patterns.functional_examples import epilogue_examples

        return epilogue_examples()


def flat(operand: Node) -> Node:
    """A row, column or scalar operand as one dimension, inserted at the current point."""
    fake = fake_value(operand)
    if fake.dim() == 1:
        return operand
    if fake.dim() == 0:
        return functional.call(operand.graph, aten.reshape.default, (operand, [1]), operand)
    at = next((i for i, s in enumerate(fake.shape) if functional.size_key(s) != 1), 0)
    return functional.call(operand.graph, aten.reshape.default, (operand, [functional.size_node(operand, at)]), operand)


def read_region(node: Node) -> MatmulRegion:
    """What can be fused behind matmul `node`, or a region with the reason why it cannot be expressed."""
    x, transposed = node.args[-2:]
    assert isinstance(x, Node) and isinstance(transposed, Node)
    if node.kwargs:
        return MatmulRegion(node, reason=f"it is scaled: {node.kwargs}")
    turned = is_call(transposed, aten.t.default) or (
        is_call(transposed, aten.permute.default) and list(transposed.args[1]) == [1, 0]  # type: ignore[arg-type]
    )
    weight = transposed.args[0] if turned else None
    if not isinstance(weight, Node) or not (weight.op == "placeholder" or is_call(weight, DEQUANTIZE)):
        return MatmulRegion(node, reason="it does not multiply by the transpose of a weight [N, K]")
    fake_w, fake_x = fake_value(weight), fake_value(x)
    if not fake_w.is_contiguous():
        return MatmulRegion(node, reason=f"its weight {tuple(fake_w.shape)} is not contiguous")
    if fake_x.dtype != fake_w.dtype:
        return MatmulRegion(node, reason=f"activations are {fake_x.dtype}, its weight {fake_w.dtype}")
    if token_shape(node) is None:
        return MatmulRegion(node, reason=f"its output {tuple(fake_value(node).shape)} has no fixed number of features")
    grown = _Growth(node)
    if not grown.has_bias:
        return MatmulRegion(node, reason="what it adds is no bias, residual or number of a supported dtype")
    return MatmulRegion(node, x, weight, grown.exit, grown.program, grown.operands)


class _Growth:
    """Grows the region behind one matmul over the graph, keeping the largest part with a single exit."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.names: dict[Node, str] = {}
        self.members: list[Node] = []
        self.steps: list[tuple] = []
        self.layouts: list[str] = []
        self.inputs: dict[Node, str] = {}
        self.dependent = functional.descendants(node)
        self.shape = token_shape(node)
        self.groups = 1
        halves = self._halves()
        if halves:
            self.groups, self.shape = 2, token_shape(halves[0])
            self._join(node, "")
            for i, half in enumerate(halves):
                self._join(half, f"a{i}")
        else:
            self._join(node, "a0")
        self.has_bias = node.target is not aten.addmm.default or self._bias(node.args[0])
        self.exit, self.program, self.operands = self._grow()

    def _join(self, node: Node, name: str) -> None:
        self.names[node] = name
        self.members.append(node)

    def _bias(self, bias: Any) -> bool:
        """Make what an addmm adds the first step of the epilogue; False if it cannot be an operand."""
        name = self._operand(bias)
        if name is None:
            return False
        self.steps.append(("add", "a0", name))
        self.names[self.node] = "t0"
        return True

    def _halves(self) -> list[Node]:
        """The two equal slices that are all that is read of the result, if that is so."""
        if self.node.target is aten.addmm.default or self.shape is None:
            return []
        views, slices = [self.node], []
        for view in views:
            for user in view.users:
                if is_call(user, *RESHAPES) and token_shape(user) == self.shape:
                    views.append(user)
                elif is_call(user, aten.slice.Tensor):
                    slices.append(user)
                else:
                    return []
        width = self.shape[1]
        wanted = {0: (0, width // 2), 1: (width // 2, width)}
        found: dict[int, Node] = {}
        for user in slices:
            given: tuple[Any, ...] = user.args[1:]
            dim, start, end = (*given, *(0, 0, width)[len(given) :])[:3]
            if dim not in (-1, fake_value(user).dim() - 1) or given[3:] not in ((), (1,)):
                return []
            part = next((i for i, (a, b) in wanted.items() if start == a and min(end, width) == b), None)
            if part is None or part in found:
                return []
            found[part] = user
        if len(found) != 2 or width % 2:
            return []
        for view in views[1:]:
            self.members.append(view)
        return [found[0], found[1]]

    def _operand(self, node: Any) -> str | None:
        """Name of an independent tensor that broadcasts to [T, N], or None."""
        if not isinstance(node, Node) or node in self.dependent or self.shape is None:
            return None
        if node in self.inputs:
            return self.inputs[node]
        fake = fake_value(node)
        if not isinstance(fake, Tensor) or fake.dtype not in FLOATS or len(self.inputs) >= MAX_OPERANDS:
            return None
        sizes = [key for key in map(functional.size_key, fake.shape) if key != 1]
        rows, width = self.shape
        if not sizes:
            layout = SCALAR
        elif token_shape(node) == self.shape:
            layout = FULL
        elif sizes == [width] and functional.size_key(fake.shape[-1]) == width:
            layout = ROW
        elif sizes == [rows] and fake.dim() >= 2 and functional.size_key(fake.shape[-1]) == 1:
            layout = COLUMN
        else:
            return None
        self.layouts.append(layout)
        self.inputs[node] = f"i{len(self.inputs)}"
        return self.inputs[node]

    def _name(self, argument: Any) -> str | float | None:
        if isinstance(argument, bool) or argument is None:
            return None
        if isinstance(argument, int | float):
            return argument
        return self.names.get(argument) or self._operand(argument)

    def _step(self, node: Node) -> tuple | None:
        """The step that `node` is, given the names so far."""
        if node.kwargs:
            return None
        if node.target is aten.pow.Tensor_Scalar:
            base, exponent = self._name(node.args[0]), node.args[1]
            if base is None or exponent not in (2, 3, 0.5):
                return None
            if exponent == 0.5:
                return ("sqrt", base)
            if exponent == 3:
                self.steps.append(("mul", base, base))
                return ("mul", f"t{len(self.steps) - 1}", base)
            return ("mul", base, base)
        if node.target in CLAMPS:
            return self._clamp(node)
        target: Any = node.target
        function = BINARY.get(target) or UNARY.get(target)
        if target is aten.relu.default:
            name = self._name(node.args[0])
            return None if name is None else ("maximum", name, 0.0)
        # A truth value may choose, and no more: sums and products of them are other functions than those of numbers.
        numbers = node.args[1:] if function == "where" else node.args
        if function is None or any(isinstance(a, Node) and fake_value(a).dtype == torch.bool for a in numbers):
            return None
        arguments = [self._name(a) for a in node.args]
        return None if None in arguments else (function, *arguments)

    def _clamp(self, node: Node) -> tuple | None:
        """A clamp as a maximum, a minimum, or one after the other."""
        value, *bounds = (*node.args, None, None)
        low, high = (None, bounds[0]) if node.target is aten.clamp_max.default else bounds[:2]
        name = self._name(value)
        if name is None or not all(b is None or isinstance(b, int | float) for b in (low, high)):
            return None
        if low is None or high is None:
            return ("minimum", name, high) if low is None else ("maximum", name, low)
        self.steps.append(("maximum", name, low))
        return ("minimum", f"t{len(self.steps) - 1}", high)

    def _joins(self, node: Node) -> bool:
        """Add `node` to the region if it belongs there."""
        if node.op != "call_function" or node not in self.dependent or token_shape(node) != self.shape:
            return False
        source = node.args[0] if node.args else None
        if is_call(node, *RESHAPES) or (is_call(node, CAST) and node.args[1] in FLOATS):
            name = self.names.get(source)  # type: ignore[arg-type]
            if not name or fake_value(source).dtype == torch.bool:
                return False
            self._join(node, name)
            return True
        before = (len(self.steps), len(self.layouts), dict(self.inputs))
        step = self._step(node)
        if (
            step is None
            or not any(isinstance(a, str) and a[0] in "at" for a in step[1:])
            or len(self.steps) > MAX_STEPS
        ):
            del self.steps[before[0] :], self.layouts[before[1] :]
            self.inputs = before[2]
            return False
        self.steps.append(step)
        self._join(node, f"t{len(self.steps) - 1}")
        return True

    def _grow(self) -> tuple[Node, Program, list[Node]]:
        best = self._snapshot(self.members[-1] if self.groups == 1 else None)
        nodes = iter(self.node.graph.nodes)
        for node in nodes:
            if node is self.node:
                break
        for node in nodes:
            if node in self.names or not self._joins(node):
                continue
            exits = self._exits()
            if len(exits) == 1 and self._may_end_at(exits[0]):
                best = self._snapshot(exits[0])
        if best is None:  # two halves that never meet: the matmul alone
            self.groups, self.steps, self.layouts, self.inputs = 1, [], [], {}
            self.names = {self.node: "a0"}
            self.shape = token_shape(self.node)
            best = self._snapshot(self.node)
        assert best is not None
        return best

    def _exits(self) -> list[Node]:
        inside = set(self.members)
        return [node for node in self.members if any(user not in inside for user in node.users)]

    def _may_end_at(self, node: Node) -> bool:
        """An exit is a float value with a name; ending at a widening cast would only write more bytes."""
        return bool(self.names.get(node)) and fake_value(node).dtype in FLOATS and not functional.is_widening(node)

    def _snapshot(self, exit_node: Node | None) -> tuple[Node, Program, list[Node]] | None:
        if exit_node is None or self.shape is None:
            return None
        dtype = str(fake_value(exit_node).dtype).removeprefix("torch.")
        steps, used = live_steps(self.steps, self.names[exit_node])
        keep = [(node, name) for node, name in self.inputs.items() if name in used]
        rename = {name: f"i{i}" for i, (_, name) in enumerate(keep)}
        steps = tuple((f, *(rename.get(a, a) if isinstance(a, str) else a for a in args)) for f, *args in steps)
        layouts = tuple(self.layouts[int(name[1:])] for _, name in keep)
        return exit_node, Program(self.groups, layouts, steps, dtype), [node for node, _ in keep]


def live_steps(steps: list[tuple], last: str) -> tuple[tuple[tuple, ...], set[str]]:
    """The steps that `last` needs, renumbered so that it is the final one, and every name they use."""
    needed, stack = set(), [last]
    while stack:
        name = stack.pop()
        if name.startswith("t") and name not in needed:
            needed.add(name)
            stack.extend(a for a in steps[int(name[1:])][1:] if isinstance(a, str))
    order = [i for i in range(len(steps)) if f"t{i}" in needed]
    rename = {f"t{old}": f"t{new}" for new, old in enumerate(order)}
    kept = tuple((steps[i][0], *(rename.get(a, a) if isinstance(a, str) else a for a in steps[i][1:])) for i in order)
    return kept, {a for step in kept for a in step[1:] if isinstance(a, str)}
