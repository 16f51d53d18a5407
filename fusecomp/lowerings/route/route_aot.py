"""The router kernels for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.route.kernel import num_warps, route_kernel
from fusecomp.lowerings.route.pieces import constants
from fusecomp.lowerings.route.router import NUM_STAGES, router_config, router_constants, router_kernel
from fusecomp.ops.router import SIGMOID, SOFTMAX, SPARSEMIXER, SUM, TOP2, RouteSpec

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
# DeepSeek V3 and PhiMoE, which between them take every branch but a plain softmax: experts, logits, bias, spec.
ROUTERS = (
    (256, "fp32", "fp32", RouteSpec(SIGMOID, 8, SUM, 1e-20, 0.0, 8, 4, TOP2, 2.5)),
    (16, "bf16", None, RouteSpec(SPARSEMIXER, 2, threshold=0.02, dtype="bfloat16")),
)
# Qwen3-30B-A3B, DeepSeek V3 with logits in its own dtype, gpt-oss and others: experts, dtype, hidden size, norm.
WHOLE = (
    (128, "bf16", 2048, True, RouteSpec(SOFTMAX, 8, SUM, dtype="bfloat16")),
    (256, "bf16", 7168, True, RouteSpec(SIGMOID, 8, SUM, 1e-20, 0.0, 8, 4, TOP2, 2.5)),
    (512, "fp16", 2048, True, RouteSpec(SOFTMAX, 10, SUM, dtype="float16")),
    (32, "bf16", 2880, False, RouteSpec("logits", 4, "softmax", dtype="bfloat16")),
    (60, "fp32", 2048, True, RouteSpec(SOFTMAX, 4)),
)


def specializations(target: Target) -> Iterator[Specialization]:
    """Routers with and without groups, biases and norms."""
    for experts, logits, bias, spec in ROUTERS:
        yield _route(target, experts, logits, bias, spec, 0)
    for experts, dtype, hidden, normed, spec in WHOLE:
        for tokens in (1, 16, 512):
            config = router_config(tokens, experts, hidden, 4 if dtype == "fp32" else 2, target.num_sms)
            given = {"norm_weight": dtype, "y": dtype} if normed else {}
            given |= {"lists": "i32"} if tokens == 16 else {}
            absent = {name: None for name in ("norm_weight", "y", "lists") if name not in given}
            yield Specialization(
                f"router-{experts}-{hidden}-{dtype}-t{tokens}",
                router_kernel,
                {"x": dtype, "weight": dtype, "parts": "fp32", **given},
                {"eps": "fp32", "num_tokens": "i32", "stride_x": "i32"},
                {**router_constants(config, experts, hidden), "NORM": normed, "PLUS_ONE": False}
                | {"USE_PDL": target.has_pdl, **absent},
                num_warps=config.num_warps,
                num_stages=NUM_STAGES,
            )
            yield _route(target, experts, dtype, None, spec, config.splits, "lists" in given)


def _route(
    target: Target, experts: int, dtype: str, bias: str | None, spec: RouteSpec, splits: int, lists: bool = False
) -> Specialization:
    given = {"bias": bias} if bias else {}
    given |= ({"added": dtype} if splits else {}) | ({"lists": "i32"} if lists else {})
    weights = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[spec.dtype]
    return Specialization(
        f"route-{spec.kind}-{experts}-{dtype}-{splits}{'-lists' if lists else ''}",
        route_kernel,
        {"logits": "fp32" if splits else dtype, "ids": "i64", "weights": weights, **given},
        {"stride_row": "i32", "stride_split": "i32", "capacity": "i32"},
        {
            **constants(spec, experts),
            "SPLITS": splits,
            "DTYPE": {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype],
        }
        | {"USE_PDL": target.has_pdl, **{name: None for name in ("added", "bias", "lists") if name not in given}},
        num_warps=num_warps(experts),
        num_stages=1,
    )
