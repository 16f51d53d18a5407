"""Paged attention on a GPU: correctness first, then decode and prefill against the card's measured limits.

    python -m benchmarks.attention                     # the committed configurations
    python -m benchmarks.attention --only grid         # decode of three models, bf16 beside FP8 caches
    python -m benchmarks.attention --tune --out DIR    # sweep configurations, write entries of the tuned table

Times are medians of CUDA-graph replays over random data; a decode shape whose KV fits in the L2 cycles through
enough sequences that it does not stay there. Shares are of the read bandwidth and matrix rate measured in the same run.
The last line of the output is JSON. A failed check ends the run before any timing.

Legend: H query heads, G kv heads, D head dim, B page size.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton

from benchmarks.attention_cases import (
    DTYPE,
    L2_BYTES,
    DecodeCase,
    DecodeShape,
    FusedCase,
    Layer,
    PrefillCase,
    PrefillShape,
    label,
    projected,
    random_cache,
    row,
)
from benchmarks.attention_tune import prepare, table_entry, timed, tune, write_entries
from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.paged_attention import lowering
from fusecomp.lowerings.paged_attention.lowering import NewTokens
from fusecomp.lowerings.paged_attention.rope import launch_rope_cache
from fusecomp.ops.rope import Rope

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
FP8_PREFILL = [PrefillShape(LLAMA, 1, 2048, cached=14336, quantized=codes) for codes in (False, True)]
GRID_LAYERS = {"1B": SMALL_HEADS, "8B": LLAMA, "30B-A3B": QWEN}
GRID_BATCHES, GRID_CONTEXTS = (1, 8, 64, 256), (200, 1024, 8192)
SHORT_BATCHES, SHORT_CONTEXTS = (64, 256), (200, 230)  # where bf16 decode is far from its limit


def measure_limits() -> tuple[float, float]:
    """(bytes/s of a read-only pass, FLOP/s of a bf16 matrix product) of this card."""
    data = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    bandwidth = data.nbytes / time_chain(lambda _: torch.sum(data), 3)
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return bandwidth, 2 * 8192**3 / time_chain(lambda _: torch.mm(a, b, out=out), 5)


def time_rope_cache(tokens: int, layer: Layer, bandwidth: float, quantized: bool = False) -> dict:
    """One line of the report: queries and keys rotated, keys and values written; bytes against the read bandwidth."""
    moved = tokens * (2 * layer.heads + 5 * layer.kv_heads + 2) * layer.head_dim * DTYPE.itemsize
    if quantized:  # values are written once more, and both to the cache as codes
        moved += tokens * layer.kv_heads * (layer.token_bytes(True) - layer.head_dim * DTYPE.itemsize)
    sets = max(1, min(64, L2_BYTES // moved))
    cache = random_cache(layer, -(-tokens // layer.page_size) * sets, quantized)
    slots = torch.arange(sets * tokens, device="cuda").view(sets, tokens)
    rope = Rope("half", layer.head_dim)
    inputs = []
    for own in slots:
        q, k, v = projected(tokens, layer)
        cos, sin = torch.randn(2, tokens, layer.head_dim, dtype=DTYPE, device="cuda")
        inputs.append((q, NewTokens(k, v, cos, sin, None, None, own, rope)))
    seconds = time_chain(lambda i: launch_rope_cache(*inputs[i % sets], cache), max(4, sets))
    return {
        "label": f"rope_cache D{layer.head_dim} H{layer.heads}/{layer.kv_heads} {tokens} tokens{' fp8' * quantized}",
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


def grid_classes(quantized: bool) -> list[list[DecodeShape]]:
    """Decode shapes that share a table entry: one layer and batch, at every context."""
    return [
        [DecodeShape(layer, batch, context, quantized=quantized) for context in GRID_CONTEXTS]
        for layer in GRID_LAYERS.values()
        for batch in GRID_BATCHES
    ]


def short_classes() -> list[list[DecodeShape]]:
    """bf16 decodes of many short rows; the long context only keeps their splits honest."""
    return [
        [DecodeShape(layer, batch, context) for context in (*SHORT_CONTEXTS, 1024)]
        for layer in (LLAMA, QWEN)
        for batch in SHORT_BATCHES
    ]


def time_class(shapes: list, tuned: bool, bandwidth: float, matrix_rate: float) -> tuple[list[dict], list]:
    """The report's lines of one class with the committed or the best configuration, and all that was tried."""
    kind = FusedCase if isinstance(shapes[0], DecodeShape) else PrefillCase
    cases = [kind(shape) for shape in shapes]
    found = tune(cases) if tuned else []
    times = found[0][0] if found else [timed(case, case.default()) for case in cases]
    rows = [row(case, seconds, bandwidth, matrix_rate) for case, seconds in zip(cases, times, strict=True)]
    del cases
    torch.cuda.empty_cache()
    return rows, found


