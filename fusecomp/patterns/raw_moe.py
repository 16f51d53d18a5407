"""Mixtures of experts written out in the graph -> the canonical `experts`.

From two expert weights the graph is read back to hidden states, chosen experts and their weights, and on to the sum
over experts. What lies between (sorting, grouped or batched matmuls, all experts on all tokens) is not matched by shape
of code: it is run on random values and compared with the canonical op. What does not agree is refused.

Legend: T tokens, K experts per token, E experts, C hidden size.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.patterns.base import TOLERANCE, Example, PassContext, Pattern, fake_value, op_name
from fusecomp.patterns.dataflow import Cut, Dataflow, erase, is_size, reads_shape_only
from fusecomp.patterns.expert_weights import (
    PRODUCTS,
    SeparateWeights,
    WeightPair,
    layouts,
    separate_weights,
    weight_pairs,
)
from fusecomp.patterns.functional import FLOATS, size_key
from fusecomp.patterns.moe_proof import ExpertsForm, RoutedPart, prove, vanishes
from fusecomp.patterns.raw_attention import argument

KEEPS_CHOICES = {"to", "long", "int", "view", "reshape", "contiguous", "clone", "detach", "squeeze", "flatten"}
MAX_NODES, MAX_PER_PRODUCT, MAX_PROOFS = 240, 24, 12
MAX_SUMS, MAX_STATES, MAX_CHOICES, MAX_WEIGHTS = 24, 4, 4, 6
UNCHOSEN = "every token goes through every expert: none is chosen"


class RawExperts(Pattern):
    """Experts by grouped or batched matmuls, or all experts on all tokens."""

    name = "raw_experts"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[WeightPair | SeparateWeights]:
        return [*weight_pairs(graph), *separate_weights(graph)]

    def guard(self, candidate: WeightPair | SeparateWeights, context: PassContext) -> str | None:
        if isinstance(candidate, SeparateWeights):
            first, last = candidate.experts[0], candidate.experts[-1].rpartition(".")[2]
            return f"{first} to {last} have weights of their own, which would have to be stacked"
        if len(candidate.ups) > 1:
            return "its gate and up projections are two weights, which would have to be stacked"
        found = identify(candidate)
        if isinstance(found, str):
            return found
        candidate.proven = found
        return None

    def emit(self, candidate: WeightPair, gm: GraphModule, context: PassContext) -> str:
        part, form = candidate.proven
        flow = Dataflow(gm.graph)
        _, checks, renamed = flow.escapes(part.cut)
        with gm.graph.inserting_before(part.out):
            new = _experts_call(part, form)
        for node in (part.out, *renamed):
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in part.cut.members)
        erase({*part.cut.members, *checks}, flow.order)
        how = ", weights on its input" if form.scales_input else ""
        return f"{part.experts} experts, top-{part.top_k}, {form.act}{' gated' if form.gated else ''}{how}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.raw_moe_examples import raw_moe_examples

        return raw_moe_examples()


def _experts_call(part: RoutedPart, form: ExpertsForm) -> Node:
    """The canonical op on a proven part's inputs, inserted at the current point, in the shape of its output."""
    k, out = part.top_k, fake_value(part.out)
    index = _rows_of(part, part.index, k)
    if part.dense:
        dense = _rows_of(part, part.weights, part.experts)
        if fake_value(index).dtype != torch.int64:
            index = _call(part, "long", index)
        weights = _call(part, torch.gather, dense, 1, index)
    else:
        weights = _rows_of(part, part.weights, k)
    x = _rows_of(part, part.x, fake_value(part.x).shape[-1])
    if form.scales_input:
        x = _call(part, operator.mul, x, _call(part, "to", weights, fake_value(x).dtype))
        weights = _call(part, torch.ones_like, weights)
    biases = [
        None if bias is None else _call(part, "reshape", bias, (part.experts, -1))
        for bias in (part.up_bias, part.down_bias)
    ]
    operands = (x, index, weights, part.up, biases[0], part.down, biases[1])
    new = _call(part, OPS.experts.default, *operands, form.act, form.gated, form.interleaved, form.transposed)
    return new if out.dim() == 2 else _call(part, "view_as", new, part.x)


def _rows_of(part: RoutedPart, node: Node, width: int) -> Node:
    fake = fake_value(node)
    return node if fake.dim() == 2 and fake.shape[1] == width else _call(part, "reshape", node, (-1, width))


