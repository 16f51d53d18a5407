"""The router kernel for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.route.kernel import num_warps, route_kernel
from fusecomp.lowerings.route.pieces import constants
from fusecomp.ops.router import SIGMOID, SPARSEMIXER, SUM, TOP2, RouteSpec

# DeepSeek V3 and PhiMoE, which between them take every branch but a plain softmax: experts, logits, bias, spec.
ROUTERS = (
    (256, "fp32", "fp32", RouteSpec(SIGMOID, 8, SUM, 1e-20, 0.0, 8, 4, TOP2, 2.5)),
    (16, "bf16", None, RouteSpec(SPARSEMIXER, 2, threshold=0.02, dtype="bfloat16")),
)


def specializations(target: Target) -> Iterator[Specialization]:
    """Routers with and without groups and bias."""
    for experts, logits, bias, spec in ROUTERS:
        absent = {} if bias else {"bias": None}
        yield Specialization(
            f"route-{spec.kind}-{experts}",
            route_kernel,
            {"logits": logits, "ids": "i64", "weights": "bf16" if spec.dtype == "bfloat16" else "fp32"}
            | ({"bias": bias} if bias else {}),
            {"stride_row": "i32"},
            {**constants(spec, experts), **absent, "USE_PDL": target.has_pdl},
            num_warps=num_warps(experts),
            num_stages=1,
        )
