"""Quantized linears: their configurations, and how a call falls back."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from fusecomp.lowerings.paged_attention.heuristics import SM80, SM90, TARGETS, Target
from fusecomp.lowerings.quant import held_launch, heuristics, launches, lowering, tables
from fusecomp.lowerings.quant.held_launch import in_bf16
from fusecomp.lowerings.quant.heuristics import (
    FOLDED_LIMIT,
    MAX_SPLITS,
    TILE_LIMIT,
    QuantConfig,
    digit_entries,
    entries,
    fitting_columns,
    held_config,
    held_entries,
    held_registers,
    quant_config,
    reads_words,
    serves_held,
    serves_words,
    unit,
)
from fusecomp.lowerings.quant.launches import input_tiles, run_quant
from fusecomp.lowerings.quant.lowering import explain_choices, launch_quant_linear, refusal
from fusecomp.ops.linear import Program
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from fusecomp.ops.quant_linear import QuantShape
from fusecomp.patterns.quant_examples import random_weight

KINDS = ((INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4))


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    sizes, dtypes = (2, 1000, 14336), ("bfloat16", "float32")
    for n, k, groups, tokens, dtype in itertools.product(sizes, sizes, (1, 2), (1, 2, 16, 33, 128, 5000), dtypes):
        for (kind, bits), cols in itertools.product(KINDS, (0, 16, 32, 48, 128, 160)):
            shape = QuantShape(n, k, groups, dtype, kind, bits, 1, cols, False)
            config = quant_config(target, shape, tokens)
            assert config.kernel not in ("vector", "words") or tokens == 1
            assert (config.kernel == "dequantize") == (tokens > TILE_LIMIT[bits])
            if config.kernel == "tile":
                assert cols == 0 or cols % config.block_k == 0 or config.block_k % cols == 0
                assert config.block_k >= 16 and config.block_r % groups == 0
                assert 1 <= config.splits <= MAX_SPLITS and config.block_t <= 128
                stage = (
                    config.block_r * bits // 8 + config.block_t * (2 if dtype == "bfloat16" else 4)
                ) * config.block_k
                assert config.num_stages * stage <= target.smem_bytes
            elif config.kernel == "vector":
                assert cols % unit(shape) == 0 and config.block_k % unit(shape) == 0


H100 = Target("NVIDIA H100 80GB HBM3", "cuda", 90, SM90.smem_bytes, SM90.num_sms)


def tuned_shape(entry: dict) -> QuantShape:
    """The layer that an entry was measured on."""
    n, (cols, fold) = entry["rows"] // entry["groups"], (128, 64) if entry["bits"] == 4 else (0, 0)
    layout = (entry["kind"], entry["bits"], 1, cols, entry.get("zero", False))
    return QuantShape(n, entry["k"], entry["groups"], "bfloat16", *layout, fold=fold)


def test_source_says_whether_the_entry_was_measured_for_the_shape():
    assert {(e["kind"], e["bits"]) for e in entries(H100.table)} == {(FP8, 8), (INT, 4)}
    for target in (H100, SM90):
        # Inputs of fp16 are not held, nor cut to digits.
        kept = [("float16", entry) for entry in entries(target.table)]
        kept += [("bfloat16", entry) for entry in held_entries(target.table) + digit_entries(target.table)]
        for dtype, entry in kept:
            shape, tokens, held = replace(tuned_shape(entry), dtype=dtype), entry["tokens"], dtype == "bfloat16"
            found, timed = quant_config(target, shape, tokens, held), "us" in entry or "step_us" in entry
            measured = timed and entry["gpu"] == target.name
            assert found.source.startswith(entry["gpu"])
            assert found.source.endswith("(exact)" if measured else "(nearest)")
            assert found == QuantConfig(**entry["config"], source=found.source)
            assert quant_config(replace(target, num_sms=100), shape, tokens, held).kernel == found.kernel
            assert quant_config(replace(target, name="Some GPU"), shape, tokens, held).source.endswith("(nearest)")
            for change in ({"n": shape.n + 16}, {"k": shape.k + 128}, {"rows": 128}):
                assert quant_config(target, replace(shape, **change), tokens, held).source.endswith("(nearest)")


def test_own_entries_replace_those_of_the_default_gpu(monkeypatch, tmp_path):
    """One by one: what was not measured on a GPU is the default GPU's."""
    default = json.loads((tables.TABLES / f"{tables.DEFAULT_TABLE}.json").read_text())
    own = next(e for e in default["quant"] if e["kind"] == FP8) | {"us": 1.0}
    (tmp_path / f"{tables.DEFAULT_TABLE}.json").write_text(json.dumps(default))
    (tmp_path / "some_gpu.json").write_text(json.dumps({"gpu": "Some GPU", "quant": [own]}))
    monkeypatch.setattr(tables, "TABLES", tmp_path)
    tables.entries_of.cache_clear()
    try:
        found = entries("some_gpu")
        assert len(found) == len(default["quant"])
        assert [e for e in found if e["gpu"] == "Some GPU"] == [own | {"gpu": "Some GPU"}]
        assert {e["gpu"] for e in entries("another_gpu")} == {default["gpu"]}
    finally:
        tables.entries_of.cache_clear()


