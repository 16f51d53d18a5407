"""Experts whose weights are codes: the choice of kernels, what they refuse and, on a GPU, how they run.

Under the interpreter they are run by `interpreted/check_quant_experts.py`. Legend: T tokens, E experts.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import moe
from benchmarks.moe_schemes import SCHEMES, code_frames
from fusecomp.lowerings.experts import quant_lowering
from fusecomp.lowerings.experts.heuristics import VECTOR_ELEMENTS, ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_heuristics import (
    DEQUANTIZE,
    KEYS,
    explain_choices,
    fitted_digits,
    load_codes_table,
    quant_experts_config,
)
from fusecomp.lowerings.experts.quant_lowering import launch_quant_experts, supports
from fusecomp.lowerings.paged_attention.heuristics import SM80, SM90, TARGETS
from fusecomp.ops import take_fallbacks
from fusecomp.ops.experts import CodesShape, codes_shape, quant_experts_reference
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from tests.lowerings.experts_cases import FORMS, ROUTINGS, routings
from tests.lowerings.quant_experts_cases import LAYOUTS, check_quant_contract, make_quant_layer

KINDS = ((INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4))
SIZES = ((8, 2, 4096, 14336), (128, 8, 2048, 768), (512, 22, 2048, 512), (1, 1, 16, 16), (32, 4, 2880, 2880))
UNTRANSPOSED = [form for form in FORMS if "transposed" not in FORMS[form]]
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    for sizes, (kind, bits), cols in itertools.product(SIZES, KINDS, (0, 16, 48, 128)):
        for tokens, itemsize in itertools.product((1, 2, 7, 64, 500, 8192, 65536), (2, 4)):
            config = quant_experts_config(target, CodesShape(*sizes, kind, bits, cols, cols, itemsize), tokens)
            if config.method == DEQUANTIZE:
                continue
            for tiles in (config.up, config.down):
                assert tiles.block_n & (tiles.block_n - 1) == 0 and tiles.block_n >= 1
                if config.method == "vector":
                    assert tiles.block_n * tiles.block_d <= VECTOR_ELEMENTS * 32 * tiles.num_warps
                    continue
                assert tiles.block_d >= 16 and (cols == 0 or cols % tiles.block_d == 0 or tiles.block_d % cols == 0)
                assert target.has_tma or not tiles.use_tma
                weight, tokens_ = tiles.block_n * bits // 8, config.block_t * itemsize
                assert tiles.num_stages * (weight + tokens_) * tiles.block_d <= target.smem_bytes


@pytest.mark.parametrize("name", ["nvidia_h100_80gb_hbm3", "nvidia_h200"])
def test_source_says_where_it_comes_from(name):
    """A table may hold what another card measured, and says so."""
    table = load_codes_table(name)
    card = replace(SM90, name=table["gpu"])
    assert card.table == name
    for entry in table["entries"]:
        cols = 128 if entry["codes"].endswith("blocks") else 0
        layout = entry["codes"].removesuffix(" blocks")
        kind, bits = (INT, int(layout[3:])) if layout.startswith(INT) else (layout, 8 if layout == FP8 else 4)
        shape = CodesShape(*(entry[key] for key in KEYS[1:5]), kind, bits, cols, cols, 2)
        assert shape.codes == entry["codes"]
        gpu = entry.get("gpu", table["gpu"])
        source = quant_experts_config(card, shape, entry["tokens"]).source
        assert source.startswith(gpu) and ("(exact" if gpu == card.name else "(nearest") in source
        assert "(nearest" in quant_experts_config(replace(card, name="a card"), shape, entry["tokens"]).source
        other = replace(shape, hidden=shape.hidden + 16)
        assert "(nearest" in quant_experts_config(card, other, entry["tokens"]).source
    wide = CodesShape(128, 8, 2048, 768, FP8, 8, 0, 0, 4)
    assert "not measured" in quant_experts_config(SM90, wide, 64).source


def test_what_was_measured_serves_its_like():
    """A layout not measured takes tiles of codes as wide; a distant shape those of 16-bit weights."""
    sizes = (128, 8, 2048, 768)
    for bits in (4, 8):
        for tokens in (1, 2, 8, 64, 8192):
            config = quant_experts_config(SM90, CodesShape(*sizes, INT, bits, 0, 0, 2), tokens)
            assert config.method == "grouped" or tokens <= 4
            assert bits == 4 or tokens != 64 or "experts of fp8" in config.source
    assert "not measured" in quant_experts_config(SM90, CodesShape(8, 2, 4096, 14336, FP8, 8, 0, 0, 2), 3).source


def test_who_has_tiles_of_digits():
    """What a launch by them wants of sizes, scales and the GPU, the choice of tiles knows, and so what is explained."""
    shape = CodesShape(128, 8, 2048, 768, FP8, 8, 0, 0, 2)
    config = quant_experts_config(SM90, shape, 64)
    assert config.digits is not None and fitted_digits(config, SM90, shape) == config.digits
    for change in (
        {"kind": INT}, {"up_cols": 128}, {"down_cols": 128}, {"hidden": 32768}, {"hidden": 2048 + 128},
        {"width": 8192}, {"width": 768 + 128},
    ):  # fmt: skip
        assert fitted_digits(config, SM90, replace(shape, **change)) is None, change
    assert fitted_digits(config, SM80, shape) is None
    plain = replace(config.digits, down=replace(config.digits.down, use_tma=False))
    assert fitted_digits(replace(config, digits=plain), SM90, shape) is None
    assert fitted_digits(replace(config, digits=None), SM90, shape) is None


def test_choices_are_explained():
    shape = CodesShape(128, 8, 2048, 768, FP8, 8, 0, 0, 2)
    lines = explain_choices(SM90, shape, [0, 1, 64])
    assert [line.split(", from")[0] for line in lines] == [
        "1 tokens: vector experts of codes",
        "64 tokens: grouped experts of codes",
        "1 tokens: three launches that choose inside, where the router is part of them",
        "64 tokens: by lists of the router, where it is part of them",
        "64 tokens: then inputs of bf16 are fp8 digits, and codes are multiplied as they are",
    ]
    assert lines[2].endswith("(exact)") and len(explain_choices(SM80, shape, [1, 64])) == 3
    for other in (replace(shape, down_cols=128), replace(shape, kind=INT, bits=4)):
        assert not any("lists" in line for line in explain_choices(SM90, other, [64]))
    assert explain_choices(SM90, shape, [8192])[1:] == []


def test_shape_is_its_text():
    for kind, bits in KINDS:
        shape = CodesShape(128, 8, 2048, 768, kind, bits, 128, 0, 2)
        assert CodesShape.parse(str(shape)) == shape
    assert CodesShape.parse("quant_linear 4096 x 14336 fp88 1x0 bfloat16") is None
    odd = CodesShape(128, 8, 2048, 768, INT, 4, 8, 8, 2)
    assert explain_choices(SM90, odd, [1]) == [
        "any tokens: dequantized, then experts: a scale serves 8 columns, no multiple of 16"
    ]


def reason_of(layer, **changes):
    found = {}

    def ask(x, _, __, up, us, uz, up_bias, down, ds, dz, down_bias, *rest):
        parts = {"x": x, "up": (up, us, uz), "up_bias": up_bias, "down": (down, ds, dz), "down_bias": down_bias}
        parts |= {"transposed": False, "up_spec": WeightSpec.from_text(rest[4])}
        parts |= {"down_spec": WeightSpec.from_text(rest[5]), **changes}
        found["reason"] = supports(**parts)

    layer.run(ask)
    return found["reason"]


@layouts
def test_every_layout_is_read(layout):
    assert reason_of(make_quant_layer(layout=layout, C=256, width=128, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: {"x": layer.plain.x.double()}, "none of fp32, fp16, bf16"),
        (lambda layer: {"x": layer.plain.x.half()}, "activations are torch.float16"),
        (lambda layer: {"transposed": True}, "along the outputs"),
        (lambda layer: {"up_bias": torch.ones(4, 64).mT.contiguous().mT}, "biases are not contiguous"),
        (lambda layer: {"up": (layer.up.q.view(torch.int8), *layer.up.parts("cpu")[1:])}, "of the up weights, codes"),
        (lambda layer: {"down_spec": replace(layer.down.spec, cols=8)}, "of the down weights, a scale serves 8"),
    ],
)
def test_what_the_kernels_refuse(change, reason):
    layer = make_quant_layer(layout="int4 groups")
    assert reason_of(layer) is None
    assert reason in reason_of(layer, **change(layer))


@pytest.mark.parametrize("T", [0, 5])
def test_a_refusal_is_dequantized_and_counted(T):
    spec = WeightSpec(INT, 4, 1, 8, "float32")
    layer = make_quant_layer(T, up=spec, down=spec, dtype=torch.float64, residual=True)
    take_fallbacks()
    out = layer.run(launch_quant_experts)
    torch.testing.assert_close(out, layer.run(quant_experts_reference))
    reasons = dict(take_fallbacks().keys())
    assert "all experts are dequantized" in reasons["quant_experts"]


class TestBenchmark:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_what_is_tried_fits_the_scales(self, scheme):
        cols = SCHEMES[scheme].spec.cols
        for tokens in (1, 4, 16, 64, 1024, 8192):
            frames = list(code_frames(SCHEMES[scheme], 8, 128, 768, tokens))
            assert frames and all(ups and downs for _, ups, downs in frames)
            for frame, ups, downs in frames:
                if frame.method == "grouped":
                    assert all(cols % t.block_d == 0 or t.block_d % cols == 0 for t in (*ups, *downs) if cols)

    def test_bytes_of_a_layer(self):
        shape = moe.SHAPES["qwen3-30b-a3b"]
        assert shape.expert_bytes("fp8") == 3 * 2048 * 768 + 4 * (2 * 768 + 2048)
        assert shape.expert_bytes("mxfp4") == 3 * 2048 * 768 * (1 / 2 + 1 / 32)

    def test_a_written_table_is_read(self, tmp_path):
        spec = SCHEMES["fp8"].spec
        shape = codes_shape(spec, spec, (128, 8, 2048, 768), 2)
        config = ExpertsConfig("vector", Tiles(4, 1024, 2), Tiles(2, 256, 4))
        sizes = moe.SHAPES["qwen3-30b-a3b"].keys(3)
        entry = {"codes": moe.codes_name("fp8"), **sizes, "config": config.to_entry(), "us": 1.0}
        moe.write_table(tmp_path / "gpu_codes.json", {"gpu": SM90.name}, [entry], codes=True)
        written = json.loads((tmp_path / "gpu_codes.json").read_text())
        assert entry in written["entries"] and entry["codes"] == shape.codes
        default = load_codes_table("no card")
        assert all({"gpu": default["gpu"]} | e in written["entries"] for e in default["entries"])

    @pytest.mark.parametrize("method", ["grouped", "vector"])
    def test_a_launch_tuned_again_keeps_its_tiles_of_digits(self, tmp_path, method):
        """They are tuned by whole steps; a launch without tiles has none."""
        sizes = {"codes": "fp8", **moe.SHAPES["qwen3-30b-a3b"].keys(64)}
        before = next(e for e in load_codes_table("nvidia_h200")["entries"] if e.items() >= sizes.items())
        config = ExpertsConfig(method, Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), 16, True)
        path = tmp_path / "nvidia_h200_codes.json"
        moe.write_table(path, {"gpu": SM90.name}, [{**sizes, "config": config.to_entry(), "us": 1.0}], codes=True)
        entries = json.loads(path.read_text())["entries"]
        found = ExpertsConfig.from_entry(next(e["config"] for e in entries if e.items() >= sizes.items()))
        assert replace(found, digits=None) == config
        digits = ExpertsConfig.from_entry(before["config"]).digits
        assert digits is not None and found.digits == (digits if method == "grouped" else None)


TOKENS = [1, 2, 7, 64, 300]


@pytest.mark.gpu
class TestOnAGPU:
    @layouts
    @pytest.mark.parametrize("T", TOKENS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_layouts(self, layout, T, dtype):
        take_fallbacks()
        for sizes in ((2, 8, 256, 128), (3, 8, 200, 72)):
            layer = make_quant_layer(T, *sizes, layout=layout, dtype=dtype, device="cuda")
            check_quant_contract(layer, layer.run(launch_quant_experts))
        assert take_fallbacks() == {}

    @pytest.mark.parametrize("form", UNTRANSPOSED)
    @pytest.mark.parametrize("T", TOKENS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_forms(self, form, T, dtype):
        layer = make_quant_layer(T, 2, 8, 64, 32, layout="mxfp4", dtype=dtype, device="cuda", **FORMS[form])
        check_quant_contract(layer, layer.run(launch_quant_experts))

    @pytest.mark.parametrize("layout", ["fp8", "int4 zero"])
    @pytest.mark.parametrize("T", TOKENS)
    def test_one_graph_serves_any_routing(self, layout, T):
        """Captured on one routing and replayed on others, sentinels and idle experts included."""
        layer = make_quant_layer(T, 2, 8, 128, 64, layout=layout, dtype=torch.bfloat16, device="cuda")
        layer.run(launch_quant_experts)
        torch.cuda.synchronize()
        # The codes are copied to the device in each call of `run`: those of the graph are held here.
        held = {}
        layer.run(lambda *args: held.update(args=args))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = launch_quant_experts(*held["args"])
        for routing in ROUTINGS:
            layer.plain.top_k_index.copy_(routings(T, 2, 8)[routing])
            graph.replay()
            assert torch.equal(out, launch_quant_experts(*held["args"]))
            nothing = (layer.plain.top_k_index == 8).all(1)
            assert (out[nothing] == 0).all()
            if not nothing.all():
                check_quant_contract(layer, out)
        assert take_fallbacks() == {}

    @layouts
    def test_dequantized_first(self, layout, monkeypatch):
        chosen = ExpertsConfig(DEQUANTIZE, Tiles(1, 1), Tiles(1, 1))
        monkeypatch.setattr(quant_lowering, "quant_experts_config", lambda *_: chosen)
        layer = make_quant_layer(64, 2, 8, 200, 72, layout=layout, dtype=torch.bfloat16, device="cuda")
        check_quant_contract(layer, layer.run(launch_quant_experts))

    def test_repeats_bitwise(self):
        for T in TOKENS:
            layer = make_quant_layer(T, 8, 128, 256, 96, layout="fp8 blocks", dtype=torch.bfloat16, device="cuda")
            first = layer.run(launch_quant_experts)
            assert all(torch.equal(layer.run(launch_quant_experts), first) for _ in range(10))
