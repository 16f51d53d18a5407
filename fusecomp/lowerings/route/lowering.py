"""CUDA implementation of `router`: which kernels run, decided per call from shapes alone.

Few tokens: the norm and the matmul in one launch, the choice in a second. More, or what the first does not serve: the
norm, the matmul and the choice, each its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.lowerings.device import uses_pdl
from fusecomp.lowerings.linear.lowering import launch_linear, launch_norm_op
from fusecomp.lowerings.route import kernel
from fusecomp.lowerings.route.router import launch_router, supports_router
from fusecomp.ops.linear import ROW, Program
from fusecomp.ops.mode import batch_invariant
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.router import RouteSpec


def supports(x: Tensor, weight: Tensor, spec: RouteSpec) -> str | None:
    """Why the kernels cannot run this router, or None if they can."""
    if x.dtype != weight.dtype:
        return f"activations are {x.dtype}, the weight {weight.dtype}"
    if not weight.is_contiguous():
        return f"its weight {tuple(weight.shape)} is not contiguous"
    return kernel.supports(x.dtype, len(weight), spec)


def launch_router_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    route_bias: Tensor | None,
    norm: NormSpec | None,
    logits: torch.dtype,
    spec: RouteSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fusecomp::router` on CUDA; shapes as in `router_reference`. Bitwise repeatable. `supports` must hold."""
    if not batch_invariant() and supports_router(len(x), weight, norm, norm_bias) is None:
        return launch_router(x, weight, bias, norm_weight, route_bias, norm, logits, spec, uses_pdl(x))
    y = launch_norm_op(x, norm_weight, norm_bias, norm) if norm else x
    dtype = str(logits).removeprefix("torch.")
    program = Program(1, (), (), dtype) if bias is None else Program(1, (ROW,), (("add", "a0", "i0"),), dtype)
    found = launch_linear(y, weight, None, None, [] if bias is None else [bias], program)
    ids, weights = kernel.launch_route(found, route_bias, spec, uses_pdl(x))
    return y if norm else x.new_empty(0), ids, weights
