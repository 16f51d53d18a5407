"""Launches that `benchmarks.step_tune` tries, and the tables that it writes."""

import json
import shutil
from dataclasses import replace

import pytest

from benchmarks import step_tables
from benchmarks.linear_layers import LAYERS
from benchmarks.quant_schemes import quant_shape_of
from benchmarks.step_candidates import (
    ATTENTION,
    EXPERTS,
    attention_candidates,
    brief,
    chosen,
    code_candidates,
    digit_candidates,
    key_of,
    linear_candidates,
    weight_candidates,
)
from benchmarks.step_tune import _constants
from fusecomp.lowerings.experts import quant_routed
from fusecomp.lowerings.experts.heuristics import DigitTiles, Tiles
from fusecomp.lowerings.experts.quant_heuristics import fitted_digits
from fusecomp.lowerings.linear import large_heuristics, lowering
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import SM90, decode_config
from fusecomp.lowerings.quant import activations, tables
from fusecomp.lowerings.quant import lowering as quant_lowering
from fusecomp.lowerings.quant.heuristics import FOLDED_WIDE, QuantConfig, quant_config
from fusecomp.lowerings.quant.scaled_heuristics import ScaledConfig, ScaledShape, scaled_config
from fusecomp.ops.experts import CodesShape
from fusecomp.ops.linear import LinearShape
from fusecomp.ops.quant import FP8

QKV, OUT, GATE_UP, DOWN, _ = LAYERS["llama-8b"]


