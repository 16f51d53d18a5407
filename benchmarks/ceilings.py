"""The device's own limits, measured in the same run: read-only stream bandwidth and dense matmul rate.

On a GPU the stream is a Triton reduction over a buffer far larger than the L2 and the product 8192 x 8192 x 8192 in
bf16, on random data (zeros run faster than real data). On a CPU both are smaller, and in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.timing import time_calls

STREAM_BYTES = {"cuda": 4 << 30, "cpu": 128 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of one device.

    Attributes:
        read_bytes_per_s: read-only stream.
        matmul_flops_per_s: square product in `matmul_dtype`.
    """

    read_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "read_TB_per_s": round(self.read_bytes_per_s / 1e12, 4),
            "matmul_TFLOP_per_s": round(self.matmul_flops_per_s / 1e12, 3),
            "matmul_dtype": self.matmul_dtype,
        }


@triton.jit
def _sum_kernel(x, out, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    # x [programs * STEPS * BLOCK] int32; program i sums its own contiguous range into out[i].
    base = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        total += tl.load(x + base + step * BLOCK + lanes)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a read-only stream: the best of a few kernel shapes, each a median over repeats."""
    size = STREAM_BYTES[device.type]
    if device.type != "cuda":
        return size / (time_calls(torch.rand(size // 4, device=device).sum, device, calls=7).median * 1e-3)
    x = torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    best = 0.0
    for block, steps, warps in ((4096, 1, 8), (4096, 4, 8), (8192, 2, 8), (8192, 8, 16), (2048, 4, 4)):
        grid = x.numel() // (block * steps)
        out = torch.empty(grid, dtype=torch.int32, device=device)

        def run(grid: int = grid, out: torch.Tensor = out, block: int = block, steps: int = steps, w: int = warps):
            _sum_kernel[(grid,)](x, out, BLOCK=block, STEPS=steps, num_warps=w)

        best = max(best, size / (time_calls(run, device, calls=15).median * 1e-3))
        expected = x.view(grid, -1)[:4].sum(1).to(torch.int32)
        if not torch.equal(out[:4], expected):
            raise RuntimeError("the read-bandwidth kernel computes a wrong sum")
    return best


def matmul_rate(device: torch.device) -> tuple[float, str]:
    """FLOP/s of a square product of random matrices, and its dtype."""
    n, dtype = MATMUL_SIZE[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    ms = time_calls(lambda: torch.mm(a, b), device, calls=20).median
    return 2 * n**3 / (ms * 1e-3), str(dtype).removeprefix("torch.")


def measure_ceilings(device: torch.device) -> Ceilings:
    """Both limits; frees its buffers."""
    bandwidth = read_bandwidth(device)
    rate, dtype = matmul_rate(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Ceilings(bandwidth, rate, dtype)