def test_zero_points_have_launches_of_their_own():
    """Beyond 8 tokens, with the bias in sums where symmetric codes have none; else those of symmetric codes serve."""
    for n, k, groups in ((6144, 4096, 1), (14336, 4096, 2), (4096, 14336, 1), (2048, 8192, 1)):
        plain = QuantShape(n, k, groups, "bfloat16", INT, 4, 1, 128, False, fold=64)
        for tokens in range(1, FOLDED_LIMIT + 1):
            found, other = (quant_config(H100, replace(plain, zero=zero), tokens) for zero in (True, False))
            assert found.sums and other.sums == (tokens <= 8)
            assert tokens > 8 or replace(found, source="") == replace(other, source="")
            assert not (found.source.endswith("(exact)") and (tokens <= 8 or tokens > 64))


def test_folded_codes_have_one_kernel():
    """Up to a limit, which is higher where launches are tuned; or another of few tokens. Other GPUs and fp32 do too."""
    entry = next(e for e in entries(H100.table) if e["bits"] == 4 and e["tokens"] == 8)
    shape = tuned_shape(entry)
    for target, dtype in itertools.product((H100, *TARGETS), ("bfloat16", "float16", "float32")):
        other = replace(shape, dtype=dtype)
        limit = FOLDED_LIMIT if target.backend == "cuda" and dtype != "float32" else TILE_LIMIT[4]
        kernels = [quant_config(target, other, tokens).kernel for tokens in (1, 2, 33, limit, limit + 1)]
        assert kernels[2:] == ["folded"] * 2 + ["dequantize"] and {*kernels[:2]} <= {"folded", "folded held"}
        assert dtype != "float32" or not any(quant_config(target, other, t).sums for t in (1, 33, limit))
    assert quant_config(H100, replace(shape, cols=16, fold=0), 1).source == "no table"


@pytest.mark.parametrize("target", [SM90, replace(SM90, num_sms=64), SM80], ids=["H200", "fewer", "A100"])
@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize("tokens, warps", [(1, 16), (2, 12)])
def test_held_inputs_fill_the_gpu_once(target, parts, tokens, warps):
    """All programs at once, each with all rows of its part; no warp beyond K, and TMA's requests where it is."""
    sizes = [(6144, 4096, 1), (14336, 4096, 2), (4096, 14336, 1), (2048, 256, 1), (16, 53248, 1), (65536, 512, 2)]
    for n, k, groups in sizes:
        shape = QuantShape(n, k, groups, "bfloat16", INT, 4, 1, 128, True, fold=64)
        assert serves_held(shape)
        config = held_config(QuantConfig("folded held", 1, parts=parts, ahead=1), target, shape, tokens)
        programs = math.ceil(n * groups / config.block_r) * config.splits
        assert config.parts <= parts and (config.parts - 1) * 256 < k <= config.parts * 256 * config.splits
        assert config.block_r % 16 == 0 and config.ahead == target.has_tma and config.num_warps == config.parts
        assert config.block_r == 1024 or programs * config.parts <= warps * target.num_sms
        assert held_registers(tokens) * 32 * warps <= 65536


