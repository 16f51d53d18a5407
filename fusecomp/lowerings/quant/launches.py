"""Launches of the kernels of quantized weights, as a configuration says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.launch import ALIGNMENT, launch
from fusecomp.lowerings.linear.epilogue import epilogue_hook, full_rows, operand_strides, unit_stride
from fusecomp.lowerings.linear.large_heuristics import tma_reads
from fusecomp.lowerings.linear.skinny import split_scratch, split_steps
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.quant import heuristics, pieces
from fusecomp.lowerings.quant.digits import digits_kernel
from fusecomp.lowerings.quant.folded import folded_kernel, unfold_kernel
from fusecomp.lowerings.quant.folded_digit_rows import launch_folded_digits
from fusecomp.lowerings.quant.folded_digits import folded_digits_kernel
from fusecomp.lowerings.quant.folded_parts import folded_parts_kernel
from fusecomp.lowerings.quant.folded_wide import folded_wide_kernel
from fusecomp.lowerings.quant.held_launch import run_held
from fusecomp.lowerings.quant.heuristics import (
    DIGITS,
    FOLDED,
    FOLDED_DIGITS,
    FOLDED_HELD,
    FOLDED_WIDE,
    TILE,
    VECTOR,
    WORD_VECTOR,
    QuantConfig,
)
from fusecomp.lowerings.quant.kinds import code_kind
from fusecomp.lowerings.quant.tile import dequantize_kernel, quant_tile_kernel
from fusecomp.lowerings.quant.vector import quant_vector_kernel
from fusecomp.lowerings.quant.word_vector import word_vector_kernel
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import FP8, INT4_OFFSET, WeightSpec
from fusecomp.ops.quant_linear import QuantShape, quant_shape


@dataclass(frozen=True)
class _Call:
    """One call of `run_quant`, as kernels take it.

    Attributes:
        x: [T, K], last dim contiguous.
        q, zero: as they are stored, and as `zero_points` gives them.
        norm_weight: [K], or None where the norm has none, or there is no norm.
        args, strides: of the epilogue.
        common: constants of all kernels, and the launch's options.
    """

    config: QuantConfig
    x: Tensor
    q: Tensor
    scale: Tensor
    zero: Tensor | None
    out: Tensor
    norm_weight: Tensor | None
    eps: float
    args: tuple[Tensor, ...]
    strides: tuple[int, ...]
    spec: WeightSpec
    shape: QuantShape
    common: dict[str, Any]

    @property
    def scale_columns(self) -> int:
        return self.spec.scales(self.shape.groups * self.shape.n, self.shape.k)[1]

    @property
    def blocks(self) -> int:
        """Programs that all features take."""
        return cdiv(self.shape.n, self.config.block_r // self.shape.groups)

    @property
    def asm(self) -> bool:
        """Whether a kernel's assembly serves: on NVIDIA's GPUs, of 16-bit inputs."""
        return self.q.is_cuda and target_of(self.q).backend == "cuda" and self.shape.dtype != "float32"

    @property
    def exact_norm(self) -> bool:
        return self.common["NORM"] > 0 and self.x.dtype == torch.float16

    def splits(self, step: int) -> tuple[int, int, int, tuple[Tensor | None, ...]]:
        """(programs, steps of a split, splits, scratch) of a kernel that splits K by steps of so many columns."""
        config = self.config
        teams = self.blocks * cdiv(len(self.x), config.block_t)
        per_split, splits = split_steps(cdiv(self.shape.k, step), config.splits)
        return teams * splits, per_split, splits, split_scratch(self.x, teams, splits, config.block_r, config.block_t)

    def scale_words(self) -> tuple[list[Tensor | None], bool]:
        """Scales and zero points, and whether they are words of a folded tile's two."""
        given = [part for part in (self.scale, self.zero) if part is not None]
        words = all(part.dtype == self.x.dtype and part.storage_offset() % 2 == 0 for part in given)
        packed = words and heuristics.packs_scales(self.shape)
        both = (self.scale, self.zero)
        return [part.view(torch.int32) if packed and part is not None else part for part in both], packed

    def tiled(self, without: Sequence[str] = ()) -> tuple[Tensor, dict[str, Any]]:
        """The codes as a kernel of codes that are not folded reads them, and its constants."""
        codes, layout = _layout(self.q, self.zero, self.spec)
        block_k = self.config.block_k
        constants = self.common | {"BLOCK_K": block_k, "EVEN_K": self.shape.k % block_k == 0, **layout}
        return codes, {name: value for name, value in constants.items() if name not in without}


