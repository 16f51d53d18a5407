"""Launch configurations: pure, within every target's limits, and honest about where they come from."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS, Target, decode_config, prefill_config
from fusecomp.lowerings.paged_attention.lowering import supports

SHAPE = {"head_dim": 128, "itemsize": 2, "num_kv_heads": 8, "page_size": 16}


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    for head_dim, itemsize, rows in itertools.product((16, 32, 64, 80, 96, 128, 256), (2, 4), (1, 7, 64, 1000)):
        decode = decode_config(
            target, head_dim=head_dim, itemsize=itemsize, num_kv_heads=8, page_size=1, num_rows=rows, capacity=32768
        )
        assert 1 <= decode.num_splits <= heuristics.MAX_SPLITS
        assert decode.block_n & (decode.block_n - 1) == 0
        prefill = prefill_config(target, head_dim=head_dim, itemsize=itemsize, max_keys=rows)
        assert not prefill.use_tma or target.has_tma
        tile = heuristics.padded_dim(head_dim) * itemsize
        assert 2 * decode.block_n * decode.num_stages * tile <= target.smem_bytes
        assert (prefill.block_m + 2 * prefill.block_n) * tile <= target.smem_bytes


def test_splits_follow_rows_and_capacity():
    def config(num_rows: int, capacity: int = 32768) -> heuristics.DecodeConfig:
        return decode_config(SM90, **SHAPE, num_rows=num_rows, capacity=capacity)

    assert config(1).num_splits > config(512).num_splits == 1
    assert config(1, capacity=32).num_splits == 1
    for rows, capacity in itertools.product((1, 8, 32, 256), (200, 4096, 32768)):
        found = config(rows, capacity)
        assert (found.num_splits - 1) * found.min_split < capacity


def test_more_query_heads_get_more_warps():
    def warps(group: int, head_dim: int = 256, itemsize: int = 2) -> int:
        shape = {**SHAPE, "head_dim": head_dim, "itemsize": itemsize}
        return decode_config(SM90, **shape, num_rows=32, capacity=4096, group=group).num_warps

    for head_dim, itemsize in itertools.product((64, 128, 256), (2, 4)):
        assert warps(1, head_dim, itemsize) == warps(16, head_dim, itemsize)  # as tuned
    assert warps(64, 128) == 2 * warps(32, 128) == 4 * warps(16, 128)
    assert warps(64, itemsize=4) == heuristics.MAX_WARPS


def test_wide_tiles_that_are_read_ahead_serve_small_launches_only():
    for rows, kv_heads, ahead in ((1, 4, True), (8, 4, True), (1, 8, False), (64, 4, False), (256, 4, False)):
        found = decode_config(SM90, **{**SHAPE, "num_kv_heads": kv_heads}, num_rows=rows, capacity=4096)
        assert found.read_ahead is ahead
        assert found.block_n == (128 if ahead else 16)
    shape = {**SHAPE, "num_kv_heads": 4}
    assert decode_config(SM90, **shape, num_rows=1, capacity=4096, group=16).read_ahead
    assert not decode_config(SM90, **shape, num_rows=1, capacity=4096, group=17).read_ahead


def test_warps_apart_serve_new_keys_of_a_plain_16_bit_cache_alone(monkeypatch):
    """Whatever else is asked for is answered as if the entry were not there."""
    table = heuristics.load_table(SM90.table)
    tuned = {"head_dim": 128, "itemsize": 2, "page": 16, "pairs": 8}
    tuned["config"] = {"block_n": 256, "num_warps": 8, "num_stages": 1, "num_splits": 32, "min_split": 256, "apart": 32}
    others = [e for e in table["decode"] if e["pairs"] != 8 or e["head_dim"] != 128]
    choose = decode_config.__wrapped__  # what is remembered is another table's
    shape = {**SHAPE, "num_rows": 1, "capacity": 4096, "group": 4}
    refused = [
        (SM90, {**shape, "new_key": False}), (SM90, {**shape, "new_key": True, "quantized": True}),
        (heuristics.GFX942, {**shape, "new_key": True}), (replace(SM90, arch=75), {**shape, "new_key": True}),
        *((SM90, {**shape, "new_key": True, **change})
          for change in ({"group": 17}, {"itemsize": 4}, {"head_dim": 96}, {"head_dim": 256})),
    ]  # fmt: skip
    monkeypatch.setattr(heuristics, "load_table", lambda _: {**table, "decode": others})
    without = [choose(target, **wanted) for target, wanted in refused]
    monkeypatch.setattr(heuristics, "load_table", lambda _: {**table, "decode": [tuned, *others]})
    assert [choose(target, **wanted) for target, wanted in refused] == without
    found = choose(SM90, **shape, new_key=True)
    assert (found.apart, found.block_n, found.num_warps, found.min_tiles()) == (32, 256, 8, 1)
    assert found.num_splits == 16 and found.source.endswith("(exact)")
    assert choose(SM90, **{**shape, "head_dim": 64, "group": 16}, new_key=True).apart in (0, 32)


def test_warps_apart_that_load_a_tile_ahead_serve_no_more_pairs_than_they_were_measured_with():
    """Their programs fill the card: of more, some would begin when others end."""
    for target in (SM90, heuristics.SM100):
        for group, kv_heads in ((4, 8), (8, 4), (7, 2), (4, 10), (1, 16)):
            shape = {**SHAPE, "num_kv_heads": kv_heads, "group": group, "new_key": True, "capacity": 2048}
            found = {rows: decode_config(target, **shape, num_rows=rows) for rows in (8, 16, 24, 32, 48, 64, 80, 128)}
            ahead = {
                rows * kv_heads: config.num_warps for rows, config in found.items() if config.apart and config.ahead
            }
            assert ahead and max(ahead) <= 256
            assert all(warps == 4 for pairs, warps in ahead.items() if pairs > 128)
            assert not any(config.apart for rows, config in found.items() if rows * kv_heads > 256)


def test_entries_of_an_fp8_cache_serve_no_other(monkeypatch):
    table = heuristics.load_table(SM90.table)
    tuned = {"head_dim": 128, "itemsize": 2, "kv_itemsize": 1, "page": 16, "pairs": 256}
    tuned["config"] = {"block_n": 64, "num_warps": 4, "num_stages": 2, "num_splits": 4, "min_split": 256}
    monkeypatch.setattr(heuristics, "load_table", lambda _: {**table, "decode": [tuned, *table["decode"]]})
    choose = decode_config.__wrapped__  # what is remembered is another table's
    plain = choose(SM90, **SHAPE, num_rows=32, capacity=4096)
    codes = choose(SM90, **SHAPE, num_rows=32, capacity=4096, quantized=True)
    assert "kv_itemsize" not in plain.source and plain.block_n != 64
    assert "kv_itemsize=1" in codes.source and codes.source.endswith("(exact)") and codes.block_n == 64
    other = choose(SM90, **{**SHAPE, "head_dim": 256}, num_rows=32, capacity=4096, quantized=True)
    assert "head_dim=256" in other.source and other.source.endswith("(nearest)")


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "config"), [(64, 4, 8, (32, 1, 4, 256)), (32, 8, 4, (32, 1, 8, 512))]
)
def test_an_entry_with_a_group_serves_that_shape_alone(rows, kv_heads, group, config):
    """It was measured on so many rows and kv heads, on another GPU than its table; others are chosen as without it."""
    tuned = [e for e in heuristics.load_table(SM90.table)["decode"] if "group" in e and "kv_itemsize" in e]
    h100 = Target("NVIDIA H100 80GB HBM3", "cuda", 90, SM90.smem_bytes, SM90.num_sms)
    (entry,) = [e for e in tuned if e["group"] == group and e.get("gpu") == h100.name]
    assert entry["kv_itemsize"] == 1 and entry["pairs"] == rows * kv_heads

    def choose(target, **change):
        wanted = {"num_kv_heads": kv_heads, "num_rows": rows, "group": group, **change}
        return decode_config(target, **{**SHAPE, **wanted}, capacity=4096, quantized=True)

    found = choose(h100)
    assert found.source.startswith("NVIDIA H100") and found.source.endswith("(exact)")
    assert (found.block_n, found.num_warps, found.num_splits, found.min_split) == config
    assert choose(SM90) == replace(found, source=found.source.replace("exact", "nearest"))
    for change in (
        {"group": 16}, {"group": 1}, {"num_rows": rows // 2}, {"num_rows": 1}, {"num_rows": 2 * rows},
        {"page_size": 32}, {"head_dim": 64}, {"itemsize": 4},
    ):  # fmt: skip
        assert "H100" not in choose(h100, **change).source
    assert all("H100" not in choose(target).source for target in TARGETS if target.arch != SM90.arch)
    plain = decode_config(h100, **{**SHAPE, "num_kv_heads": kv_heads}, num_rows=rows, capacity=4096, group=group)
    assert "H100" not in plain.source


def test_64_rows_of_an_fp8_cache_have_splits_of_their_own():
    shape = {**SHAPE, "num_kv_heads": 8, "group": 4, "capacity": 8192, "quantized": True}
    found = decode_config(SM90, **shape, num_rows=64)
    assert (found.block_n, found.num_splits, found.min_split) == (32, 4, 512) and found.source.endswith("(exact)")
    assert decode_config(SM90, **shape, num_rows=128).min_split != 512


@pytest.mark.parametrize(("rows", "splits"), [(16, 8), (32, 4), (96, 2), (128, 2), (160, 2), (192, 2), (256, 2)])
def test_rows_with_eight_query_heads_a_kv_head_have_launches_of_their_own(rows, splits):
    """As many pairs of fewer query heads, an FP8 cache's and other numbers of rows have others."""
    shape = {**SHAPE, "num_kv_heads": 4, "capacity": 1 << 20}
    found = decode_config(SM90, **shape, num_rows=rows, group=8)
    assert found.num_splits == splits and found.source.endswith("(exact)")
    for change in ({"group": 4}, {"quantized": True}, {"num_rows": rows // 2}):
        other = decode_config(SM90, **{**shape, "num_rows": rows, "group": 8, **change})
        assert replace(other, source="") != replace(found, source="")


def test_short_capacities_split_no_row_at_64_rows_and_more():
    """An engine for 2,048 tokens at most, as Llama-1B is run offline."""
    shape = {**SHAPE, "head_dim": 64, "capacity": 2048, "group": 4}
    assert all(
        decode_config(SM90, **shape, num_rows=rows).num_splits == 1 for rows in (64, 96, 128, 160, 192, 224, 256)
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_codes_fit_with_what_they_are_converted_to(target):
    for head_dim, itemsize in itertools.product((64, 128, 256), (2, 4)):
        shape = {"head_dim": head_dim, "itemsize": itemsize, "num_kv_heads": 8, "page_size": 16}
        found = decode_config(target, **shape, num_rows=8, capacity=4096, quantized=True)
        assert 2 * found.block_n * head_dim * (found.num_stages + itemsize) <= target.smem_bytes


def test_source_says_whether_the_entry_was_tuned_for_the_shape():
    table = heuristics.load_table(SM90.table)
    assert {"gpu", "measured", "decode", "prefill"} <= table.keys()
    entry = table["decode"][0]
    kv_heads = min(8, entry["pairs"])
    rows = entry["pairs"] // kv_heads
    shape = {**SHAPE, "num_kv_heads": kv_heads, "head_dim": entry["head_dim"], "itemsize": entry["itemsize"]}
    assert decode_config(SM90, **shape, num_rows=rows, capacity=32768).source.endswith("(exact)")
    assert decode_config(SM90, **shape, num_rows=rows + 3, capacity=32768).source.endswith("(nearest)")
    other = Target("Some GPU", "cuda", 90, SM90.smem_bytes, 100)
    assert decode_config(other, **shape, num_rows=rows, capacity=32768).source.endswith("(nearest)")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"head_dim": 80}, None),
        ({"dtype": torch.float64}, "dtype"),
        ({"num_heads": 12}, "multiple"),
        ({"num_heads": 1024}, "query heads per kv head"),
        ({"head_dim": 257}, "head dim"),
        ({"head_dim": 81, "quantized": True}, "odd head dim"),
        ({"head_dim": 81}, None),
        ({"page_size": 0}, "page size"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"window": -1}, "negative"),
        ({"softcap": -2.0}, "negative"),
    ],
)
def test_supports(change, reason):
    shape = {"dtype": torch.bfloat16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16, **change}
    said = supports(**shape)
    assert said is None if reason is None else reason in said