def test_digits_serve_few_tokens_of_bf16_where_they_were_tuned():
    """From two tokens on, up to the last entry; scales of blocks take steps as wide; else the tile kernel."""
    alike = [e for e in digit_entries(SM90.table) if e["kind"] == FP8]
    shape = tuned_shape(next(e for e in alike if e["tokens"] == 8))
    most = max(e["tokens"] for e in alike)
    kernels = [quant_config(SM90, shape, tokens).kernel for tokens in (1, 2, 8, most, most + 1)]
    assert kernels == ["words", "digits", "digits", "digits", "tile"]
    assert quant_config(SM90, replace(shape, n=1000, k=1600), 5).kernel == "digits"
    blocks = quant_config(SM90, replace(shape, rows=128, cols=128), 8)
    assert blocks.kernel == "digits" and 128 % blocks.block_k == 0
    for change in ({"cols": 64}, {"k": 4104}, {"kind": INT}, {"dtype": "float16"}, {"dtype": "float32"}):
        assert quant_config(SM90, replace(shape, **change), 8).kernel == "tile", change
    for target in TARGETS:
        assert (quant_config(target, shape, 8).kernel == "digits") == (target == SM90)
    assert not digit_entries(H100.table)


def test_digits_serve_folded_codes_of_bf16_where_they_were_tuned():
    """Gate and up from three tokens on, other layers with zero points from nine; where half a tile has one scale."""
    alike = [e for e in digit_entries(SM90.table) if e["bits"] == 4]
    most = max(e["tokens"] for e in alike)
    for entry in (e for e in alike if e["tokens"] == 16 and e.get("zero")):
        shape = tuned_shape(entry)
        kernels = [quant_config(SM90, shape, tokens).kernel for tokens in (1, 2, 8, 9, 16, most + 1)]
        first = "folded digits" if shape.groups == 2 else "folded"
        assert kernels[:5] == ["folded held", "folded held", first, "folded digits", "folded digits"]
        assert kernels[5] in ("folded", "folded wide")
        assert quant_config(SM90, replace(shape, zero=False), 16).kernel == first
        for change in ({"cols": 0}, {"cols": 256}, {"fold": 32}, {"rows": 0}, {"k": 1024}):
            assert quant_config(SM90, replace(shape, **change), 16).kernel == "folded digits", change
        for change in ({"cols": 64}, {"dtype": "float16"}, {"dtype": "float32"}, {"k": 32768}):
            assert quant_config(SM90, replace(shape, **change), 16).kernel == "folded", change
        for target in (*TARGETS, H100):
            assert (quant_config(target, shape, 16).kernel == "folded digits") == (target == SM90)
        for groups, tokens in itertools.product((1, 2), (16, 32)):
            wide = quant_config(SM90, replace(shape, groups=groups, fold=32), tokens)
            if wide.kernel == "folded digits":
                assert wide.block_k == 128 and wide.block_r >= 64 * groups and wide.block_t * groups <= 32


@pytest.mark.parametrize(("k", "begin", "asks"), [(1024, 0, True), (1024, 2, False), (1024, 8, True), (768, 0, False)])
def test_held_inputs_ask_for_scales_that_tma_can_address(monkeypatch, k, begin, asks):
    """They begin at a multiple of 16 bytes, and so does each row."""
    asked = []
    monkeypatch.setattr(held_launch, "launch", lambda *_, **options: asked.append(options["ASK_SCALES"]))
    q, *parts = random_weight((32, k), WeightSpec(INT, 4, 1, 128, "bfloat16", 64), torch.bfloat16, zero=True)
    scale, zero = (torch.empty(part.numel() + begin, dtype=part.dtype)[begin:].view(part.shape) for part in parts)
    x, out = torch.zeros(1, k, dtype=torch.bfloat16), torch.empty(1, 32, dtype=torch.bfloat16)
    config = held_config(QuantConfig("folded held", 1, parts=2), SM90, tuned_shape(held_entries(SM90.table)[0]), 1)
    held_launch.run_held(config, x, q, scale, zero, None, (), (), out, 0.0, {"G": 1, "ASM": True})
    assert asked == [asks]
    assert in_bf16(scale, zero) and not in_bf16(scale.view(-1)[1:], zero)


