"""The large-M linear's kernels under Triton's interpreter; `tests/lowerings/test_interpreted.py` runs this file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.linear import large_heuristics, norm
from fusecomp.lowerings.linear.large import launch_large, run_matmul
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.norm import launch_norm
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16
from tests.lowerings.linear_epilogues import EPILOGUES, make_args, norm_reference, reference, row_strides

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


multiply_bfloat16()


def assert_as_exact(found: torch.Tensor, exact: torch.Tensor, unfused: torch.Tensor) -> None:
    """At most 1.5 times the unfused error, or one rounding: the interpreter truncates where a GPU rounds to nearest."""
    error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (found, unfused))
    floor = 2e-6 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps
    assert error <= max(1.5 * allowed, floor), (error, allowed)


@st.composite
def matmuls(draw):
    """(epilogue, dtype, T, N, K, padding of rows, configuration): tiles smaller than the tiny shapes."""
    name, k = draw(st.sampled_from(sorted(EPILOGUES))), draw(st.sampled_from([8, 24, 72, 100, 129]))
    config = LargeConfig(
        block_t=draw(st.sampled_from([16, 32])), block_n=draw(st.sampled_from([16, 32])), block_k=16,
        swap=EPILOGUES[name][1] == 1 and draw(st.booleans()), splits=draw(st.sampled_from([1, 1, 2, 3])),
        pieces=draw(st.sampled_from([1, 2, 4])), group_t=draw(st.integers(1, 3)),
        use_tma=draw(st.booleans()),
    )  # fmt: skip
    shape = draw(st.integers(1, 70)), draw(st.sampled_from([1, 8, 40, 56, 83])), k
    return name, draw(st.sampled_from(DTYPES)), shape, draw(st.sampled_from([0, 8, 3])), config


def inputs(name: str, dtype: torch.dtype, shape: tuple[int, int, int], pad: int):
    num_tokens, n, k = shape
    torch.manual_seed(0)
    x = torch.randn(num_tokens, k + pad, dtype=dtype)[:, :k]
    weight = torch.randn(EPILOGUES[name][1] * n, k, dtype=dtype) / k**0.5
    return x, weight, make_args(name, num_tokens, n, dtype, "cpu", pad)


@SETTINGS
@given(matmuls())
def test_persistent(case):
    name, dtype, shape, pad, config = case
    epilogue, groups, _, hint = EPILOGUES[name]
    x, weight, args = inputs(name, dtype, shape, pad)
    exact = reference(name, x.double() @ weight.double().t(), args)
    found = run_matmul(config, x, weight, dtype, epilogue, args, row_strides(args), groups, hint)
    assert_as_exact(found, exact, reference(name, x @ weight.t(), args))


@SETTINGS
@given(matmuls(), st.sampled_from(["cublas", "cublas_addmm"]), st.sampled_from(DTYPES))
def test_library(case, method, out_dtype):
    name, dtype, shape, pad, config = case
    epilogue, groups, _, hint = EPILOGUES[name]
    method = "cublas" if hint not in ("residual", "bias") else method
    x, weight, args = inputs(name, dtype, shape, pad)
    exact = reference(name, x.double() @ weight.double().t(), args)
    found = run_matmul(
        replace(config, method=method), x, weight, out_dtype, epilogue, args, row_strides(args), groups, hint
    )
    assert found.dtype == out_dtype
    assert_as_exact(found, exact, reference(name, x @ weight.t(), args))


@SETTINGS
@given(
    kind=st.sampled_from(norm.KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 7, 64, 100, 300])),
    block=st.sampled_from([(1, 512), (2, 512), (4, 64), (1, 64)]),
    options=st.tuples(*[st.booleans()] * 3),
)
def test_norm(kind, dtype, shape, block, options):
    with_weight, with_bias, plus_one = options
    torch.manual_seed(0)
    num_tokens, k = shape
    x = 3 + torch.randn(num_tokens, k + 5, dtype=dtype)[:, :k]
    weight = torch.randn(k, dtype=dtype) if with_weight else None
    bias = torch.randn(k, dtype=dtype) if with_bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "norm_block", lambda *_: (*block, 4))
        y = launch_norm(x, weight, bias, 1e-5, kind, plus_one)
    rest = (weight, bias, 1e-5, kind, plus_one)
    exact = norm_reference(x.double(), *rest)
    if kind == "layer" and k == 1:  # x - mean(x) is zero: there is no relative error
        assert torch.equal(y, exact.to(dtype))
    else:
        assert_as_exact(y, exact, norm_reference(x, *rest))


@pytest.mark.parametrize("method", large_heuristics.METHODS)
@pytest.mark.parametrize("norm_kind", ["", "rms", "layer"])
def test_launch(monkeypatch, method, norm_kind):
    """Norm, choice, matmul and epilogue together, with no tokens too."""
    config = LargeConfig(method=method, block_t=16, block_n=16, block_k=16)
    monkeypatch.setattr(large_heuristics, "large_config", lambda *_, **__: config)
    name = "residual"
    x, weight, args = inputs(name, torch.bfloat16, (33, 40, 72), 8)
    scale = torch.randn(72, dtype=torch.bfloat16)
    normed = {d: norm_reference(x.to(d), scale, None, 1e-6, norm_kind, True) if norm_kind else x.to(d) for d in DTYPES}
    exact = reference(name, normed[torch.float32].double() @ weight.double().t(), args)
    unfused = reference(name, normed[torch.bfloat16] @ weight.t(), args)

    def launch(rows: int) -> torch.Tensor:
        operands = tuple(arg[:rows] for arg in args)
        return launch_large(
            x[:rows], weight, torch.bfloat16, norm_kind, scale, None, 1e-6, True, EPILOGUES[name][0], operands,
            row_strides(args), 1, name,
        )  # fmt: skip

    assert launch(0).shape == (0, 40)
    assert_as_exact(launch(33), exact, unfused)


def test_refusals():
    x, weight = torch.randn(4, 16), torch.randn(6, 16)
    rest = (torch.float32, "", None, None, 0.0, False, EPILOGUES["identity"][0])
    for bad_x, bad_weight, args, strides, groups, hint in (
        (x, weight, (), (), 3, "identity"),
        (x, weight[:, :8].contiguous(), (), (), 1, "identity"),
        (x.half(), weight, (), (), 1, "identity"),
        (x.t().contiguous().t(), weight, (), (), 1, "identity"),
        (x, weight, (), (), 1, "residual"),
        (x, weight, (), (), 1, "unknown"),
        (x, weight, (x,), (), 1, "other"),
    ):
        with pytest.raises(ValueError, match="linear"):
            launch_large(bad_x, bad_weight, *rest, args, strides, groups, hint)
    with pytest.raises(ValueError, match="norm kind"):
        launch_norm(x, None, None, 1e-5, "batch")
    with pytest.raises(ValueError, match="weight"):
        launch_norm(x, torch.ones(3), None, 1e-5)
