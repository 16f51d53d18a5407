"""CUDA implementation of `quant_experts`: the experts' kernels read codes, which they convert on their way.

Which kernels run follows from shapes and layouts alone, as in `lowering.py`. Few tokens: codes are multiplied in
registers. More: they are the matrix units' first operand, which may come from the registers where they were converted.
Where the table says so, or a layout is refused, the weights of all experts are dequantized and `experts` runs.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts import quant_heuristics
from fusecomp.lowerings.experts.codes import Codes
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, experts_config
from fusecomp.lowerings.experts.launch import Experts, run_experts
from fusecomp.lowerings.experts.lowering import DTYPES, launch_experts
from fusecomp.lowerings.experts.quant_heuristics import DEQUANTIZE, quant_experts_config
from fusecomp.lowerings.quant.lowering import launch_dequantize, refusal
from fusecomp.ops.experts import Activation, codes_shape
from fusecomp.ops.library import record_fallback
from fusecomp.ops.quant import WeightSpec, dequantize_reference

Weight = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, zero points


def supports(
    x: Tensor, up: Weight, up_bias: Tensor | None, down: Weight, down_bias: Tensor | None, transposed: bool,
    up_spec: WeightSpec, down_spec: WeightSpec,
) -> str | None:  # fmt: skip
    """Why the kernels cannot read these experts' codes, or None if they can."""
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype} is none of fp32, fp16, bf16"
    if not all(bias.is_contiguous() for bias in (up_bias, down_bias) if bias is not None):
        return "biases are not contiguous"
    for name, weight, spec in (("up", up, up_spec), ("down", down, down_spec)):
        if spec.torch_dtype != x.dtype:
            return f"activations are {x.dtype}, the {name} weights are dequantized to {spec.dtype}"
        if reason := refusal(*weight, spec):
            return f"of the {name} weights, {reason}"
    return quant_heuristics.refusal(up_spec, down_spec, transposed)


def launch_quant_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    up_bias: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    up_spec: str,
    down_spec: str,
    residual: Tensor | None = None,
) -> Tensor:
    """`fusecomp::quant_experts` on CUDA; shapes as in `quant_experts_reference`. [T, C] contiguous, bitwise repeatable.

    What `supports` refuses is dequantized, counted; unlike the reference, without a look at the routing.
    """
    first, second = WeightSpec.from_text(up_spec), WeightSpec.from_text(down_spec)
    parts = (up, up_scale, up_zero), (down, down_scale, down_zero)
    form = (act, gated, interleaved, transposed)

    if reason := supports(x, parts[0], up_bias, parts[1], down_bias, transposed, first, second):
        record_fallback("quant_experts", f"{reason}: all experts are dequantized")
        numbers = (_dequantize(*part, spec) for part, spec in zip(parts, (first, second), strict=True))
        return launch_experts(
            x, top_k_index, top_k_weights, next(numbers), up_bias, next(numbers), down_bias, *form, residual
        )
    tokens, top_k = top_k_index.shape
    if tokens == 0 or top_k == 0:
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        return out if residual is None else out.copy_(residual)
    layer = Experts(
        up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, False,
        Codes(up_scale, up_zero, first), Codes(down_scale, down_zero, second),
    )  # fmt: skip
    experts, _, hidden, width = layer.sizes
    shape = codes_shape(first, second, (experts, top_k, hidden, width), x.element_size())
    config = quant_experts_config(target_of(x), shape, tokens)
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    return run_quant_experts(config, x, index, weights, layer, residual, uses_pdl(x))


def run_quant_experts(
    config: ExpertsConfig,
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
) -> Tensor:
    """`run_experts`, or, if `config` says so, the same after all of the layer's weights were dequantized."""
    if config.method == DEQUANTIZE:
        (tokens, top_k), (experts, _, hidden, width) = index.shape, layer.sizes
        config = experts_config(
            target_of(x), experts=experts, top_k=top_k, hidden=hidden, width=width, tokens=tokens,
            itemsize=x.element_size(),
        )  # fmt: skip
        layer = layer.dequantized()
    return run_experts(config, x, index, routing_weights, layer, residual, use_pdl)


def _dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, spec: WeightSpec) -> Tensor:
    if reason := refusal(q, scale, zero, spec):
        record_fallback("dequantize", reason)
        return dequantize_reference(q, scale, zero, spec.to_text())
    return launch_dequantize(q, scale, zero, spec)
