"""Matrix products of one term to a sum: the multiplication in their place is exact, and keeps what others rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fusecomp._compat import mark_unbacked
from fusecomp.patterns.base import count_ops, fake_value
from fusecomp.patterns.outer import OuterProduct
from fusecomp.testing.patterns import new_context, run_fused

PRODUCTS = ("mm.default", "bmm.default")


def rewritten(function, inputs):
    """The ATen graph of `function` as it is traced, before Inductor takes products apart itself, and the pattern's."""
    graphs = [make_fx(function, tracing_mode="fake")(*inputs) for _ in range(2)]
    context = new_context()
    matches = OuterProduct().apply(graphs[1], context)
    return *graphs, matches, context.report


@st.composite
def operands(draw):
    """Operands [B, M, 1] and [B, 1, N] of any layout, with special values among theirs; B = 0 stands for a plain mm."""
    batch, rows, columns = draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    special = draw(st.sampled_from([None, 0.0, -0.0, float("inf"), float("nan"), 1e-30, 3e4]))

    def operand(*shape):
        order = draw(st.permutations(range(len(shape))))
        made = torch.randn([shape[i] for i in order], generator=generator)
        if special is not None:
            made.view(-1)[0] = special
        return made.to(dtype).permute([order.index(i) for i in range(len(shape))])

    lead = (batch,) if batch else ()
    return operand(*lead, rows, 1), operand(*lead, 1, columns)


@settings(deadline=None, max_examples=60)
@given(operands())
def test_it_is_exact(case):
    a, b = case
    before, after, matches, _ = rewritten(torch.matmul if a.dim() == 2 else torch.bmm, (a, b))
    assert matches == 1 and not any(name in count_ops(after.graph) for name in PRODUCTS)
    exact = (a.double() * b.double()).to(a.dtype)
    torch.testing.assert_close(after(a, b), exact, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(after(a, b), before(a, b), rtol=0, atol=0, equal_nan=True)
    assert after(a, b).stride() == before(a, b).stride()
    assert fake_value(after.graph.output_node().args[0]).stride() == before(a, b).stride()


def test_a_size_is_one_only_if_that_is_known():
    """The contracted size is a symbol here, and 1 in this call: the next may sum two products."""
    inputs, context = (torch.randn(8, 1), torch.randn(1, 40)), new_context()
    mark_unbacked(inputs[0], 1)
    mark_unbacked(inputs[1], 0)
    output, graph = run_fused(torch.mm, inputs, lambda gm: OuterProduct().apply(gm, context))
    assert context.report.count("outer_product") == 0 and "mm.default" in count_ops(graph.graph)
    assert torch.equal(output, torch.mm(*inputs))


@pytest.mark.parametrize("add", [torch.addmm, torch.baddbmm])
def test_sums_are_left_alone(add):
    lead = () if add is torch.addmm else (2,)
    inputs = (torch.randn(*lead, 8, 5), torch.randn(*lead, 8, 1), torch.randn(*lead, 1, 5))
    _, after, matches, report = rewritten(add, inputs)
    assert matches == 0 and "adds to the product" in report.near_misses[0].reason
    assert torch.equal(after(*inputs), add(*inputs))


def test_the_rotary_table_has_no_product_left():
    """Frequencies by positions as Hugging Face writes them, for any number of tokens."""

    def table(frequencies, positions):
        angles = (frequencies[None, :, None].expand(1, -1, 1) @ positions[:, None, :].float()).transpose(1, 2)
        both = torch.cat((angles, angles), -1)
        return both.cos(), both.sin()

    inputs = (torch.rand(16), torch.arange(11)[None])
    mark_unbacked(inputs[1], 1)
    context = new_context()
    output, graph = run_fused(table, inputs, lambda gm: OuterProduct().apply(gm, context))
    assert not any(name in count_ops(graph.graph) for name in PRODUCTS)
    assert all(torch.equal(a, b) for a, b in zip(output, table(*inputs), strict=True))
