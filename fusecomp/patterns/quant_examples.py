"""Callables with dequantized weights and activations, and look-alikes that must stay as they are.

Each takes codes as the checkpoint has them; the reference is the same function, dequantized in the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from fusecomp.patterns.base import Example
from fusecomp.patterns.functional_examples import rms

T, K, N, E = 7, 48, 32, 4

INT4 = WeightSpec(INT, 4, 1, 16, "float32")
INT8 = WeightSpec(INT, 8, 1, 0, "float32")
FP8_TENSOR, FP8_BLOCK = WeightSpec(FP8, 8, 0, 0, "float32"), WeightSpec(FP8, 8, 16, 32, "float32")
FP4_SPEC, NF4_SPEC = WeightSpec(FP4, 4, 1, 16, "float32"), WeightSpec(NF4, 4, 1, 16, "float32")


def random_codes(shape: tuple[int, ...], spec: WeightSpec, generator: torch.Generator) -> Tensor:
    """Codes of a tensor of this shape [..., N, K]; fp8 ones are finite."""
    if spec.bits == 4:
        return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    if spec.kind == INT:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return (torch.randn(shape, generator=generator) * 50).to(torch.float8_e4m3fn)


def random_weight(
    shape: tuple[int, ...], spec: WeightSpec, dtype: torch.dtype, *, zero: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales that make products near 1, and zero points."""
    generator = torch.Generator().manual_seed(seed)
    q = random_codes(shape, spec, generator)
    size = (*shape[:-2], *spec.scales(*shape[-2:]))
    spread = {(INT, 4): 5.0, (INT, 8): 73.0, (FP8, 8): 50.0, (FP4, 4): 3.0, (NF4, 4): 0.5}[spec.kind, spec.bits]
    scale = ((torch.rand(size, generator=generator) + 0.5) / (spread * shape[-1] ** 0.5)).to(dtype)
    zeros = torch.randint(4, 12, size, generator=generator).to(dtype) if zero else None
    return q, scale, zeros


def texts(spec: WeightSpec) -> dict[torch.dtype, str]:
    """The spec's text for results of each dtype."""
    names = ("float32", "float16", "bfloat16")
    return {getattr(torch, name): replace(spec, dtype=name).to_text() for name in names}


def _weight_case(
    name: str,
    function: Callable,
    spec: WeightSpec = INT4,
    *more: tuple[int, ...],
    shape: tuple[int, ...] = (N, K),
    zero: bool = False,
    **facts: object,
) -> Example:
    """`function(x, weight, *more)`, the weight dequantized in the graph."""
    by_dtype = texts(spec)

    def dequantized(x: Tensor, q: Tensor, scale: Tensor, *rest: Tensor) -> object:
        zero_points, others = (rest[0], rest[1:]) if zero else (None, rest)
        return function(x, OPS.dequantize(q, scale, zero_points, by_dtype[x.dtype]), *others)

    def inputs(dtype: torch.dtype) -> tuple:
        q, scale, zeros = random_weight(shape, spec, dtype, zero=zero)
        return (draw(dtype, (1, T, K))[0], q, scale, *(() if zeros is None else (zeros,)), *draw(dtype, *more))

    return Example(name, dequantized, inputs, **facts)  # type: ignore[arg-type]


