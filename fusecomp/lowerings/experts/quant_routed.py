"""CUDA implementation of `routed_quant_experts`: for very few tokens, three launches where the table has them.

They are those of `routed.py`, which multiply codes as the vector kernels do. Up to some hundred tokens there are five,
those of `listed_launch.py`. Otherwise `router` and `quant_experts` are launched one after the other.

Experts of fp8 codes may be multiplied by digits of what they read: see `digits.py`.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of, uses_pdl
from fusecomp.lowerings.experts.codes import Codes
from fusecomp.lowerings.experts.heuristics import ExpertsConfig
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.listed_launch import run_listed, serves
from fusecomp.lowerings.experts.quant_heuristics import quant_experts_config, routed_codes_config
from fusecomp.lowerings.experts.quant_lowering import supports
from fusecomp.lowerings.experts.routed import run_chosen, served
from fusecomp.lowerings.experts.router import Router
from fusecomp.lowerings.quant.digit_rows import Digits
from fusecomp.lowerings.quant.norm_digits import launch_norm_digits
from fusecomp.ops.experts import Activation, codes_shape
from fusecomp.ops.quant import WeightSpec
from fusecomp.ops.routed_quant_experts import EXPERTS_ARGS, ROUTER_ARGS


class Mixture(NamedTuple):
    """What the arguments of `routed_quant_experts` behind x say, and how it runs.

    Attributes:
        few: of the three launches for very few tokens, or None.
        more: of others.
    """

    router: Router
    layer: Experts
    residual: Tensor | None
    few: ExpertsConfig | None
    more: ExpertsConfig


def launch_routed_quant_experts(x: Tensor, *args: Any, digits: Digits | None = None) -> tuple[Tensor, Tensor] | None:
    """`fusecomp::routed_quant_experts` where it saves launches; None where its halves are launched in turn.

    Args:
        digits: of x, where `takes_digits`; they are made here where they are not given.
    """
    if (mixture := _mixture(x, args)) is None:
        return None
    router, layer, residual, few, more = mixture
    residual = residual if residual is None or residual.stride(-1) == 1 else residual.contiguous()
    if few is not None:
        return run_chosen(few, x, router, layer, residual, uses_pdl(x))
    if digits is None and _takes_digits(mixture, x):
        y, digits = launch_norm_digits(x, router.norm, router.norm_weight, router.norm_bias)
        out = run_listed(more, y, router.bare(), layer, residual, uses_pdl(x), digits)[1]
        return y if router.norm else x.new_empty(0), out
    if serves(more, x, router, layer):
        return run_listed(more, x, router, layer, residual, uses_pdl(x), digits)
    return None


def takes_digits(x: Tensor, args: Sequence[Any]) -> bool:
    """Whether `routed_quant_experts` multiplies its experts by digits of what they read.

    Args:
        x: [T, C], of which no number is looked at.
        args: the op's behind x.
    """
    mixture = _mixture(x, args)
    return mixture is not None and mixture.few is None and _takes_digits(mixture, x)


def _takes_digits(mixture: Mixture, x: Tensor) -> bool:
    """Of a mixture that few do not serve."""
    config, router, layer = mixture.more, mixture.router.bare(), mixture.layer
    return (
        config.digits is not None
        and x.dtype == torch.bfloat16
        and not any(weight.data_ptr() % 16 for weight in (layer.up, layer.down))  # as TMA wants it
        and serves(config, x, router, layer)
    )


def _mixture(x: Tensor, args: Sequence[Any]) -> Mixture | None:
    """None where no kernel reads the codes."""
    router, rest = Router.of(*args[:ROUTER_ARGS]), args[ROUTER_ARGS:]
    experts, residual = rest[:EXPERTS_ARGS], rest[EXPERTS_ARGS] if len(rest) > EXPERTS_ARGS else None
    up, up_scale, up_zero, up_bias, down, down_scale, down_zero, down_bias, *form = experts
    act, gated, interleaved, transposed, *specs = form
    first, second = map(WeightSpec.from_text, specs)
    parts = (up, up_scale, up_zero), up_bias, (down, down_scale, down_zero), down_bias
    if not len(x) or supports(x, *parts, transposed, first, second):
        return None
    layer = Experts(
        up, up_bias, down, down_bias, Activation.parse(act, gated), gated, interleaved, transposed,
        Codes(up_scale, up_zero, first), Codes(down_scale, down_zero, second),
    )  # fmt: skip
    count, _, hidden, width = layer.sizes
    shape = codes_shape(first, second, (count, router.spec.k, hidden, width), x.element_size())
    few = routed_codes_config(target_of(x), shape, len(x)) if served(x, router, layer) else None
    return Mixture(router, layer, residual, few, quant_experts_config(target_of(x), shape, len(x)))
