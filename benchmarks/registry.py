"""The benchmarks by name. One is a function of a `Session` that returns its figures and the table to print."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.decode import decode
from benchmarks.patterns import patterns
from benchmarks.prefix import prefix
from benchmarks.session import Result, Session
from benchmarks.throughput import offline, prefill

# `startup` is not among them: it starts processes of its own and has no session.
BENCHMARKS: dict[str, Callable[[Session], Result]] = {
    "decode": decode,
    "prefill": prefill,
    "offline": offline,
    "prefix": prefix,
    "patterns": patterns,
}
