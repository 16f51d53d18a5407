"""Canonical ops between real numbers and codes: `dequantize`, `quantize`, `fake_quantize`, and layouts of codes.

Legend: N rows, K columns of a weight, T tokens.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from fusecomp.ops.library import define

INT, FP8, FP4, NF4 = "int", "fp8", "fp4", "nf4"
KINDS = {INT: (4, 8), FP8: (8,), FP4: (4,), NF4: (4,)}  # kind -> widths in bits
TENSOR, TOKEN, BLOCK = "tensor", "token", "block"
INT4_OFFSET = 8  # of codes without zero points
FOLD_ORDER = (0, 2, 1, 3)  # quarters of a block of folded codes, by the nibble of a word that has them
FOLDS = (64, 32)  # the first that fits is taken: columns of a quarter of a block of folded codes

# Values of codes 0..15: OCP e2m1, and the quantiles of a normal distribution of QLoRA's appendix E.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST = {INT: 127.0, FP8: 448.0}  # of an activation's codes


@dataclass(frozen=True)
class WeightSpec:
    """How the codes of a tensor [..., N, K] lie and what they stand for.

    Attributes:
        kind: "int", "fp8" (e4m3fn), "fp4" (e2m1) or "nf4".
        bits: of one code: 8, or 4 with two codes in a byte along K, the low nibble first.
        rows: rows that share a scale; 0 for all.
        cols: columns that share a scale; 0 for all.
        dtype: of the result, as torch names it.
        fold: 0, or of 4-bit integers with zero points that are integers: columns of a quarter of a block. The block's
            i-th 16-bit word has the codes of column i of its quarters, lowest nibble first in the order of
            `FOLD_ORDER`: the low nibbles of its bytes are of the first half of the block, the high ones of the other.
    """

    kind: str
    bits: int
    rows: int
    cols: int
    dtype: str
    fold: int = 0

    def __post_init__(self) -> None:
        if self.bits not in KINDS.get(self.kind, ()):
            raise ValueError(f"weight spec: no {self.bits}-bit codes of kind {self.kind!r}; there are {KINDS}")
        if self.rows < 0 or self.cols < 0:
            raise ValueError(f"weight spec: {self.rows} rows and {self.cols} columns share a scale")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"weight spec: {self.dtype!r} is no dtype")
        if self.fold and ((self.kind, self.bits) != (INT, 4) or self.fold not in FOLDS):
            raise ValueError(f"weight spec: {self.kind}{self.bits} codes do not fold by {self.fold} columns")

    def to_text(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> WeightSpec:
        """Parse `to_text`'s output.

        Raises:
            ValueError: the text is no spec.
        """
        return WeightSpec(**json.loads(text))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def codes_dtype(self) -> torch.dtype:
        """What the codes are stored as."""
        return torch.uint8 if self.bits == 4 else torch.int8 if self.kind == INT else torch.float8_e4m3fn

    def shape(self, codes: torch.Size) -> tuple[int, ...]:
        """[..., N, K] of what codes of this shape stand for."""
        return (*codes[:-1], codes[-1] * (8 // self.bits))

    def scales(self, n: int, k: int) -> tuple[int, int]:
        """Rows and columns of the scale of [N, K] values."""
        return (-(-n // self.rows) if self.rows else 1), (-(-k // self.cols) if self.cols else 1)

    def describe(self) -> str:
        """In a few words, for reports."""
        name = f"{self.kind}{self.bits}" if self.kind == INT else self.kind
        across = {0: "all columns"}.get(self.cols, f"{self.cols} columns")
        down = {0: "all rows", 1: "a row"}.get(self.rows, f"{self.rows} rows")
        return f"{name}, a scale for {across} of {down}"


@dataclass(frozen=True)
class ActivationSpec:
    """How activations [..., T, K] become codes.

    Attributes:
        kind: "int" or "fp8".
        bits: 8.
        granularity: "tensor", "token" or "block" (of a token's columns): what shares a scale.
        block: columns of a block, otherwise 0.
        dynamic: the scale follows from the values; otherwise it is given.
        least_tokens: steps of fewer tokens keep their activations as they are.
    """

    kind: str
    bits: int = 8
    granularity: str = TOKEN
    block: int = 0
    dynamic: bool = True
    least_tokens: int = 0

    def __post_init__(self) -> None:
        if self.least_tokens < 0:
            raise ValueError(f"activation spec: steps of at least {self.least_tokens} tokens")
        if self.kind not in LARGEST or self.bits != 8:
            raise ValueError(f"activation spec: no {self.bits}-bit codes of kind {self.kind!r}")
        if self.granularity not in (TENSOR, TOKEN, BLOCK) or (self.block > 0) != (self.granularity == BLOCK):
            raise ValueError(f"activation spec: granularity {self.granularity!r} with blocks of {self.block}")

    def to_text(self) -> str:
        """Canonical JSON: equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_text(text: str) -> ActivationSpec:
        """Parse `to_text`'s output.

        Raises:
            ValueError: the text is no spec.
        """
        return ActivationSpec(**json.loads(text))

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.int8 if self.kind == INT else torch.float8_e4m3fn

    @property
    def codes(self) -> str:
        """The codes' type in a word: "int8" or "fp8"."""
        return f"{self.kind}{self.bits}" if self.kind == INT else self.kind

    def dequantized(self, dtype: str) -> WeightSpec:
        """What `dequantize` calls the codes and scales of these activations."""
        rows = 0 if self.granularity == TENSOR else 1
        return WeightSpec(self.kind, self.bits, rows, self.block, dtype)

    def describe(self) -> str:
        """In a few words, for reports."""
        what = f"{self.block} columns of a token" if self.granularity == BLOCK else f"a {self.granularity}"
        when = f", in steps of {self.least_tokens} tokens and more" if self.least_tokens else ""
        return f"{'dynamic' if self.dynamic else 'static'} {self.codes}, a scale for {what}{when}"


def code_values(q: Tensor, spec: WeightSpec) -> Tensor:
    """The numbers [..., N, K] that codes stand for before zero and scale, in fp32."""
    if spec.bits == 8:
        return q.to(torch.float32)
    q = unfold_codes(q, spec.fold) if spec.fold else q
    codes = torch.stack((q & 15, q >> 4), -1).flatten(-2)
    if spec.kind == INT:
        return codes.to(torch.float32)
    return _table(spec.kind, q.device)[codes.int()]


def fits_fold(k: int, cols: int, fold: int) -> bool:
    """Whether blocks folded by `fold` fill K columns, and no quarter of one has more than one scale."""
    block = 4 * fold
    return k % block == 0 and cols % fold == 0 and (cols % block == 0 or block % cols == 0)


def fold_codes(q: Tensor, fold: int) -> Tensor:
    """Bytes [..., K / 2] of 4-bit codes, the low nibble first, in the order of `WeightSpec.fold`."""
    a, b, c, d = q.unflatten(-1, (-1, 4, fold // 2)).unbind(-2)  # the quarters of each block
    words = (a & 15 | c << 4, b & 15 | d << 4, a >> 4 | c & 240, b >> 4 | d & 240)  # bytes of two words
    return torch.stack(words, -1).flatten(-3)


def unfold_codes(q: Tensor, fold: int) -> Tensor:
    """The inverse of `fold_codes`."""
    ac, bd, ac_next, bd_next = q.unflatten(-1, (-1, fold // 2, 4)).unbind(-1)
    quarters = (ac & 15 | ac_next << 4, bd & 15 | bd_next << 4, ac >> 4 | ac_next & 240, bd >> 4 | bd_next & 240)
    return torch.stack(quarters, -2).flatten(-3)


@functools.cache
def _table(kind: str, device: torch.device) -> Tensor:
    """Kept: while a CUDA graph is captured, nothing can be copied to the device."""
    return torch.tensor(FP4_VALUES if kind == FP4 else NF4_VALUES, dtype=torch.float32, device=device)


def scale_values(scale: Tensor) -> Tensor:
    """Scales in fp32; bytes are e8m0 exponents, of which 255 is no number."""
    if scale.dtype != torch.uint8:
        return scale.to(torch.float32)
    powers = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.to(torch.int32) - 127)
    return torch.where(scale == 255, torch.nan, powers)


def _spread(scale: Tensor, spec: WeightSpec, n: int, k: int) -> Tensor:
    """Scales (or zeros) as something that broadcasts to [..., N, K]."""
    wanted = spec.scales(n, k)
    if wanted == (1, 1) and scale.numel() == 1:
        return scale.reshape(())
    if scale.shape[-2:] != wanted:
        raise ValueError(f"dequantize: scales {tuple(scale.shape)} for {n} x {k} values of {spec.describe()}")
    if spec.cols:
        scale = scale.repeat_interleave(spec.cols, -1)[..., :k]
    if spec.rows > 1:
        scale = scale.repeat_interleave(spec.rows, -2)[..., :n, :]
    return scale


def dequantize_reference(q: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    """(code - zero) * scale [..., N, K] in the spec's dtype, computed in fp32 and rounded once.

    Args:
        q: codes [..., N, K] int8 or float8_e4m3fn, or [..., N, K / 2] uint8. Leading dims are experts.
        scale: [..., ceil(N / rows), ceil(K / cols)] of a float type, or uint8 e8m0 exponents; [1] if one serves all.
        zero: as scale, or None: then 4-bit integer codes stand for code - 8.

    Raises:
        ValueError: scales or zeros of another shape.
    """
    parsed = WeightSpec.from_text(spec)
    values = code_values(q, parsed)
    n, k = values.shape[-2:]
    if zero is not None:
        values = values - _spread(zero.to(torch.float32), parsed, n, k)
    elif parsed.kind == INT and parsed.bits == 4:
        values = values - INT4_OFFSET
    return (values * _spread(scale_values(scale), parsed, n, k)).to(parsed.torch_dtype)


def _dequantize_fake(q: Tensor, scale: Tensor, zero: Tensor | None, spec: str) -> Tensor:
    parsed = WeightSpec.from_text(spec)
    return q.new_empty(parsed.shape(q.shape), dtype=parsed.torch_dtype)


def quantize_reference(x: Tensor, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """Codes [..., T, K] of x and their scale, fp32: [1], [..., T, 1] or [..., T, ceil(K / block)].

    A dynamic scale makes the largest magnitude the largest code; of zeros it is 1. Integer codes are rounded to even
    and lie in [-127, 127]; fp8 codes saturate. NaN stays NaN in fp8, and makes a dynamic scale NaN.

    Args:
        scale: the static one, [1]; None if the spec is dynamic.

    Raises:
        ValueError: a scale for a dynamic spec, none for a static one, or a spec that leaves some steps as they are.
    """
    parsed = ActivationSpec.from_text(spec)
    if parsed.least_tokens:
        raise ValueError(f"quantize: codes of {parsed.describe()} are not those of every step; use fake_quantize")
    if (scale is None) != parsed.dynamic:
        raise ValueError(f"quantize: {'no' if scale is None else 'a'} scale for {parsed.describe()}")
    values, largest = x.to(torch.float32), LARGEST[parsed.kind]
    if scale is None:
        scale = _dynamic_scale(values.abs(), parsed) / largest
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = scale.to(torch.float32).reshape(1)
    spread = scale.repeat_interleave(parsed.block, -1)[..., : x.shape[-1]] if parsed.block else scale
    codes = (values / spread).clamp(-largest, largest)
    return (codes.round() if parsed.kind == INT else codes).to(parsed.codes_dtype), scale.clone()


def _dynamic_scale(magnitudes: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.granularity == TENSOR:
        return magnitudes.amax().reshape(1)
    if spec.granularity == BLOCK:
        missing = -magnitudes.shape[-1] % spec.block
        padded = torch.nn.functional.pad(magnitudes, (0, missing))
        return padded.unflatten(-1, (-1, spec.block)).amax(-1)
    return magnitudes.amax(-1, keepdim=True)


def _quantize_fake(x: Tensor, scale: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    parsed = ActivationSpec.from_text(spec)
    blocks = -(-x.shape[-1] // parsed.block) if parsed.block else 1
    shape = (1,) if parsed.granularity == TENSOR else (*x.shape[:-1], blocks)
    return x.new_empty(x.shape, dtype=parsed.codes_dtype), x.new_empty(shape, dtype=torch.float32)


def fake_quantize_reference(x: Tensor, scale: Tensor | None, spec: str) -> Tensor:
    """x [..., T, K] rounded to what its codes stand for, in x's dtype; as it is in steps below `least_tokens`.

    Args:
        scale: the static one, [1]; None if the spec is dynamic.

    Raises:
        ValueError: as `quantize`.
    """
    parsed = ActivationSpec.from_text(spec)
    if x.numel() < parsed.least_tokens * x.shape[-1]:
        return x.clone(memory_format=torch.contiguous_format)
    every = replace(parsed, least_tokens=0)
    codes, scales = quantize_reference(x, scale, every.to_text())
    dtype = str(x.dtype).removeprefix("torch.")
    return dequantize_reference(codes, scales, None, every.dequantized(dtype).to_text())


def _fake_quantize_fake(x: Tensor, scale: Tensor | None, spec: str) -> Tensor:
    return x.new_empty(x.shape)


define(
    "dequantize(Tensor q, Tensor scale, Tensor? zero, str spec) -> Tensor",
    dequantize_reference,
    _dequantize_fake,
)
define("quantize(Tensor x, Tensor? scale, str spec) -> (Tensor, Tensor)", quantize_reference, _quantize_fake)
define("fake_quantize(Tensor x, Tensor? scale, str spec) -> Tensor", fake_quantize_reference, _fake_quantize_fake)
