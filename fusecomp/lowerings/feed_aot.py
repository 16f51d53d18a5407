"""The kernels between steps for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.feed import BLOCK, deliver_kernel, feed_kernel


def specializations() -> Iterator[Specialization]:
    """Each has one."""
    lists = {"staged_tokens": "i64", "staged_lens": "i32", "moved_at": "i32", "moved_to": "i32", "continues": "i64"}
    buffers = {"sampled": "i64", "tokens": "i64", "seq_lens": "i32", "tables": "i32"}
    sizes = {"size": "i32", "count": "i32", "moved": "i32"}
    yield Specialization("feed", feed_kernel, lists | buffers, sizes, {"BLOCK": BLOCK}, num_warps=4, num_stages=1)
    pointers = {"sampled": "i64", "host": "i64"}
    yield Specialization(
        "deliver", deliver_kernel, pointers, {"size": "i32"}, {"BLOCK": BLOCK}, num_warps=4, num_stages=1
    )
