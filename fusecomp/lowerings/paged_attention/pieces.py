"""Device pieces shared by the decode and the prefill kernel: page arithmetic and the hooks on scores.

Legend: B page size, D head dim, N keys of one tile, R query heads that share one kv head.

Scores are kept in base 2. A hook gets the raw dot products and a factor `pre`; the kernel multiplies what it
returns by `post` and subtracts the running maximum, which the compiler contracts into one fused multiply-add.
`score_factors` gives both factors, so a kernel without softcap spends nothing on it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """(pre, post) such that exp2(hook(q.k, pre) * post) = exp(score); softcap 0 means none."""
    if softcap > 0:
        return 2 * LOG2E * scale / softcap, softcap * LOG2E
    return 1.0, scale * LOG2E


@triton.jit
def plain_score(dots, pre):
    """Score hook without softcap: the dot products as they are."""
    return dots


@triton.jit
def softcap_score(dots, pre):
    """Score hook tanh(scale * q.k / c), written as 1 - 2 / (1 + exp2(pre * q.k)): exact at both infinities."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(dots * pre))


@triton.jit
def softcap_score_fp32(dots, pre):
    """`softcap_score` to within 2 ulp: below |y| = 0.65 the subtraction cancels, a polynomial in y * y does not."""
    y = dots * (pre * 0.34657359027997264)  # pre / (2 * log2(e))
    z = y * y
    # Chebyshev fit of (tanh(y) / y - 1) / z on [0, 0.65]; relative error of tanh 1e-7
    poly = -0.33333327 + z * (0.13332602 + z * (-0.05382585 + z * (0.02088132 - 0.00593298 * z)))
    return tl.where(tl.abs(y) < 0.65, y + y * z * poly, 1.0 - 2.0 / (1.0 + tl.exp2(dots * pre)))


@triton.jit
def no_sink(sinks, head, mask):
    """Sink hook without sinks: a finite stand-in for -inf, and nothing in the denominator."""
    return tl.where(mask, -1.0e30, -1.0e30), tl.where(mask, 0.0, 0.0)


@triton.jit
def with_sink(sinks, head, mask):
    """Sink hook: the running maximum starts at the sink and the denominator at exp2(0)."""
    sink = tl.load(sinks + head, mask=mask, other=0.0).to(tl.float32)
    return sink * 1.4426950408889634, tl.where(mask, 1.0, 1.0)


@triton.jit
def tile_pages(table, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the keys start .. start + N: one scalar if the tile lies in one page, else int32[N].

    `start` is a multiple of N. Entries of the table for positions >= `end` are not read.
    """
    if PAGE % BLOCK_N == 0:
        return tl.load(table + start // PAGE, mask=start < end, other=0)
    else:
        pos = start + tl.arange(0, BLOCK_N)
        return tl.load(table + pos // PAGE, mask=pos < end, other=0)


@triton.jit
def tile_offsets(pages, start, stride_page, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64[N]: offset of each key of the tile from the start of K (or V) of its kv head in page 0."""
    n = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:
        return pages.to(tl.int64) * stride_page + (start % PAGE + n) * stride_slot
    else:
        return pages.to(tl.int64) * stride_page + ((start + n) % PAGE) * stride_slot
