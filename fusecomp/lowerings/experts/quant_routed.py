"""CUDA implementation of `routed_quant_experts`: for very few tokens, three launches where the table has them.

They are those of `routed.py`, which multiply codes as the vector kernels do. Otherwise `router` and `quant_experts` are
launched one after the other.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts.codes import Codes
from fusecomp.lowerings.experts.heuristics import ExpertsConfig
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.quant_heuristics import routed_codes_config
from fusecomp.lowerings.experts.quant_lowering import supports
from fusecomp.lowerings.experts.routed import Router, run_chosen, served
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
    """`fusecomp::routed_quant_experts` of few tokens; None where its two halves are launched one after the other."""
    gate = Router.of(router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    layer = Experts(
        up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, transposed,
        Codes(up_scale, up_zero, WeightSpec.from_text(up_spec)),
        Codes(down_scale, down_zero, WeightSpec.from_text(down_spec)),
    )  # fmt: skip
    config = chosen_codes_config(x, gate, layer) if len(x) else None
    if config is None:
        return None
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    return run_chosen(config, x, gate, layer, residual, uses_pdl(x))


def chosen_codes_config(x: Tensor, router: Router, layer: Experts) -> ExpertsConfig | None:
    """How `run_chosen` runs this call of experts of codes; None if it does not."""
    up, down = layer.up_codes, layer.down_codes
    assert up is not None and down is not None
    parts = (layer.up, up.scale, up.zero), layer.up_bias, (layer.down, down.scale, down.zero), layer.down_bias
    if supports(x, *parts, layer.transposed, up.spec, down.spec) or not served(x, router, layer):
        return None
    experts, _, hidden, width = layer.sizes
    shape = codes_shape(up.spec, down.spec, (experts, router.spec.k, hidden, width), x.element_size())
    return routed_codes_config(target_of(x), shape, len(x))
