"""Launches, and compiling them ahead: what is compiled, how often, and what a failure does."""

import ast
import logging
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from fusecomp.lowerings import launch as module
from fusecomp.lowerings.launch import compile_ahead, compiling_ahead, computed, launch

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


@triton.jit(do_not_specialize=["tokens"])
def add_kernel(x, out, args, tokens, stride, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at * stride, tl.load(x + at) * scale, mask=at < tokens)


class Kernel:
    """Stands for a Triton function; records launches and compilations."""

    __name__ = "stand_in"

    def __init__(self, error=None):
        self.params = [SimpleNamespace(do_not_specialize=name == "tokens") for name in ("x", "tokens", "stride")]
        self.launched, self.compiled, self.loaded, self.error = [], [], [], error

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append((grid, args, options))

    def warmup(self, *args, grid, **options):
        if self.error:
            raise self.error
        self.compiled.append((threading.current_thread().name, grid, args, options))
        return Compiled(self.loaded)


class Compiled:
    def __init__(self, loaded):
        self.loaded = loaded

    def __getitem__(self, grid):
        self.loaded.append(grid)


@pytest.fixture
def devices(monkeypatch):
    """The devices that compiling threads were set to; no GPU is needed."""
    found = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    return found


def test_a_launch_is_a_launch():
    kernel = Kernel()
    launch(kernel, (3, 2), "x", 5, BLOCK=16)
    assert kernel.launched == [((3, 2), ("x", 5), {"BLOCK": 16})]
    assert not kernel.compiled
    assert computed(torch.ones(2)).tolist() == [1, 1]


def test_on_a_cpu_nothing_changes():
    kernel = Kernel()
    with compile_ahead(torch.device("cpu")):
        assert not compiling_ahead()
        launch(kernel, (1,), "x")
    assert len(kernel.launched) == 1


def test_equal_launches_compile_once_in_threads_and_are_waited_for(devices):
    kernel, x = Kernel(), torch.zeros(64)
    with compile_ahead(CUDA):
        assert compiling_ahead()
        launch(kernel, (1,), x, 7, 32, BLOCK=16)
        launch(kernel, (9,), x[16:], 1, 64, BLOCK=16)  # another grid, another aligned place, a size not specialized on
        launch(kernel, (1,), x[1:], 7, 32, BLOCK=16)  # not aligned
        launch(kernel, (1,), x, 7, 1, BLOCK=16)  # a stride of 1
        launch(kernel, (1,), x, 7, 32, BLOCK=32)
        launch(kernel, (1,), x.half(), 7, 32, BLOCK=16)
        assert computed(torch.ones(2)).tolist() == [0, 0]
    assert not compiling_ahead()
    assert len(kernel.compiled) == len(kernel.loaded) == 5
    assert not kernel.launched
    assert all(name.startswith("compile-ahead") for name, *_ in kernel.compiled)
    assert set(devices) == {CUDA}


def test_what_fails_ahead_is_said_and_left_to_the_launch(devices, caplog):
    kernel = Kernel(RuntimeError("no registers"))
    with caplog.at_level(logging.WARNING, "fusecomp"), compile_ahead(CUDA):
        launch(kernel, (1,), torch.zeros(1), 1, 1)
    assert "stand_in" in caplog.text
    assert "no registers" in caplog.text
    launch(kernel, (1,), torch.zeros(1), 1, 1)
    assert len(kernel.launched) == 1


def test_an_error_inside_ends_the_mode(devices):
    with pytest.raises(ValueError, match="inside"), compile_ahead(CUDA):
        raise ValueError("inside")
    assert not compiling_ahead()


ALIGNED = torch.zeros(64)
ARGUMENTS = [
    (ALIGNED, ALIGNED, (), 1, 1, 1.0),
    (ALIGNED, ALIGNED, (), 16, 1, 1.0),
    (ALIGNED, ALIGNED, (), 2, 16, 0.5),
    (ALIGNED, ALIGNED, (), 2, 48, 0.5),
    (ALIGNED, ALIGNED, (), 2, 3, 0.5),
    (ALIGNED, ALIGNED, (), 2, 5, 2.5),
    (ALIGNED, ALIGNED, (), 1 << 40, 5, 2.5),
    (ALIGNED, ALIGNED, (), 2, 1 << 40, 2.5),
    (ALIGNED, ALIGNED, (ALIGNED,), 2, 16, 0.5),
    (ALIGNED, ALIGNED, (ALIGNED[1:],), 2, 16, 0.5),
    (ALIGNED, ALIGNED, (ALIGNED, 16), 2, 16, 0.5),
    (ALIGNED, ALIGNED, (ALIGNED, 3), 2, 16, 0.5),
    (ALIGNED[1:], ALIGNED, (), 2, 16, 0.5),
    (ALIGNED[4:], ALIGNED, (), 2, 16, 0.5),
    (ALIGNED.half(), ALIGNED, (), 2, 16, 0.5),
    (ALIGNED, None, (), 2, 16, 0.5),
]


def test_compiles_ahead_for_each_of_tritons_specializations():
    """Were ours coarser, kernels would be compiled at their first launch after all; finer, they would compile twice."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(add_kernel.signature, add_kernel.params, backend)

    def ours(args):
        return tuple(module._place(arg, p.do_not_specialize) for arg, p in zip(args, add_kernel.params, strict=False))

    found = [(ours(args), str(bind(*args, BLOCK=16)[1])) for args in ARGUMENTS]
    for i, (own, triton_own) in enumerate(found):
        for j, (other, triton_other) in enumerate(found):
            assert (own == other) == (triton_own == triton_other), (i, j, triton_own, triton_other)


@pytest.mark.gpu
def test_a_launch_finds_what_was_compiled_ahead(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    threads = []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda **_: threads.append(threading.current_thread().name)
    )
    x, out = torch.arange(64, device="cuda", dtype=torch.float32), torch.zeros(64, device="cuda")
    arguments = (add_kernel, (4,), x, out, (), 64, 1, 2.0)
    with compile_ahead(x.device):
        launch(*arguments, BLOCK=16)
    assert not out.any()
    launch(*arguments, BLOCK=16)
    assert torch.equal(out, 2 * x)
    assert [name.split("_")[0] for name in threads] == ["compile-ahead"]


def test_launches_call_no_function_of_the_language():
    """Called by Python, `triton.cdiv` and its like unwrap constants for 2.5 us, which steps of many launches pay."""
    for file in sorted((ROOT / "fusecomp").rglob("*.py")):
        tree = ast.parse(file.read_text())
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and not any(
                "jit" in ast.unparse(d) for d in function.decorator_list
            ):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                assert not called & {"triton.cdiv", "triton.next_power_of_2"}, (file, function.name)
