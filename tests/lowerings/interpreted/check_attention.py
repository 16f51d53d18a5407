"""The attention kernels under Triton's interpreter. `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fusecomp.lowerings import device
from fusecomp.lowerings.paged_attention import heuristics, lowering
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, PrefillConfig
from fusecomp.ops.kv_cache import KVLayout, fill_random
from tests.lowerings import reference
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.searches import SETTINGS as SEARCH
from tests.lowerings.steps import Step, check_attention, make_step, padded

SETTINGS = settings(SEARCH, suppress_health_check=[*SEARCH.suppress_health_check, HealthCheck.filter_too_much])
HEAD_DIMS = [32, 64, 80, 96, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


multiply_bfloat16()


def _contiguous(handle: TensorHandle) -> TensorHandle:
    """Rows that are repeated by a stride of 0 would keep numpy from its exact sums, here and in all that follows."""
    return TensorHandle(np.ascontiguousarray(handle.data), handle.dtype.scalar)


_create_reshape = InterpreterBuilder.create_reshape
InterpreterBuilder.create_reshape = lambda self, *arguments: _contiguous(_create_reshape(self, *arguments))


@contextmanager
def decoded_by(config: DecodeConfig):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heuristics, "decode_config", lambda *_, **__: config)
        yield


@contextmanager
def small_tiles(block_m: int, block_n: int, use_tma: bool, read_ahead: bool = False):
    """Tiny tiles and three splits, so that tiny shapes reach every branch."""
    with pytest.MonkeyPatch.context() as patch:
        decode = DecodeConfig(block_n, 4, 2, 3, block_n, read_ahead)
        prefill = PrefillConfig(block_m, block_n, 4, 2, use_tma)
        patch.setattr(heuristics, "decode_config", lambda *_, **__: decode)
        patch.setattr(heuristics, "prefill_config", lambda *_, **__: prefill)
        yield


def run(step: Step, scale: float, window: int = 0, softcap: float = 0.0, sinks: torch.Tensor | None = None):
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    out = lowering.launch_paged_attention(*step.attention_inputs(), scale, window, softcap, sinks)
    check_attention(step, out, scale, window, softcap, sinks)
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"
    device._arrival_counters.clear()
    return out


@st.composite
def cases(draw, decode: bool, prefill: bool):
    group, kv_heads = draw(st.sampled_from([(1, 2), (3, 1), (4, 2), (17, 1)]))
    cached = st.integers(0, 70)
    decodes = draw(st.lists(st.tuples(cached, st.just(1)), min_size=1, max_size=3)) if decode else []
    prefills = draw(st.lists(st.tuples(cached, st.integers(2, 24)), min_size=1, max_size=2)) if prefill else []
    shape = {
        "padding": 0 if prefill else draw(st.integers(0, 2)),
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from(HEAD_DIMS)),
        "page_size": draw(st.sampled_from([1, 16, 32, 64])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 1000)),
        "quantized": draw(st.booleans()),
    }
    options = {
        "window": draw(st.sampled_from([0, 0, 1, 7, 33])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "sinks": torch.randn(group * kv_heads) if draw(st.booleans()) else None,
    }
    return decodes + prefills, shape, options


@settings(SETTINGS, max_examples=12)
@given(case=cases(decode=True, prefill=False))
def test_decode(case):
    rows, shape, options = case
    run(make_step(rows, **shape), shape["head_dim"] ** -0.5, **options)


@settings(SETTINGS, max_examples=8)
@given(
    case=cases(decode=True, prefill=True),
    small=st.booleans(),
    spare=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20)),
)
def test_a_mixed_step_padded_for_a_graph(case, small, spare):
    """Decode rows without a token overwrite no prefill's result; padding tokens are a prompt of their own."""
    rows, shape, options = case
    step = make_step(rows, **shape)
    wider = padded(step, *spare)
    mode = (shape["head_dim"] ** -0.5, options["window"], options["softcap"], options["sinks"])
    with small_tiles(16, 16, False) if small else nullcontext():
        lowering.launch_cache_write(wider.k, wider.v, wider.kv_cache, wider.slots)
        out = lowering.launch_paged_attention(*wider.attention_inputs(), *mode)
    assert out.isfinite().all()
    check_attention(step, out[: len(step.q)], *mode)


