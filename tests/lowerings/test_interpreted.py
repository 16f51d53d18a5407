"""Runs the kernel checks of `interpreted/` under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests need the compiler, so this is a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ("attention", "mixed"),
        ("attention", "not mixed"),
        ("rope epilogue greedy feed route", ""),
    ],
)
def test_kernels(files, part):
    paths = [f"tests/lowerings/interpreted/check_{name}.py" for name in files.split()]
    command = [sys.executable, "-m", "pytest", "-q", *paths, "-k", part]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
