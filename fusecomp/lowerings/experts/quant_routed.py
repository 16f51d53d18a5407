"""CUDA implementation of `routed_quant_experts`: for very few tokens, three launches where the table has them.

They are those of `routed.py`, which multiply codes as the vector kernels do. Up to some hundred tokens there are five,
those of `listed_launch.py`. Otherwise `router` and `quant_experts` are launched one after the other.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts.codes import Codes
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.listed_launch import run_listed, serves
from fusecomp.lowerings.experts.quant_heuristics import quant_experts_config, routed_codes_config
from fusecomp.lowerings.experts.quant_lowering import supports
from fusecomp.lowerings.experts.routed import run_chosen, served
from fusecomp.lowerings.experts.router import Router
from fusecomp.ops.experts import Activation, codes_shape
from fusecomp.ops.quant import WeightSpec


def launch_routed_quant_experts(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: str,
    logits: str,
    spec: str,
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
) -> tuple[Tensor, Tensor] | None:
    """`fusecomp::routed_quant_experts` where it saves launches; None where its halves are launched in turn."""
    gate = Router.of(router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    first, second = WeightSpec.from_text(up_spec), WeightSpec.from_text(down_spec)
    layer = Experts(
        up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, transposed,
        Codes(up_scale, up_zero, first), Codes(down_scale, down_zero, second),
    )  # fmt: skip
    parts = (up, up_scale, up_zero), up_bias, (down, down_scale, down_zero), down_bias
    if not len(x) or supports(x, *parts, transposed, first, second):
        return None
    experts, _, hidden, width = layer.sizes
    shape = codes_shape(first, second, (experts, gate.spec.k, hidden, width), x.element_size())
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    if served(x, gate, layer) and (chosen := routed_codes_config(target_of(x), shape, len(x))) is not None:
        return run_chosen(chosen, x, gate, layer, residual, uses_pdl(x))
    config = quant_experts_config(target_of(x), shape, len(x))
    if serves(config, x, gate, layer):
        return run_listed(config, x, gate, layer, residual, uses_pdl(x))
    return None
