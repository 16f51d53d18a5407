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


@triton.jit
def pdl_wait(USE_PDL: tl.constexpr):
    """With programmatic dependent launch: wait for all earlier work.

    Every program runs this before it reads anything that a kernel of the step wrote and before it writes anything.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def pdl_launch(USE_PDL: tl.constexpr):
    """With programmatic dependent launch: the next kernel's programs may start once all of this one's came here."""
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_tables(
    cos, sin, t, live, d, stride_cos, stride_sin, R: tl.constexpr, STYLE: tl.constexpr, PAIRS: tl.constexpr
):
    """Rows t [M, 1] of cos and sin as [M, DP], 1 and 0 for the dims that are not rotated and where not `live`."""
    if STYLE == "none":
        return 1.0, 0.0
    else:
        column = d
        if PAIRS:
            if STYLE == "half":
                column = tl.where(d < R // 2, d, d - R // 2)
            else:
                column = d // 2
        mask = live & (d < R)[None, :]
        c = tl.load(cos + t * stride_cos + column[None, :], mask=mask, other=1.0)
        s = tl.load(sin + t * stride_sin + column[None, :], mask=mask, other=0.0)
        return c, s


@triton.jit
def _load_weight(weight, d, D: tl.constexpr):
    """[1, DP]: what a normalized head is multiplied by; `weight` [D], or None for ones."""
    if weight is None:
        return 1.0
    else:
        return tl.load(weight + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def load_heads(x_at, live, d, weight, D: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr, NORM: tl.constexpr):
    """What `rotated` needs of the heads that start at x_at [M, 1]: zeros where not `live` [M, 1] and beyond D.

    Returns x [M, DP], the partner of each dim that is rotated ("half" only), and the norm's weight for both. A
    partner lies in another thread: reading it again hits the L1 and costs no exchange.
    """
    x = tl.load(x_at + d[None, :], mask=live & (d < D)[None, :], other=0.0)
    y = 0.0
    w = 1.0
    w_y = 1.0
    if NORM != "none":
        w = _load_weight(weight, d, D)
    if STYLE == "half":
        partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
        y = tl.load(x_at + partner[None, :], mask=live & (d < R)[None, :], other=0.0)
        if NORM != "none":
            w_y = _load_weight(weight, partner, D)
    return x, y, w, w_y


@triton.jit
def _factor(weight, NORM: tl.constexpr):
    """What a loaded norm weight stands for, in fp32."""
    return weight.to(tl.float32) + (1.0 if NORM == "rms+1" else 0.0)


@triton.jit
def rotated(
    heads,
    tables,
    d,
    eps,
    weight,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    STYLE: tl.constexpr,
    NORM: tl.constexpr,
):
    """Norm and rotation of what `load_heads` and `load_tables` gave: fp32 [M, DP]; NORM is "none", "rms" or "rms+1"."""
    x, y, w, w_y = heads
    x = x.to(tl.float32)
    rms = 1.0
    if NORM != "none":
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * rms
        if weight is not None:
            x = x * _factor(w, NORM)
    if STYLE != "none":
        cos = tables[0].to(tl.float32)
        sin = tables[1].to(tl.float32)
        if STYLE == "half":
            y = y.to(tl.float32)
            if NORM != "none":
                y = y * rms
                if weight is not None:
                    y = y * _factor(w_y, NORM)
            x = x * cos + tl.where((d < R // 2)[None, :], -y, y) * sin
        else:
            even, odd = tl.split(tl.reshape(x, (x.shape[0], DP // 2, 2)))
            x = x * cos + tl.reshape(tl.join(-odd, even), (x.shape[0], DP)) * sin
    return x
