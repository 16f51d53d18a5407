"""The kernels that feed a step and deliver its tokens, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.feed import BLOCK, deliver_kernel, feed_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target


def specializations(target: Target) -> Iterator[Specialization]:
    """Each has one."""
    words = dict.fromkeys(("header", "taken", "ids", "seen", "half"), "i64")
    lists = dict.fromkeys(("new_ids", "lens", "moved_at", "moved_to", "continues"), "i32") | {"slots": "i64"}
    buffers = {"tokens": "i64", "seq_lens": "i32", "tables": "i32"}
    pointers = words | lists | buffers
    yield Specialization("feed", feed_kernel, pointers, {"size": "i32"}, {"BLOCK": BLOCK}, num_warps=1, num_stages=1)
    pointers = dict.fromkeys(("sampled", "half", "ids", "host"), "i64")
    yield Specialization(
        "deliver",
        deliver_kernel,
        pointers,
        {"size": "i32", "stride": "i32"},
        {"BLOCK": BLOCK, "USE_PDL": target.has_pdl},
        num_warps=4,
        num_stages=1,
    )