def _call(part: RoutedPart, target: Any, *args: Any) -> Node:
    """Insert a call of a function or of the method of that name, with its fake value and the output's metadata."""
    graph, is_method = part.out.graph, isinstance(target, str)
    node = graph.call_method(target, args) if is_method else graph.call_function(target, args)
    node.meta.update({k: v for k, v in part.out.meta.items() if k != "tensor_dict"})
    fakes: Any = torch.fx.node.map_aggregate(args, lambda a: fake_value(a) if isinstance(a, Node) else a)
    with torch.no_grad():
        node.meta["example_value"] = getattr(fakes[0], target)(*fakes[1:]) if is_method else target(*fakes)
    return node


def identify(pair: WeightPair) -> tuple[RoutedPart, ExpertsForm] | str:
    """The mixture that two expert weights make, or why there is none: the reason that is closest to a match."""
    flow, proofs = Dataflow(pair.node.graph), 0
    reasons = [(0, "no sum over experts follows from hidden states, chosen experts and their weights")]
    for part in routed_parts(flow, pair):
        if isinstance(part, str):
            reasons.append((1, part))
            continue
        reason = flow.changed_leaf(part.cut) or flow.escapes(part.cut)[0] or _dtype_reason(part, pair)
        if reason is not None:
            reasons.append((2, reason))
            continue
        form = prove(part)
        if isinstance(form, ExpertsForm):
            return part, form
        agreed, reason = form
        reasons.append((4 if agreed else 3, reason))
        proofs += 1
        if proofs == MAX_PROOFS:
            break
    return max(reasons, key=lambda ranked: ranked[0])[1]


def _dtype_reason(part: RoutedPart, pair: WeightPair) -> str | None:
    wanted = fake_value(part.up).dtype
    for what, node in (("states", part.x), ("down weight", part.down), ("product", pair.node), ("sum", part.out)):
        if fake_value(node).dtype != wanted:
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (fake_value(node).dtype, wanted)]
            return f"its {what} is {dtypes[0]}, its up weight {dtypes[1]}"
    return None


def routed_parts(flow: Dataflow, pair: WeightPair) -> Iterator[RoutedPart | str]:
    """Readings of the graph around two expert weights, or why one of them is none; the likeliest first."""
    up, limit = fake_value(pair.ups[0]).shape, MAX_NODES + MAX_PER_PRODUCT * len(pair.products)
    after = set.intersection(*(flow.descendants(node) for node in pair.products))
    routed = flow.descendants(pair.ups[0]) | flow.descendants(pair.down)
    sums = sorted((node for node in after if _is_features(node)), key=flow.order.__getitem__)
    for out in sums[:MAX_SUMS]:
        hidden, rows = fake_value(out).shape[-1], _rows(out)
        if not layouts(up, fake_value(pair.down).shape, hidden):
            continue
        before = [node for node in flow.latest_sources(out, limit) if node not in routed]
        features = [node for node in before if _is_features(node) and _rows(node) == rows]
        states = [node for node in features if fake_value(node).shape[-1] == hidden][:MAX_STATES]
        choices = [node for node in before if 0 < _top_k(node, rows, False) <= up[0] and _selection_rank(node) < 3]
        choices = sorted(choices, key=_selection_rank)[:MAX_CHOICES]
        dense = [node for node in features if fake_value(node).shape[-1] == up[0]][:MAX_WEIGHTS]
        for x in states:
            if fake_value(out).dim() != 2 and str(fake_value(out).shape) != str(fake_value(x).shape):
                continue
            for index in choices:
                k = _top_k(index, rows, False)
                weights = [n for n in before if _top_k(n, rows, True) == k]
                # A loop over experts makes many from the ones that are wanted.
                for weight in dict.fromkeys((*weights[:MAX_WEIGHTS], *weights[-MAX_WEIGHTS:])):
                    if part := _part(flow, pair, out, x, index, weight, limit, k=k):
                        yield part
            for weight in dense:
                yield from _dense_parts(flow, pair, out, x, weight, choices, limit, rows)


def _part(
    flow: Dataflow, pair: WeightPair, out: Node, x: Node, index: Node, weights: Node, limit: int, *, k: int,
    dense: bool = False,
) -> RoutedPart | None:  # fmt: skip
    """The part of the graph between these nodes, if it reads nothing else."""
    up, down = pair.ups[0], pair.down
    given = {x, weights, up, down} | (set() if dense else {index})
    cut = flow.cut(out, given, limit)
    if cut is None or not given <= {*cut.leaves}:
        return None
    hidden, biases = fake_value(x).shape[-1], dict[bool, Node]()
    unread = []
    for leaf in cut.leaves:
        if leaf in given or is_size(leaf):
            continue
        if reads_shape_only(cut, leaf):
            unread.append(leaf)
        elif (
            _is_bias(leaf, cut, fake_value(up).shape[0])
            and (is_up := _is_up_bias(flow, pair, leaf, hidden)) not in biases
        ):
            biases[is_up] = leaf
        else:
            return None
    found = biases.get(True), biases.get(False)
    return RoutedPart(cut, x, index, weights, dense, dense or _distinct(index), k, up, down, *found, tuple(unread))


