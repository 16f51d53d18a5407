"""CUDA implementation of `routed_experts`: three launches for very few tokens, five for some hundred.

The three of this file, as the five of `listed_launch.py`, serve experts of codes too, which `quant_routed.py` hands
over. Else it is `router` and `experts`.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts.chosen import down_chosen_kernel, logits_kernel, up_chosen_kernel
from fusecomp.lowerings.experts.codes import Codes, kernel_weight
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, experts_config, routed_config
from fusecomp.lowerings.experts.later import asked_bytes
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.listed_launch import run_listed, serves
from fusecomp.lowerings.experts.lowering import supports as supports_experts
from fusecomp.lowerings.experts.router import Router
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2
from fusecomp.lowerings.route.kernel import triton_dtype
from fusecomp.lowerings.route.lowering import supports as supports_router
from fusecomp.lowerings.route.pieces import constants
from fusecomp.ops.experts import Activation
from fusecomp.ops.norm import RMS

MAX_EXPERTS, MAX_CHOSEN, MAX_COLUMNS = 512, 16, 8192


def launch_routed_experts(
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
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
    residual: Tensor | None = None,
    *,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`fusecomp::routed_experts` where it saves launches; None where its halves are launched in turn.

    Args:
        later: a weight that is read after the experts: see `later.py`.
    """
    gate = Router.of(router, router_bias, norm_weight, norm_bias, route_bias, norm, logits, spec)
    layer = Experts(up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, transposed)
    if not len(x) or supports_experts(x, up, up_bias, down, down_bias):
        return None
    experts, _, hidden, width = layer.sizes
    sizes = {
        "experts": experts, "top_k": gate.spec.k, "hidden": hidden, "width": width, "tokens": len(x),
        "itemsize": x.element_size(),
    }  # fmt: skip
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    if served(x, gate, layer) and (chosen := routed_config(target_of(x), **sizes)) is not None:
        return run_chosen(chosen, x, gate, layer, residual, uses_pdl(x), later)
    config = experts_config(target_of(x), transposed=transposed, **sizes)
    if serves(config, x, gate, layer):
        return run_listed(config, x, gate, layer, residual, uses_pdl(x))
    return None


def served(x: Tensor, router: Router, layer: Experts) -> bool:
    """Whether the three launches serve such a router in front of such experts, whatever their weights are."""
    experts, _, hidden, _ = layer.sizes
    norm = router.norm
    return not (
        layer.transposed
        or supports_router(x, router.weight, router.spec)
        or (norm is not None and (norm.kind != RMS or router.norm_bias is not None))
        or experts > MAX_EXPERTS
        or router.spec.k > MAX_CHOSEN
        or hidden > MAX_COLUMNS
    )


def run_chosen(
    config: ExpertsConfig,
    x: Tensor,
    router: Router,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
    later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, residual + experts of y) [T, C], chosen by y, without a launch for the choice; bitwise repeatable.

    y is norm(x), or empty without a norm, where the experts read x.

    Args:
        config: from `chosen_config`, or of codes from `quant_routed.chosen_codes_config`.
        x, residual: [T, C], last dim contiguous.
        use_pdl: programmatic dependent launch; needs an NVIDIA GPU of compute capability 9.0 or more.
        later: a weight that is read after the experts, or None.
    """
    (tokens, hidden_size), (experts, rows, _, width) = x.shape, layer.sizes
    spec, norm, up, down = router.spec, router.norm, config.up, config.down
    y = torch.empty((tokens, hidden_size), dtype=x.dtype, device=x.device) if norm else x
    logits = torch.empty((tokens, experts), dtype=torch.float32, device=x.device)
    hidden = torch.empty((tokens * spec.k, width), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, hidden_size), dtype=x.dtype, device=x.device)
    columns = next_power_of_2(hidden_size)
    warps = logits_warps(columns)
    asked = asked_bytes(later, tokens, tokens * experts, warps, use_pdl)
    options = {"USE_PDL": use_pdl, **({"launch_pdl": True} if use_pdl else {})}
    launch(
        logits_kernel, (tokens * experts,),
        x, router.weight, router.bias, router.norm_weight, y if norm else None, logits,
        later if asked else None, norm.eps if norm else 0.0, x.stride(0), NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one, E=experts, D=hidden_size, BLOCK_D=columns, LATER=asked,
        THREADS=32 * warps, num_warps=warps, **options,
    )  # fmt: skip
    choice = {**constants(spec, experts), "DTYPE": triton_dtype(router.logits)}
    weight, scale, zero, layout = chosen_weight(layer.up, layer.up_codes)
    launch(
        up_chosen_kernel, (tokens * spec.k * cdiv(rows, up.block_n),),
        y, logits, router.route_bias, weight, scale, zero, layer.up_bias, hidden, y.stride(0), N=rows, D=hidden_size,
        BLOCK_N=up.block_n, BLOCK_D=columns if layer.up_codes is None else up.block_d, num_warps=up.num_warps,
        **layer.act_constants(), **layout, **choice, **options,
    )  # fmt: skip
    weight, scale, zero, layout = chosen_weight(layer.down, layer.down_codes)
    launch(
        down_chosen_kernel, (tokens * cdiv(hidden_size, down.block_n),),
        hidden, logits, router.route_bias, weight, scale, zero, layer.down_bias, residual, out,
        0 if residual is None else residual.stride(0), WEIGHT_DTYPE=triton_dtype(getattr(torch, spec.dtype)),
        KP=next_power_of_2(spec.k), N=hidden_size, D=width, BLOCK_N=down.block_n, BLOCK_D=down.block_d,
        num_warps=down.num_warps, **layout, **choice, **options,
    )  # fmt: skip
    return y if norm else x.new_empty(0), out


def chosen_weight(
    weight: Tensor, codes: Codes | None
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, int | float]]:
    """`kernel_weight`, with the constants as `chosen.py` names them."""
    *tensors, constants = kernel_weight(weight, codes)
    return *tensors, layout_constants(constants)  # type: ignore[return-value]


def layout_constants(constants: dict[str, Any]) -> dict[str, Any]:
    """Those of a layout of codes; KIND is the router's in these kernels."""
    return {"CODES" if name == "KIND" else name: value for name, value in constants.items()}


def logits_warps(columns: int) -> int:
    """Warps of a program that multiplies one row of `columns`."""
    return max(1, min(8, columns // 512))
