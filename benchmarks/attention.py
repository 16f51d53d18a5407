"""Paged attention on a GPU: correctness first, then decode and prefill against the card's measured limits.

    python -m benchmarks.attention                     # the committed configurations
    python -m benchmarks.attention --tune --out DIR    # sweep configurations, write the table DIR/<gpu>.json

Times are medians of CUDA-graph replays over random data; a decode shape whose KV fits in the L2 cycles through
enough sequences that it does not stay there. Shares are of the read bandwidth and matrix rate measured in the same run.
The last line of the output is JSON. A failed check ends the run before any timing.

Legend: H query heads, G kv heads, D head dim, B page size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton

from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.paged_attention import heuristics, lowering
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, PrefillConfig
from fusecomp.lowerings.paged_attention.lowering import NewTokens
from fusecomp.lowerings.paged_attention.rope import launch_rope_attention, launch_rope_cache
from fusecomp.ops.rope import Rope
from tests.lowerings.steps import check_attention, check_rope_attention, make_rope, make_step

L2_BYTES = 256 * 2**20  # cycle through at least this much KV
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Layer:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    norm: bool = False  # of queries and keys, in the fused shapes


@dataclass(frozen=True)
class DecodeShape:
    layer: Layer
    batch: int
    context: int
    ragged: bool = False  # lengths spread evenly over 1 .. context

    @property
    def lengths(self) -> torch.Tensor:
        if self.ragged:
            return torch.linspace(1, self.context, self.batch).int()
        return torch.full((self.batch,), self.context, dtype=torch.int32)

    @property
    def kv_bytes(self) -> int:
        return int(self.lengths.sum()) * 2 * self.layer.kv_heads * self.layer.head_dim * DTYPE.itemsize


@dataclass(frozen=True)
class PrefillShape:
    layer: Layer
    rows: int
    new: int
    cached: int = 0
    window: int = 0

    @property
    def max_keys(self) -> int:
        return min(self.window or 2**30, self.cached + self.new)

    @property
    def flops(self) -> int:
        keys = self.new * self.cached + self.new * (self.new + 1) // 2
        if self.window:
            keys = sum(min(self.cached + i + 1, self.window) for i in range(self.new))
        return 4 * self.layer.heads * self.layer.head_dim * self.rows * keys


LLAMA = Layer()
SMALL_HEADS = Layer(head_dim=64)
QWEN = Layer(kv_heads=4, norm=True)
LARGE_HEADS = Layer(heads=16, head_dim=256)
DECODE_SHAPES = [
    *(DecodeShape(LLAMA, 1, n) for n in (200, 1024, 4096, 32768)),
    DecodeShape(LLAMA, 8, 1024),
    DecodeShape(LLAMA, 32, 200),
    DecodeShape(LLAMA, 32, 4096),
    DecodeShape(LLAMA, 32, 16384, ragged=True),
    DecodeShape(LLAMA, 256, 1024),
    DecodeShape(LLAMA, 256, 4096, ragged=True),
    *(DecodeShape(SMALL_HEADS, b, n) for b, n in ((1, 1024), (32, 4096))),
    *(DecodeShape(LARGE_HEADS, b, n) for b, n in ((1, 1024), (32, 4096))),
    *(DecodeShape(replace(LLAMA, page_size=b), 32, 4096) for b in (1, 32, 64)),
]
FUSED_BATCHES = ((1, 200), (8, 224), (64, 224), (256, 224))
FUSED_SHAPES = [
    *(DecodeShape(layer, b, n) for layer in (LLAMA, SMALL_HEADS) for b, n in FUSED_BATCHES),
    DecodeShape(LLAMA, 256, 448, ragged=True),
    *(DecodeShape(QWEN, b, n) for b in (1, 8, 64, 256) for n in (229, 1024, 4096)),
]
PREFILL_SHAPES = [
    PrefillShape(LLAMA, 8, 2048),
    PrefillShape(replace(QWEN, norm=False), 4, 2048),
    PrefillShape(LLAMA, 4, 4096),
    PrefillShape(LLAMA, 1, 16384),
    PrefillShape(LLAMA, 16, 256),
    PrefillShape(LLAMA, 1, 2048, cached=14336),
    PrefillShape(LLAMA, 1, 16384, window=4096),
    PrefillShape(SMALL_HEADS, 8, 2048),
    PrefillShape(LARGE_HEADS, 8, 2048),
]


def measure_limits() -> tuple[float, float]:
    """(bytes/s of a read-only pass, FLOP/s of a bf16 matrix product) of this card."""
    data = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    bandwidth = data.nbytes / time_chain(lambda _: torch.sum(data), 3)
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return bandwidth, 2 * 8192**3 / time_chain(lambda _: torch.mm(a, b, out=out), 5)


def random_cache(layer: Layer, blocks: int) -> torch.Tensor:
    shape = (blocks, 2, layer.kv_heads, layer.page_size, layer.head_dim)
    return torch.empty(shape, dtype=DTYPE, device="cuda").normal_()


class DecodeCase:
    """Inputs of one decode shape: several disjoint batches over one cache of shuffled pages."""

    def __init__(self, shape: DecodeShape) -> None:
        self.shape, layer = shape, shape.layer
        pages = -(-shape.context // layer.page_size)
        self.batches = max(1, math.ceil(L2_BYTES / shape.kv_bytes))
        order = torch.randperm(self.batches * shape.batch * pages, device="cuda", dtype=torch.int32)
        self.kv_cache = random_cache(layer, len(order))
        self.tables = order.view(self.batches, shape.batch, pages)
        self.q = torch.randn(layer.heads, shape.batch, layer.head_dim, dtype=DTYPE, device="cuda").transpose(0, 1)
        self.out = torch.empty(shape.batch, layer.heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.seq_lens = shape.lengths[torch.randperm(shape.batch)].cuda()

    def default(self) -> DecodeConfig:
        layer = self.shape.layer
        return heuristics.decode_config(
            device_target(0), head_dim=layer.head_dim, itemsize=DTYPE.itemsize, num_kv_heads=layer.kv_heads,
            page_size=layer.page_size, num_rows=self.shape.batch, capacity=self.shape.context,
            group=layer.heads // layer.kv_heads,
        )  # fmt: skip

    def launch(self, config: DecodeConfig, i: int = 0) -> None:
        lowering.run_decode(
            config, self.q, self.kv_cache, self.out, self.seq_lens, self.tables[i % self.batches], self.shape.batch,
            self.shape.layer.head_dim**-0.5, 0, 0.0, None,
        )  # fmt: skip

    def seconds(self, config: DecodeConfig) -> float:
        launches = max(4, min(200, int(4e-3 * 4e12 / (self.shape.kv_bytes + 4e6))))
        return time_chain(lambda i: self.launch(config, i), launches)


class FusedCase(DecodeCase):
    """The same with what precedes attention in a step: norm, rotation, the write of each row's last key and value."""

    def __init__(self, shape: DecodeShape) -> None:
        super().__init__(shape)
        layer, page_size = shape.layer, shape.layer.page_size
        self.q, k, v = projected(shape.batch, layer)
        cos, sin = torch.randn(2, shape.batch, layer.head_dim, dtype=DTYPE, device="cuda")
        last = self.seq_lens.long() - 1
        pages = self.tables.long().gather(2, (last // page_size).expand(self.batches, -1)[..., None])[..., 0]
        slots = pages * page_size + last % page_size
        rope, norms = Rope("half", layer.head_dim), (None, None)
        if layer.norm:
            rope = replace(rope, norm="rms", eps=1e-6)
            norms = tuple(torch.randn(2, layer.head_dim, dtype=DTYPE, device="cuda"))
        self.new = [NewTokens(k, v, cos, sin, *norms, own, rope) for own in slots]

    def launch(self, config: DecodeConfig, i: int = 0) -> None:
        lowering.run_decode(
            config, self.q, self.kv_cache, self.out, self.seq_lens, self.tables[i % self.batches], self.shape.batch,
            self.shape.layer.head_dim**-0.5, 0, 0.0, None, new=self.new[i % self.batches],
        )  # fmt: skip


def projected(tokens: int, layer: Layer) -> tuple[torch.Tensor, ...]:
    """q, k, v [tokens, heads, D] as views of one projection's result."""
    heads = layer.heads + 2 * layer.kv_heads
    qkv = torch.randn(tokens, heads, layer.head_dim, dtype=DTYPE, device="cuda")
    return qkv.split([layer.heads, layer.kv_heads, layer.kv_heads], 1)


class PrefillCase:
    """Inputs of one prefill shape."""

    def __init__(self, shape: PrefillShape) -> None:
        self.shape, layer = shape, shape.layer
        tokens, length = shape.rows * shape.new, shape.cached + shape.new
        pages = -(-length // layer.page_size)
        order = torch.randperm(shape.rows * pages, device="cuda", dtype=torch.int32)
        self.kv_cache = random_cache(layer, len(order))
        self.table = order.view(shape.rows, pages)
        self.q = torch.randn(layer.heads, tokens, layer.head_dim, dtype=DTYPE, device="cuda").transpose(0, 1)
        kv = torch.randn(tokens, 2 * layer.kv_heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.k, self.v = kv.split(layer.kv_heads, 1)
        self.out = torch.empty(tokens, layer.heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.cu = torch.arange(shape.rows + 1, dtype=torch.int32, device="cuda") * shape.new
        self.seq_lens = torch.full((shape.rows,), length, dtype=torch.int32, device="cuda")

    def default(self) -> PrefillConfig:
        return heuristics.prefill_config(
            device_target(0), head_dim=self.shape.layer.head_dim, itemsize=DTYPE.itemsize,
            max_keys=self.shape.max_keys,
        )  # fmt: skip

    def launch(self, config: PrefillConfig) -> None:
        lowering.run_prefill(
            config, self.q, self.k, self.v, self.kv_cache, self.out, self.cu, self.seq_lens, self.table,
            0, self.shape.rows, self.shape.new, self.shape.layer.head_dim**-0.5, self.shape.window, 0.0, None,
        )  # fmt: skip

    def seconds(self, config: PrefillConfig) -> float:
        return time_chain(lambda _: self.launch(config), 4, replays=5)


CHECKS: list[tuple[list[tuple[int, int]], dict, dict]] = [
    ([(200, 1)], {}, {}),
    ([(4095, 1), (0, 1), (1, 1), (777, 1), (2048, 1)], {"padding": 2}, {}),
    ([(1500, 1), (63, 1), (1000, 700), (0, 1111), (5, 2)], {}, {}),
    ([(1500, 1), (1000, 700), (0, 1111)], {"page_size": 1, "head_dim": 80}, {"softcap": 20.0}),
    ([(1500, 1), (1000, 700), (0, 1111)], {"page_size": 64, "head_dim": 64}, {"window": 300, "sinks": True}),
    ([(900, 1), (300, 200), (0, 411)], {"page_size": 32, "head_dim": 256}, {"window": 128, "softcap": 30.0}),
    ([(300, 1), (100, 120)], {"dtype": torch.float32, "head_dim": 96}, {"softcap": 5.0}),
    ([(300, 1), (100, 120)], {"dtype": torch.float16}, {}),
]


def check_correctness(case: int) -> None:
    """One step of real size against fp64, repeated to catch races; raises AssertionError."""
    rows, shape, options = CHECKS[case]
    layer = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 16, "dtype": DTYPE, **shape}
    step = make_step(rows, **layer, device="cuda", seed=case)
    sinks = torch.randn(8, device="cuda") if options.get("sinks") else None
    mode = (layer["head_dim"] ** -0.5, options.get("window", 0), options.get("softcap", 0.0), sinks)
    fused = replace(step, kv_cache=step.kv_cache.clone())
    given = make_rope(step, Rope("half", layer["head_dim"], norm="rms", eps=1e-6), table_dtype=torch.float32)
    out = launch_rope_attention(*given.arguments(fused, mode))
    check_rope_attention(step, fused, given, out, mode)
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    first = lowering.launch_paged_attention(*step.attention_inputs(), *mode)
    check_attention(step, first, *mode)
    for _ in range(20):
        again = lowering.launch_paged_attention(*step.attention_inputs(), *mode)
        assert torch.equal(first, again), f"check {case}: a second launch differs, so there is a race"


def time_rope_cache(tokens: int, layer: Layer, bandwidth: float) -> dict:
    """One line of the report: queries and keys rotated, keys and values written; bytes against the read bandwidth."""
    moved = tokens * (2 * layer.heads + 5 * layer.kv_heads + 2) * layer.head_dim * DTYPE.itemsize
    sets = max(1, min(64, L2_BYTES // moved))
    cache = random_cache(layer, -(-tokens // layer.page_size) * sets)
    slots = torch.arange(sets * tokens, device="cuda").view(sets, tokens)
    rope = Rope("half", layer.head_dim)
    inputs = []
    for own in slots:
        q, k, v = projected(tokens, layer)
        cos, sin = torch.randn(2, tokens, layer.head_dim, dtype=DTYPE, device="cuda")
        inputs.append((q, NewTokens(k, v, cos, sin, None, None, own, rope)))
    seconds = time_chain(lambda i: launch_rope_cache(*inputs[i % sets], cache), max(4, sets))
    return {
        "label": f"rope_cache D{layer.head_dim} H{layer.heads}/{layer.kv_heads} {tokens} tokens",
        "us": round(seconds * 1e6, 2), "rate": round(moved / seconds / 1e12, 3), "unit": "TB/s",
        "share": round(moved / seconds / bandwidth, 3),
    }  # fmt: skip


def time_cache_write(tokens: int, layer: Layer, bandwidth: float) -> dict:
    """One line of the report: bytes read plus bytes written, against the read bandwidth."""
    sets = max(1, L2_BYTES // (tokens * 4 * layer.kv_heads * layer.head_dim * DTYPE.itemsize))
    sets = min(sets, 64)
    kv = torch.randn(sets, tokens, 2 * layer.kv_heads, layer.head_dim, dtype=DTYPE, device="cuda")
    cache = random_cache(layer, -(-tokens // layer.page_size) * sets)
    slots = torch.randperm(cache.shape[0] * layer.page_size, device="cuda")[: sets * tokens].view(sets, tokens)

    def launch(i: int) -> None:
        k, v = kv[i % sets].split(layer.kv_heads, 1)
        lowering.launch_cache_write(k, v, cache, slots[i % sets])

    seconds = time_chain(launch, max(4, sets))
    rate = 4 * tokens * layer.kv_heads * layer.head_dim * DTYPE.itemsize / seconds
    return {
        "label": f"cache_write D{layer.head_dim} G{layer.kv_heads} {tokens} tokens", "us": round(seconds * 1e6, 2),
        "rate": round(rate / 1e12, 3), "unit": "TB/s", "share": round(rate / bandwidth, 3),
    }  # fmt: skip


def decode_candidates(shape: DecodeShape) -> Iterator[DecodeConfig]:
    dp = shape.layer.head_dim
    tiles = [(n, w, s) for n in (16, 32, 64, 128) for w in (1, 2, 4, 8) for s in (2, 3, 4)]
    for n, w, s in tiles:
        if 2 * s * n * dp * 2 > 200_000 or not 1024 <= n * dp // w <= 4096:
            continue
        yield DecodeConfig(n, w, s, 1, 64)


def split_candidates(batch: int, layer: Layer, config: DecodeConfig) -> Iterator[DecodeConfig]:
    """Splits for one to eight programs per multiprocessor, and at least one each."""
    pairs = batch * layer.kv_heads
    splits = {max(1, round(132 * per_sm / pairs)) for per_sm in (1, 2, 3, 4, 8, 16, 32)}
    for count, least in itertools.product(sorted(splits), (64, 128, 256, 1024, 2048)):
        if count <= heuristics.MAX_SPLITS and (count > 1 or least == 64):
            yield replace(config, num_splits=count, min_split=max(least, config.block_n))


def prefill_candidates(layer: Layer) -> Iterator[PrefillConfig]:
    shapes = [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 8, 3),
    ]  # fmt: skip
    for (m, n, w, s), tma in itertools.product(shapes, (True, False)):
        if (2 * s * n + m) * layer.head_dim * 2 <= 227 * 1024 and (tma or s == 3):
            yield PrefillConfig(m, n, w, s, tma)


def _prepare(job: tuple) -> str:
    """Run one check, or compile one configuration into Triton's disk cache, from a process of its own."""
    shape, config = job
    if shape is None:
        try:
            check_correctness(config)
        except Exception:
            return f"check {CHECKS[config]}: {traceback.format_exc()}"
        return ""
    try:
        decode = isinstance(shape, DecodeShape)
        case = DecodeCase(replace(shape, batch=2, context=64)) if decode else PrefillCase(replace(shape, cached=64))
        case.launch(config)
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not fit is reported when it is timed
        print(f"build {config}: {type(error).__name__}", flush=True)
    return ""


def prepare(jobs: list[tuple]) -> None:
    """All checks and builds, on several processes; SystemExit if a check fails."""
    start = time.time()
    jobs = [(None, case) for case in range(len(CHECKS))] + jobs
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1, len(jobs))) as pool:
        failures = [text for text in pool.map(_prepare, jobs, chunksize=1) if text]
    if failures:
        raise SystemExit("\n".join([*failures, json.dumps({"failed_checks": len(failures)})]))
    print(
        f"{len(CHECKS)} checks passed, {len(jobs) - len(CHECKS)} kernels built: {time.time() - start:.0f} s", flush=True
    )


def timed(case: DecodeCase | PrefillCase, config: DecodeConfig | PrefillConfig) -> float:
    try:
        return case.seconds(config)
    except triton.runtime.errors.OutOfResources as error:
        print(f"{config}: {error}", flush=True)
        return math.inf


def tune(cases: list[DecodeCase] | list[PrefillCase]) -> list[tuple[list[float], DecodeConfig | PrefillConfig]]:
    """(seconds per case, config) of every candidate, best geometric mean first.

    Decode: tiles at the default split, then the splits of the best two tiles.
    """

    def rank(configs: Iterable[DecodeConfig | PrefillConfig]) -> list:
        found = [([timed(case, config) for case in cases], config) for config in configs]
        return sorted(found, key=lambda pair: math.prod(pair[0]))

    shape = cases[0].shape
    if isinstance(shape, PrefillShape):
        return rank(prefill_candidates(shape.layer))
    default = cases[-1].default()  # of the longest context
    tiles = [replace(c, num_splits=default.num_splits, min_split=default.min_split) for c in decode_candidates(shape)]
    first = rank(tiles)
    second = dict.fromkeys(c for _, tile in first[:2] for c in split_candidates(shape.batch, shape.layer, tile))
    return sorted(first + rank(second), key=lambda pair: math.prod(pair[0]))


def table_entry(shape: DecodeShape | PrefillShape, config: DecodeConfig | PrefillConfig, rows: list[dict]) -> dict:
    """What the tuned table keeps of a class of shapes: its keys, the best configuration, the times it reached."""
    layer = shape.layer
    entry = {"head_dim": heuristics.padded_dim(layer.head_dim), "itemsize": DTYPE.itemsize}
    if isinstance(shape, DecodeShape):
        entry |= {"page": layer.page_size, "pairs": shape.batch * layer.kv_heads}
    else:
        entry |= {"keys": shape.new}
    chosen = {key: value for key, value in asdict(config).items() if key != "source"}
    return {**entry, "config": chosen, "measured": {row["label"]: [row["us"], row["share"]] for row in rows}}


def tune_class(shape: DecodeShape | PrefillShape) -> tuple | None:
    """Shapes that get one table entry together; None for those that take the entry of the plain shape."""
    if shape.layer.page_size != 16 or getattr(shape, "window", 0) or getattr(shape, "cached", 0):
        return None
    return (shape.layer, shape.batch) if isinstance(shape, DecodeShape) else (shape.layer, shape.new)


def write_table(path: Path, environment: dict, entries: list[dict]) -> None:
    """A table with one line per entry; dtypes that were not tuned keep their entries."""
    kept = heuristics.load_table(heuristics.DEFAULT_TABLE)
    lines = []
    for kind in ("decode", "prefill"):
        fresh = [e for e in entries if ("keys" in e) == (kind == "prefill")]
        other = [e for e in kept[kind] if e["itemsize"] != DTYPE.itemsize or not fresh]
        body = ",\n".join("    " + json.dumps(entry) for entry in [*fresh, *other])
        lines.append(f'  "{kind}": [\n{body}\n  ]')
    head = f'  "gpu": {json.dumps(environment["gpu"])},\n  "measured": {json.dumps(environment)},\n'
    path.write_text("{\n" + head + ",\n".join(lines) + "\n}\n")


def label(shape: DecodeShape | PrefillShape) -> str:
    layer = shape.layer
    head = f"D{layer.head_dim} H{layer.heads}/{layer.kv_heads} B{layer.page_size}"
    if isinstance(shape, DecodeShape):
        return f"decode  {head} batch {shape.batch} context {'1 to ' * shape.ragged}{shape.context}"
    extra = f" cached {shape.cached}" * bool(shape.cached) + f" window {shape.window}" * bool(shape.window)
    return f"prefill {head} {shape.rows} x {shape.new}{extra}"


def row(case: DecodeCase | PrefillCase, seconds: float, bandwidth: float, matrix_rate: float) -> dict:
    """One line of the report: time, rate and share of the measured limit."""
    shape = case.shape
    decode = isinstance(shape, DecodeShape)
    rate = (shape.kv_bytes if decode else shape.flops) / seconds
    return {
        "label": label(shape), "us": round(seconds * 1e6, 2), "rate": round(rate / 1e12, 3),
        "unit": "TB/s" if decode else "TFLOP/s", "share": round(rate / (bandwidth if decode else matrix_rate), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=120.0, help="start no new class of shapes after this long")
    args = parser.parse_args()
    begin = time.time()
    shapes: list[DecodeShape | PrefillShape] = []
    shapes += DECODE_SHAPES if args.only != "prefill" else []
    shapes += PREFILL_SHAPES if args.only != "decode" else []
    jobs: list[tuple] = []
    if args.tune:
        for kind, layer in dict.fromkeys((type(s), s.layer) for s in shapes if tune_class(s)):
            if kind is DecodeShape:
                jobs += [(DecodeShape(layer, 1, 64), c) for c in decode_candidates(DecodeShape(layer, 1, 64))]
            else:
                jobs += [(PrefillShape(layer, 2, 256), c) for c in prefill_candidates(layer)]
    prepare(jobs)
    bandwidth, matrix_rate = measure_limits()
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "read_tb_s": round(bandwidth / 1e12, 2), "matmul_tflop_s": round(matrix_rate / 1e12),
    }  # fmt: skip
    print(f"limits: read {environment['read_tb_s']} TB/s, bf16 matmul {environment['matmul_tflop_s']} TFLOP/s")

    classes: dict[tuple, list] = {}
    for shape in shapes:
        classes.setdefault((type(shape), tune_class(shape) or shape), []).append(shape)
    rows, entries, sweep = [], [], {}
    for members in classes.values():
        if time.time() - begin > args.seconds:
            print(f"out of time before {label(members[0])}")
            continue
        cases = [DecodeCase(s) if isinstance(s, DecodeShape) else PrefillCase(s) for s in members]
        config, found = None, []
        if args.tune and tune_class(members[0]):
            found = tune(cases)
            times, config = found[0]
        else:
            times = [timed(case, case.default()) for case in cases]
        new = [row(case, seconds, bandwidth, matrix_rate) for case, seconds in zip(cases, times, strict=True)]
        for line in new:
            print(
                f"{line['label']:50s} {line['us']:9.1f} us {line['rate']:8.2f} {line['unit']:8s} {line['share']:6.1%}"
            )
        print(f"    {config or cases[0].default()}", flush=True)
        rows += new
        if config:
            entries.append(table_entry(members[0], config, new))
            sweep[label(members[0])] = [([round(s * 1e6, 2) for s in t], str(c)) for t, c in found]
        del cases
        torch.cuda.empty_cache()
    for shape in FUSED_SHAPES if args.only != "prefill" else []:
        case = FusedCase(shape)
        line = row(case, timed(case, case.default()), bandwidth, matrix_rate)
        rows.append({**line, "label": f"{'norm + ' * shape.layer.norm}rope + {line['label']}"})
        del case
        torch.cuda.empty_cache()
    rows += [time_cache_write(tokens, LLAMA, bandwidth) for tokens in (1, 256, 16384)]
    rows += [time_rope_cache(tokens, LLAMA, bandwidth) for tokens in (512, 8192)]
    for line in rows[-len(FUSED_SHAPES) - 5 :]:
        print(f"{line['label']:50s} {line['us']:9.1f} us {line['rate']:8.2f} TB/s {line['share']:6.1%}")
    if args.tune:
        write_table(args.out / f"{device_target(0).table}.json", environment, entries)
        (args.out / "sweep.json").write_text(json.dumps(sweep, indent=1))
    print(json.dumps({**environment, "results": {r["label"]: [r["us"], r["rate"], r["share"]] for r in rows}}))


if __name__ == "__main__":
    main()
