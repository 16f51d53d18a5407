"""`rope_attention` and its kernels under Triton's interpreter. `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings import device
from fusecomp.lowerings.paged_attention import rope as rope_lowering
from fusecomp.ops.rope import Rope
from tests.lowerings.interpreted.check_attention import DTYPES, SETTINGS, cases, poisoned_memory, small_tiles
from tests.lowerings.steps import check_rope_attention, make_rope, make_step

__all__ = ["poisoned_memory"]  # a fixture that every test uses


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


@settings(SETTINGS, max_examples=8)
@given(data=st.data(), case=cases(decode=True, prefill=True), use_tma=st.booleans())
def test_mixed_step(data, case, use_tma):
    check(data, case, use_tma=use_tma)


@settings(SETTINGS, max_examples=6)
@given(data=st.data(), case=cases(decode=False, prefill=True))
def test_prefill(data, case):
    check(data, case, block_n=0)


def test_a_slot_of_minus_one_writes_nothing():
    """A row may have a length and no slot: its token is attended to from registers and not kept."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.float32}
    step = make_step([(20, 1), (33, 1)], **shape)
    inputs = make_rope(step, Rope("half", 32), table_dtype=torch.float32)
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
