"""Canonical ops: the vocabulary in which patterns and lowerings meet.

Each op has a `torch.library` schema, an eager reference (also the CPU path), a fake implementation and
a symbolic cost. Importing this package registers them under `torch.ops.fusecomp`.
"""

from fusecomp.ops import (
    attention,
    experts,
    experts_linear,
    linear,
    linear_experts,
    linear_pair,
    norm,
    quant,
    quant_linear,
    rope,
    routed_experts,
    routed_quant_experts,
    router,
    sampling,
)
from fusecomp.ops.cost import COSTS, Cost, op_cost
from fusecomp.ops.library import OPS, record_fallback, take_fallbacks

__all__ = [
    "COSTS",
    "OPS",
    "Cost",
    "attention",
    "experts",
    "experts_linear",
    "linear",
    "linear_experts",
    "linear_pair",
    "norm",
    "op_cost",
    "quant",
    "quant_linear",
    "record_fallback",
    "rope",
    "routed_experts",
    "routed_quant_experts",
    "router",
    "sampling",
    "take_fallbacks",
]