def test_held_inputs_serve_whole_products_with_scales_of_bf16(monkeypatch):
    """Else one token runs as others do."""
    shape = tuned_shape(held_entries(SM90.table)[0])
    found, two = quant_config(SM90, shape, 1), quant_config(SM90, shape, 1, held=False)
    assert found.kernel == "folded held" and found.source.endswith("(exact)") and two.kernel == "folded"
    assert quant_config(SM90, shape, 2).kernel == "folded held" and not held_entries(H100.table)
    assert quant_config(SM90, shape, 3).kernel == "folded"
    for change in ({"n": shape.n + 8}, {"k": shape.k + 128}, {"cols": 256}, {"rows": 0}, {"dtype": "float16"}):
        assert quant_config(SM90, replace(shape, **change), 1).kernel == "folded", change
    places = replace(shape, n=(1 << 31) // (shape.groups * 2048), k=4096)
    assert not serves_held(places) and serves_held(replace(places, n=places.n - 16)), "places in a weight are int32"
    ran = []
    monkeypatch.setattr(lowering, "quant_config", lambda *_, held=True: found if held else two)
    monkeypatch.setattr(lowering, "run_quant", lambda config, *_: ran.append(config))
    spec, x = WeightSpec(INT, 4, 1, 128, "bfloat16", 64), torch.zeros(1, 256, dtype=torch.bfloat16)
    program = Program(1, (), (), "bfloat16")
    for dtype, zero in itertools.product((torch.bfloat16, torch.float16), (torch.bfloat16, torch.float8_e4m3fn)):
        q, scale, zeros = random_weight((32, 256), spec, dtype, zero=True)
        weight = q, scale, zeros.to(zero)
        launch_quant_linear(x, *weight, None, None, [], program, spec)
        if ran[-1] is two:
            with pytest.raises(ValueError, match="held inputs: scales are"):
                run_quant(found, x, *weight, None, [], program, spec, x.new_empty(1, 32), False)
    with pytest.raises(ValueError, match="held inputs: 3 tokens"):
        run_quant(found, x.expand(3, -1), q, scale, zeros, None, [], program, spec, x.new_empty(3, 32), False)
    assert ran == [found, two, two, two]


def test_splits_follow_the_gpu():
    large = Target("Some GPU", "cuda", 90, SM90.smem_bytes, 2 * SM90.num_sms)
    shape = QuantShape(8192, 4096, 1, "bfloat16", INT, 4, 1, 128, False, fold=64)
    assert quant_config(large, shape, 16).splits > quant_config(SM90, shape, 16).splits
    assert quant_config(SM90, replace(shape, n=1 << 20), 16).splits == 1


@pytest.mark.parametrize(
    ("cols", "config", "words"),
    [
        (128, QuantConfig("tile", 16, 64, 128), True),
        (0, QuantConfig("tile", 16, 64, 256), True),
        (128, QuantConfig("tile", 16, 64, 32), False),
        (128, QuantConfig("tile", 8, 64, 128), False),
        (32, QuantConfig("tile", 16, 64, 128), False),
    ],
)
def test_words_share_a_scale(cols, config, words):
    assert reads_words(config, QuantShape(64, 1024, 1, "bfloat16", FP8, 8, 1, cols, False)) == words
    assert not reads_words(config, QuantShape(64, 1026, 1, "bfloat16", FP8, 8, 1, cols, False))


def test_halves_are_of_whole_rows_of_bytes(monkeypatch):
    entry = {"kind": FP8, "bits": 8, "rows": 64, "k": 1024, "groups": 1, "tokens": 16}
    entry["config"] = {k: v for k, v in asdict(QuantConfig("tile", 16, 64, 256, halves=True)).items() if k != "source"}
    monkeypatch.setattr(heuristics, "entries", lambda _: [entry | {"gpu": ""}])
    shape = QuantShape(64, 1024, 1, "bfloat16", FP8, 8, 1, 0, False)
    target = replace(H100, name="Some GPU")
    assert quant_config(target, shape, 16).halves and quant_config(target, replace(shape, kind=INT, rows=0), 16).halves
    for change in ({"cols": 128}, {"zero": True, "kind": INT}):
        assert not quant_config(target, replace(shape, **change), 16).halves
        assert quant_config(target, replace(shape, **change), 16).block_t == 16


def test_words_serve_whole_rows_of_bytes():
    shape = QuantShape(64, 1024, 1, "bfloat16", FP8, 8, 1, 0, False)
    assert serves_words(shape) and serves_words(replace(shape, kind=INT, rows=0))
    for change in ({"cols": 128}, {"zero": True}, {"dtype": "float32"}, {"k": 1022}, {"bits": 4, "kind": INT}):
        assert not serves_words(replace(shape, **change))
        assert quant_config(H100, replace(shape, **change), 1).kernel != "words"


def test_columns_of_a_tile_keep_to_those_of_a_scale():
    assert [fitting_columns(128, cols) for cols in (0, 32, 128, 48, 96, 256)] == [128, 128, 128, 16, 32, 128]


def test_shape_is_its_text():
    for (kind, bits), zero, groups in itertools.product(KINDS, (False, True), (1, 2)):
        shape = QuantShape(4096, 14336, groups, "bfloat16", kind, bits, 1, 128, zero)
        assert QuantShape.parse(str(shape)) == shape
    folded_shape = replace(shape, kind=INT, bits=4, fold=64)
    assert QuantShape.parse(str(folded_shape)) == folded_shape and str(folded_shape) != str(replace(shape, kind=INT))
    assert QuantShape.parse("linear 4096 x 14336 identity bfloat16") is None


def test_choices_are_explained():
    shape = QuantShape(4096, 4096, 1, "bfloat16", INT, 4, 1, 128, False, fold=64)
    lines = explain_choices(SM90, shape, [0, 1, 8, 600, 8192])
    assert [line.split(", from")[0] for line in lines] == [
        "1 tokens: quantized folded held where scales are bf16",
        "8 tokens: quantized folded",
        "600 to 8192 tokens: dequantize, then linear",
    ]
    assert "from NVIDIA H200 int4 rows=4096 k=4096 tokens=8 (exact)" in lines[1]
    assert "no multiple of 16" in explain_choices(SM90, QuantShape(64, 64, 1, "bfloat16", INT, 4, 1, 8, False), [1])[0]


def test_inputs_that_tma_does_not_read_have_no_descriptor(monkeypatch):
    """Rows and addresses of 16 bytes, numbers of 16 bits, blocks of 16 bytes, and a GPU that has it."""
    config, x = QuantConfig("folded wide", 64, 64, 128, use_tma=True), torch.zeros(33, 257, dtype=torch.bfloat16)
    rows = x[:, :256].contiguous()
    assert input_tiles(rows, config).block_shape == [64, 32]
    assert input_tiles(rows, replace(config, use_tma=False)) is None
    for refused in (x[:, :256], torch.zeros(33, 272, dtype=x.dtype)[:, 1:257], rows.float()):
        assert input_tiles(refused, config) is None
    assert input_tiles(rows, replace(config, block_k=16)) is None
    monkeypatch.setattr(launches, "target_of", lambda _: SM80)
    assert input_tiles(rows, config) is None


def test_entries_that_name_tma_choose_it_where_a_gpu_has_it(monkeypatch):
    entry = next(e for e in entries(SM90.table) if e["config"]["kernel"] == "folded wide")
    shape, tokens = tuned_shape(entry), entry["tokens"]
    monkeypatch.setattr(heuristics, "entries", lambda _: [entry | {"config": entry["config"] | {"use_tma": True}}])
    quant_config.cache_clear()
    try:
        found = {target: quant_config(target, shape, tokens) for target in (SM80, SM90)}
    finally:
        quant_config.cache_clear()
    assert [config.use_tma for config in found.values()] == [False, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, s, z: (q.t().contiguous().t(), s, z), "strides"),
        (lambda q, s, z: (q.view(torch.int8), s, z), "codes are torch.int8"),
        (lambda q, s, z: (q, s.double(), z), "scales are torch.float64"),
        (lambda q, s, z: (q, s.t().contiguous().t(), z), "not contiguous"),
    ],
)
def test_refusals(change, reason):
    spec = WeightSpec(INT, 4, 1, 16, "bfloat16")
    weight = random_weight((32, 64), spec, torch.bfloat16, zero=True)
    assert refusal(*weight, spec) is None
    assert reason in refusal(*change(*weight), spec)
    narrow = WeightSpec(INT, 4, 1, 32, "bfloat16", 64)
    assert "folded by 64 columns" in refusal(*random_weight((32, 256), narrow, torch.bfloat16), narrow)
    odd = WeightSpec(INT, 4, 1, 8, "bfloat16")
    assert "no multiple of 16" in refusal(*random_weight((32, 64), odd, torch.bfloat16), odd)
    assert heuristics.reason(QuantShape(32, 64, 1, "bfloat16", INT, 4, 1, 8, False))
