"""Independent eager reference of `cache_write` and `paged_attention`: one sequence at a time, dense softmax.

Legend: T tokens, S rows, P pages per row, H query heads, G kv heads, D head dim, B page size, L keys of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.ops.rope import Rope


def cache_write(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    page_size = kv_cache.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kv_cache[slot // page_size, 0, :, slot % page_size] = k[token]
            kv_cache[slot // page_size, 1, :, slot % page_size] = v[token]


def rotate(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, rope: Rope, dtype: torch.dtype
) -> Tensor:
    """Norm, then rotation of x [T, N, D] by the definition, pair after pair, every operation in `dtype`."""
    x = x.to(dtype)
    if rope.norm != "none":
        x = x / (x.square().mean(-1, keepdim=True) + rope.eps).sqrt()
        if weight is not None:
            x = x * (weight.to(dtype) + 1 if rope.norm == "rms+1" else weight.to(dtype))
    out = x.clone()
    for i in range(rope.dims // 2):
        a, b = (i, i + rope.dims // 2) if rope.style == "half" else (2 * i, 2 * i + 1)
        ca, cb = (i, i) if rope.table == "pairs" else (a, b)
        c, s = cos.to(dtype), sin.to(dtype)
        out[..., a] = x[..., a] * c[:, ca, None] - x[..., b] * s[:, ca, None]
        out[..., b] = x[..., b] * c[:, cb, None] + x[..., a] * s[:, cb, None]
    return out


def gather(kv_cache: Tensor, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V [L, G, D] of a row from its pages."""
    page_size = kv_cache.shape[3]
    pages = pages[: -(-length // page_size)].long()
    k, v = kv_cache[pages].movedim(1, 0).transpose(2, 3).flatten(1, 2)[:, :length]  # [2, n, G, B, D] -> 2 x [L, G, D]
    return k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dense attention [n, H, D] of a row's last n tokens over its L keys, every operation in `dtype`."""
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))  # [H, n, D], [G, L, D]
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    length = k.shape[1]
    key = torch.arange(length, device=q.device)
    query = key[length - q.shape[1] :, None]
    seen = key <= query
    if window > 0:
        seen &= key > query - window
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype)[:, None, None].expand(-1, q.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores.float() if dtype != torch.float64 else scores, -1).to(dtype)
    return (weights[..., :length] @ v).transpose(0, 1)


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[T, H, D] in `dtype`; a row of length 0 gives zeros."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    for row, length in enumerate(seq_lens.tolist()):
        first, last = cu_q_lens[row].item(), cu_q_lens[row + 1].item()
        if length:
            k, v = gather(kv_cache, block_tables[row], length)
            out[first:last] = attend(q[first:last], k, v, scale, window, softcap, sinks, dtype)
    return out