def _is_up_bias(flow: Dataflow, pair: WeightPair, bias: Node, hidden: int) -> bool:
    """Whether a bias has a number for each up row; where there are as many hidden features, whether it comes first."""
    width, rows = fake_value(bias).shape[-1], prod(fake_value(pair.ups[0]).shape[1:]) // hidden
    return width == rows if rows != hidden else pair.node in flow.descendants(bias)


def _is_bias(leaf: Node, cut: Cut, experts: int) -> bool:
    fake = fake_value(leaf)
    if leaf.op not in ("placeholder", "get_attr") or not isinstance(fake, Tensor) or fake.dtype not in FLOATS:
        return False
    if any(op_name(node) in PRODUCTS and leaf in node.args[1:] for node in cut.members):
        return False
    return fake.shape[:1] == (experts,) and (fake.dim() == 2 or (fake.dim() == 3 and fake.shape[1] == 1))


def _dense_parts(
    flow: Dataflow, pair: WeightPair, out: Node, x: Node, weights: Node, choices: list[Node], limit: int, rows: Any
) -> Iterator[RoutedPart | str]:
    """Readings in which all experts see all tokens, weighted by [T, E]."""
    stops = {node for node in flow.latest_sources(weights, limit) if op_name(node) in PRODUCTS}
    made = flow.cut(weights, stops, limit)
    chosen = [index for index in choices if made is not None and index in made.members]
    for index in chosen or choices[:1] or [weights]:
        part = _part(flow, pair, out, x, index, weights, limit, k=_top_k(index, rows, False), dense=True)
        if part is None:
            continue
        if not chosen or made is None:
            if not any(node in choices for node in part.cut.members):
                yield UNCHOSEN
        elif vanishes(part, made, index):
            yield part
        else:
            yield "weights of experts that are not chosen are not known to be zero"


def _rows(node: Node) -> Any:
    """Product of all sizes but the last."""
    return prod(size_key(size) for size in fake_value(node).shape[:-1])


def _is_features(node: Node) -> bool:
    fake = fake_value(node)
    return isinstance(fake, Tensor) and fake.dtype in FLOATS and fake.dim() > 1 and isinstance(fake.shape[-1], int)


def _top_k(node: Node, rows: Any, floats: bool) -> int:
    """K of a value [.., K] of `rows` tokens, or [T], of floats or of integers; 0 for any other."""
    fake = fake_value(node)
    wanted = FLOATS if floats else (torch.int64, torch.int32)
    if not isinstance(fake, Tensor) or fake.dtype not in wanted or fake.dim() == 0:
        return 0
    if isinstance(fake.shape[-1], int) and _rows(node) == rows:
        return fake.shape[-1]
    return 1 if fake.dim() == 1 and size_key(fake.shape[0]) == rows else 0


def _selection(index: Node) -> Node:
    """What makes an index, under casts and views that keep its last dimension."""
    while op_name(index) in KEEPS_CHOICES and isinstance(index.args[0], Node):
        source: Node = index.args[0]
        if [size_key(s) for s in fake_value(source).shape[-1:]] != [size_key(s) for s in fake_value(index).shape[-1:]]:
            break
        index = source
    return index


def _selection_rank(index: Node) -> int:
    """0 for what a selection among experts gives, 1 for what a graph is given, 2 for what else is computed.

    3 for computed numbers in a row: chosen experts of all tokens, flattened, would pass for one a token.
    """
    made = _selection(index)
    if op_name(made) == "getitem" and op_name(made.args[0]) in ("topk", "max", "sort"):  # type: ignore[arg-type]
        return 0
    if op_name(made) in ("argmax", "argsort"):
        return 0
    return 1 if made.op == "placeholder" else 2 if fake_value(index).dim() > 1 else 3


def _distinct(index: Node) -> bool:
    """Whether the experts of a token differ: they are the largest of its row."""
    made = _selection(index)
    if op_name(made) != "getitem" or op_name(made.args[0]) != "topk" or made.args[1] != 1:  # type: ignore[arg-type]
        return False
    topk: Any = made.args[0]
    return argument(topk, 2, "dim", -1) in (-1, fake_value(topk.args[0]).dim() - 1)