def report_grid(tuned: bool, bandwidth: float, matrix_rate: float, until: float) -> tuple[list[dict], list, dict]:
    """Prints decode with bf16 and FP8 caches side by side; returns lines, table entries and the sweep."""
    rows, entries, sweep = [], [], {}
    names = {layer: name for name, layer in GRID_LAYERS.items()}
    print("fused decode: us, share of read bandwidth; fp8 as committed and (tuned); ratio of the last to bf16")
    for plain, codes in zip(grid_classes(False), grid_classes(True), strict=True):
        if time.time() > until:
            print(f"out of time before {label(codes[0])}")
            break
        columns = [time_class(plain, False, bandwidth, matrix_rate)[0]]
        columns.append(time_class(codes, False, bandwidth, matrix_rate)[0])
        if tuned:
            best, found = time_class(codes, True, bandwidth, matrix_rate)
            columns.append(best)
            entries.append(table_entry(codes[0], found[0][1], best))
            sweep[label(codes[0])] = [([round(s * 1e6, 2) for s in t], str(c)) for t, c in found[:12]]
            c = found[0][1]
            chosen = f"{c.block_n} keys {c.num_warps} warps {c.num_stages} stages {c.num_splits}/{c.min_split}"
            chosen += " ahead" * c.read_ahead
        else:
            chosen = ""
        for shape, *lines in zip(plain, *columns, strict=True):
            cells = "  ".join(f"{line['us']:8.1f} {line['share']:4.0%}" for line in lines)
            print(
                f"{names[shape.layer]:8s} b{shape.batch:<4d} ctx {shape.context:<5d} {cells}"
                f"  {lines[-1]['us'] / lines[0]['us']:.2f}  {chosen}",
                flush=True,
            )
        rows += [line for column in columns for line in column]
    return rows, entries, sweep


def report_short(bandwidth: float, matrix_rate: float) -> tuple[list[dict], list, dict]:
    """Prints bf16 decodes of many short rows, as committed and with the best configuration found."""
    rows, entries, sweep = [], [], {}
    for shapes in short_classes():
        before = time_class(shapes, False, bandwidth, matrix_rate)[0]
        after, found = time_class(shapes, True, bandwidth, matrix_rate)
        pairs = ", ".join(f"{s.context}: {a['us']} -> {b['us']}" for s, a, b in zip(shapes, before, after, strict=True))
        print(f"bf16 H{shapes[0].layer.heads}/{shapes[0].layer.kv_heads} b{shapes[0].batch} {pairs}  {found[0][1]}")
        entries.append(table_entry(shapes[0], found[0][1], after))
        sweep[label(shapes[0])] = [([round(s * 1e6, 2) for s in t], str(c)) for t, c in found[:12]]
        rows += after
    return rows, entries, sweep