def draw(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random values, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _swiglu(x: Tensor, w: Tensor) -> Tensor:
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def quant_linear_examples() -> list[Example]:
    """Every kind of codes and every place a linear is fused in, and what must be left alone."""
    case, vector, full = _weight_case, (N,), (1, T, N)
    own, other = texts(INT8), replace(INT8, dtype="float64").to_text()

    def codes(dtype: torch.dtype) -> tuple:
        return (*draw(dtype, (1, T, K)), *random_weight((N, K), INT8, dtype)[:2])

    def computed_codes(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, OPS.dequantize(q + 1, scale, None, own[x.dtype]))

    def other_dtype(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, OPS.dequantize(q, scale, None, other).to(x.dtype))

    return [
        case("int4", F.linear),
        case("int4_zero", F.linear, zero=True),
        case("int4_group_past_k", F.linear, replace(INT4, cols=32)),
        case("int8", F.linear, INT8),
        case("fp8_tensor", F.linear, FP8_TENSOR),
        case("fp8_block", F.linear, FP8_BLOCK),
        case("fp4", F.linear, FP4_SPEC),
        case("nf4", F.linear, NF4_SPEC),
        case("bias", F.linear, INT4, vector),
        case("residual", lambda x, w, r: r + F.linear(x, w), INT8, full),
        case("swiglu", _swiglu, INT4, shape=(2 * N, K)),
        case("norm", lambda x, w, g: F.linear(rms(x, g), w), INT4, (K,)),
        case("act_order", lambda x, w: F.linear(x.index_select(-1, torch.arange(K).flip(0)), w)),
        case("read_twice", lambda x, w: (F.linear(x, w), F.linear(x + 1, w))),
        case("also_read", lambda x, w: (F.linear(x, w), w.sum()), matches=0, reason="is read by sum"),
        case("untransposed", lambda x, w: x @ w, INT8, shape=(K, N), matches=0, reason="is read by mm"),
        case("no_linear", lambda x, w: w * 2, matches=0, reason="is read by mul"),
        case("experts_of_a_linear", lambda x, w: torch.einsum("btk,enk->ebtn", x, w), INT8, shape=(2, N, K), matches=0,
             reason="no linear by it"),
        Example("computed_codes", computed_codes, codes, 0, "its codes are computed by add"),
        Example("another_dtype", other_dtype, codes, 0, "float64"),
    ]  # fmt: skip


def _experts_inputs(spec: WeightSpec, *, zero: bool = False) -> Callable[[torch.dtype], tuple]:
    """x, residual, ids, weights, up, down; weights as codes, scales and zero points or None."""

    def inputs(dtype: torch.dtype) -> tuple:
        x, residual, scores = draw(dtype, (T, K), (1, T, K), (T, E))
        ids = scores.argsort(1)[:, :2]
        up = random_weight((E, 2 * N, K), spec, dtype, zero=zero)
        down = random_weight((E, K, N), spec, dtype, zero=zero, seed=1)
        return x, residual, ids, scores[:, :2].softmax(1), *(p for p in (*up, *down) if p is not None)

    return inputs


def quant_experts_examples() -> list[Example]:
    """Experts by dequantized weights, and what must be left alone."""

    def case(name: str, spec: WeightSpec, ending: Callable, *, zero: bool = False, **facts: object) -> Example:
        by_dtype = texts(spec)

        def function(x: Tensor, residual: Tensor, ids: Tensor, weights: Tensor, *parts: Tensor) -> object:
            half = len(parts) // 2
            up, down = (
                OPS.dequantize(p[0], p[1], p[2] if zero else None, by_dtype[x.dtype])
                for p in (parts[:half], parts[half:])
            )
            return ending(x, residual, ids, weights, up, down)

        return Example(name, function, _experts_inputs(spec, zero=zero), **facts)  # type: ignore[arg-type]

    def experts(x: Tensor, _: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return OPS.experts(x, ids, weights, up, None, down, None, "silu", True, False, False)

    def residual(x: Tensor, r: Tensor, *rest: Tensor) -> Tensor:
        return r + experts(x, r, *rest).view(1, T, K)

    def read_elsewhere(x: Tensor, r: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> object:
        return experts(x, r, ids, weights, up, down), up.sum()

    def turned(x: Tensor, _: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
        return OPS.experts(x, ids, weights, up, None, down, None, "silu", True, False, True)

    def put_in_order(x: Tensor, r: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        order = torch.arange(K - 1, -1, -1).expand(up.shape)
        return experts(x, r, ids, weights, up.gather(-1, order), down)

    def one_quantized(x: Tensor, r: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return experts(x, r, ids, weights, up, down * 2)

    return [
        case("int4", INT4, experts),
        case("int4_zero", INT4, experts, zero=True),
        case("fp8_block", FP8_BLOCK, experts),
        case("residual", INT8, residual),
        case("read_elsewhere", INT8, read_elsewhere, matches=0, reason="up weights are also read by sum"),
        case("turned", FP4_SPEC, turned),
        case("put_in_order", INT8, put_in_order, matches=0, reason="up weights are put in another order"),
        case("one_quantized", INT8, one_quantized, matches=0, reason="its down weights are not quantized"),
    ]
