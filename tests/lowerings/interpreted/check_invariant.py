"""Batch-invariant kernels under Triton's interpreter: right, and bitwise the same for a token in any step.

`tests/lowerings/test_interpreted.py` runs this file. The interpreter multiplies matrices by numpy's library, whose sums
may depend on the other columns; here they are taken one product after the other, as matrix units do step by step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fusecomp.errors import FallbackError
from fusecomp.lowerings import device, quant_registration, registration
from fusecomp.lowerings.experts.lowering import launch_experts
from fusecomp.lowerings.linear.invariant import InvariantConfig, run_invariant
from fusecomp.lowerings.linear.lowering import launch_linear, launch_norm_op
from fusecomp.lowerings.linear.skinny import split_steps
from fusecomp.lowerings.paged_attention import lowering
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.paged_attention.invariant_launch import InvariantAttention, launch_invariant_attention
from fusecomp.lowerings.paged_attention.rope import launch_rope_attention
from fusecomp.lowerings.route.lowering import launch_router_op
from fusecomp.ops.linear import Program
from fusecomp.ops.mode import batch_invariance
from fusecomp.ops.norm import NormSpec
from fusecomp.ops.rope import Rope
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec
from tests.lowerings import experts_cases
from tests.lowerings.interpreted.bfloat16 import _float32
from tests.lowerings.linear_cases import EPILOGUES, Linear
from tests.lowerings.searches import SETTINGS
from tests.lowerings.steps import check_attention, make_rope, make_step

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _create_dot(self, a, b, d, *_):
    a, b = (_float32(x).data.astype(np.float32) for x in (a, b))
    total = np.zeros(d.data.shape, np.float32)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[None, k]
    return TensorHandle(total + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = _create_dot


@pytest.fixture(autouse=True)
def lowered_counters():
    yield
    for counters in device._arrival_counters.values():
        assert not counters.any(), "a launch left its counters raised"
    device._arrival_counters.clear()


def rows_of(layer: Linear, rows: slice) -> Linear:
    args = tuple(a[rows] if a.dim() == 2 else a for a in layer.args)
    return Linear(layer.x[rows], layer.weight, layer.norm, layer.norm_weight, layer.epilogue, args)


def run(layer: Linear, config: InvariantConfig) -> torch.Tensor:
    tokens, n = layer.x.shape[0], layer.weight.shape[0] // layer.epilogue.groups
    buffer = torch.full((tokens + 1, n + 3), float("nan"), dtype=layer.x.dtype)
    out = buffer[:tokens, :n]
    epilogue = layer.epilogue
    run_invariant(
        config, layer.x, layer.weight, out, epilogue.kernel, layer.args, layer.strides, epilogue.groups, False
    )
    assert buffer[tokens:].isnan().all() and buffer[:, n:].isnan().all(), "a store went past the output"
    layer.assert_accurate(out, ulps=2.0)  # the interpreter truncates where a GPU rounds
    return out


@settings(SETTINGS, max_examples=10)
@given(
    st.integers(2, 140), st.integers(1, 40), st.integers(1, 200), st.sampled_from([*EPILOGUES]),
    st.sampled_from(DTYPES), st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.integers(1, 4), st.data(),
)  # fmt: skip
def test_linear_rows(tokens, n, k, epilogue, dtype, block_r, block_k, splits, data):
    """Alone, in a step whose segments are programs, and in one whose programs do all segments."""
    layer = Linear.random(tokens, n, k, epilogue=epilogue, dtype=dtype)
    per_segment, segments = split_steps(cdiv(k, block_k), splits)
    config = InvariantConfig(block_r, block_k, 4, segments, per_segment)
    whole = run(layer, config)
    for rows in (slice(0, 1), slice(0, 17), slice(tokens - 1, tokens)):
        assert torch.equal(run(rows_of(layer, rows), config), whole[rows])
    first = data.draw(st.integers(0, tokens - 1))
    assert torch.equal(run(rows_of(layer, slice(first, tokens)), config), whole[first:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_linear_op_with_norm(norm, dtype):
    layer = Linear.random(70, 24, 96, norm="weight", dtype=dtype)
    program = Program(1, (), (), str(dtype).removeprefix("torch."), NormSpec(norm, 1e-5) if norm else None)

    def op(x):
        with batch_invariance():
            return launch_linear(x, layer.weight, layer.norm_weight if norm else None, None, [], program)

    whole = op(layer.x)
    with batch_invariance():
        ways = layer.x if not norm else launch_norm_op(layer.x, layer.norm_weight, None, NormSpec(norm, 1e-5))
    bare = Linear(ways, layer.weight, "none", None, EPILOGUES["plain"], ())
    bare.assert_accurate(whole, ulps=2.0)
    for rows in (slice(0, 1), slice(3, 20), slice(6, 70)):
        assert torch.equal(op(layer.x[rows]), whole[rows])


def test_norm_of_many_rows():
    """From 1,024 rows on the default takes other warps."""
    x = torch.randn(1030, 48)
    with batch_invariance():
        whole = launch_norm_op(x, None, None, NormSpec("rms", 1e-5))
        assert torch.equal(launch_norm_op(x[5:6], None, None, NormSpec("rms", 1e-5)), whole[5:6])


SHAPES = st.fixed_dictionaries(
    {
        "kv_heads": st.sampled_from([1, 2]),
        "head_dim": st.sampled_from([32, 80]),
        "page_size": st.sampled_from([1, 16, 64]),
        "dtype": st.sampled_from(DTYPES),
        "quantized": st.booleans(),
        "seed": st.integers(0, 99),
    }
)


@settings(SETTINGS, max_examples=10)
@given(
    SHAPES, st.sampled_from([1, 3, 4]), st.sampled_from([1, 4]), st.sampled_from([16, 32]), st.sampled_from([32, 64]),
    st.sampled_from([0, 0, 7, 50]), st.sampled_from([0.0, 5.0]), st.booleans(), st.data(),
)  # fmt: skip
def test_attention_rows(shape, group, queries, block_n, segment, window, softcap, has_sinks, data):
    """Decodes beside prefills, and every token of theirs as a decode of its own, with and without shared segments."""
    decodes = data.draw(st.lists(st.tuples(st.integers(0, 150), st.just(1)), max_size=2))
    prefills = data.draw(st.lists(st.tuples(st.integers(0, 100), st.integers(2, 12)), min_size=1, max_size=2))
    heads = group * shape["kv_heads"]
    step = make_step(decodes + prefills, heads=heads, **shape)
    sinks = torch.randn(heads) if has_sinks else None
    mode = (0.2, window, softcap, sinks)
    config = InvariantAttention(queries, block_n, 4, 2, segment)
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)

    def attend(q, cu, lengths, tables, meta):
        meta = torch.tensor(meta, dtype=torch.int32)
        return launch_invariant_attention(q, step.kv_cache, cu, lengths, tables, meta, *mode, config)

    whole = attend(step.q, step.cu_q_lens, step.seq_lens, step.block_tables, step.host_meta.tolist())
    check_attention(step, whole, *mode)
    cu, lengths = step.cu_q_lens.tolist(), step.seq_lens.tolist()
    tokens = [(row, token) for row in range(len(lengths)) for token in range(cu[row], cu[row + 1])]
    ends = [lengths[row] - (cu[row + 1] - 1 - token) for row, token in tokens]
    rows = torch.tensor([row for row, _ in tokens])
    count, longest = len(tokens), max(ends)
    together = attend(
        step.q, torch.arange(count + 1, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32),
        step.block_tables[rows], [count, 1, longest, count],
    )  # fmt: skip
    assert torch.equal(together, whole)
    at = data.draw(st.integers(0, count - 1))
    alone = attend(
        step.q[at : at + 1], torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor(ends[at : at + 1], dtype=torch.int32),
        step.block_tables[rows[at : at + 1]], [1, 1, ends[at], 1],
    )  # fmt: skip
    assert torch.equal(alone[0], whole[at])


def test_padding_rows_are_zero():
    step = make_step([(40, 1)], padding=2, heads=4, kv_heads=2, head_dim=32, page_size=16, dtype=torch.float32)
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    q, _, _, *rest = step.attention_inputs()
    check_attention(step, launch_invariant_attention(q, *rest, 0.2, 0, 0.0, None), 0.2, 0, 0.0, None)


@pytest.mark.parametrize("norm", ["", " rms:1e-06"])
def test_rope_attention_of_a_step_in_parts(norm):
    """A prompt in one step, and cut in two: the same queries, keys and outputs."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "page_size": 16, "dtype": torch.bfloat16}
    step = make_step([(0, 30)], **shape)
    rope = Rope.parse(f"half:32:full{norm}")
    given = make_rope(step, rope, table_dtype=torch.bfloat16)
    mode = (0.2, 0, 0.0, None)
    cache = step.kv_cache.clone()

    def part(kv_cache, lo, hi):
        meta = torch.tensor([hi - lo == 1 and lo > 0, hi - lo, hi, 1], dtype=torch.int32)
        tables = (None if t is None else t[lo:hi] for t in (given.cos, given.sin))
        rows = torch.tensor([0, hi - lo], dtype=torch.int32), torch.tensor([hi], dtype=torch.int32)
        with batch_invariance():
            return registration._rope_attention(
                step.q[lo:hi], step.k[lo:hi], step.v[lo:hi], *tables, given.q_norm, given.k_norm, kv_cache,
                step.slots[lo:hi], *rows, step.block_tables, meta, *mode, str(rope),
            )  # fmt: skip

    whole = part(step.kv_cache, 0, 30)
    parts = torch.cat([part(cache, lo, hi) for lo, hi in ((0, 13), (13, 14), (14, 29), (29, 30))])
    assert torch.equal(parts, whole)
    assert torch.equal(cache.nan_to_num(7.0), step.kv_cache.nan_to_num(7.0))
    default = launch_rope_attention(*given.arguments(step, mode))
    torch.testing.assert_close(whole, default, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "gpt-oss", "residual"])