@pytest.mark.parametrize("tokens", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("layer", [QKV, OUT, GATE_UP, DOWN], ids=str)
def test_candidates_differ_and_splits_fill_the_card_at_most_once(layer, tokens):
    for pool in (linear_candidates(layer, tokens, 132), code_candidates(layer, tokens, 132)):
        found = list(pool)
        assert len(set(found)) > 5
        for config in found:
            if config.method == "persistent":
                tiles = -(-tokens // config.block_t) * -(-layer.n // config.block_n)
                assert config.splits == 1 or (layer.groups == 1 and tiles * config.splits <= 132 * config.per_sm)
                assert not (config.swap and layer.groups == 2)
            assert brief(config)


def test_what_is_chosen_runs_and_only_that():
    shape = LinearShape(OUT.n, OUT.k, 1, OUT.kind, "bfloat16")
    scaled = ScaledShape(DOWN.n, DOWN.k, 1, "fp8", 0, DOWN.kind)
    weights = quant_shape_of("int4-zero", QKV)
    before = lowering.choose(SM90, shape, 64), activations.scaled_config(SM90, scaled, 64)
    dense, codes, folded = LargeConfig(block_t=64), ScaledConfig(block_t=64), QuantConfig("folded", 8)
    with chosen({key_of("o", OUT): dense, key_of("down", DOWN): codes, key_of("qkv", QKV): folded}):
        assert lowering.choose(SM90, shape, 64) == dense
        assert activations.scaled_config(SM90, scaled, 64) == codes
        assert quant_lowering.quant_config(SM90, weights, 1) == folded
        assert lowering.choose(SM90, replace(shape, n=2 * OUT.n), 64) != dense
        assert activations.scaled_config(SM90, replace(scaled, n=64), 64) != codes
    assert (lowering.choose(SM90, shape, 64), activations.scaled_config(SM90, scaled, 64)) == before


def test_attention_of_few_rows_is_tried_in_other_splits():
    few, many = (
        decode_config(
            SM90, head_dim=128, itemsize=2, num_kv_heads=8, page_size=16, num_rows=rows, capacity=4096, group=4
        )
        for rows in (1, 64)
    )
    assert len({config.min_split for config in attention_candidates(few, 8)}) > 1
    assert {config.min_split for config in attention_candidates(many, 512)} == {many.min_split}
    assert not any(config.apart for config in attention_candidates(many, 512, apart=True))
    tried = list(attention_candidates(few, 8, apart=True))
    assert {(c.apart, c.num_warps, c.block_n) for c in tried if c.apart} == {
        (16, 4, 64), (16, 8, 128), (32, 4, 128), (32, 8, 256)
    }  # fmt: skip
    for config in tried:
        with chosen({key_of(ATTENTION, None): config}):
            assert heuristics.decode_config(SM90, head_dim=128, new_key=True) is config
            assert _constants(config)["apart"] == config.apart and brief(config)
    with chosen({key_of(ATTENTION, None): tried[-1]}):  # the keys are all in the cache
        assert not heuristics.decode_config(
            SM90, head_dim=128, itemsize=2, num_kv_heads=8, page_size=16, num_rows=1, capacity=4096
        ).apart


@pytest.mark.parametrize("tokens", [8, 64, 128, 256])
def test_experts_are_tried_by_other_tiles_of_digits(tokens):
    """Each fits, as it is, what the committed ones serve; experts without digits get none."""
    shape = CodesShape(128, 8, 2048, 768, FP8, 8, 0, 0, 2)
    before = quant_routed.quant_experts_config(SM90, shape, tokens)
    tried = list(dict.fromkeys(digit_candidates(before.digits)))
    assert before.digits in tried and len(tried) > 15 and len({brief(tiles) for tiles in tried}) == len(tried)
    for tiles in tried:
        with chosen({key_of(EXPERTS, None): tiles}):
            assert quant_routed.quant_experts_config(SM90, shape, tokens) == replace(before, digits=tiles)
            assert quant_routed.quant_experts_config(SM90, shape, 1).digits is None
        assert fitted_digits(replace(before, digits=tiles), SM90, shape) == tiles
        assert DigitTiles(*(Tiles(**side) for side in _constants(tiles).values())) == tiles
    assert quant_routed.quant_experts_config(SM90, shape, tokens) == before


ROW = {"name": "o", "tokens": 64, "step_us": 90.0, "committed_step_us": 100.0, "difference": 0.0}


def forget():
    """What was read of tables, and chosen by them."""
    for cached in (tables.entries_of, large_heuristics.load_table, large_heuristics.large_config, lowering.choose):
        cached.cache_clear()
    scaled_config.cache_clear()
    quant_config.cache_clear()


def sizes(layer):
    return {"n": layer.n, "k": layer.k, "groups": layer.groups, "kind": layer.kind}


@pytest.mark.parametrize("form, scheme", [("", ""), ("codes", "fp8"), ("weights", "int4-zero"), ("weights", "fp8")])
def test_a_faster_launch_replaces_the_entry_of_its_sizes(form, scheme, tmp_path, monkeypatch, capsys):
    """And is found again as the exact one; one that gains nothing is left, and so is the rest of the file."""
    for module in (tables, large_heuristics):
        folder = tmp_path / module.__name__
        shutil.copytree(module.TABLES, folder)
        monkeypatch.setattr(module, "TABLES", folder)
    config = {
        "": {"block_t": 64, "num_stages": 4, "method": "persistent"},
        "codes": {"block_t": 64, "num_stages": 5, "method": "persistent"},
        "weights": {"kernel": "folded", "block_t": 8, "block_r": 16, "num_stages": 5},
    }[form]
    tokens = 8 if form == "weights" else 64
    row = {**ROW, **sizes(OUT), "tokens": tokens, "form": form, "scheme": scheme, "config": config}
    slow = {**row, **sizes(DOWN), "step_us": 99.9}
    result = {"gpu": SM90.name, "shape": "llama-8b", "64x200": {"linears": [row, slow, {**ROW, "config": {}}]}}
    (tmp_path / "found").write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["step_tables", str(tmp_path / "found")])
    path, section, _ = step_tables.place_of(row, SM90.name)
    before = json.loads(path.read_text())
    step_tables.main()
    assert capsys.readouterr().out.count("left") == 2
    after = json.loads(path.read_text())
    assert {k: v for k, v in after.items() if k != section} == {k: v for k, v in before.items() if k != section}
    changed = [entry for entry in after[section] if entry not in before[section]]
    assert len(changed) == 1 and changed[0]["config"] == config and changed[0]["gpu"] == SM90.name
    assert len(after[section]) - len(before[section]) in (0, 1)
    forget()
    try:
        if form == "codes":
            found = scaled_config(SM90, ScaledShape(OUT.n, OUT.k, 1, "fp8", 0, OUT.kind), tokens)
        elif form == "weights":
            found = quant_config(SM90, quant_shape_of(scheme, OUT), tokens)
        else:
            found = lowering.choose(SM90, LinearShape(OUT.n, OUT.k, 1, OUT.kind, "bfloat16"), tokens)
        assert "exact" in found.source and found.num_stages == config["num_stages"]
    finally:
        monkeypatch.undo()
        forget()


@pytest.mark.parametrize("gpu", [SM90.name, "NVIDIA H100 80GB HBM3"])
@pytest.mark.parametrize("kernel", ["folded held", "folded"])
def test_launches_of_one_token_go_where_they_are_looked_for(monkeypatch, tmp_path, gpu, kernel):
    """Where a GPU has launches that hold their inputs, or gets the first, with these; and they are found there."""
    shutil.copytree(tables.TABLES, tmp_path / "tables")
    monkeypatch.setattr(tables, "TABLES", tmp_path / "tables")
    forget()
    target, shape = replace(SM90, name=gpu), quant_shape_of("int4-zero", OUT)
    config = {"kernel": kernel, "block_t": 8, "block_r": 16, "num_stages": 5, "parts": 4, "num_warps": 4}
    row = {**ROW, **sizes(OUT), "tokens": 1, "form": "weights", "scheme": "int4-zero", "config": config}
    try:
        path, section, key = step_tables.place_of(row, gpu)
        assert section == ("held" if kernel == "folded held" or gpu == SM90.name else "quant")
        step_tables.merge(path, section, key, [step_tables.entry_of(row, "llama-8b, 1 rows", gpu)])
        forget()
        found = quant_config(target, shape, 1)
        assert (found.kernel, found.num_stages, found.parts) == (kernel, 5, 4) and "exact" in found.source
    finally:
        monkeypatch.undo()
        forget()


@pytest.mark.parametrize("scheme, tokens", [("fp8", 1), ("fp8", 8), ("int4-zero", 1), ("int4-zero", 128)])
def test_weights_of_codes_have_candidates(scheme, tokens):
    found = list(weight_candidates(OUT, tokens, scheme))
    assert len(set(found)) > 5 and len({brief(config) for config in found}) == len(found)


@pytest.mark.parametrize("tokens", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("layer", [QKV, OUT, GATE_UP, DOWN], ids=str)
def test_folded_codes_of_many_tokens_are_tried_with_and_without_tma(layer, tokens):
    found = [config for config in weight_candidates(layer, tokens, "int4-zero") if config.kernel == FOLDED_WIDE]
    assert {replace(config, use_tma=not config.use_tma) for config in found} == set(found) and len(found) <= 24
    assert {config.num_stages for config in found} == ({2, 3, 4} if tokens > 32 else {3, 4})
    assert {config.block_r for config in found} == {64, 128} and {config.block_k for config in found} == {128, 256}
