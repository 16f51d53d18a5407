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
    ("file", "part"),
    [
        ("check_attention.py", "mixed"),
        ("check_attention.py", "not mixed"),
        ("check_rope.py", "mixed"),
        ("check_rope.py", "not mixed"),
        ("check_epilogue.py", ""),
        ("check_greedy.py", ""),
        ("check_feed.py", ""),
        ("check_route.py", ""),
    ],
)
def test_kernels(file, part):
    command = [sys.executable, "-m", "pytest", "-q", f"tests/lowerings/interpreted/{file}", "-k", part]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
