"""CUDA implementation of `experts`: which kernels run, decided per call from shapes alone.

Very few tokens: two launches of plain products. More: one routing launch (two from 4,096 routed rows on), two grouped
matmuls with gather, activation and biases inside, and one launch that weighs and sums a token's experts and adds the
residual, at any number of experts.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts.heuristics import experts_config, invariant_experts_config
from fusecomp.lowerings.experts.launch import Experts, run_experts
from fusecomp.ops.experts import Activation, experts_reference
from fusecomp.ops.library import record_fallback
from fusecomp.ops.mode import batch_invariant

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> str | None:
    """Why the kernels cannot run these experts, or None if they can."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is none of fp32, fp16, bf16"
    if up.dtype != x.dtype or down.dtype != x.dtype:
        return f"activations are {x.dtype}, the weights {up.dtype} and {down.dtype}"
    if not all(w.is_contiguous() for w in (up, up_bias, down, down_bias) if w is not None):
        return f"weights with strides {up.stride()} and {down.stride()}, or their biases, are not contiguous"
    return None


def launch_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    residual: Tensor | None = None,
) -> Tensor:
    """`fusecomp::experts` on CUDA; shapes as in `experts_reference`. [T, C] contiguous, bitwise repeatable.

    What `supports` refuses runs the reference, counted; it reads counts on the host, so a CUDA graph cannot hold it.
    """
    if reason := supports(x, up, up_bias, down, down_bias):
        record_fallback("experts", reason)
        return experts_reference(
            x, top_k_index, top_k_weights, up, up_bias, down, down_bias, act, gated, interleaved, transposed, residual
        )
    tokens, top_k = top_k_index.shape
    if tokens == 0 or top_k == 0:
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        return out if residual is None else out.copy_(residual)
    layer = Experts(up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, transposed)
    experts, _, hidden, width = layer.sizes
    choose = invariant_experts_config if batch_invariant() else experts_config
    config = choose(
        target_of(x), experts=experts, top_k=top_k, hidden=hidden, width=width, tokens=tokens,
        itemsize=x.element_size(), transposed=transposed,
    )  # fmt: skip
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    return run_experts(config, x, index, weights, layer, residual, uses_pdl(x))
