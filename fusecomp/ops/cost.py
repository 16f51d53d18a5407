"""Symbolic cost of canonical ops: bytes moved and floating-point operations as sympy expressions.

Symbols: T tokens in the step, S rows, ctx mean context length of a row (all its keys).
The figures count each input once and each output once: they are the floor, not what a kernel does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from fusecomp.ops.kv_cache import PAIR_BYTES, is_quantized
from fusecomp.ops.linear_pair import LINEAR_ARGS, QUANT_ARGS
from fusecomp.ops.quant import WeightSpec
from fusecomp.ops.router import RouteSpec

T, S, CONTEXT = sympy.symbols("T S ctx", positive=True)


@dataclass(frozen=True)
class Cost:
    """Bytes moved through device memory and floating-point operations, as expressions in T, S and ctx."""

    bytes: sympy.Expr
    flops: sympy.Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def at(self, tokens: int, rows: int, context: int) -> tuple[float, float]:
        """Bytes and FLOPs at concrete sizes."""
        point = {T: tokens, S: rows, CONTEXT: context}
        return float(self.bytes.subs(point)), float(self.flops.subs(point))


ZERO = Cost(sympy.Integer(0), sympy.Integer(0))


def _paged_attention(q: Any, k: Any, *args: Any) -> Cost:
    H, D = int(q.shape[-2]), int(q.shape[-1])
    G, width, window = int(k.shape[-2]), q.element_size(), int(args[7])
    seen = sympy.Min(CONTEXT, window) if window else CONTEXT
    return Cost(S * seen * _token_bytes(k, args[1]) * G + 2 * T * H * D * width, 4 * T * seen * H * D)


def _token_bytes(k: Any, kv_cache: Any) -> int:
    """Bytes of one token's key and value in the cache, of one kv head."""
    D = int(k.shape[-1])
    return 2 * D + PAIR_BYTES if is_quantized(kv_cache) else 2 * D * k.element_size()


def _cache_write(k: Any, v: Any, kv_cache: Any, *_: Any) -> Cost:
    given = 2 * int(k.shape[-1]) * k.element_size()
    return Cost(T * int(k.shape[-2]) * (given + _token_bytes(k, kv_cache)), sympy.Integer(0))


def _rope_attention(q: Any, k: Any, *args: Any) -> Cost:
    """Raw k and v are read and written to the cache; cos and sin are counted as one row of each per token."""
    cos, sin = args[1], args[2]
    tables = sum(T * int(x.shape[-1]) * x.element_size() for x in (cos, sin) if x is not None)
    attention = _paged_attention(q, k, None, args[5], *(None,) * 5, args[12])
    return attention + _cache_write(k, args[0], args[5]) + Cost(tables, sympy.Integer(0))


def _experts(x: Any, index: Any, weights: Any, up: Any, up_bias: Any, down: Any, *_: Any) -> Cost:
    E, K = int(up.shape[0]), int(index.shape[1])
    per_expert = up[0].numel() + down[0].numel()
    # Expected number of distinct experts when every token draws K of E uniformly.
    touched = E * (1 - (1 - sympy.Rational(K, E)) ** T)
    activations = 2 * T * int(x.shape[-1]) * x.element_size()
    return Cost(touched * per_expert * up.element_size() + activations, 2 * T * K * per_expert)


