"""Decode attention over bf16 and FP8 caches in under a minute: `python -m benchmarks.attention_quick --out DIR`.

A handful of shapes, and for each a handful of configurations: built in parallel, compared with the eager reference (at
the shortest context, and at lengths spread over a range where a class has them), then timed with norm, rotation and
cache write inside. The table shows microseconds and shares of the read bandwidth measured in the same run;
DIR/fp8kv-quick.json has everything, and for each class an entry of the tuned table. `--only` names others as well.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.attention_cases import DecodeShape, FusedCase, Layer, label, row
from benchmarks.attention_tune import build_or_check, table_entry, timed
from benchmarks.builds import refusal
from benchmarks.step_candidates import MOST_PROGRAMS
from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig
from fusecomp.ops.attention import paged_attention_reference
from fusecomp.ops.rope import rotate_reference

LLAMA, SMALL, QWEN = Layer(), Layer(head_dim=64), Layer(kv_heads=4, norm=True)
# Relative error that queries, keys and probabilities rounded to bf16 explain; one key of 200 left out makes 7%.
ALLOWED = 2e-2
# Keys of a tile, warps, stages, whether the first tile is read ahead.
SPLIT = (
    (16, 1, 3, False),
    (16, 1, 4, False),
    (32, 1, 3, False),
    (32, 2, 3, False),
    (64, 2, 2, False),
    (64, 4, 3, False),
)
AHEAD = ((64, 4, 2, True), (128, 8, 2, True))


@dataclass(frozen=True)
class Class:
    """Shapes that take one table entry, the candidates for it, and how finely each may split a row.

    With `spread` more shapes have unequal lengths: between the two, and from 1 to 4,096.
    """

    layer: Layer
    batch: int
    contexts: tuple[int, ...]
    quantized: bool
    tiles: tuple[tuple[int, int, int, bool], ...]
    splits: tuple[int, ...]
    least: tuple[int, ...]
    spread: tuple[int, int] | None = None
    alone: bool = False  # the entry serves its query heads a kv head alone
    apart: tuple[int, ...] = ()  # warps of launches whose warps are apart and load a tile ahead

    @property
    def name(self) -> str:
        """As `--only` takes it: kv heads, sequences, the head dim if it is not 128, and what the cache holds."""
        layer, spread = self.layer, "-spread" if self.spread else ""
        dim = "" if layer.head_dim == 128 else f"-d{layer.head_dim}"
        return f"{layer.kv_heads}x{self.batch}{dim}-{'fp8' if self.quantized else 'bf16'}{spread}"

    @property
    def shapes(self) -> list[DecodeShape]:
        alike = [DecodeShape(self.layer, self.batch, n, quantized=self.quantized) for n in self.contexts]
        ranges = [self.spread, (1, 4096)] if self.spread else []
        return alike + [replace(alike[0], context=high, ragged=True, shortest=low) for low, high in ranges]

    def kernels(self) -> list[DecodeConfig]:
        shared = [
            DecodeConfig(n, w, s, splits, max(n, self.least[0]), ahead)
            for n, w, s, ahead in self.tiles
            for splits in self.splits
        ]
        return shared + [
            DecodeConfig(16 * w, w, 2, splits, max(16 * w, self.least[0]), apart=16)
            for w in self.apart
            for splits in self.splits
        ]

    def configs(self) -> list[DecodeConfig]:
        """How finely a row is split is an argument of a kernel."""
        return [replace(c, min_split=m) for c in self.kernels() for m in self.least if m >= c.block_n]


CLASSES = (
    Class(LLAMA, 64, (200, 1024, 8192), False, (), (4,), (512,)),
    Class(LLAMA, 64, (200, 1024, 8192), True, SPLIT + AHEAD, (4,), (512, 2048)),
    Class(LLAMA, 1, (200, 1024, 8192), False, (), (32,), (64,)),
    Class(LLAMA, 1, (200, 1024, 8192), True, (SPLIT[0], SPLIT[2], SPLIT[5], *AHEAD), (32,), (64, 256)),
    Class(QWEN, 64, (200, 1024), False, (SPLIT[2], *AHEAD), (4,), (64, 256)),
    Class(QWEN, 64, (200, 1024), True, (*SPLIT[:4], *AHEAD), (4,), (64, 256)),
    Class(LLAMA, 8, (200, 1024, 4096), True, (*SPLIT[:3], AHEAD[0]), (8,), (64, 256)),
    Class(LLAMA, 32, (200, 1024, 4096), True, (*SPLIT[:3], AHEAD[0]), (8,), (64, 512)),
    Class(QWEN, 1, (200, 1024, 4096), True, (SPLIT[0], SPLIT[2], *AHEAD), (32,), (64, 256)),
    Class(QWEN, 8, (200, 1024, 4096), True, (*SPLIT[:3], *AHEAD), (8,), (64, 256)),
)  # fmt: skip
WIDE = (*SPLIT[:1], *SPLIT[2:3], (64, 4, 2, False), SPLIT[5])


def served(rows: int) -> tuple[int, int]:
    """The shortest and longest of the last `rows` of 256 sequences, prompts and outputs uniform in 100..1024."""
    made = round(100 + 924 * (1 - rows / 256))
    return 100 + made, 1024 + made


ON_REQUEST = tuple(
    Class(
        layer, rows, (200, 640), False, tiles, (1, 2, 4, 8), (256, 512, 1024, 2048), served(rows), layer is QWEN, apart
    )
    for layer, tiles in ((LLAMA, WIDE), (SMALL, (*WIDE, (128, 4, 2, False))), (QWEN, WIDE))
    for rows in (16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
    for apart in ((4, 8) if rows * layer.kv_heads <= MOST_PROGRAMS else (),)
)


def reference(case: FusedCase) -> torch.Tensor:
    """What the launch that was just run on the first batch must have given, over the keys that it wrote: [S, H, D]."""
    new, shape = case.new[0], case.shape
    cu = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    meta = torch.tensor([shape.batch, 1, shape.context, shape.batch], dtype=torch.int32)
    q = rotate_reference(case.q, new.cos, new.sin, new.q_norm, new.rope)
    rest = (case.kv_cache, cu, case.seq_lens, case.tables[0], meta, shape.layer.head_dim**-0.5, 0, 0.0, None)
    return paged_attention_reference(q, new.k, new.v, *rest).double()


def check(case: FusedCase, configs: Sequence[DecodeConfig]) -> list[DecodeConfig]:
    """The configurations that run; each gives what the reference gives.

    Raises:
        AssertionError: one does not.
    """

    def launch(config: DecodeConfig) -> None:
        case.launch(config)
        torch.cuda.synchronize()

    good = []
    for config in configs:
        if why := refusal(partial(launch, config)):
            print(f"left out {config}: {why}", flush=True)
            continue
        expected = reference(case)
        error = float((case.out.double() - expected).norm() / expected.norm())
        assert error < ALLOWED, f"{label(case.shape)} {config}: error {error:.1e} against the reference"
        good.append(config)
    return good


def measure(one: Class, bandwidth: float, until: float) -> tuple[list[dict], list, dict | None]:
    """Lines of the committed and the best configuration, every time taken, and the best as a table entry."""
    cases = [FusedCase(shape) for shape in one.shapes]
    for case in cases:
        if case is cases[0] or case.shape.ragged:
            check(case, [case.default(), *one.configs()])
    found = [([timed(case, case.default()) for case in cases], cases[0].default())]
    for config in one.configs():
        if time.time() < until:
            found.append(([timed(case, config) for case in cases], config))
    best = min(found, key=lambda pair: math.prod(pair[0]))
    lines = [
        [row(case, t, bandwidth, 1.0) for case, t in zip(cases, times, strict=True)] for times, _ in (found[0], best)
    ]
    for before, after, shape in zip(*lines, one.shapes, strict=True):
        cells = "  ".join(f"{line['us']:8.2f} us {line['share']:4.0%}" for line in (before, after))
        print(f"{label(shape):52s} {cells}  {best[1].block_n}/{best[1].num_warps}/{best[1].num_stages}"
              f"{' apart' * bool(best[1].apart)}"
              f" {best[1].num_splits}x{best[1].min_split}{' ahead' * best[1].read_ahead}", flush=True)  # fmt: skip
    times = [([round(s * 1e6, 2) for s in t], str(c)) for t, c in sorted(found, key=lambda pair: math.prod(pair[0]))]
    entry = table_entry(one.shapes[0], best[1], lines[1]) if best is not found[0] else None
    if entry and one.alone:
        entry["group"] = one.layer.heads // one.layer.kv_heads
    torch.cuda.empty_cache()
    return [line for pair in lines for line in pair], times, entry


def read_bandwidth() -> float:
    """Bytes/s of a read-only pass over 2 GiB."""
    data = torch.empty(2**29, dtype=torch.float32, device="cuda").normal_()
    return data.nbytes / time_chain(lambda _: torch.sum(data), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=40.0, help="time no further configuration after this long")
    parser.add_argument(
        "--only", help=f"some of {', '.join(c.name for c in (*CLASSES, *ON_REQUEST))}, separated by commas"
    )
    args = parser.parse_args()
    begin = time.time()
    named = args.only.split(",") if args.only else [c.name for c in CLASSES]
    classes = [c for c in (*CLASSES, *ON_REQUEST) if c.name in named]
    if not classes:
        parser.error(f"--only {args.only} names none")
    jobs = [(replace(c.shapes[0], context=64), config) for c in classes for config in (None, *c.kernels())]
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        pool.map(build_or_check, jobs, chunksize=1)
    bandwidth = read_bandwidth()
    print(f"{len(jobs)} kernels built after {time.time() - begin:.0f} s; read {bandwidth / 1e12:.2f} TB/s", flush=True)
    print("committed configuration, then the best of those tried: tile keys/warps/stages, splits x least keys")
    result = {"gpu": torch.cuda.get_device_name(), "read_tb_s": round(bandwidth / 1e12, 2)}
    result |= {"table": device_target(0).table, "rows": [], "entries": [], "sweep": {}}
    for one in classes:
        rows, times, entry = measure(one, bandwidth, begin + args.seconds)
        result["rows"] += rows
        result["sweep"][label(one.shapes[0])] = times
        result["entries"] += [entry] if entry else []
        (args.out / "fp8kv-quick.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({"seconds": round(time.time() - begin, 1)}))


if __name__ == "__main__":
    main()
