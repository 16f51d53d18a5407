"""Canonical attention: resolved from Hugging Face's interface, then paged (engine) or made SDPA (stateless).

Passes, in order: `InterfaceAttention`, `SdpaAttention`, `SoftmaxAttention` (raw_attention.py), then either
`PagedAttention` or `StatelessAttention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecomp.ops import OPS
from fusecomp.ops.attention import BIDIRECTIONAL, CAUSAL, UNNUMBERED, UNRESOLVED
from fusecomp.ops.kv_cache import KVLayout, is_quantized
from fusecomp.patterns.base import (
    BITWISE,
    QUANTIZING,
    TOLERANCE,
    Example,
    PassContext,
    Pattern,
    fake_value,
    replace_and_prune,
)
from fusecomp.patterns.masks import UNKNOWN
from fusecomp.patterns.raw_attention import is_call

ATTENTION = (OPS.attention, OPS.attention.default)
STEP_INPUTS = (OPS.step_inputs, OPS.step_inputs.default)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256


@dataclass(frozen=True)
class Call:
    """Arguments of one canonical attention node, by name."""

    node: Node
    q: Node
    k: Node
    v: Node
    scale: float
    mask: str
    window: int
    softcap: float
    sinks: Node | None
    layer: int


def attention_calls(graph: torch.fx.Graph) -> list[Call]:
    """Every canonical attention node in graph order."""
    return [Call(node, *node.args) for node in graph.nodes if is_call(node, ATTENTION)]


def number_calls(graph: torch.fx.Graph, layers: Sequence[int]) -> None:
    """Give the calls that came through HF's interface their layers, which the probe saw in the same order."""
    calls = [call for call in attention_calls(graph) if call.layer == UNNUMBERED]
    if len(calls) == len(layers):  # otherwise they keep none, and no mask is proven for them
        for call, layer in zip(calls, layers, strict=True):
            call.node.args = (*call.node.args[:8], layer)


class InterfaceAttention(Pattern):
    """An attention node emitted through HF's interface gets the mask that the probe proved for its layer."""

    name = "attention"
    numerics = BITWISE

    def apply(self, gm: GraphModule, context: PassContext) -> int:
        number_calls(gm.graph, context.calls or list(context.masks))
        return super().apply(gm, context)

    def find(self, graph: torch.fx.Graph) -> Iterable[Call]:
        return [call for call in attention_calls(graph) if call.mask == UNRESOLVED]

    def guard(self, candidate: Call, context: PassContext) -> str | None:
        mask = context.masks.get(candidate.layer)
        if mask is None:
            return f"the probe saw no attention call of layer {candidate.layer}"
        if not all(isinstance(x, int | float) for x in (candidate.scale, candidate.softcap)):
            return "its scale or softcap is computed at run time"
        return f"mask is {mask}" if mask.kind == UNKNOWN else None

    def emit(self, candidate: Call, gm: GraphModule, context: PassContext) -> str:
        mask = context.masks[candidate.layer]
        args = list(candidate.node.args)
        args[4:6] = mask.kind, mask.window
        candidate.node.args = tuple(args)
        return f"{mask}, scale {candidate.scale:.6g}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import interface_examples

        return interface_examples()


