"""Host time of one decode step outside the model: schedule, build, update. `python -m benchmarks.host`

Prints microseconds (median, 99th percentile) per number of rows; the last line is JSON. On CUDA the copies are only
issued, as in an engine, and the device is drained between steps, outside the timed part. Steps are scheduled ahead, as
an engine on a GPU does; with `--no-ahead`, when the tokens before are known.

With `--texts`, every row's text is followed token by token, for stop texts that never come, in the detokenizer's
thread ("thread") or in the loop ("inline"). Then "texts" is what the loop spends on it, and "late" how much later than
asked it wakes from a wait of `--wait` ms between steps, which stands for the device's work: threads share one
interpreter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from fusecomp.request import SamplingParams
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.detokenizer import Detokenizer, Followed
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.mailbox import NOWHERE
from fusecomp.runtime.scheduler import Scheduler, SequenceState

PHASES = ("schedule", "build", "update", "texts", "late")
TOKENIZER = Path(__file__).parents[1] / "models" / "pico-llama"


class Texts:
    """Follows the texts of all rows in the way of `mode`: none, thread or inline."""

    def __init__(self, mode: str, rows: int, params: SamplingParams) -> None:
        self.mode = mode
        if mode == "none":
            return
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        self.ids = self.tokenizer.encode("def read_lines(path):\n    return [line for line in open(path)] # naïve\n")
        self.detokenizer = Detokenizer(self.tokenizer)
        self.followed = [Followed(row, params, live=False) for row in range(rows)]
        self.step = 0

    def advance(self) -> None:
        """One token more for each row."""
        if self.mode == "none":
            return
        self.step += 1
        size = len(self.ids)
        updates = [(each, [self.ids[(self.step + row) % size]], None) for row, each in enumerate(self.followed)]
        if self.mode == "thread":
            self.detokenizer.put(updates)
            self.detokenizer.take()
        else:
            decode = self.detokenizer._decoder(self.followed[0].params)
            for each, ids, reason in updates:
                each.add(ids, reason, decode)

    def close(self) -> None:
        """Let the thread end."""
        if self.mode != "none":
            self.detokenizer.close()


def measure(
    rows: int,
    steps: int,
    context: int,
    max_model_len: int,
    device: str,
    *,
    prefix_caching: bool = True,
    block_size: int = 16,
    texts: str = "none",
    wait: float = 0.0,
    ahead: bool = True,
) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile, in us, of each phase over `steps` decode steps of `rows` sequences; `wait` in s.

    "all" is what every step takes: to schedule, build and update.
    """
    blocks_per_seq = -(-max_model_len // block_size)
    kv = KVCacheManager(rows * blocks_per_seq, block_size, prefix_caching=prefix_caching)
    scheduler = Scheduler(rows, max(8192, rows), max_model_len, kv)
    builder = BatchBuilder(rows, max(8192, rows), blocks_per_seq, block_size, device)
    params = SamplingParams(max_tokens=None, temperature=0.7, top_p=0.9, stop="\0never\0")
    following = Texts(texts, rows, params)
    for i in range(rows):
        # Staggered lengths: block boundaries are met by some rows at every step, as in service.
        scheduler.add(SequenceState(str(i), [i] * (context - i % block_size), params))
    times: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "all")}
    sampled = [7] * rows
    builder.mailbox.ids.fill_(7)
    before = None
    while len(times["build"]) < steps:
        t0 = time.perf_counter()
        found = None if before is None else scheduler.schedule_ahead(before)
        step, continues = (scheduler.schedule(), None) if found is None else found
        t1 = time.perf_counter()
        assert step is not None
        full = step.decode_only and len(step.seqs) == rows
        builder.build(step, rows if full else None, continues, sealed=full)
        if full:
            builder.send(NOWHERE)
        t2 = time.perf_counter()
        if before is not None:
            scheduler.update(before, sampled, frozenset({2}))
        if not ahead:
            scheduler.update(step, sampled, frozenset({2}))
        before = step if ahead else None
        t3 = time.perf_counter()
        following.advance()
        t4 = time.perf_counter()
        time.sleep(wait)
        t5 = time.perf_counter()
        if full:
            spent = (t1 - t0, t2 - t1, t3 - t2, t4 - t3, t5 - t4 - wait, t3 - t0)
            for phase, seconds in zip(times, spent, strict=True):
                times[phase].append(seconds * 1e6)
            builder.launch_feed(rows)  # the device's work, with which the step's graph begins
        if device == "cuda":
            torch.cuda.synchronize()
    following.close()
    return {p: (statistics.median(t), statistics.quantiles(t, n=100)[98]) for p, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ahead", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--texts", choices=("none", "thread", "inline"), default="none")
    parser.add_argument("--wait", type=float, default=0.0, metavar="MS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)  # on a CPU "device", copies of a few KB must not wait for a thread pool
    result = {}
    columns = (*PHASES, "all")
    print(f"{'rows':>6}" + "".join(f"{phase + ' us (p99)':>22}" for phase in columns))
    for rows in args.rows:
        times = measure(
            rows,
            args.steps,
            args.context,
            args.max_model_len,
            args.device,
            prefix_caching=args.prefix_caching,
            block_size=args.block_size,
            texts=args.texts,
            wait=args.wait / 1e3,
            ahead=args.ahead,
        )
        print(f"{rows:>6}" + "".join(f"{f'{times[p][0]:.1f} ({times[p][1]:.1f})':>22}" for p in columns))
        result[str(rows)] = {phase: round(times[phase][0], 1) for phase in columns}
    options = {
        "device": args.device,
        "prefix_caching": args.prefix_caching,
        "block_size": args.block_size,
        "ahead": args.ahead,
    }
    print(json.dumps({"benchmark": "host", **options, "texts": args.texts, "median_us": result}))


if __name__ == "__main__":
    main()
