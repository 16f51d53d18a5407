"""What a step of few tokens writes stays in the L2, while its weights and keys stream through.

Stored in the usual way, a line is pushed out by the stream, written to memory, and read back by the launch that wants
it; and memory that turns from reading to writing costs several times what the bytes do. Lines that are evicted last
stay: buffers of the layers are the same few megabytes.

Measured on an H200 (4.70 TB/s read): down projections of fp8 experts, 805 MB of codes, 8.4 MB of results, take 193.4 us
as usual, 181.7 with results kept, 180.4 without storing them. With results evicted first 182.7, but whole steps gain
nothing by that: see docs/measurements.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

KEEP: tl.constexpr = tl.constexpr("evict_last")  # eviction policy of what few tokens write
KEPT_ROWS: tl.constexpr = tl.constexpr(512)  # most rows whose results are kept by kernels that serve any number
KEPT_ROW_BYTES = 1 << 16  # and the longest row; 362 of them, the most that matmuls keep, are half an H200's L2


@triton.jit
def store_rows(at, value, mask, num_rows):
    """Stores a part of a result of `num_rows` rows, kept up to `KEPT_ROWS`."""
    if num_rows <= KEPT_ROWS:
        tl.store(at, value, mask=mask, eviction_policy=KEEP)
    else:
        tl.store(at, value, mask=mask)


def store_policy(out: Tensor, most_tokens: int) -> str:
    """Eviction policy of the stores to out [T, N], or parts [S, T, N], of a kernel that serves any number of tokens.

    It is a constant of the kernel. It changes with the number of tokens where the tables' choice of a launch does, and
    nowhere else: a start compiles one kernel for each launch, and a step between would compile another.

    Args:
        most_tokens: whose results are kept: the last that are served by the launch for 256.
    """
    tokens = out.shape[-2]
    row_bytes = out.numel() // max(tokens, 1) * out.element_size()
    return KEEP.value if tokens <= most_tokens and row_bytes <= KEPT_ROW_BYTES else ""
