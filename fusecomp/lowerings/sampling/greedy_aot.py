"""The greedy kernel for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.lowerings.sampling.greedy import BLOCK, MAX_SPLITS, greedy_kernel
from fusecomp.ops.sampling import INVALID_TOKEN


def specializations(target: Target) -> Iterator[Specialization]:
    """One split a row and many, for the dtypes of logits."""
    for dtype in ("bf16", "fp32"):
        for splits in (1, MAX_SPLITS - 1):
            yield Specialization(
                f"greedy-{dtype}-{splits}",
                greedy_kernel,
                {"logits": dtype, "out": "i64", "part_best": "fp32", "part_token": "i32", "arrivals": "i32"},
                {"vocab": "i32", "blocks": "i32", "stride": "i32"},
                {
                    **{"SPLITS": splits, "SPLITS_P2": MAX_SPLITS if splits > 1 else 1, "BLOCK": BLOCK},
                    **{"INVALID": INVALID_TOKEN, "USE_PDL": target.has_tma},
                },
                num_warps=8,
                num_stages=1,
                aligned=("vocab", "stride"),
            )
