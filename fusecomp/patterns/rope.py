"""qk-norm, rotary embedding and cache write around a paged attention, recognised by what they compute.

`rope_proof` finds the rule by which the attention's queries and keys are made; where one is proven for both, the cache
write, the attention and all that made their inputs become one canonical op. Anything else is refused, and the graph
stays as it is.

Legend: T tokens, N heads (H of queries, G of keys), D head dim, C columns of a cos or sin table.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.kv_cache import is_quantized
from fusecomp.ops.rope import NO_NORM, UNROTATED, Rope
from fusecomp.patterns import functional
from fusecomp.patterns.base import QUANTIZING, TOLERANCE, Example, PassContext, Pattern, fake_value, replace_and_prune
from fusecomp.patterns.functional import aten, is_call, size_key
from fusecomp.patterns.rope_proof import Heads, Proof, prove_chain

AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2
PAGED, CACHE_WRITE, ROPE = OPS.paged_attention.default, OPS.cache_write.default, OPS.rope_attention.default


@dataclass(frozen=True)
class Written:
    """The cache write that an attention reads: its functionalized call and the tensor that it returns."""

    call: Node
    cache: Node


@dataclass(frozen=True)
class RopeCandidate:
    """A paged attention; `node` is it."""

    node: Node


class RopeAttention(Pattern):
    """`cache_write` and `paged_attention` with what makes their queries and keys -> one `rope_attention`."""

    name = "rope_attention"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[RopeCandidate]:
        return [RopeCandidate(node) for node in graph.nodes if is_call(node, PAGED)]

    def guard(self, candidate: RopeCandidate, context: PassContext) -> str | None:
        outcome = prove(candidate.node)
        return outcome if isinstance(outcome, str) else None

    def emit(self, candidate: RopeCandidate, gm: GraphModule, context: PassContext) -> str:
        outcome = prove(candidate.node)
        assert not isinstance(outcome, str)
        written, q, k = outcome
        node, graph = candidate.node, gm.graph
        _, _, v, _, *step, scale, window, softcap, sinks = node.args
        cu_q_lens, seq_lens, block_tables, host_meta = step
        with graph.inserting_before(node):
            kwargs = {
                "q": _packed(q.source),
                "k": _packed(k.source),
                "v": v,
                "cos": q.cos and _table(q.cos),
                "sin": q.sin and _table(q.sin),
                "q_norm": q.weight and _vector(q.weight),
                "k_norm": k.weight and _vector(k.weight),
                "slots": written.call.kwargs["slots"],
                "cu_q_lens": cu_q_lens,
                "seq_lens": seq_lens,
                "block_tables": block_tables,
                "host_meta": host_meta,
                "scale": scale,
                "window": window,
                "softcap": softcap,
                "sinks": sinks,
                "rope": str(q.rope),
                "_kv_cache_base_index": 0,
                "_all_bases": written.call.kwargs["_all_bases"],
            }
            call = graph.call_function(AUTO_FUNCTIONALIZED, (ROPE,), kwargs)
            fakes = (fake_value(node), fake_value(written.cache))
            call.meta.update({key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")})
            call.meta["val"] = fakes
            out, cache = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
            for part, fake in zip((out, cache), fakes, strict=True):
                part.meta["val"] = fake
        # The old cache tensor may be read between the write and the attention; nothing does, by `_written`.
        replace_and_prune(written.cache, cache)
        replace_and_prune(node, out)
        return _describe(q.rope, fake_value(node).shape[2])

    def numerics_of(self, candidate: RopeCandidate, context: PassContext) -> str:
        return QUANTIZING if is_quantized(fake_value(candidate.node.args[3])) else self.numerics

    def examples(self) -> list[Example]:
        from fusecomp.patterns.rope_examples import rope_examples

        return rope_examples()


def _describe(rope: Rope, head_dim: int) -> str:
    norm = "" if rope.norm == NO_NORM else f"{rope.norm} eps {rope.eps:g}, "
    if rope.style == UNROTATED:
        return f"{norm}no rotation"
    return f"{norm}{rope.style} rotation of {rope.dims} of {head_dim} dims"


def prove(attention: Node) -> tuple[Written, Proof, Proof] | str:
    """The cache write before `attention` and how its queries and keys were proven to be made; or why not."""
    written = _written(attention)
    if isinstance(written, str):
        return written
    proofs = []
    for name, node in (("queries", attention.args[0]), ("keys", attention.args[1])):
        assert isinstance(node, Node)
        proof = prove_chain(node)
        if proof is None:
            return f"what makes its {name} is no norm and rotation in the vocabulary"
        proofs.append(proof)
    q, k = proofs
    if q.facts() != k.facts():
        # A norm or rotation on one side only stays in the graph; the shared rest is what both sides end with.
        return f"its queries are made by {q.rope}, its keys by {k.rope}" + (
            " with other tables" if q.rope == k.rope else ""
        )
    return written, q, k


def _written(attention: Node) -> Written | str:
    """The write of the same keys and values into the cache that `attention` reads, if it can be moved into it."""
    _, k, v, cache = attention.args[:4]
    call = cache.args[0] if is_call(cache, operator.getitem) else None  # type: ignore[union-attr]
    if not is_call(call, AUTO_FUNCTIONALIZED) or call.args[0] is not CACHE_WRITE:  # type: ignore[union-attr]
        return "its keys were written elsewhere"
    assert isinstance(call, Node) and isinstance(cache, Node)
    if call.kwargs["k"] is not k or call.kwargs["v"] is not v:
        return "the keys or values that are written are not those it is given"
    same = (attention, k, v) if is_quantized(fake_value(cache)) else (attention, k, v, cache)
    dtypes = {fake_value(x).dtype for x in same}
    if len(dtypes) > 1:
        return f"its tensors have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if call.kwargs.get("_kv_cache_base_index") != 0 or len(call.kwargs["_all_bases"]) != 1:  # type: ignore[arg-type]
        return "the cache is a view of another tensor"
    readers = [user for user in cache.users if user is not attention and user < attention]
    if readers or any(user is not cache for user in call.users):
        return "the cache is read between the write and the attention"
    return Written(call, cache)


def _packed(heads: Heads) -> Node:
    """`heads` as a view [T, N, D], inserted at the current point."""
    node, order = heads.node, heads.order
    extra = [dim for dim in range(fake_value(node).dim()) if dim not in order]
    if extra:
        order = tuple(dim - sum(e < dim for e in extra) for dim in order)  # type: ignore[assignment]
        for dim in reversed(extra):
            node = functional.call(node.graph, aten.select.int, (node, dim, 0), heads.node)
    if order != (0, 1, 2):
        node = functional.call(node.graph, aten.permute.default, (node, list(order)), heads.node)
    return node


def _table(node: Node) -> Node:
    """A table as a view [T, C], inserted at the current point."""
    while (fake := fake_value(node)).dim() > 2:
        dim = next(i for i, s in enumerate(fake.shape[:-1]) if size_key(s) == 1)
        node = functional.call(node.graph, aten.select.int, (node, dim, 0), node)
    return node


def _vector(node: Node) -> Node:
    """A vector as a view [D], inserted at the current point."""
    while fake_value(node).dim() > 1:
        node = functional.call(node.graph, aten.select.int, (node, 0, 0), node)
    return node
