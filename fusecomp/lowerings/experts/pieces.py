"""What the experts' kernels share: rows of a weight tile, tokens, products, gate and up of a tile, activations.

Legend: N rows of one expert's weight (its outputs, gate and up counted apart), BN rows of a weight tile, C columns.
GATING: 0 not gated; 1 gate rows [0, N / 2), up rows [N / 2, N); 2 gate rows even, up rows odd. A tile of gating 1 holds
BN / 2 rows of each half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusecomp.lowerings.linear.epilogue import tanh


@triton.jit
def weight_rows(block, N: tl.constexpr, GATING: tl.constexpr, BLOCK_N: tl.constexpr, CLAMP: tl.constexpr):
    """[BN] rows of an expert's weight that tile `block` holds.

    Those past the end of a half read the last one if CLAMP, and otherwise whatever follows: the next half, or, from
    N on, nothing that is the weight's.
    """
    r = tl.arange(0, BLOCK_N)
    PARTS: tl.constexpr = 2 if GATING == 1 else 1
    ROWS: tl.constexpr = BLOCK_N // PARTS  # of each half
    row = block * ROWS + r % ROWS
    if CLAMP and (N // PARTS) % ROWS != 0:
        row = tl.minimum(row, N // PARTS - 1)
    return row + r // ROWS * (N // PARTS)


@triton.jit
def load_tokens(x_at, live, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BT, BD] columns from d on of the tokens at x_at, zero where they are not live and beyond D."""
    if D % BLOCK_D == 0:
        return tl.load(x_at + d, mask=live[:, None], other=0.0)
    else:
        return tl.load(x_at + d, mask=live[:, None] & (d + tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def dot(w, tokens, acc, SWAP: tl.constexpr):
    """acc plus products of rows w [BN, BD] and tokens [BT, BD]: [BT, BN], or [BN, BT] if SWAP."""
    if SWAP:
        return tl.dot(w, tokens.T, acc, input_precision="ieee")
    else:
        return tl.dot(tokens, w.T, acc, input_precision="ieee")


@triton.jit
def halves(tile):
    """Left and right half of a tile [R, C]; both are in the registers of the same threads."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS]), [0, 2, 1]))


@triton.jit
def split_gate(acc, GATING: tl.constexpr, SWAP: tl.constexpr):
    """(gate, up) of a tile [C, BN], or [BN, C] when SWAP."""
    if SWAP:
        HALF: tl.constexpr = acc.shape[0] // 2
        if GATING == 1:
            return tl.split(tl.permute(tl.reshape(acc, [2, HALF, acc.shape[1]]), [1, 2, 0]))
        else:
            return tl.split(tl.permute(tl.reshape(acc, [HALF, 2, acc.shape[1]]), [0, 2, 1]))
    elif GATING == 1:
        return halves(acc)
    else:
        return tl.split(tl.reshape(acc, [acc.shape[0], acc.shape[1] // 2, 2]))


@triton.jit
def exp(x):
    """e^x of fp32 `x`, or 0 where that is not a normal number: `tl.exp` takes 3 instructions more for those alone."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation of fp32 `x`; a NaN stays one."""
    if ACT == "silu":
        return x / (1.0 + exp(-1.0 * x))  # `-x`, which is 0 - x, takes an instruction
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.where(x < 0, 0.0, x * x)


@triton.jit
def activated(
    acc, GATING: tl.constexpr, SWAP: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
):
    """The hidden tile of an fp32 tile of the up projection: half its rows if gated."""
    if GATING == 0:
        return activate(acc, ACT)
    else:
        gate, up = split_gate(acc, GATING, SWAP)
        if ACT == "gpt_oss":
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
            return (up + 1.0) * (gate / (1.0 + exp(-ALPHA * gate)))
        else:
            return activate(gate, ACT) * up
