"""Runs the kernel checks of `interpreted/` under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests need the compiler, so these are processes of their
own. Each costs a start, so files share one where they want the same changes to the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOGETHER = [
    "experts routed listed linear_experts digits",
    "quant folded scaled linear_pair",
    "rope epilogue greedy feed route skinny linear_large",
    "quant_experts",
    "attention",
    "invariant",
]


def path_of(name: str) -> str:
    return f"tests/lowerings/interpreted/check_{name}.py"


@pytest.mark.parametrize("names", TOGETHER)
def test_kernels(names):
    command = [sys.executable, "-m", "pytest", "-q", *map(path_of, names.split())]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_check_is_run():
    files = (ROOT / "tests/lowerings/interpreted").glob("check_*.py")
    assert sorted(path_of(name) for names in TOGETHER for name in names.split()) == sorted(
        str(file.relative_to(ROOT)) for file in files
    )