def run_quant(
    config: QuantConfig,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    norm_weight: Tensor | None,
    operands: Sequence[Tensor],
    program: Program,
    spec: WeightSpec,
    out: Tensor,
    use_pdl: bool,
) -> None:
    """out[T, N] = epilogue(norm(x) @ dequantize(q)^T) as `config` says, in one launch; of norms only an RMSNorm.

    Launches on one device must be ordered, as those of one stream or graph are: they share counters.
    """
    args, norm = full_rows(operands, program), program.norm
    scheme = 0 if norm is None else 1 if norm_weight is None else 3 if norm.plus_one else 2
    common = {
        "G": program.groups, "BLOCK_R": config.block_r, "NORM": scheme, "EPILOGUE": epilogue_hook(program),
        "USE_PDL": use_pdl, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if use_pdl:
        common["launch_pdl"] = True
    RUNS[config.kernel](
        _Call(
            config, unit_stride(x), q, scale, zero_points(zero), out, norm_weight if scheme >= 2 else None,
            0.0 if norm is None else norm.eps, args, operand_strides(program, args), spec,
            quant_shape(x.dtype, q, zero, program, spec), common,
        )
    )  # fmt: skip


def _run_held(c: _Call) -> None:
    options = c.common | {"ASM": c.asm}
    run_held(c.config, c.x, c.q, c.scale, c.zero, c.norm_weight, c.args, c.strides, c.out, c.eps, options)


def _run_folded_digits(c: _Call) -> None:
    config, spec, (n, k) = c.config, c.spec, (c.shape.n, c.shape.k)
    digits, sums = launch_folded_digits(c.x, spec.fold, c.common["NORM"], c.norm_weight, c.eps)
    programs, per_split, splits, scratch = c.splits(4 * spec.fold)
    both, packed = c.scale_words()
    q, columns = c.q.view(torch.uint8), 2 * spec.fold
    digit_tiles = TensorDescriptor(digits.view(-1, k), [2 * len(c.x), k], [k, 1], [2 * config.block_t, columns])
    q_tiles = TensorDescriptor(q, list(q.shape), [k // 2, 1], [config.block_r // c.shape.groups, columns])
    launch(
        folded_digits_kernel, (programs,),
        digit_tiles, sums, q_tiles, *both, c.out, scratch[0], scratch[2], c.args, c.strides, len(c.x), n, k,
        per_split, c.out.stride(0), c.scale_columns, BLOCK_T=config.block_t, FOLD=spec.fold, SPLITS=splits,
        PACKED=packed, ASM=c.asm, ROWS=spec.rows, COLS=spec.cols,
        **{name: value for name, value in c.common.items() if name != "NORM"},
    )  # fmt: skip


def _run_wide(c: _Call) -> None:
    assert c.common["NORM"] == 0, "so many tokens are normed by a launch of its own"
    config, spec, (n, k) = c.config, c.spec, (c.shape.n, c.shape.k)
    programs, per_split, splits, scratch = c.splits(config.block_k)
    both, packed = c.scale_words()
    x_tiles = input_tiles(c.x, config)
    launch(
        folded_wide_kernel, (programs,),
        c.x, x_tiles, c.q.view(torch.int16), *both, c.out, scratch[0], scratch[2], c.args, c.strides, len(c.x), n, k,
        per_split, c.x.stride(0), c.out.stride(0), c.scale_columns, BLOCK_T=config.block_t, FOLD=spec.fold,
        WORDS=config.block_k // 4, SPLITS=splits, AHEAD=config.ahead, PACKED=packed, ASM=c.asm, ROWS=spec.rows,
        COLS=spec.cols, USE_TMA=x_tiles is not None,
        **{name: value for name, value in c.common.items() if name != "NORM"},
    )  # fmt: skip


def _run_folded(c: _Call) -> None:
    config, spec, (n, k) = c.config, c.spec, (c.shape.n, c.shape.k)
    step = 4 * spec.fold * config.parts
    programs, per_split, splits, scratch = c.splits(step)
    parts = {"PARTS": config.parts, "EVEN_K": k % step == 0, "ONE": len(c.x) == 1} if config.parts > 1 else {}
    launch(
        folded_kernel if config.parts == 1 else folded_parts_kernel, (programs,),
        c.x, c.q.view(torch.int16), c.scale, c.zero, c.out, c.norm_weight, *scratch, c.args, c.strides, len(c.x), n, k,
        per_split, c.eps, c.x.stride(0), c.out.stride(0), c.scale_columns, BLOCK_T=config.block_t, FOLD=spec.fold,
        SPLITS=splits, SUMS=config.sums, EARLY=config.early, AHEAD=config.ahead, ASM=c.asm, ROWS=spec.rows,
        COLS=spec.cols, EXACT_NORM=c.exact_norm, **parts, **c.common,
    )  # fmt: skip


def _run_words(c: _Call) -> None:
    codes, constants = c.tiled(without=("OFFSET", "COLS"))
    norm_weight = None if c.norm_weight is None else _quads(c.norm_weight)
    launch(
        word_vector_kernel, (c.blocks,),
        _quads(c.x), codes.view(torch.int32), c.scale, c.out, norm_weight, c.args, c.strides, c.shape.n, c.shape.k,
        c.eps, c.scale_columns, DTYPE=getattr(tl, c.shape.dtype), WARPS=c.config.num_warps,
        AHEAD=c.config.ahead if c.asm and c.shape.k % 16 == 0 else 0, **constants,
    )  # fmt: skip


def _run_vector(c: _Call) -> None:
    codes, constants = c.tiled()
    launch(
        quant_vector_kernel, (c.blocks,),
        c.x, codes, c.scale, c.zero, c.out, c.norm_weight, c.args, c.strides, c.shape.n, c.shape.k, c.eps,
        c.scale_columns, UNIT=heuristics.unit(c.shape), **constants,
    )  # fmt: skip


def _run_digits(c: _Call) -> None:
    config, (n, k) = c.config, (c.shape.n, c.shape.k)
    codes, constants = c.tiled(without=("OFFSET",))
    programs, per_split, splits, scratch = c.splits(config.block_k)
    q_tiles = TensorDescriptor(codes, list(codes.shape), [k, 1], [config.block_r // c.shape.groups, config.block_k])
    launch(
        digits_kernel, (programs,),
        c.x, q_tiles, c.scale, c.out, c.norm_weight, *scratch, c.args, c.strides, len(c.x), n, k, per_split, c.eps,
        c.x.stride(0), c.out.stride(0), c.scale_columns, BLOCK_T=config.block_t, SPLITS=splits, **constants,
    )  # fmt: skip


def _run_tile(c: _Call) -> None:
    config, (n, k) = c.config, (c.shape.n, c.shape.k)
    codes, constants = c.tiled()
    programs, per_split, splits, scratch = c.splits(config.block_k)
    words = heuristics.reads_words(config, c.shape)
    launch(
        quant_tile_kernel, (programs,),
        c.x, codes.view(torch.int32) if words else codes, c.scale, c.zero, c.out, c.norm_weight, *scratch, c.args,
        c.strides, len(c.x), n, k, per_split, c.eps, c.x.stride(0), c.out.stride(0), c.scale_columns,
        BLOCK_T=config.block_t, SPLITS=splits, EARLY=config.early, HALVES=config.halves, EXACT_NORM=c.exact_norm,
        WORDS=words, ASM=c.asm, **constants,
    )  # fmt: skip


RUNS: dict[str, Callable[[_Call], None]] = {
    VECTOR: _run_vector,
    WORD_VECTOR: _run_words,
    TILE: _run_tile,
    DIGITS: _run_digits,
    FOLDED: _run_folded,
    FOLDED_DIGITS: _run_folded_digits,
    FOLDED_WIDE: _run_wide,
    FOLDED_HELD: _run_held,
}


def launch_dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    """`fusecomp::dequantize` [..., N, K], contiguous; `refusal` must be None."""
    *leading, n, k = spec.shape(q.shape)
    out = torch.empty((*leading, n, k), dtype=spec.torch_dtype, device=q.device)
    if out.numel() == 0:
        return out
    rows, columns = spec.scales(n, k)
    if spec.fold:
        launch(
            unfold_kernel, (cdiv(n, 16), k // (4 * spec.fold), out.numel() // (n * k)),
            q.view(torch.int16), scale, zero_points(zero), out, n, k, rows, columns, BLOCK_R=16, FOLD=spec.fold,
            ROWS=spec.rows, COLS=spec.cols, num_warps=4,
        )  # fmt: skip
        return out
    codes, layout = _layout(q, zero, spec)
    zero = zero_points(zero)
    block_r, block_k = 16, heuristics.fitting_columns(256, spec.cols)
    launch(
        dequantize_kernel, (cdiv(n, block_r), cdiv(k, block_k), out.numel() // (n * k)),
        codes, scale, zero, out, n, k, rows, columns, BLOCK_R=block_r, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
        num_warps=4, **layout,
    )  # fmt: skip
    return out


def zero_points(zero: Tensor | None) -> Tensor | None:
    """Zero points as a kernel reads them: those in fp8 are bytes where a GPU does not convert it."""
    if zero is None or zero.dtype != torch.float8_e4m3fn:
        return zero
    native = zero.is_cuda and code_kind(FP8, 8, target_of(zero)) == pieces.NATIVE_FP8
    return zero if native else zero.view(torch.int8)


def _layout(q: Tensor, zero: Tensor | None, spec: WeightSpec) -> tuple[Tensor, dict[str, Any]]:
    """The codes as a kernel reads them, and its KIND, OFFSET, ROWS and COLS."""
    kind = code_kind(spec.kind, spec.bits, target_of(q))
    if kind == pieces.NATIVE_FP8 and not q.is_cuda:
        kind = pieces.FP8  # the interpreter, which stands for GPUs without a conversion of fp8
    offset = float(INT4_OFFSET) if kind == pieces.INT4 and zero is None else 0.0
    constants = {"KIND": kind, "OFFSET": offset, "ROWS": spec.rows, "COLS": spec.cols}
    return (q.view(torch.uint8) if kind == pieces.FP8 else q), constants


def input_tiles(x: Tensor, config: QuantConfig) -> TensorDescriptor | None:
    """x [T, K] in blocks of a program's tokens by a step's words; None where TMA cannot or shall not read it."""
    words = config.block_k // 4
    if not (config.use_tma and target_of(x).has_tma and tma_reads(x)):
        return None
    if x.dtype == torch.float32 or words * x.element_size() < ALIGNMENT:
        return None
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [config.block_t, words])


def _quads(x: Tensor) -> Tensor:
    """One token, or a norm's weight, [K] as words of four 16-bit numbers."""
    x = x.reshape(-1)
    return (x if x.storage_offset() % 4 == 0 else x.clone()).view(torch.int64)