def _quant_experts(x: Any, index: Any, weights: Any, *args: Any) -> Cost:
    """As `experts`, of the codes, scales and zero points of those touched."""
    up, down = args[:3], args[4:7]
    E, K = int(up[0].shape[0]), int(index.shape[1])
    specs = (WeightSpec.from_text(text) for text in args[12:14])
    values = sum(q[0].numel() * (8 // spec.bits) for (q, *_), spec in zip((up, down), specs, strict=True))
    touched = E * (1 - (1 - sympy.Rational(K, E)) ** T)
    activations = 2 * T * int(x.shape[-1]) * x.element_size()
    return Cost(touched * sympy.Rational(_bytes(*up, *down), E) + activations, 2 * T * K * values)


def _route(logits: Any, bias: Any, spec: str) -> Cost:
    """Ids are eight bytes. Operations are of the order of the logits, and counted as one for each."""
    parsed, E = RouteSpec.from_text(spec), int(logits.shape[-1])
    chosen = parsed.k * (8 + getattr(torch, parsed.dtype).itemsize)
    return Cost(T * (E * logits.element_size() + chosen), T * E)


def _router(x: Any, weight: Any, *args: Any) -> Cost:
    """The weight, x and what is chosen; with a norm, its result too."""
    norm, _, spec = args[4:]
    E, C = (int(size) for size in weight.shape)
    parsed = RouteSpec.from_text(spec)
    chosen = parsed.k * (8 + getattr(torch, parsed.dtype).itemsize)
    return Cost((E * C + T * C * (2 if norm else 1)) * x.element_size() + T * chosen, 2 * T * E * C)


def _routed_experts(x: Any, router: Any, *args: Any) -> Cost:
    """As `experts`, with the router's weight and, where there is one, the norm's result; what is chosen stays."""
    chosen, more = _routing(x, router, *args)
    return _experts(x, chosen, None, args[7], None, args[9]) + more


def _routed_quant_experts(x: Any, router: Any, *args: Any) -> Cost:
    """As `quant_experts`, with what `routed_experts` adds."""
    chosen, more = _routing(x, router, *args)
    return _quant_experts(x, chosen, None, *args[7:]) + more


def _routing(x: Any, router: Any, *args: Any) -> tuple[Any, Cost]:
    """What stands for the experts chosen [T, K], of which K counts, and the cost of the router in front of them."""
    norm, spec = args[4], RouteSpec.from_text(args[6])
    E, C = (int(size) for size in router.shape)
    rows = (sympy.Integer(E * C) + (T * C if norm else 0)) * x.element_size()
    return torch.empty(0, spec.k, device="meta"), Cost(rows, 2 * T * E * C)


def _linear(x: Any, weight: Any, norm_weight: Any, norm_bias: Any, operands: Any, program: str) -> Cost:
    rows, K = int(weight.shape[0]), int(weight.shape[1])
    out = rows // json.loads(program)["groups"]
    full = sum(1 for operand in operands if operand.dim() == 2)
    activations = T * (K + out * (1 + full)) * x.element_size()
    return Cost(rows * K * weight.element_size() + activations, 2 * T * rows * K)


def _experts_linear(*args: Any) -> Cost:
    """Both halves, each with what it reads and writes."""
    return _routed_experts(*args[:-5]) + _linear(args[0], *args[-5:])


def _bytes(*tensors: Any) -> int:
    """Of tensors whose sizes are known, None among them."""
    return sum(int(x.numel()) * x.element_size() for x in tensors if x is not None)


def _dequantize(q: Any, scale: Any, zero: Any, spec: str) -> Cost:
    """Codes, scales and the result; activations as codes are [T, K], counted by their scales too."""
    parsed = WeightSpec.from_text(spec)
    width = parsed.torch_dtype.itemsize
    if not isinstance(q.shape[-2], int):
        return Cost(T * int(q.shape[-1]) * (q.element_size() + width), T * int(q.shape[-1]))
    values = int(q.numel()) * (8 // parsed.bits)
    return Cost(sympy.Integer(_bytes(q, scale, zero) + values * width), sympy.Integer(values))


def _quantize(x: Any, *_: Any) -> Cost:
    K = int(x.shape[-1])
    return Cost(T * K * (x.element_size() + 1), T * K)


def _fake_quantize(x: Any, *_: Any) -> Cost:
    K = int(x.shape[-1])
    return Cost(2 * T * K * x.element_size(), 2 * T * K)


def _quant_linear(x: Any, q: Any, scale: Any, zero: Any, *args: Any) -> Cost:
    """As `linear`, the weight as codes with their scales; the result as wide as the program says.

    An x that is quantized inside is counted as it comes: the codes between need not leave the chip.
    """
    operands, program, spec = args[2], json.loads(args[3]), WeightSpec.from_text(args[4])
    rows, K = spec.shape(q.shape)
    width = getattr(torch, program["dtype"]).itemsize
    full = sum(1 for operand in operands if operand.dim() == 2)
    activations = T * (K * x.element_size() + rows // program["groups"] * (1 + full) * width)
    return Cost(_bytes(q, scale, zero) + activations, 2 * T * rows * K)


def _linear_pair(x: Any, *args: Any) -> Cost:
    """Both linears, each with what it reads and writes."""
    first, then = args[:LINEAR_ARGS], args[LINEAR_ARGS:]
    return _linear(x, *first) + _linear(_result(first[-1]), *then)


def _quant_linear_pair(x: Any, *args: Any) -> Cost:
    first, then = args[:QUANT_ARGS], args[QUANT_ARGS:]
    return _quant_linear(x, *first) + _quant_linear(_result(first[6]), *then)


def _linear_experts(x: Any, *args: Any) -> Cost:
    """The linear and the mixture, each with what it reads and writes."""
    return _linear(x, *args[:LINEAR_ARGS]) + _routed_experts(*_mixture(args, LINEAR_ARGS, 4))


def _linear_experts_linear(x: Any, *args: Any) -> Cost:
    return _linear(x, *args[:LINEAR_ARGS]) + _experts_linear(*_mixture(args, LINEAR_ARGS, 4))


def _quant_linear_experts(x: Any, *args: Any) -> Cost:
    return _quant_linear(x, *args[:QUANT_ARGS]) + _routed_quant_experts(*_mixture(args, QUANT_ARGS, 6))


def _mixture(args: tuple, count: int, program: int) -> tuple:
    """All arguments of a mixture behind a linear, which has `count` of them, its program among these."""
    return _result(args[program], int(args[count].shape[1])), *args[count:-1]


def _result(program: str, features: int = 0) -> torch.Tensor:
    """Stands for a linear's result, of which the dtype counts, and for experts the features."""
    return torch.empty(0, features, dtype=getattr(torch, json.loads(program)["dtype"]), device="meta")


def _norm(x: Any, *_: Any) -> Cost:
    return Cost(2 * T * int(x.shape[-1]) * x.element_size(), sympy.Integer(0))


COSTS: dict[str, Callable[..., Cost]] = {
    "paged_attention": _paged_attention,
    "cache_write": _cache_write,
    "rope_attention": _rope_attention,
    "experts": _experts,
    "routed_experts": _routed_experts,
    "experts_linear": _experts_linear,
    "route": _route,
    "router": _router,
    "linear": _linear,
    "linear_experts": _linear_experts,
    "linear_experts_linear": _linear_experts_linear,
    "linear_pair": _linear_pair,
    "quant_linear_experts": _quant_linear_experts,
    "quant_linear_pair": _quant_linear_pair,
    "norm": _norm,
    "dequantize": _dequantize,
    "quantize": _quantize,
    "fake_quantize": _fake_quantize,
    "quant_linear": _quant_linear,
    "quant_experts": _quant_experts,
    "routed_quant_experts": _routed_quant_experts,
}


def op_cost(name: str, args: tuple) -> Cost:
    """Cost of one call of canonical op `name` on (fake) tensor arguments; zero for ops without a cost."""
    return COSTS[name](*args) if name in COSTS else ZERO
