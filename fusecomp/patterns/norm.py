"""RMSNorm and LayerNorm in front of a linear, recognised by what they compute and not by how they are written.

The subgraph between a hidden state and the linear's input is evaluated in fp64 on random values and compared with the
norms in the vocabulary. One that agrees is the norm; spelling, order of casts and 1 + w do not matter.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp._compat import real_tensors
from fusecomp.ops import OPS
from fusecomp.ops.linear import Program
from fusecomp.ops.norm import LAYER, RMS, NormSpec, norm_reference
from fusecomp.patterns import functional
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.epilogue import BINARY, CLAMPS, UNARY
from fusecomp.patterns.functional import CAST, FLOATS, RESHAPES, aten, is_call, skip_reshapes, token_shape

REDUCTIONS = (
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var_mean.correction,
    aten.var.correction,
    aten.linalg_vector_norm.default,
)
ALLOWED = (
    *BINARY,
    *UNARY,
    *CLAMPS,
    aten.relu.default,
    *REDUCTIONS,
    *RESHAPES,
    CAST,
    aten.pow.Tensor_Scalar,
    aten.expand.default,
    operator.getitem,
)
MAX_NODES = 40
DRAWS, AGREEMENT = 3, 1e-9
TOKENS = 3  # of a draw, where their number is not known
LINEAR, NORM = OPS.linear.default, OPS.norm.default
FAKE_QUANTIZE = OPS.fake_quantize.default


@dataclass(frozen=True)
class NormCandidate:
    """A value that is computed from a hidden state by way of a reduction, and that linears read.

    Attributes:
        node: the normalised value.
        source: the hidden state.
        region: nodes from `source` (not included) to `node`, in graph order.
        vectors: the region's other inputs, one value a feature.
        linears: readers of `node`.
    """

    node: Node
    source: Node
    region: tuple[Node, ...]
    vectors: tuple[Node, ...]
    linears: tuple[Node, ...]


class Norm(Pattern):
    """A norm becomes the canonical op, or part of the one linear that reads it.

    Before a rounding to codes it becomes the op; `norm_quantize` takes that in, with the rounding.
    """

    name = "norm"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[NormCandidate]:
        seen: set[Node] = set()
        for node in list(graph.nodes):
            if not is_call(node, LINEAR):
                continue
            y = activations(node)
            if y in seen or (is_call(y, NORM) and not _only_reader(y, node)):
                continue
            seen.add(y)
            candidate = read_norm(y)
            if candidate is not None:
                yield candidate

    def guard(self, candidate: NormCandidate, context: PassContext) -> str | None:
        return norm_reason(candidate)

    def emit(self, candidate: NormCandidate, gm: GraphModule, context: PassContext) -> str:
        found = identify(candidate)
        assert found is not None
        spec, weight, bias = found
        node, graph = candidate.node, gm.graph
        if len(candidate.linears) == 1 and _only_reader(node, candidate.linears[0]):
            linear = candidate.linears[0]
            old = Program.from_text(linear.args[5])  # type: ignore[arg-type]
            with graph.inserting_before(linear):
                rows = functional.as_rows(candidate.source, fake_value(linear.args[0]).shape[1])
                text = replace(old, norm=spec).to_text()
                args = (rows, linear.args[1], weight, bias, linear.args[4], text)
                new = functional.call(graph, LINEAR, args, linear)
            replace_and_prune(linear, new)
            return f"{spec.describe()}, folded into the linear that reads it"
        with graph.inserting_before(node):
            new = functional.call(graph, NORM, (candidate.source, weight, bias, spec.to_text()), node)
        replace_and_prune(node, new)
        return f"{spec.describe()}, read {len(new.users)} times"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.functional_examples import norm_examples

        return norm_examples()


def activations(linear: Node) -> Node:
    """What a linear reads, under reshapes; and under the rounding to what codes stand for, which stays where it is."""
    y = skip_reshapes(linear.args[0])  # type: ignore[arg-type]
    return skip_reshapes(y.args[0]) if is_call(y, FAKE_QUANTIZE) else y  # type: ignore[arg-type]


def norm_reason(candidate: NormCandidate) -> str | None:
    """Why the candidate is no norm that the canonical op computes, or None."""
    if fake_value(candidate.node).dtype != fake_value(candidate.source).dtype:
        return f"it turns {fake_value(candidate.source).dtype} into {fake_value(candidate.node).dtype}"
    if len(candidate.vectors) > 2:
        return f"it reads {len(candidate.vectors)} vectors, a norm has a weight and a bias"
    return None if identify(candidate) else "what it computes is no norm in the vocabulary"


def _only_reader(node: Node, linear: Node) -> bool:
    """Whether the value of `node`, under any reshape, is read by `linear` alone, as its activations."""
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif user is not linear or user.all_input_nodes.count(user.args[0]) != 1:  # type: ignore[arg-type]
                return False
    return True


def _readers(node: Node) -> tuple[Node, ...]:
    """Linears whose activations are the value of `node`."""
    found, stack = [], [node]
    while stack:
        for user in stack.pop().users:
            if is_call(user, *RESHAPES):
                stack.append(user)
            elif is_call(user, LINEAR):
                found.append(user)
    return tuple(found)


def read_norm(y: Node) -> NormCandidate | None:
    """The nearest hidden state from which `y` is computed by a reduction and pointwise operations, if any.

    A canonical norm is one too: its only reader may still take it in.
    """
    if is_call(y, NORM):
        args: Any = y.args
        return NormCandidate(y, args[0], (y,), tuple(v for v in args[1:3] if v is not None), _readers(y))
    shape = token_shape(y)
    if shape is None or not is_call(y, *ALLOWED):
        return None
    whole = functional.cone(y, lambda node: not is_call(node, *ALLOWED), 10 * MAX_NODES)
    if whole is None:
        return None
    for source in sorted({*whole, *functional.leaves(whole)} - {y}, reverse=True):
        if token_shape(source) != shape or fake_value(source).dtype not in FLOATS:
            continue
        region = functional.cone(y, partial(_is_outside, source), MAX_NODES)
        if region is None or not any(is_call(node, *REDUCTIONS) for node in region):
            continue
        vectors = [leaf for leaf in functional.leaves(region) if leaf is not source and not _is_size(leaf)]
        if source not in functional.leaves(region) or not all(_is_vector(leaf, shape[1]) for leaf in vectors):
            continue
        origin: Node = source
        while functional.is_widening(origin) or skip_reshapes(origin) is not origin:
            region = [origin, *region]
            origin = origin.args[0]  # type: ignore[assignment]
        return NormCandidate(y, origin, tuple(region), tuple(vectors), _readers(y))
    return None


def _is_outside(source: Node, node: Node) -> bool:
    return node is source or not is_call(node, *ALLOWED)


def _is_size(node: Node) -> bool:
    return isinstance(fake_value(node), torch.SymInt)


def _is_vector(node: Node, width: int) -> bool:
    """Whether `node` is one value a feature, such as a norm's weight."""
    fake = fake_value(node)
    return isinstance(fake, Tensor) and fake.dim() == 1 and fake.shape[0] == width and fake.dtype in FLOATS


