"""Host time of one decode step outside the model: schedule, build, update. `python -m benchmarks.host`

Prints microseconds (median, 99th percentile) per number of rows; the last line is JSON. On CUDA the copies are only
issued, as in an engine, and the device is drained between steps, outside the timed part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from fusecomp.request import SamplingParams
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import Scheduler, SequenceState

PHASES = ("schedule", "build", "update")


def measure(
    rows: int, steps: int, context: int, max_model_len: int, device: str, prefix_caching: bool, block_size: int
) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile, in us, of each phase over `steps` decode steps of `rows` sequences."""
    blocks_per_seq = -(-max_model_len // block_size)
    kv = KVCacheManager(rows * blocks_per_seq, block_size, prefix_caching=prefix_caching)
    scheduler = Scheduler(rows, max(8192, rows), max_model_len, kv)
    builder = BatchBuilder(rows, max(8192, rows), blocks_per_seq, block_size, device)
    params = SamplingParams(max_tokens=None, temperature=0.7, top_p=0.9)
    for i in range(rows):
        # Staggered lengths: block boundaries are met by some rows at every step, as in service.
        scheduler.add(SequenceState(str(i), [i] * (context - i % block_size), params))
    times: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "all")}
    sampled = [7] * rows
    while len(times["build"]) < steps:
        t0 = time.perf_counter()
        step = scheduler.schedule()
        t1 = time.perf_counter()
        assert step is not None
        full = step.decode_only and len(step.seqs) == rows
        builder.build(step, pad_to=rows if full else None)
        t2 = time.perf_counter()
        scheduler.update(step, sampled, frozenset({2}))
        t3 = time.perf_counter()
        if full:
            for phase, seconds in zip(times, (t1 - t0, t2 - t1, t3 - t2, t3 - t0), strict=True):
                times[phase].append(seconds * 1e6)
        if device == "cuda":
            torch.cuda.synchronize()
    return {p: (statistics.median(t), statistics.quantiles(t, n=100)[98]) for p, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on a CPU "device", copies of a few KB must not wait for a thread pool
    result = {}
    columns = (*PHASES, "all")
    print(f"{'rows':>6}" + "".join(f"{phase + ' us (p99)':>22}" for phase in columns))
    for rows in args.rows:
        times = measure(
            rows, args.steps, args.context, args.max_model_len, args.device, args.prefix_caching, args.block_size
        )
        print(f"{rows:>6}" + "".join(f"{f'{times[p][0]:.1f} ({times[p][1]:.1f})':>22}" for p in columns))
        result[str(rows)] = {phase: round(times[phase][0], 1) for phase in columns}
    options = {"device": args.device, "prefix_caching": args.prefix_caching, "block_size": args.block_size}
    print(json.dumps({"benchmark": "host", **options, "median_us": result}))


if __name__ == "__main__":
    main()