def test_experts_rows(form, dtype):
    layer = experts_cases.make_layer(70, 2, 4, 32, 48, dtype=dtype, **experts_cases.FORMS[form])

    def rows(part):
        of_tokens = ("x", "top_k_index", "top_k_weights", "residual")
        cut = {name: value[part] for name in of_tokens if (value := getattr(layer, name)) is not None}
        with batch_invariance():
            return experts_cases.replace(layer, **cut).run(launch_experts)

    def invariant(*args):
        with batch_invariance():
            return launch_experts(*args)

    experts_cases.check_contract(layer, invariant, 3.0)  # the interpreter truncates where a GPU rounds
    whole = rows(slice(0, 70))
    for part in (slice(0, 1), slice(4, 21), slice(6, 70)):
        assert torch.equal(rows(part), whole[part])


def test_router_rows():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (70, 8))
    scale, spec = torch.rand(64, generator=generator), RouteSpec(SOFTMAX, 2, SUM, dtype="float32")

    def rows(part):
        with batch_invariance():
            return launch_router_op(
                x[part], weight, None, scale, None, None, NormSpec("rms", 1e-5), torch.float32, spec
            )

    whole = rows(slice(0, 70))
    for part in (slice(0, 1), slice(4, 21), slice(6, 70)):
        assert all(torch.equal(a, b[part]) for a, b in zip(rows(part), whole, strict=True))


def test_what_has_no_such_kernel_is_refused():
    layer = Linear.random(3, 20, 64, dtype=torch.float64)
    with batch_invariance():
        with pytest.raises(FallbackError, match="linear"):
            registration.run_linear(layer.x, layer.weight, None, None, [], Program(1, (), (), "float64").to_text())
        with pytest.raises(FallbackError, match="quant_linear"):
            quant_registration._quant_linear(*[None] * 9)
        with pytest.raises(FallbackError, match="quant_experts"):
            quant_registration._quant_experts()
