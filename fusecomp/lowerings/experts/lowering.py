"""Experts on a GPU by PyTorch's grouped matmul: sort by expert, two grouped GEMMs, weighted sum. No host sync.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows.
The fused Triton template will replace it; until then the library is at hand and captures into CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.ops.experts import _activate, _expert_linear, experts_reference
from fusecomp.ops.library import record_fallback

# torch's grouped matmul needs rows of both operands aligned to 16 bytes.
ALIGN_ELEMENTS = 8
# Up to here, what the grouped matmul refuses runs every expert on every token: decode buckets are captured.
DENSE_TOKENS = 1024


def supports(x: Tensor, up: Tensor, down: Tensor) -> str | None:
    """Why the grouped matmul cannot serve these experts, or None."""
    if x.dtype != torch.bfloat16:
        return f"grouped matmul needs bfloat16, got {x.dtype}"
    if any(size % ALIGN_ELEMENTS for size in (*up.shape[1:], *down.shape[1:])):
        return f"expert sizes {tuple(up.shape[1:])} and {tuple(down.shape[1:])} are not multiples of {ALIGN_ELEMENTS}"
    return None


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """x [R, in] sorted by expert, weight [E, out, in] (or [E, in, out] when transposed) -> [R, out]."""
    out = torch._grouped_mm(x, weight if transposed else weight.transpose(-2, -1), offs=offsets)
    return out if bias is None else out + bias[ids]


def experts_dense(
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
) -> Tensor:
    """`experts_reference` by every expert on every token. E / K times the work, but a CUDA graph can hold it."""
    parts = torch.zeros(*top_k_index.shape, x.shape[1], dtype=torch.float32, device=x.device)
    for expert in range(up.shape[0]):
        hidden = _expert_linear(x, up[expert], None if up_bias is None else up_bias[expert], transposed)
        hidden = _activate(hidden, act, gated, interleaved)
        rows = _expert_linear(hidden, down[expert], None if down_bias is None else down_bias[expert], transposed)
        parts = torch.where((top_k_index == expert)[..., None], rows.float()[:, None], parts)
    return (parts * top_k_weights.float()[..., None]).sum(1).to(x.dtype)


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
) -> Tensor:
    """`fusecomp::experts` on CUDA; shapes as in `experts_reference`. The sum over k runs in fp32, in routing order."""
    if reason := supports(x, up, down):
        record_fallback("experts", reason)
        # The reference reads counts on the host, which a capture forbids.
        run = experts_dense if len(x) <= DENSE_TOKENS or _capturing(x) else experts_reference
        return run(x, top_k_index, top_k_weights, up, up_bias, down, down_bias, act, gated, interleaved, transposed)
    (T, K), E = top_k_index.shape, up.shape[0]
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    # Sentinels (id E) sort last, beyond the final offset; the GEMM leaves their rows unwritten.
    offsets = torch.searchsorted(ids, torch.arange(E, device=x.device), right=True).to(torch.int32)
    clamped = ids.clamp(max=E - 1)
    hidden = _grouped(x[order // K].contiguous(), up, up_bias, clamped, offsets, transposed)
    hidden = _activate(hidden, act, gated, interleaved).contiguous()
    rows = _grouped(hidden, down, down_bias, clamped, offsets, transposed)
    rows = torch.where((ids < E)[:, None], rows, 0.0)
    parts = torch.empty_like(rows)
    parts[order] = rows
    weighted = parts.view(T, K, -1).float() * top_k_weights.float()[..., None]
    return weighted.sum(1).to(x.dtype)
