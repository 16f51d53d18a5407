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


def e4m3_values() -> Tensor:
    """fp64 [256]: what each code stands for."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = (-1.0) ** (code >> 7), (code >> 3) & 15, code & 7
        size = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(float("nan") if code & 127 == 127 else sign * size)
    return torch.tensor(values, dtype=torch.float64)


def unpack(kv_cache: Tensor, page_size: int, head_dim: int) -> Tensor:
    """An FP8 cache [num_blocks, G, W] as a plain one [num_blocks, 2, G, B, D] in fp64."""
    blocks, kv_heads, _ = kv_cache.shape
    size = page_size * head_dim
    codes = kv_cache[..., : 2 * size].reshape(blocks, kv_heads, 2, page_size, head_dim).long()
    at = -(-2 * size // 4) * 4
    words = kv_cache[..., at : at + 4 * page_size].reshape(blocks, kv_heads, page_size, 2, 2).int()
    scales = ((words[..., 0] | words[..., 1] << 8) << 16).view(torch.float32)  # [blocks, G, B, 2]
    values = e4m3_values().to(kv_cache.device)[codes] * scales.double().movedim(3, 2)[..., None]
    return values.transpose(1, 2)


def quantized(x: Tensor) -> Tensor:
    """fp64 heads [..., D] after a round trip through codes: the nearest e4m3 of the best of four scales.

    The scales are 1, 7/8, 3/4, 5/8 times the least power of two that holds the head; a product in fp32 decides
    between two codes, sums of 64ths of squared errors between scales.
    """
    x = x.double()
    exponent = torch.arange(-100, 121, dtype=torch.float64, device=x.device)
    fits = x.abs().amax(-1, keepdim=True) <= 448 * 2.0**exponent
    scale = 2.0 ** exponent[fits.int().argmax(-1)][..., None]
    grid = e4m3_values()[:127].to(x.device)
    tried, errors = [], []
    for eighths in (8, 7, 6, 5):
        size = ((x / scale).abs().float() * (8 / eighths)).double().clamp(max=448)
        above = torch.searchsorted(grid, size.contiguous()).clamp(max=126)
        below = (above - 1).clamp(min=0)
        down, up = size - grid[below], grid[above] - size
        nearer = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
        tried.append(grid[nearer] * eighths / 8 * scale * x.sign())
        errors.append((((tried[-1] - x) / scale).float().square() * 64).long().sum(-1))
    best = torch.stack(errors).argmin(0)
    return torch.stack(tried).gather(0, best[None, ..., None].expand(1, *x.shape))[0]


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
