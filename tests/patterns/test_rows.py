"""Rows chosen before a norm: any choice, in any order, however often; and what the whole fuse stage makes of it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp._compat import mark_unbacked
from fusecomp.fusion import FUSE
from fusecomp.ops.linear import Program
from fusecomp.patterns.base import fake_value
from fusecomp.patterns.hoisted_rows import HoistedRows
from fusecomp.patterns.norm import LINEAR, NORM
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import flat, new_context, run_fused

WIDTH = 24


def run_stage(function, inputs):
    """Outputs of `function` after the whole fuse stage, the report, and the graph's linears."""
    context = new_context()
    output, graph = run_fused(function, inputs, lambda gm: [p.apply(gm, context) for p in FUSE])
    assert not graph.graph.find_nodes(op="call_function", target=NORM), graph.code
    return flat(output), context.report, graph.graph.find_nodes(op="call_function", target=LINEAR)


@st.composite
def heads(draw):
    tokens = draw(st.integers(2, 9))
    chosen = draw(st.lists(st.integers(-tokens, tokens - 1), min_size=1, max_size=12))
    return tokens, chosen, draw(st.sampled_from(["rms", "layer"])), draw(st.booleans()), draw(st.booleans())


@settings(deadline=None, max_examples=25)
@given(heads(), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([torch.int32, torch.int64]))
def test_any_choice_of_rows_is_normalised_in_the_head(case, dtype, index_dtype):
    """Sizes known or not; the sum that is normalised may be wanted too."""
    tokens, chosen, kind, dynamic, keeps_sum = case
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, tokens, WIDTH), (1, tokens, WIDTH), (20, WIDTH), (WIDTH,))
    x, r, w, g = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    index = torch.tensor(chosen, dtype=index_dtype)

    def function(x, r, w, g, index):
        h = x + r
        y = F.rms_norm(h, (WIDTH,), g, 1e-6) if kind == "rms" else F.layer_norm(h, (WIDTH,), g, None, 1e-5)
        logits = F.linear(y[:, index], w)
        return (logits, h) if keeps_sum else logits

    inputs = (x, r, w, g, index)
    exact = flat(function(x.double(), r.double(), w.double(), g.double(), index))
    plain = flat(function(*inputs))
    if dynamic:
        mark_unbacked(x, 1), mark_unbacked(r, 1), mark_unbacked(index, 0)
    output, report, linears = run_stage(function, inputs)
    assert report.counts() == {"linear": 1, "selected_rows": 1, "norm": 1} and not report.near_misses
    (linear,) = linears
    assert Program.from_text(linear.args[5]).norm.kind == kind
    if not dynamic:
        assert fake_value(linear.args[0]).shape == (len(chosen), WIDTH)
    for actual, wanted, unfused in zip(output, exact, plain, strict=True):
        assert relative_error(actual, wanted) <= max(1.5 * relative_error(unfused, wanted), 2e-6)


def test_a_norm_whose_other_rows_are_wanted_stays():
    """The normalised states leave the graph: they are computed once, for all rows, and nothing is rewritten."""

    def function(x, g, w, index):
        y = F.rms_norm(x, (WIDTH,), g, 1e-6)
        return F.linear(y[:, index], w), y

    inputs = (torch.randn(1, 5, WIDTH), torch.randn(WIDTH), torch.randn(20, WIDTH), torch.tensor([4, 4, 0]))
    output, report, _ = run_stage(function, inputs)
    assert report.counts() == {"linear": 1}
    assert [m.reason for m in report.near_misses] == ["the norm's result is also read by output"]
    for actual, wanted in zip(output, function(*inputs), strict=True):
        assert relative_error(actual, wanted) < 2e-6


@pytest.mark.parametrize("name", ["heads", "three dims", "experts"])
def test_rows_are_hoisted_as_two_dims(name):
    """Inductor of torch 2.11 cannot take a choice of more dims among an unknown number of rows."""
    example = next(e for e in HoistedRows().examples() if e.name == name)
    context = new_context()
    inputs = example.inputs(torch.float32)
    _, graph = run_fused(example.function, inputs, lambda gm: HoistedRows().apply(gm, context))
    chosen = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
    assert context.report.count("hoisted_rows") == 1 and chosen
    assert {fake_value(n).dim() for n in chosen} == {2}


def test_a_mask_of_rows_is_refused():
    def function(x, g, w, mask):
        return F.linear(torch.ops.aten.index(F.rms_norm(x, (WIDTH,), g, 1e-6), [None, mask]), w)

    inputs = (torch.randn(1, 5, WIDTH), torch.randn(WIDTH), torch.randn(20, WIDTH))
    mask = torch.tensor([True, False, True, True, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        output, report, _ = run_stage(function, (*inputs, mask))
    assert report.count("selected_rows") == 0 and "no list of row numbers" in report.near_misses[0].reason
    assert relative_error(output[0], function(*inputs, mask)) < 2e-6