class PagedAttention(Pattern):
    """Canonical causal attention over a packed step -> `cache_write` + `paged_attention` on the layer's KV tensor."""

    name = "paged_attention"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[Call]:
        return attention_calls(graph)

    def guard(self, candidate: Call, context: PassContext) -> str | None:
        if candidate.mask == UNRESOLVED:
            return f"mask is {context.masks.get(candidate.layer, 'unresolved')}"
        if candidate.mask != CAUSAL:
            return f"a {candidate.mask} mask cannot be served from a KV cache"
        q, k, v = (fake_value(n) for n in (candidate.q, candidate.k, candidate.v))
        if v.shape[-1] != k.shape[-1]:
            return f"value head dim {v.shape[-1]} differs from key head dim {k.shape[-1]}"
        if not MIN_HEAD_DIM <= q.shape[-1] <= MAX_HEAD_DIM:
            return f"head dim {q.shape[-1]} is outside {MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
        if q.shape[0] != 1:
            return f"the step is packed, but attention sees a batch of {q.shape[0]}"
        marker = step_marker(candidate.node.graph)
        if marker is None:
            return "the graph has no paged inputs"
        kv_caches, index = marker.args[5], len(context.layers)
        if index >= len(kv_caches):  # type: ignore[arg-type]
            return f"there are only {len(kv_caches)} KV tensors: the trial run made fewer attention calls"  # type: ignore[arg-type]
        cache = fake_value(kv_caches[index])  # type: ignore[index]
        layout = KVLayout.of(cache, k.shape[3])
        if layout.quantized:
            if (layout.heads, layout.width) != (k.shape[1], cache.shape[2]):
                return f"its KV tensor has {layout.heads} heads of {cache.shape[2]} bytes, its keys {k.shape[1]}"
        elif (layout.heads, layout.head_dim) != (k.shape[1], k.shape[3]):
            return f"its KV tensor has {layout.heads} heads of {layout.head_dim}, its keys {k.shape[1]} of {k.shape[3]}"
        return None

    def numerics_of(self, candidate: Call, context: PassContext) -> str:
        marker = step_marker(candidate.node.graph)
        assert marker is not None
        cache = marker.args[5][len(context.layers)]  # type: ignore[index]
        return QUANTIZING if is_quantized(fake_value(cache)) else self.numerics

    def emit(self, candidate: Call, gm: GraphModule, context: PassContext) -> str:
        marker = step_marker(gm.graph)
        assert marker is not None
        _, cu_q_lens, seq_lens, block_tables, host_meta, kv_caches = marker.args
        index = len(context.layers)
        q, k, v = (fake_value(n) for n in (candidate.q, candidate.k, candidate.v))
        context.layers.append((candidate.layer, k.shape[1], k.shape[3]))
        graph = gm.graph
        with graph.inserting_before(candidate.node):

            def emit(target: Any, args: tuple, fake: Any) -> Node:
                node = graph.call_function(target, args)
                node.meta.update({k: v for k, v in candidate.node.meta.items() if k != "tensor_dict"})
                node.meta["example_value"] = fake
                return node

            slots = emit(torch.select, (marker.args[0], 0, 2), fake_value(marker.args[0])[2])  # type: ignore[arg-type,index]

            def packed(source: Node, fake: Tensor) -> Node:
                """[1, heads, T, D] -> [T, heads, D], a view."""
                row = emit(torch.select, (source, 0, 0), fake[0])
                rows = emit(torch.transpose, (row, 0, 1), fake[0].transpose(0, 1))
                if fake.shape[1] > 1:
                    return rows
                # Inductor takes [1, 1, T, D] for a channels-last image, and then wants to know T: give it [T, 1, D].
                copy = emit(torch.clone, (rows,), fake_value(rows).clone(memory_format=torch.contiguous_format))
                copy.kwargs = {"memory_format": torch.contiguous_format}
                return copy

            q_t, k_t, v_t = packed(candidate.q, q), packed(candidate.k, k), packed(candidate.v, v)
            cache = kv_caches[index]  # type: ignore[index]
            emit(OPS.cache_write.default, (k_t, v_t, cache, slots), None)
            args = (q_t, k_t, v_t, cache, cu_q_lens, seq_lens, block_tables, host_meta)
            facts = (candidate.scale, candidate.window, candidate.softcap, candidate.sinks)
            fake_out = fake_value(q_t).contiguous()
            out = emit(OPS.paged_attention.default, (*args, *facts), fake_out)
            rows = emit(torch.transpose, (out, 0, 1), fake_out.transpose(0, 1))
            new = emit(torch.unsqueeze, (rows, 0), fake_out.transpose(0, 1).unsqueeze(0))
        replace_and_prune(candidate.node, new)
        mask = f"sliding({candidate.window})" if candidate.window else "causal"
        heads = f"{q.shape[1]} query / {k.shape[1]} kv heads of {q.shape[3]}"
        fp8 = ", FP8 KV cache" if is_quantized(fake_value(cache)) else ""
        return f"{mask}, {heads}, scale {candidate.scale:.6g}{fp8}"

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import paged_examples

        return paged_examples()


class StatelessAttention(Pattern):
    """Without a KV cache, canonical attention becomes PyTorch's fused SDPA, when SDPA can express it."""

    name = "fused_sdpa"
    numerics = TOLERANCE

    def find(self, graph: torch.fx.Graph) -> Iterable[Call]:
        return attention_calls(graph)

    def guard(self, candidate: Call, context: PassContext) -> str | None:
        if candidate.softcap:
            return "SDPA has no softcap"
        if candidate.sinks is not None:
            return "SDPA has no sinks"
        return "the mask is unresolved" if candidate.mask == UNRESOLVED else None

    def emit(self, candidate: Call, gm: GraphModule, context: PassContext) -> str:
        graph, node = gm.graph, candidate.node
        q, k = fake_value(candidate.q), fake_value(candidate.k)
        kwargs: dict[str, Any] = {"scale": candidate.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        with graph.inserting_before(node):
            if candidate.window:
                length = graph.call_method("size", (candidate.q, 2))
                length.meta["example_value"] = q.shape[2]
                kwargs["attn_mask"] = graph.call_function(sliding_mask, (candidate.q, length, candidate.window))
            else:
                kwargs["is_causal"] = candidate.mask == CAUSAL
            new = graph.call_function(F.scaled_dot_product_attention, (candidate.q, candidate.k, candidate.v), kwargs)
        new.meta.update(node.meta)
        replace_and_prune(node, new)
        if candidate.window:
            return f"sliding({candidate.window})"
        return CAUSAL if candidate.mask == CAUSAL else BIDIRECTIONAL

    def examples(self) -> list[Example]:
        from fusecomp.patterns.examples import sdpa_examples

        return sdpa_examples()


def sliding_mask(like: Tensor, length: int, window: int) -> Tensor:
    """Boolean [length, length]: query p sees key j iff p - window < j <= p."""
    at = torch.arange(length, device=like.device)
    return (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)


def step_marker(graph: torch.fx.Graph) -> Node | None:
    """The `step_inputs` node, if the graph is a packed step."""
    return next((node for node in graph.nodes if is_call(node, STEP_INPUTS)), None)


def remove_step_marker(gm: GraphModule) -> None:
    """Replace the marker's result by its first argument, once every attention is wired."""
    marker = step_marker(gm.graph)
    if marker is not None:
        marker.replace_all_uses_with(marker.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(marker)
        gm.recompile()
