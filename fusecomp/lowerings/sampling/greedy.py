"""Arg-max of each row of logits in one launch, in their own dtype.

Legend: N rows, V vocabulary, NS splits of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fusecomp.lowerings.device import target_of, uses_pdl, zeroed_counters
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2
from fusecomp.ops.sampling import INVALID_TOKEN

BLOCK = 4096
MAX_SPLITS = 32
PER_SM = 8


@triton.jit(do_not_specialize=["blocks"])
def greedy_kernel(
    logits,  # [N, V], last dim contiguous
    out,  # [N] int64
    part_best,  # [N, NS] fp32, scratch
    part_token,  # [N, NS] int32, scratch
    arrivals,  # [N] int32, zero before and after the launch
    vocab,
    blocks,  # of BLOCK logits, of one split
    stride,
    SPLITS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    BLOCK: tl.constexpr,
    INVALID: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """out[N] = first arg-max of each row, or INVALID where the maximum is not finite or the row has a NaN.

    Program (row, split) reads V / NS logits; the last of a row to arrive compares the splits. NaN counts as +inf, so
    the maximum shows it. Every load begins at a multiple of BLOCK, known to the compiler: else it reads one logit at a
    time. Bytes: N * V * itemsize.
    """
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * blocks
    last = tl.minimum(first + blocks, tl.cdiv(vocab, BLOCK))
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = tl.full([BLOCK], 0, tl.int32)
    for block in range(first, last):
        v = block * BLOCK + at
        x = tl.load(logits + row * stride + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))  # noqa: PLR0124, a NaN differs from itself
        token = tl.where(x > best, v, token)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    lowest = tl.min(tl.where(best == top, token, 2147483647), 0)
    if SPLITS > 1:
        tl.store(part_best + row * SPLITS + split, top)
        tl.store(part_token + row * SPLITS + split, lowest)
        tl.debug_barrier()  # both stores precede the release below
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(arrivals + row, 0)
            s = tl.arange(0, SPLITS_P2)
            tops = tl.load(part_best + row * SPLITS + s, mask=s < SPLITS, other=float("-inf"), cache_modifier=".cg")
            tokens = tl.load(part_token + row * SPLITS + s, mask=s < SPLITS, other=0, cache_modifier=".cg")
            top = tl.max(tops, 0)
            lowest = tl.min(tl.where((tops == top) & (s < SPLITS), tokens, 2147483647), 0)
            tl.store(out + row, tl.where(tl.abs(top) < float("inf"), lowest.to(tl.int64), INVALID))
    else:
        tl.store(out + row, tl.where(tl.abs(top) < float("inf"), lowest.to(tl.int64), INVALID))


def launch_greedy(logits: Tensor) -> Tensor:
    """Arg-max of each row of logits [N, V] (fp32, fp16 or bf16; last dim contiguous) as int64 [N].

    Safe under CUDA-graph capture, if a launch came before. Launches on one device must be ordered: they share counters.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    # As many programs as the GPU holds at once, for a program has one block in flight; powers of two, so that few
    # kernels serve every number of rows.
    most = min(MAX_SPLITS, PER_SM * target_of(logits).num_sms // rows, cdiv(vocab, BLOCK))
    wanted = 1 << max(0, most.bit_length() - 1)
    in_row = cdiv(vocab, BLOCK)
    blocks = cdiv(in_row, wanted)
    splits = cdiv(in_row, blocks)
    partial = rows * splits if splits > 1 else 0
    part_best = torch.empty(partial, dtype=torch.float32, device=logits.device)
    part_token = torch.empty(partial, dtype=torch.int32, device=logits.device)
    use_pdl = uses_pdl(logits)
    options = {"launch_pdl": True} if use_pdl else {}
    launch(
        greedy_kernel, (rows, splits),
        logits, out, part_best, part_token, zeroed_counters(logits.device, rows), vocab, blocks, logits.stride(0),
        SPLITS=splits, SPLITS_P2=next_power_of_2(splits), BLOCK=BLOCK, INVALID=INVALID_TOKEN, USE_PDL=use_pdl,
        num_warps=8, **options,
    )  # fmt: skip
    return out
