"""Router and experts of codes in one op: what it is, where it runs in three launches, and that on a GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import moe_routed
from fusecomp.lowerings import register
from fusecomp.lowerings.experts import quant_heuristics, quant_routed
from fusecomp.lowerings.experts.heuristics import (
    TABLES,
    VECTOR_ELEMENTS,
    ExpertsConfig,
    Tiles,
    fit_registers,
)
from fusecomp.lowerings.experts.quant_heuristics import load_codes_table, routed_codes_config
from fusecomp.lowerings.experts.quant_routed import launch_routed_quant_experts
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS
from fusecomp.ops import OPS, op_cost, take_fallbacks
from fusecomp.ops.experts import CodesShape
from fusecomp.ops.norm import LAYER, NormSpec
from fusecomp.ops.quant import FP8, INT, NF4
from fusecomp.ops.routed_quant_experts import routed_quant_experts_reference
from tests.lowerings.experts_cases import relative_rms
from tests.lowerings.routed_cases import (
    CODE_LAYOUTS,
    MIXTURES,
    check_mixture,
    check_replays,
    make_quant_mixture,
)

QWEN3 = {"experts": 128, "top_k": 8, "hidden": 2048, "width": 768}


@pytest.mark.parametrize("name", MIXTURES)
def test_reference_of_codes_is_router_then_experts(name):
    (x, *args), _ = make_quant_mixture(name, 5)
    y, ids, weights = OPS.router(x, *args[:8])
    out = OPS.quant_experts(y if args[5] else x, ids, weights, *args[8:])
    for function in (routed_quant_experts_reference, OPS.routed_quant_experts):
        assert all(torch.equal(a, b) for a, b in zip(function(x, *args), (y, out), strict=True))


def test_codes_save_what_numbers_save():
    (x, *args), _ = make_quant_mixture("qwen3", 5)
    _, ids, weights = OPS.router(x, *args[:8])
    halves = op_cost("router", (x, *args[:8])) + op_cost("quant_experts", (x, ids, weights, *args[8:]))
    whole = op_cost("routed_quant_experts", (x, *args))
    T, C, width, K = 5, x.shape[1], x.element_size(), ids.shape[1]
    saved = T * K * (8 + weights.element_size()) + T * C * width
    assert (halves.at(T, 1, 1)[0] - whole.at(T, 1, 1)[0], halves.flops - whole.flops) == (saved, 0)


def codes_shape_of(kind: str = FP8, bits: int = 8, cols: int = 0, itemsize: int = 2, **sizes: int) -> CodesShape:
    return CodesShape(**{**QWEN3, **sizes}, kind=kind, bits=bits, up_cols=cols, down_cols=cols, itemsize=itemsize)


class TestConfigurationOfCodes:
    CARD = replace(SM90, name="a card")

    @pytest.fixture(autouse=True)
    def table(self, monkeypatch):
        """A card whose table has entries of fp8 for one token and for four."""
        tiles = {"up": {"block_n": 4, "block_d": 1024, "num_warps": 2}, "down": {"block_n": 64, "block_d": 256}}
        entry = {"codes": FP8, **QWEN3, "config": {"method": "vector", **tiles}}
        given = [entry | {"tokens": tokens} for tokens in (1, 4)]
        table = {"gpu": "a card", "entries": [], "routed": given}
        monkeypatch.setattr(quant_heuristics, "load_codes_table", lambda _: table)
        routed_codes_config.cache_clear()
        yield table
        routed_codes_config.cache_clear()

    def test_serves_what_was_measured(self):
        served = [t for t in range(1, 9) if routed_codes_config(self.CARD, codes_shape_of(), t) is not None]
        assert served == [1, 2, 3, 4]
        config = routed_codes_config(self.CARD, codes_shape_of(), 1)
        assert config.up == Tiles(4, 1024, 2) and "exact" in config.source
        assert "nearest" in routed_codes_config(self.CARD, codes_shape_of(), 3).source

    def test_fits_registers(self):
        """As experts that are launched apart: a program holds a tile of each of a token's experts."""
        config = routed_codes_config(self.CARD, codes_shape_of(), 1)
        assert config.down.block_n * config.down.block_d * 8 <= VECTOR_ELEMENTS * 32 * config.down.num_warps

    @pytest.mark.parametrize(
        "shape",
        [
            codes_shape_of(cols=128), codes_shape_of(INT), codes_shape_of(INT, 4, 128), codes_shape_of(NF4, 4, 64),
            codes_shape_of(itemsize=4), codes_shape_of(experts=8, hidden=8192, width=28672),
        ],
        ids=str,
    )  # fmt: skip
    def test_what_was_not_measured_is_launched_apart(self, shape):
        assert routed_codes_config(self.CARD, shape, 1) is None

    def test_another_card_is_launched_apart(self):
        assert routed_codes_config(SM90, codes_shape_of(), 1) is None

    def test_only_the_vector_kernels(self, table):
        table["routed"] = [e | {"config": {**e["config"], "method": "grouped"}} for e in table["routed"]]
        assert routed_codes_config(self.CARD, codes_shape_of(), 1) is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_committed_entries_of_codes_are_as_they_run(target):
    """What fits registers is not made smaller when it is looked up."""
    table = load_codes_table(target.table)
    for entry in table.get("routed", ()) if table["gpu"] == target.name else ():
        cols = 128 if entry["codes"].endswith("blocks") else 0
        name = entry["codes"].removesuffix(" blocks")
        kind, bits = (INT, int(name[3:])) if name.startswith(INT) else (name, 8 if name == FP8 else 4)
        sizes = {key: entry[key] for key in QWEN3}
        config = routed_codes_config(target, codes_shape_of(kind, bits, cols, **sizes), entry["tokens"])
        assert config == ExpertsConfig.from_entry(entry["config"])


