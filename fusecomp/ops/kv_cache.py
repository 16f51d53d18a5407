"""Layouts of a layer's paged KV cache: plain, or FP8 codes with a scale per token and kv head.

    plain  [num_blocks, 2, G, B, D] in the model's dtype; index 0 of dim 1 is K, 1 is V
    FP8    [num_blocks, G, W] bytes: of each page and kv head B * D codes (e4m3fn) of K, as many of V, then B pairs of
           bf16 scales, K's and V's; W is a multiple of 16, so that every page can be read 16 bytes at a time

A value is code * scale. With s the least power of two such that max |x| <= 448 * s over the D values of a head, its
scale is the one of s, 7/8 s, 3/4 s and 5/8 s that gives the least squared error; what exceeds 448 scales becomes 448
scales. So a value has at most seven significant bits: it is exact in bf16 and fp32 (in fp16 as long as it is not below
fp16's least, 2^-24), and every kernel reads the same key, whether it scales codes, or scores after the product. The
error is 2.5% (relative RMS) on Gaussian heads of 128 and 2.1% on heads with outliers; max / 448 as the scale, whose
values would be rounded again wherever they are multiplied, has 2.6% and 1.9%; s alone has 2.65% and 2.67%.

Legend: T tokens, G kv heads, B page size, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AUTO, FP8 = "auto", "fp8"
E4M3_MAX = 448.0
# Below it (no head of a real model) a scale does not go: kernels divide by scales, and by ratios of them.
LEAST_SCALE = 2.0**-100
# Scales that are tried, of the least power of two that fits, and units of squared error per squared code.
RATIOS, ERROR_UNITS = (1.0, 0.875, 0.75, 0.625), 64.0
ALIGNMENT = 16
PAIR_BYTES = 4  # the two scales of a token and kv head


@dataclass(frozen=True)
class KVLayout:
    """Sizes of one layer's cache."""

    heads: int
    page_size: int
    head_dim: int
    quantized: bool = False

    @classmethod
    def of(cls, kv_cache: Tensor, head_dim: int) -> KVLayout:
        """That of a cache (or its fake) whose heads have `head_dim` values."""
        if not is_quantized(kv_cache):
            return cls(kv_cache.shape[2], kv_cache.shape[3], kv_cache.shape[4])
        heads, width = kv_cache.shape[1:]
        return cls(heads, width // (2 * head_dim + PAIR_BYTES), head_dim, quantized=True)

    @property
    def scales_at(self) -> int:
        """Byte of an FP8 page, of one kv head, where its scales begin."""
        return _round_up(2 * self.page_size * self.head_dim, PAIR_BYTES)

    @property
    def width(self) -> int:
        """W: bytes of an FP8 page of one kv head. Padding never reaches the size of another token."""
        return _round_up(self.scales_at + PAIR_BYTES * self.page_size, ALIGNMENT)

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one block, where the model computes in `dtype`."""
        if self.quantized:
            return self.heads * self.width
        return 2 * self.heads * self.page_size * self.head_dim * dtype.itemsize

    def zeros(self, num_blocks: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A cache whose every value is zero."""
        if self.quantized:
            return torch.zeros(num_blocks, self.heads, self.width, dtype=torch.uint8, device=device)
        return torch.zeros(num_blocks, 2, self.heads, self.page_size, self.head_dim, dtype=dtype, device=device)

    def codes(self, kv_cache: Tensor) -> Tensor:
        """View [num_blocks, G, 2, B, D] of an FP8 cache's codes, as bytes."""
        size = 2 * self.page_size * self.head_dim
        return kv_cache[..., :size].unflatten(-1, (2, self.page_size, self.head_dim))

    def scales(self, kv_cache: Tensor) -> Tensor:
        """View bf16 [num_blocks, G, B, 2] of an FP8 cache's scales."""
        end = self.scales_at + PAIR_BYTES * self.page_size
        return kv_cache[..., self.scales_at : end].view(torch.bfloat16).unflatten(-1, (self.page_size, 2))


def is_quantized(kv_cache: Tensor) -> bool:
    """Whether a cache holds codes."""
    return kv_cache.dtype == torch.uint8


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, as bytes, and scales fp32 [...] of heads x [..., D]; NaN and infinity become NaN."""
    finite = x.isfinite()
    x = torch.where(finite, x.float(), 0.0)
    # max = 1.m * 2^e has s = 2^(e - 8) where 1.m <= 1.75 = 448 / 2^8, and twice that above: the addition carries.
    exponent = ((x.abs().amax(-1).view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale = (exponent << 23).view(torch.float32).clamp(min=LEAST_SCALE)
    y = x / scale[..., None]
    codes, chosen, least = None, torch.ones_like(scale), None
    for ratio in RATIOS:
        code = (y * (1 / ratio)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        off = code.float() * ratio - y
        # Integers add up to the same in any order: all kernels, and this, choose alike.
        error = (off * off * ERROR_UNITS).to(torch.int32).sum(-1)
        if codes is None or least is None:
            codes, least = code.view(torch.uint8), error
            continue
        better = error < least
        codes = torch.where(better[..., None], code.view(torch.uint8), codes)
        chosen, least = torch.where(better, ratio, chosen), torch.where(better, error, least)
    assert codes is not None
    return torch.where(finite, codes, 0x7F), scale * chosen


def dequantize_heads(codes: Tensor, scale: Tensor) -> Tensor:
    """fp32 values [..., D] of codes (bytes) and their scales [...]."""
    return codes.view(torch.float8_e4m3fn).float() * scale.float()[..., None]


def as_cached(x: Tensor) -> Tensor:
    """Heads x [..., D] as an FP8 cache returns them, in x's dtype."""
    return dequantize_heads(*quantize_heads(x)).to(x.dtype)


def fill_random(kv_cache: Tensor, head_dim: int) -> None:
    """Finite random values into every slot of a cache (or of some of its blocks)."""
    if not is_quantized(kv_cache):
        kv_cache.normal_()
        return
    layout = KVLayout.of(kv_cache, head_dim)
    codes = layout.codes(kv_cache)
    codes.copy_(torch.randint(0, 0x60, codes.shape, dtype=torch.uint8, device=kv_cache.device))
    layout.scales(kv_cache).fill_(2.0**-5)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