def report_shapes(shapes: list, tuned: bool, bandwidth: float, matrix_rate: float) -> tuple[list[dict], list]:
    """Prints prefill, and decode without what precedes it, with committed configurations; prefill can be tuned."""
    rows, entries = [], []
    for shape in shapes:
        case = DecodeCase(shape) if isinstance(shape, DecodeShape) else PrefillCase(shape)
        config = case.default()
        if tuned and isinstance(shape, PrefillShape) and not (shape.cached or shape.window or shape.quantized):
            config = tune([case])[0][1]
        line = row(case, timed(case, config), bandwidth, matrix_rate)
        if config.source == "":
            entries.append(table_entry(shape, config, [line]))
        rows.append(line)
        del case
        torch.cuda.empty_cache()
    return rows, entries


def report_fused_and_writes(bandwidth: float, matrix_rate: float) -> list[dict]:
    """Decode with norm and rotation, and the writes of a prefill."""
    rows = []
    for shape in FUSED_SHAPES:
        case = FusedCase(shape)
        line = row(case, timed(case, case.default()), bandwidth, matrix_rate)
        rows.append({**line, "label": f"{'norm + ' * shape.layer.norm}rope + {line['label']}"})
        del case
        torch.cuda.empty_cache()
    return rows + write_rows(bandwidth)


def write_rows(bandwidth: float) -> list[dict]:
    rows = [time_cache_write(tokens, LLAMA, bandwidth) for tokens in (1, 256, 16384)]
    return rows + [time_rope_cache(n, LLAMA, bandwidth, codes) for n in (512, 8192) for codes in (False, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="the grid's FP8 decodes, short bf16 decodes, and prefill")
    parser.add_argument("--only", choices=("decode", "prefill", "grid"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=300.0, help="start no new class of shapes after this long")
    args = parser.parse_args()
    begin = time.time()
    grid, tuned = args.only in (None, "grid"), args.tune
    shapes: list[DecodeShape | PrefillShape] = []
    shapes += DECODE_SHAPES if args.only in (None, "decode") else []
    shapes += PREFILL_SHAPES if args.only in (None, "prefill") else []
    shapes += FP8_PREFILL if args.only == "grid" else []
    to_tune = [members[0] for members in (*grid_classes(True), *short_classes())] if tuned and grid else []
    classes = [*grid_classes(False), *grid_classes(True), *short_classes()] if grid else []
    to_tune += [s for s in shapes if tuned and isinstance(s, PrefillShape) and args.only != "grid"]
    prepare(to_tune, [members[0] for members in classes])
    bandwidth, matrix_rate = measure_limits()
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "read_tb_s": round(bandwidth / 1e12, 2), "matmul_tflop_s": round(matrix_rate / 1e12),
    }  # fmt: skip
    print(f"limits: read {environment['read_tb_s']} TB/s, bf16 matmul {environment['matmul_tflop_s']} TFLOP/s")
    rows, entries, sweep = [], [], {}
    if grid:
        if tuned:
            rows, entries, sweep = report_short(bandwidth, matrix_rate)
        parts = report_grid(tuned, bandwidth, matrix_rate, begin + args.seconds)
        rows, entries, sweep = rows + parts[0], entries + parts[1], sweep | parts[2]
    lines, more = report_shapes(shapes, tuned and args.only != "grid", bandwidth, matrix_rate)
    entries += more
    lines += report_fused_and_writes(bandwidth, matrix_rate) if args.only in (None, "decode") else []
    lines += write_rows(bandwidth) if args.only == "grid" else []
    for line in lines:
        print(f"{line['label']:50s} {line['us']:9.1f} us {line['rate']:8.2f} {line['unit']:8s} {line['share']:6.1%}")
    rows += lines
    if tuned:
        write_entries(args.out / f"{device_target(0).table}-entries.json", environment, entries)
    result = {**environment, "results": {r["label"]: [r["us"], r["rate"], r["share"]] for r in rows}}
    (args.out / "attention.json").write_text(json.dumps({**result, "entries": entries, "sweep": sweep}, indent=1))
    print(json.dumps(result) if args.only != "grid" else json.dumps(environment))


if __name__ == "__main__":
    main()
