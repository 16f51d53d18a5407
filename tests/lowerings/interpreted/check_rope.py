"""`rope_attention` and its kernels under Triton's interpreter. `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import device
from fusecomp.lowerings.paged_attention import lowering
from fusecomp.lowerings.paged_attention import rope as rope_lowering
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig
from fusecomp.ops.rope import Rope
from tests.lowerings.interpreted.check_attention import (
    DTYPES,
    SETTINGS,
    cases,
    decoded_by,
    small_tiles,
)
from tests.lowerings.steps import NOT_A_NUMBER, check_rope_attention, make_rope, make_step


def run(rows, shape, options, rope, table_dtype=torch.float32, weights=True):
    step = make_step(rows, **shape)
    inputs = make_rope(step, rope, table_dtype=table_dtype, weights=weights, seed=shape["seed"])
    mode = (shape["head_dim"] ** -0.5, *options.values())
    before = replace(step, kv_cache=step.kv_cache.clone())
    out = rope_lowering.launch_rope_attention(*inputs.arguments(step, mode))
    check_rope_attention(before, step, inputs, out, mode)
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"
    device._arrival_counters.clear()


@st.composite
def ropes(draw, head_dim):
    style = draw(st.sampled_from(["half", "half", "interleaved", "interleaved", "none"]))
    norm = draw(st.sampled_from(["none", "rms", "rms+1"]))
    eps = draw(st.sampled_from([1e-6, 1e-5])) if norm != "none" else 0.0
    if style == "none":
        return Rope(norm=norm, eps=eps)
    dims = draw(st.sampled_from([head_dim, head_dim // 2 // 2 * 2, 2, 6]))
    return Rope(style, dims, draw(st.sampled_from(["full", "pairs"])), norm, eps)


def check(data, case, block_m=16, block_n=16, use_tma=False, read_ahead=False):
    rows, shape, options = case
    rope = data.draw(ropes(shape["head_dim"]))
    table_dtype, weights = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    if block_n:
        with small_tiles(block_m, block_n, use_tma, read_ahead):
            run(rows, shape, options, rope, table_dtype, weights)
    else:
        run(rows, shape, options, rope, table_dtype, weights)


@settings(SETTINGS, max_examples=8)
@given(data=st.data(), case=cases(decode=True, prefill=False))
def test_decode(data, case):
    check(data, case, block_n=0)


@settings(SETTINGS, max_examples=10)
@given(
    data=st.data(),
    case=cases(decode=True, prefill=False),
    block_n=st.sampled_from([16, 32]),
    read_ahead=st.booleans(),
)
def test_split_decode(data, case, block_n, read_ahead):
    check(data, case, block_n=block_n, read_ahead=read_ahead)


@st.composite
def apart(draw):
    """A decode launch whose warps are apart, and a shape that it serves, with rows around its tiles and splits."""
    keys, warps = draw(st.sampled_from([16, 32])), draw(st.sampled_from([4, 8]))
    tile = keys * warps
    stages = draw(st.sampled_from([1, 2]))
    config = DecodeConfig(
        tile, warps, stages, draw(st.sampled_from([1, 3])), tile * draw(st.integers(1, 2)), apart=keys
    )
    near = st.sampled_from([tile, 2 * tile, 3 * tile]).flatmap(lambda n: st.integers(n - 2, n + 2))
    cached = draw(st.lists(st.one_of(st.integers(0, 18), near, st.integers(0, 4 * tile)), min_size=1, max_size=4))
    heads = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    shape = {
        "padding": draw(st.integers(0, 2)), "heads": 2 * heads, "kv_heads": 2,
        "head_dim": draw(st.sampled_from([64, 128])), "page_size": draw(st.sampled_from([1, 8, 16, 32, 64])),
        "dtype": draw(st.sampled_from([torch.float16, torch.bfloat16])), "seed": draw(st.integers(0, 1000)),
    }  # fmt: skip
    options = {
        "window": draw(st.sampled_from([0, 0, 1, 33, tile + 5])), "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "sinks": torch.randn(2 * heads) if draw(st.booleans()) else None,
    }  # fmt: skip
    return config, ([(n, 1) for n in cached], shape, options)


@settings(SETTINGS, max_examples=40)
@given(data=st.data(), launch=apart())
def test_decode_whose_warps_are_apart(data, launch):
    config, case = launch
    with decoded_by(config):
        check(data, case, block_n=0)


@pytest.mark.parametrize(("keys", "stages"), [(16, 1), (16, 2), (32, 1)])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("splits", [1, 2, 16])
def test_every_length_whose_warps_are_apart(keys, stages, warps, splits):
    """Rows without a key, with ends in each place of a step and of a warp, in several tiles and splits."""
    tile = keys * warps
    lengths = [0, 1, 2, 14, 15, 16, 17, keys, keys + 1, tile - 2, tile - 1, tile, tile + 1, 3 * tile + 40]
    shape = {"heads": 4, "kv_heads": 1, "head_dim": 64, "page_size": 16, "dtype": torch.bfloat16, "seed": 0}
    with decoded_by(DecodeConfig(tile, warps, stages, splits, tile, apart=keys)):
        run([(n, 1) for n in lengths], {**shape, "padding": 1}, {"window": 0, "softcap": 0.0, "sinks": None},
            Rope("half", 64))  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2])
def test_warps_apart_give_zeros_for_a_row_without_a_token_whatever_it_brings(splits):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "page_size": 16, "dtype": torch.bfloat16}
    step = make_step([(20, 1)], padding=1, **shape)
    inputs = make_rope(step, Rope("half", 64), table_dtype=torch.float32)
    for x in (step.q, step.k, step.v):
        x[-1] = NOT_A_NUMBER
    with decoded_by(DecodeConfig(64, 4, 1, splits, 64, apart=16)):
        out = rope_lowering.launch_rope_attention(*inputs.arguments(step, (0.2, 0, 0.0, None)))
    assert torch.isfinite(out).all() and out[0].any() and not out[-1].any()


def test_warps_apart_refuse_what_they_do_not_serve():
    config = DecodeConfig(64, 4, 1, 2, 64, apart=16)
    step = make_step([(20, 1)], heads=2, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float16)
    with decoded_by(config), pytest.raises(ValueError, match="in the cache"):
        lowering.launch_paged_attention(*step.attention_inputs(), 0.2, 0, 0.0, None)
    inputs = make_rope(step, Rope("half", 64), table_dtype=torch.float32)
    shape = step.kv_cache.shape
    odd = torch.zeros(shape[0], shape[1:].numel() + 1, dtype=torch.float16)[:, :-1].view(shape)
    assert lowering.has_words(step.kv_cache) and not lowering.has_words(odd)
    with decoded_by(config), pytest.raises(ValueError, match="32 bits"):
        rope_lowering.launch_rope_attention(*inputs.arguments(replace(step, kv_cache=odd), (0.2, 0, 0.0, None)))
    wide = make_step([(20, 1)], heads=2, kv_heads=2, head_dim=64, page_size=16, dtype=torch.float32)
    inputs = make_rope(wide, Rope("half", 64), table_dtype=torch.float32)
    with decoded_by(config), pytest.raises(ValueError, match="16 bits"):
        rope_lowering.launch_rope_attention(*inputs.arguments(wide, (0.2, 0, 0.0, None)))


@settings(SETTINGS, max_examples=8)
@given(data=st.data(), case=cases(decode=True, prefill=True), use_tma=st.booleans())
def test_mixed_step(data, case, use_tma):
    check(data, case, use_tma=use_tma)


@settings(SETTINGS, max_examples=6)
@given(data=st.data(), case=cases(decode=False, prefill=True))
def test_prefill(data, case):
    check(data, case, block_n=0)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "launch"),
    [
        (32, torch.float32, nullcontext()),
        (64, torch.float16, decoded_by(DecodeConfig(64, 4, 1, 2, 64, apart=16))),
    ],
    ids=["", "warps apart"],
)
def test_a_slot_of_minus_one_writes_nothing(head_dim, dtype, launch):
    """A row may have a length and no slot: its token is attended to from registers and not kept."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": head_dim, "page_size": 16, "dtype": dtype}
    step = make_step([(20, 1), (150, 1)], **shape)
    inputs = make_rope(step, Rope("half", head_dim), table_dtype=torch.float32)
    with launch:
        expected = rope_lowering.launch_rope_attention(
            *inputs.arguments(replace(step, kv_cache=step.kv_cache.clone()), (0.2, 0, 0.0, None))
        )
        before = step.kv_cache.clone()
        step.slots.fill_(-1)
        out = rope_lowering.launch_rope_attention(*inputs.arguments(step, (0.2, 0, 0.0, None)))
    assert torch.equal(out, expected)
    assert torch.equal(before.nan_to_num(7.0), step.kv_cache.nan_to_num(7.0))


def test_what_the_kernels_refuse():
    shape = {"heads": 2, "kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.float32}
    step = make_step([(3, 1)], **shape)
    mode = (0.2, 0, 0.0, None)
    wide = make_rope(step, Rope("half", 34), table_dtype=torch.float32)
    with pytest.raises(ValueError, match="34 rotated dims"):
        rope_lowering.launch_rope_attention(*wide.arguments(step, mode))
    good = make_rope(step, Rope("half", 32), table_dtype=torch.float32)
    with pytest.raises(ValueError, match="cos is not a table"):
        rope_lowering.launch_rope_attention(*replace(good, cos=None).arguments(step, mode))
    with pytest.raises(ValueError, match="stride"):
        strided = torch.randn(1, 64)[:, ::2]
        rope_lowering.launch_rope_attention(*replace(good, sin=strided).arguments(step, mode))
    with pytest.raises(ValueError, match="scale"):
        rope_lowering.launch_rope_attention(*good.arguments(step, (-1.0, 0, 0.0, None)))
