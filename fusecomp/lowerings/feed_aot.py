"""The kernels that feed a step and deliver its tokens, for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.feed import BLOCK, deliver_kernel, feed_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target


def specializations(target: Target) -> Iterator[Specialization]:
    """Each has one."""
    words = dict.fromkeys(("header", "taken", "ids", "seen", "half"), "i64")
    lists = {"staged_tokens": "i64", "staged_lens": "i32", "moved_at": "i32", "moved_to": "i32", "continues": "i64"}
    buffers = {"tokens": "i64", "seq_lens": "i32", "tables": "i32"}
    constants = {"M": 2 * BLOCK, "BLOCK": BLOCK}
    yield Specialization("feed", feed_kernel, words | lists | buffers, {"size": "i32"}, constants, 1, num_stages=1)
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