def identify(candidate: NormCandidate) -> tuple[NormSpec, Node | None, Node | None] | None:
    """The norm that the candidate computes, with its weight and bias, or None."""
    if is_call(candidate.node, NORM):
        args: Any = candidate.node.args
        return NormSpec.from_text(args[3]), args[1], args[2]
    constants = {
        float(arg)
        for node in candidate.region
        for arg in node.args
        if isinstance(arg, float) or (isinstance(arg, int) and not isinstance(arg, bool))
    }
    eps_values = sorted(c for c in constants | {0.0} if 0 <= c < 1)
    vectors = candidate.vectors
    roles = [(w, b) for w, b in permutations([*vectors, None, None], 2) if {w, b} - {None} == set(vectors)]
    specs = [NormSpec(kind, eps, one) for kind in (RMS, LAYER) for one in (False, True) for eps in eps_values]
    with real_tensors(), torch.no_grad():
        for spec in specs:
            for weight, bias in dict.fromkeys(roles):
                if (weight is not None or not spec.plus_one) and _agrees(candidate, spec, weight, bias):
                    return spec, weight, bias
    return None


def _agrees(candidate: NormCandidate, spec: NormSpec, weight: Node | None, bias: Node | None) -> bool:
    """Whether the region equals `spec` on every draw. Small values among the draws make eps count."""
    rows, width = token_shape(candidate.node)  # type: ignore[misc]
    rows = rows if isinstance(rows, int) else TOKENS
    generator = torch.Generator().manual_seed(width)
    for draw in range(DRAWS):
        scale = (1.0, 3.0, 1e-3)[draw]
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale + draw
        given = {v: torch.randn(width, generator=generator, dtype=torch.float64) for v in candidate.vectors}
        if draw == DRAWS - 1:
            x = x - draw
        shape = [1] * (fake_value(candidate.source).dim() - 2) + [rows, width]
        values = {**given, candidate.source: x.view(shape)}
        try:
            actual = functional.evaluate_region(candidate.region, {**values, **_sizes(candidate.region)})
        except Exception:  # a foreign subgraph may fail in any way; then nothing is proven
            return False
        wanted = norm_reference(x, given.get(weight), given.get(bias), spec.to_text())  # type: ignore[arg-type]
        error = (actual.reshape(rows, width) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        if not error <= AGREEMENT:
            return False
    return True


def _sizes(region: tuple[Node, ...]) -> dict[Node, int]:
    """A value for every size that the region reads: the draws' number of tokens."""
    return {leaf: TOKENS for leaf in functional.leaves(region) if _is_size(leaf)}