class TestBenchmark:
    ROWS = (
        {"tokens": 1, "us": {"apart": 20.0, "inside": 17.0}}, {"tokens": 2, "us": {"apart": 30.0, "inside": 29.9}},
        {"tokens": 4, "us": {"apart": 40.0, "inside": 30.0}},
    )  # fmt: skip

    def test_what_is_tried_runs_as_it_is(self):
        for lanes, pool in ((1, moe_routed.UP), (8, moe_routed.DOWN)):
            assert all(fit_registers(Tiles(*tiles), lanes) == Tiles(*tiles) for tiles in pool)

    def test_entries_end_where_launches_apart_are_as_fast(self):
        rows = [row | {"scheme": "fp8", "config": {}} for row in self.ROWS]
        assert [entry["tokens"] for entry in moe_routed.routed_entries(rows)] == [1]
        assert moe_routed.routed_entries(rows[1:]) == []

    def test_a_written_table_is_the_one_before_with_entries(self, tmp_path):
        path, committed = tmp_path / "nvidia_h200_codes.json", TABLES / "nvidia_h200_codes.json"
        entries = moe_routed.routed_entries([self.ROWS[0] | {"scheme": "fp8", "config": {"method": "vector"}}])
        moe_routed.write_routed(path, {"gpu": "NVIDIA H200"}, ["fp8"], entries)
        before, after = (json.loads(p.read_text()) for p in (committed, path))
        others = [entry for entry in before.get("routed", ()) if entry["codes"] != "fp8"]
        assert after == before | {"routed": [entry for entry in after["routed"] if entry in [*others, *entries]]}
        assert after["routed"] and all(entry in after["routed"] for entry in [*others, *entries])


