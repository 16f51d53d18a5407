"""A weight that is read after the experts, asked into the L2 while a router's logits leave the memory idle.

At one token the logits take microseconds and 0.5 MB of reading, and which experts follow is known only with them; the
linear behind the experts is known before.

Measured on an H100 (3.19 TB/s read), bf16, Qwen3-30B-A3B without attention, a chain of six layers
(`benchmarks/moe_tail.py`), us a layer at one token: 45.1 without, 44.4, 44.0, 45.0 and 44.7 with 2, 5, 10 and 15 MB of
the next projection's 21. No gain at 8 and 64 tokens, from router kernels that asked likewise. Nor was there any from
asking for the first bytes of the chosen experts' weights when they are chosen (8 tokens), or for those of the first
experts before (64 tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 1
BYTES = 5 << 20
ALIGNMENT = 16  # bytes of an address, and of a size, that is asked for


@triton.jit
def ask_for(weight, program, SIZE: tl.constexpr, THREADS: tl.constexpr):
    """Ask the L2 for the program's SIZE bytes from `weight` on, by THREADS threads that have as many each."""
    PIECE: tl.constexpr = SIZE // THREADS
    at = weight.to(tl.int64) + program.to(tl.int64) * SIZE + tl.arange(0, THREADS).to(tl.int64) * PIECE
    asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;"
    size = tl.full([THREADS], PIECE, tl.int32)
    tl.inline_asm_elementwise(asm, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1)


def asked_bytes(weight: Tensor | None, tokens: int, programs: int, num_warps: int, use_pdl: bool) -> int:
    """Bytes that each program of a launch asks for; 0 for nothing.

    Args:
        weight: of the linear that follows, or None.
        use_pdl: only GPUs that have programmatic dependent launch, and use it, have the instruction.
    """
    if weight is None or not use_pdl or tokens > MAX_TOKENS:
        return 0
    if not weight.is_contiguous() or weight.data_ptr() % ALIGNMENT:
        return 0
    unit = 32 * num_warps * ALIGNMENT
    return min(BYTES, weight.numel() * weight.element_size()) // programs // unit * unit
