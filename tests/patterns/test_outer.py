"""Matrix products of one term to a sum: the multiplication in their place is exact, and keeps what others rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor import metrics
from torch.fx.experimental.proxy_tensor import make_fx

from fusecomp._compat import dynamo_settings, inductor_compile, mark_unbacked
from fusecomp.fusion import FusePass
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


def table(frequencies, positions):
    """As Hugging Face writes it."""
    angles = (frequencies[None, :, None].expand(1, -1, 1) @ positions[:, None, :].float()).transpose(1, 2)
    both = torch.cat((angles, angles), -1)
    return both.cos(), both.sin()


def test_the_rotary_table_has_no_product_left():
    """For any number of tokens."""
    inputs, context = (torch.rand(16), torch.arange(11)[None]), new_context()
    mark_unbacked(inputs[1], 1)
    output, graph = run_fused(table, inputs, lambda gm: OuterProduct().apply(gm, context))
    assert not any(name in count_ops(graph.graph) for name in PRODUCTS)
    assert all(torch.equal(a, b) for a, b in zip(output, table(*inputs), strict=True))


def compiled(function, inputs):
    """`function` by Inductor with the pattern, and the number of kernels that it became."""
    stage = FusePass((OuterProduct(),), new_context())

    def backend(gm, example_inputs):
        return inductor_compile(gm, example_inputs, {"post_grad_custom_pre_pass": stage, "force_disable_caches": True})

    torch._dynamo.reset()
    metrics.reset()
    with dynamo_settings(), torch.no_grad():
        output = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return output, metrics.generated_kernel_count


def test_the_rotary_table_is_one_kernel():
    """For any number of tokens: what is computed is not written out to be reshaped."""
    inputs = (torch.rand(16), torch.arange(11)[None])
    mark_unbacked(inputs[1], 1)
    output, kernels = compiled(table, inputs)
    assert kernels == 1
    torch.testing.assert_close(output, table(*inputs), rtol=1e-6, atol=1e-6)


def test_computed_values_of_unknown_size_are_reshaped_right():
    """With the size kept whole, and with it split or merged, where the place of an element depends on it."""

    def reshapes(x, y):
        a, b = x * 2, y + 1
        return (
            *(a[None].squeeze(0) + 1, a.unsqueeze(1).expand(-1, 3, -1) * 2, a.reshape(-1, 4, 2).sum(1)),
            *(a.reshape(-1) - 1, a.transpose(0, 1).reshape(-1) * 3, a.reshape(-1, 2, 2, 2).transpose(1, 3) * 5),
            (a[:, None] + b[None]).reshape(-1, 8) * 7,
        )

    inputs = (torch.randn(5, 8), torch.randn(3, 8))
    for x in inputs:
        mark_unbacked(x, 0)
    output, _ = compiled(reshapes, inputs)
    for actual, wanted in zip(output, reshapes(*inputs), strict=True):
        torch.testing.assert_close(actual, wanted)