class TestWhatCodesAreServed:
    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        def found(*_):
            raise LookupError

        monkeypatch.setattr(quant_routed, "routed_codes_config", found)

    def test_codes(self):
        (x, *args), _ = make_quant_mixture("qwen3", dtype=torch.bfloat16)
        with pytest.raises(LookupError):
            launch_routed_quant_experts(x, *args)

    @pytest.mark.parametrize(("at", "change"), [
        (19, lambda _: True),  # transposed
        (0, lambda router: router.mT.contiguous().mT),
        (9, lambda scale: scale.expand(-1, -1, 2)),
        (5, lambda _: NormSpec(LAYER, 1e-6).to_text()),
        (21, lambda text: text.replace("bfloat16", "float32")),
    ])  # fmt: skip
    def test_what_is_launched_apart(self, at, change):
        (x, *args), _ = make_quant_mixture("qwen3", dtype=torch.bfloat16)
        args[at] = change(args[at])
        assert launch_routed_quant_experts(x, *args) is None

    def test_no_tokens(self):
        (x, *args), _ = make_quant_mixture("qwen3", dtype=torch.bfloat16)
        assert launch_routed_quant_experts(x[:0], *args[:-1], None) is None


@pytest.mark.gpu
class TestOnAGPUByCodes:
    CONFIGS = (
        ExpertsConfig("vector", Tiles(4, 1024, 2), Tiles(4, 256, 4)),  # a row of 2048 in two tiles
        ExpertsConfig("vector", Tiles(4, 512, 1), Tiles(8, 128, 8)),  # down: more than four tiles, one after another
        ExpertsConfig("vector", Tiles(4, 256, 4), Tiles(2, 512, 2)),
    )

    @pytest.fixture(autouse=True)
    def kernels(self):
        register()

    @pytest.fixture
    def tiles(self, monkeypatch):
        def use(config):
            monkeypatch.setattr(quant_routed, "routed_codes_config", lambda *_: config)

        return use

    @pytest.mark.parametrize("tokens", [1, 2, 9])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("name", MIXTURES)
    def test_codes_of_each_mixture(self, name, dtype, tokens, tiles):
        tiles(self.CONFIGS[0])
        args, exact = make_quant_mixture(name, tokens, C=208, width=80, dtype=dtype, device="cuda")
        take_fallbacks()
        found = OPS.routed_quant_experts(*args)
        assert take_fallbacks() == {}
        check_mixture(args, exact, found)

    @pytest.mark.parametrize("config", CONFIGS, ids=["at once", "in turn", "narrow"])
    @pytest.mark.parametrize("layout", CODE_LAYOUTS)
    def test_codes_of_each_layout(self, layout, config, tiles):
        tiles(config)
        args, exact = make_quant_mixture("qwen3", 2, 32, 2048, 768, layout=layout, dtype=torch.bfloat16, device="cuda")
        check_mixture(args, exact, OPS.routed_quant_experts(*args))

    @pytest.mark.parametrize("tokens", [1, 4])
    @pytest.mark.parametrize("layout", ["fp8", "fp8 blocks", "int8", "int4 zero"])
    def test_codes_choose_as_the_router_does(self, layout, tokens, tiles):
        """Against the launches apart, with the weights of a layer of Qwen3-30B-A3B."""
        args, _ = make_quant_mixture(
            "qwen3", tokens, 128, 2048, 768, layout=layout, dtype=torch.bfloat16, device="cuda"
        )
        tiles(None)
        apart = OPS.routed_quant_experts(*args)
        tiles(self.CONFIGS[0])
        found = OPS.routed_quant_experts(*args)
        for actual, wanted in zip(found, apart, strict=True):
            assert relative_rms(actual, wanted.double()) <= 4 * torch.finfo(torch.bfloat16).eps

    @pytest.mark.parametrize("layout", ["fp8", "int4 zero"])
    def test_replays_of_codes_under_dependent_launch_are_bitwise_equal(self, layout, tiles):
        tiles(self.CONFIGS[0])
        (x, *args), _ = make_quant_mixture(
            "qwen3", 1, 128, 2048, 768, layout=layout, dtype=torch.bfloat16, device="cuda"
        )
        check_replays(lambda rows: OPS.routed_quant_experts(rows, *args[:-1], rows)[1], x)
