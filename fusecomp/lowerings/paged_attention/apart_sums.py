"""How sums of warps of `decode_apart_kernel` meet, and then those of splits.

Legend: as there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_rows(x, ROWS: tl.constexpr):
    """The first ROWS of 16 rows of [16], [W, 16] or [W, 16, D]; the others repeat them, in other registers."""
    if ROWS == 8:
        if len(x.shape) == 1:
            x, _ = tl.split(tl.permute(tl.reshape(x, [2, 8]), [1, 0]))
        elif len(x.shape) == 2:
            x, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 8]), [0, 2, 1]))
        else:
            x, _ = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 8, x.shape[2]]), [0, 2, 3, 1]))
    return x


@triton.jit
def folded(x, RP: tl.constexpr):
    """[W, M, D] whose rows repeat RP -> [W, M, D * RP / M]: the first RP rows have the first dims, and so on."""
    x = _half(x, 4) if RP <= 4 else x
    x = _half(x, 2) if RP <= 2 else x
    return _half(x, 1) if RP == 1 else x


@triton.jit
def _half(x, BIT: tl.constexpr):
    """The first half of the dims of rows [W, 8, D] without a bit, the second of those with it."""
    x = tl.reshape(x, [x.shape[0], 8, 2, x.shape[2] // 2])
    low, high = tl.split(tl.permute(x, [0, 1, 3, 2]))
    return tl.where((tl.arange(0, 8) & BIT != 0)[None, :, None], high, low)


@triton.jit
def by_dims(x):
    """[W, M, D'] -> [M, D', W], a lane's eight dims next to one another: see `dims_of`."""
    PARTS: tl.constexpr = x.shape[0]
    WIDE: tl.constexpr = x.shape[2] // 64 if x.shape[2] > 64 else 1
    x = tl.reshape(x, [PARTS, x.shape[1], WIDE, x.shape[2] // (8 * WIDE), 8])
    return tl.reshape(tl.permute(x, [1, 2, 4, 3, 0]), [x.shape[1], x.shape[2] * x.shape[3] * 8, PARTS])


@triton.jit
def dims_of(part, column):
    """[M, D'] dims of `by_dims`: column n = 64 j + 8 e + c of a product is dim 64 j + 8 c + e."""
    COUNT: tl.constexpr = column.shape[0]
    WIDE: tl.constexpr = COUNT // 64 if COUNT > 64 else 1
    EACH: tl.constexpr = COUNT // (8 * WIDE)
    at = column[None, :]
    group = part[:, None] * (COUNT // 8) + at // (8 * EACH) * EACH + at % EACH
    return group // 8 * 64 + at // EACH % 8 * 8 + group % 8


@triton.jit
def wide(x, like):
    """[M] -> [M, D']."""
    return tl.broadcast_to(x[:, None], like.shape)


@triton.jit
def of_warps(x):
    """[.., W] -> W tensors, through shared memory: warps' numbers are then each thread's."""
    a, b = _pair(x)
    if x.shape[-1] == 4:
        a, c = _pair(a)
        b, d = _pair(b)
        return _one(a), _one(b), _one(c), _one(d)
    else:
        tl.static_assert(x.shape[-1] == 8)
        a, c = _pair(a)
        b, d = _pair(b)
        a, e = _pair(a)
        b, f = _pair(b)
        c, g = _pair(c)
        d, h = _pair(d)
        return _one(a), _one(b), _one(c), _one(d), _one(e), _one(f), _one(g), _one(h)


@triton.jit
def _pair(x):
    """[.., n] -> two [.., n / 2]."""
    if len(x.shape) == 2:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
    else:
        x = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2])
    return tl.split(x)


@triton.jit
def _one(x):
    """[.., 1] -> [..]."""
    return tl.reshape(x, [x.shape[0]]) if len(x.shape) == 2 else tl.reshape(x, [x.shape[0], x.shape[1]])


@triton.jit
def combine_apart(
    out, part_acc, part_lse, pair, row, g, used, num_splits, H: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """As `combine`, where each thread adds up numbers of its own, CHUNK splits in flight: no warp waits for another.

    In one dimension, for weights and what they weigh to be of one layout.
    """
    COUNT: tl.constexpr = triton.next_power_of_2(R) * D
    r, d = tl.arange(0, COUNT) // D, tl.arange(0, COUNT) % D
    m = tl.full([COUNT], -1.0e30, tl.float32)
    l = tl.zeros([COUNT], tl.float32)
    acc = tl.zeros([COUNT], tl.float32)
    for first in range(0, used, CHUNK):
        at = (pair.to(tl.int64) * num_splits + first) * R + r
        for i in tl.static_range(CHUNK):
            live = (r < R) & (first + i < used)
            lse = tl.load(part_lse + at + i * R, mask=live, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(part_acc + (at + i * R) * D + d, mask=live, other=0.0, cache_modifier=".cg")
            top = tl.maximum(m, lse)
            weight = tl.exp2(lse - top)
            kept = tl.exp2(m - top)
            l = l * kept + weight
            acc = acc * kept + part * weight
            m = top
    acc = acc / tl.where(l > 0, l, 1.0)
    tl.store(out + row * (H * D) + (g * R + r) * D + d, acc.to(out.dtype.element_ty), mask=r < R)
