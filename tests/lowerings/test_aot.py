"""Every kernel compiles for every target, within its shared memory, and without spills where it was tuned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compile_for(target: str, *options: str) -> list[dict]:
    """A process of its own: another test may have imported Triton with its interpreter on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusecomp.lowerings.aot", "--target", target, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict], target: str) -> None:
    assert found
    for kernel in found:
        assert kernel["shared_bytes"] <= kernel["shared_limit"], kernel
        if kernel["spills"]:
            print(f"{target} {kernel['name']}: spills {kernel['spills']}, {kernel['registers']} registers")
    if target == "sm_90":
        # Head dim 256 fills the registers with accumulators: its prefill keeps 16 to 32 bytes a thread in local memory.
        spilled = [k["name"] for k in found if k["spills"] and not ("prefill" in k["name"] and k["spills"] <= 32)]
        assert spilled == []


@pytest.mark.parametrize("target", TARGETS)
def test_representative_kernels(target):
    check(compile_for(target), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    check(compile_for(target, "--full"), target)
