"""The fuse stage's patterns against their examples, and hypothesis over generated epilogues and norms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.fusion import FUSE
from fusecomp.patterns.epilogue import LinearEpilogue
from fusecomp.patterns.norm import Norm
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import check_fused, new_context, run_fused

# What is refused has no numerics: at each change it is refused in fp32.
CASES = [
    pytest.param(
        pattern, FUSE[: FUSE.index(pattern)], example, dtype,
        id=f"{pattern.name}-{example.name}-{dtype}",
        marks=() if example.matches or dtype == torch.float32 else pytest.mark.slow,
    )
    for pattern in FUSE
    for example in pattern.examples()
    for dtype in (torch.float32, torch.bfloat16)
]  # fmt: skip


@pytest.mark.filterwarnings("error:erase_node")  # of a node that was erased
@pytest.mark.parametrize(("pattern", "before", "example", "dtype"), CASES)
def test_example(pattern, before, example, dtype):
    check_fused(pattern, example, new_context(), dtype, before)


UNARY = {
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "square": torch.square,
    "neg": torch.neg,
    "clamp": lambda x: x.clamp(-1.0, 1.5),
    "scale": lambda x: x * 0.7,
    "cast": lambda x: x.float().mul(1.25).to(x.dtype),
    "softplus": F.softplus,
    "hardswish": F.hardswish,
}


@st.composite
def chains(draw):
    """A random chain of pointwise operations with operands of every layout."""
    steps = draw(
        st.lists(st.sampled_from([*UNARY, "row", "full", "column", "scalar", "reuse"]), min_size=1, max_size=6)
    )
    return steps, draw(st.integers(1, 9)), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@settings(deadline=None, max_examples=25)
@given(chains())
def test_any_chain_is_one_linear(case):
    steps, tokens, dtype = case
    n, k = 20, 12
    generator = torch.Generator().manual_seed(len(steps))

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, w = random(1, tokens, k), (random(n, k) / k**0.5).to(dtype)
    operands = {"row": random(n), "full": random(1, tokens, n), "column": random(1, tokens, 1), "scalar": random(1)}

    def function(x, w, row, full, column, scalar):
        y = first = F.linear(x, w)
        for step in steps:
            y = (
                {"row": y + row, "full": y * full, "column": y * column, "scalar": y - scalar, "reuse": y + first}.get(
                    step
                )
                if step not in UNARY
                else UNARY[step](y)
            )
        return y

    context = new_context()
    inputs = (x, w, *operands.values())
    output, graph = run_fused(function, inputs, lambda gm: LinearEpilogue().apply(gm, context))
    assert context.report.count("linear") == 1
    left = [n for n in graph.graph.nodes if n.op == "call_function" and "linear" not in str(n.target)]
    assert all("view" in str(n.target) or "reshape" in str(n.target) for n in left), graph.code
    exact, plain = function(*(t.double() for t in inputs)), function(*inputs)
    assert relative_error(output, exact) <= max(1.5 * relative_error(plain, exact), 2e-6)


def test_norm_of_another_epsilon_is_another_norm():
    """The constant that is found is the one that is used: eps is never assumed."""
    seen = []
    for eps in (1e-6, 1e-3):
        context = new_context()

        def function(x, w, g, eps=eps):
            return F.linear(F.rms_norm(x, (16,), g, eps), w)

        inputs = (torch.randn(1, 3, 16) * 1e-2, torch.randn(8, 16), torch.randn(16))
        output, _ = run_fused(
            function, inputs, lambda gm, c=context: [p.apply(gm, c) for p in (LinearEpilogue(), Norm())]
        )
        assert relative_error(output, function(*inputs)) < 1e-5
        seen += [m.detail for m in context.report.matches if m.pattern == "norm"]
    assert "1e-06" in seen[0] and "0.001" in seen[1]


def test_a_matmul_of_another_dtype_is_refused_and_not_half_read():
    """What addmm adds is no operand in fp64: a reason in the report, and the graph as it was."""
    inputs, context = (
        (torch.randn(1, 3, 8).double(), torch.randn(4, 8).double(), torch.randn(4).double()),
        new_context(),
    )
    output, _ = run_fused(F.linear, inputs, lambda gm: LinearEpilogue().apply(gm, context))
    assert context.report.count("linear") == 0 and "float64" in context.report.near_misses[0].reason
    assert torch.equal(output, F.linear(*inputs))