@pytest.mark.parametrize("spare", [(0, 0, 0), (2, 40, 9)], ids=["whole", "padded"])
def test_programs_find_their_rows(monkeypatch, spare):
    """More rows than are looked at together, of one tile and of several, some that end where a tile does."""
    rows = [(5, 1), (3, 1)] + [(7 * (i % 3), 2 + 5 * (i % 4)) for i in range(34)] + [(0, 40), (20, 16), (0, 3), (9, 32)]
    step = make_step(rows, heads=2, kv_heads=1, head_dim=32, page_size=16, dtype=torch.float32, seed=3)
    launch, packed = lowering.launch, []
    monkeypatch.setattr(
        lowering, "launch", lambda *args, **options: (packed.append(options.get("PACKED")), launch(*args, **options))
    )
    wider = padded(step, *spare) if any(spare) else step
    with small_tiles(16, 16, False):
        lowering.launch_cache_write(wider.k, wider.v, wider.kv_cache, wider.slots)
        out = lowering.launch_paged_attention(*wider.attention_inputs(), 32**-0.5, 0, 0.0, None)
        monkeypatch.setattr(lowering, "PACKED_FROM", 0.0)
        again = lowering.launch_paged_attention(*wider.attention_inputs(), 32**-0.5, 0, 0.0, None)
    check_attention(step, out[: len(step.q)], 32**-0.5, 0, 0.0, None)
    assert packed == [None, None, bool(any(spare)), None, True]
    assert torch.equal(again[: len(step.q)], out[: len(step.q)])


@settings(SETTINGS, max_examples=12)
@given(case=cases(decode=True, prefill=False), block_n=st.sampled_from([16, 32]))
def test_split_decode(case, block_n):
    rows, shape, options = case
    with small_tiles(16, block_n, False):
        run(make_step(rows, **shape), shape["head_dim"] ** -0.5, **options)


@settings(SETTINGS, max_examples=14)
@given(
    case=cases(decode=True, prefill=True),
    block_m=st.sampled_from([16, 32]),
    block_n=st.sampled_from([16, 32]),
    use_tma=st.booleans(),
)
def test_mixed_step(case, block_m, block_n, use_tma):
    rows, shape, options = case
    with small_tiles(block_m, block_n, use_tma):
        run(make_step(rows, **shape), shape["head_dim"] ** -0.5, **options)


