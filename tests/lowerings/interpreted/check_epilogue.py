"""Generated epilogues under Triton's interpreter against the program's eager reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.linear.epilogue import EXPRESSIONS, epilogue_hook, epilogue_source, operand_strides
from fusecomp.lowerings.linear.pointwise import launch_pointwise
from fusecomp.ops.linear import COLUMN, FULL, FUNCTIONS, ROW, SCALAR, Program, run_epilogue

UNARY = ("neg", "abs", "exp", "sigmoid", "tanh", "erf")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


@st.composite
def programs(draw):
    layouts = tuple(draw(st.lists(st.sampled_from([FULL, ROW, COLUMN, SCALAR]), max_size=4)))
    groups = draw(st.sampled_from([1, 2]))
    names = [*(f"a{i}" for i in range(groups)), *(f"i{i}" for i in range(len(layouts)))]
    steps: list[tuple] = []
    for i in range(draw(st.integers(0, 8))):
        argument = st.sampled_from(names)
        if draw(st.booleans()):
            steps.append((draw(st.sampled_from(UNARY)), draw(argument)))
        else:
            steps.append((draw(st.sampled_from(BINARY)), draw(argument), draw(argument | st.sampled_from([0.5, -2.0]))))
        # Exponentials of exponentials overflow: what follows a step stays within 1.
        steps.append(("tanh", f"t{2 * i}"))
        names.append(f"t{2 * i + 1}")
    return Program(groups, layouts, tuple(steps), "float32")


def operands(program: Program, tokens: int, n: int) -> tuple[torch.Tensor, ...]:
    shapes = {FULL: (tokens, n + 3), ROW: (n,), COLUMN: (tokens,), SCALAR: (1,)}
    drawn = [torch.randn(shapes[layout]) for layout in program.operands]
    return tuple(x[:, :n] if x.dim() == 2 else x for x in drawn)


@settings(deadline=None, max_examples=40)
@given(programs(), st.integers(1, 5), st.sampled_from([1, 13, 64]))
def test_generated_hook_is_the_program(program, tokens, n):
    torch.manual_seed(len(program.steps))
    acc, args = torch.randn(tokens, program.groups * n), operands(program, tokens, n)
    out = torch.full((tokens, n), float("nan"))
    launch_pointwise(acc, out, epilogue_hook(program), args, operand_strides(program, args), program.groups)
    wanted = run_epilogue(program, acc.double().chunk(program.groups, -1), args)
    assert torch.allclose(out.double(), wanted.expand(tokens, n), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf"])
def test_function_is_accurate_over_its_range(name):
    """Small arguments included, where a formula may lose its digits."""
    x = torch.logspace(-12, 1.2, 640)[None]
    x = torch.cat([x, -x]) if name in ("exp", "sigmoid", "tanh", "erf") else x
    program, out = Program(1, (), ((name, "a0"),), "float32"), torch.empty_like(x)
    launch_pointwise(x.contiguous(), out, epilogue_hook(program), (), (), 1)
    exact = FUNCTIONS[name](x.double())
    eager = FUNCTIONS[name](x).double()
    error = (out.double() - exact).abs() / exact.abs()
    assert (error <= 4 * (eager - exact).abs() / exact.abs() + 1e-6).all()


def test_nan_reaches_the_output_of_a_clamp():
    program = Program(1, (), (("maximum", "a0", -1.0), ("minimum", "t0", 1.0)), "float32")
    x = torch.tensor([[float("nan"), 5.0, -5.0, 0.5]])
    out = torch.empty_like(x)
    launch_pointwise(x, out, epilogue_hook(program), (), (), 1)
    assert out[0, 0].isnan() and out[0, 1:].tolist() == [1.0, -1.0, 0.5]


def test_every_function_has_an_expression():
    assert set(EXPRESSIONS) == set(FUNCTIONS)


def test_equal_programs_make_one_function():
    steps = (("add", "a0", "i0"),)
    first, second = Program(1, (FULL,), steps, "bfloat16"), Program(1, (FULL,), steps, "float16")
    assert epilogue_source(first) == epilogue_source(second)