@settings(SETTINGS, max_examples=12)
@given(case=cases(decode=False, prefill=True))
def test_prefill(case):
    rows, shape, options = case
    run(make_step(rows, **shape), shape["head_dim"] ** -0.5, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_stays_in_its_row(dtype):
    """A row whose values are infinite does not change its neighbours, whose last tiles overlap it."""
    step = make_step([(0, 5), (7, 9), (3, 20)], heads=2, kv_heads=1, head_dim=32, page_size=16, dtype=dtype)
    with small_tiles(16, 16, True):
        clean = run(step, 0.2)
        step.k[5:14] = float("inf")
        step.v[5:14] = float("inf")
        dirty = lowering.launch_paged_attention(*step.attention_inputs(), 0.2, 0, 0.0, None)
    others = [*range(5), *range(14, 34)]
    assert torch.equal(clean[others], dirty[others])


def test_result_does_not_depend_on_the_rest_of_the_batch():
    """With one configuration, a decode row is bitwise the same alone, among others and beside padding."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.float32}
    step = make_step([(50, 1), (3, 1), (90, 1)], padding=2, **shape)
    with small_tiles(16, 16, False):
        together = run(step, 0.2)
        for row in range(3):
            alone = lowering.launch_paged_attention(
                step.q[row : row + 1], step.k[row : row + 1], step.v[row : row + 1], step.kv_cache,
                step.cu_q_lens[:2], step.seq_lens[row : row + 1], step.block_tables[row : row + 1],
                torch.tensor([1, 1, 91, 1], dtype=torch.int32), 0.2, 0, 0.0, None,
            )  # fmt: skip
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_new_keys_are_what_an_fp8_cache_returns(dtype, head_dim):
    """Bitwise: so it does not matter to a query whether a key came with its step or before it."""
    torch.manual_seed(0)
    kv = torch.randn(12, 4, head_dim, dtype=dtype) * torch.randn(12, 4, 1).mul(2).exp().to(dtype)
    k, v = kv.split(2, 1)
    cache = KVLayout(2, 16, head_dim, quantized=True).zeros(2, dtype, "cpu")
    slots = torch.randperm(32)[:12]
    lowering.launch_cache_write(k, v, cache, slots)
    held = reference.unpack(cache, 16, head_dim)[slots // 16, :, :, slots % 16]  # [T, 2, G, D]
    for new, part in zip(lowering.launch_as_cached(k, v, cache), held.unbind(1), strict=True):
        assert torch.equal(new, part.to(dtype))
        assert dtype == torch.float16 or torch.equal(new.double(), part)  # fp16 ends at 2^-24


def test_what_is_not_finite_stays_in_its_row_of_an_fp8_cache():
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 32, "page_size": 16, "dtype": torch.bfloat16, "quantized": True}
    for bad in (float("inf"), float("nan")):
        step = make_step([(30, 1), (7, 9), (3, 20)], **shape)
        step.k[4, 0, 3] = bad
        lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
        out = lowering.launch_paged_attention(*step.attention_inputs(), 0.2, 0, 0.0, None)
        affected = out.isnan().flatten(1).any(1)
        assert affected[4:10].all()  # that token and those after it in its row
        assert not affected[:4].any() and not affected[10:].any()


def test_unsupported_shapes_raise():
    shape = {"heads": 2, "kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.float32}
    step = make_step([(3, 1)], **shape)
    with pytest.raises(ValueError, match="scale"):
        lowering.launch_paged_attention(*step.attention_inputs(), -1.0, 0, 0.0, None)
    with pytest.raises(ValueError, match="odd head dim"):
        odd = make_step([(3, 1)], **{**shape, "head_dim": 33, "quantized": True})
        lowering.launch_paged_attention(*odd.attention_inputs(), 0.2, 0, 0.0, None)
    with pytest.raises(ValueError, match="stride"):
        lowering.launch_cache_write(step.k.mT.contiguous().mT, step.v, step.kv_cache, step.slots)


@settings(SETTINGS, max_examples=12)
@given(
    tokens=st.integers(1, 70),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from(HEAD_DIMS),
    page_size=st.sampled_from([1, 16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    quantized=st.booleans(),
)
def test_cache_write(tokens, kv_heads, head_dim, page_size, dtype, seed, quantized):
    torch.manual_seed(seed)
    blocks = -(-tokens // page_size) + 2
    kv = torch.randn(tokens, 2 * kv_heads, head_dim, dtype=dtype)
    k, v = kv[:, :kv_heads], torch.randn(kv_heads, tokens, head_dim, dtype=dtype).transpose(0, 1)
    slots = torch.randperm(blocks * page_size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    cache = KVLayout(kv_heads, page_size, head_dim, quantized).zeros(blocks, dtype, "cpu")
    fill_random(cache, head_dim)
    if quantized:
        k[0, 0], v[-1, -1] = 0, 1e30 if dtype != torch.float16 else 6e4
        expected = reference.unpack(cache, page_size, head_dim)
        reference.cache_write(reference.quantized(k), reference.quantized(v), expected, slots)
    else:
        expected = cache.clone()
        reference.cache_write(k, v, expected, slots)
    lowering.launch_cache_write(k, v, cache, slots)
    assert torch.equal(reference.unpack(cache, page_size, head_dim) if quantized else cache, expected)
