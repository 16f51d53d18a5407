"""Every kernel compiles for every target, within its shared memory, and without a spill where it was tuned (sm_90)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusecomp.lowerings.aot import TUNED
from fusecomp.lowerings.machine_code import lost_codes, scattered_reductions

ROOT = Path(__file__).parents[2]
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


def compile_for(target: str, *options: str) -> list[dict]:
    """A process of its own: another test may have imported Triton with its interpreter on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fusecomp.lowerings.aot", "--target", target, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults_of(found: list[dict], target: str) -> list[dict]:
    """Kernels that cannot be launched, read codes from a wrong register, may sum others' rows, or spill where tuned.

    Prints all that spill (bytes a thread on sm_*, registers on gfx*): see `pytest -rA` or `-s`.
    """
    assert found
    spilled = [kernel for kernel in found if kernel["spills"]]
    print(f"{target}: {len(spilled)} of {len(found)} kernels spill")
    for kernel in spilled:
        print(f"  {kernel['name']:52} {kernel['spills']:6} spilled, {kernel['registers']} registers")
    return [
        k
        for k in found
        if k["shared_bytes"] > k["shared_limit"]
        or k["lost_codes"]
        or k["scattered"]
        or (target == TUNED and k["spills"])
    ]


@pytest.mark.parametrize(
    ("before", "lost"),
    [
        ("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R18, R18, R5, RZ", False),
        ("@P1 PRMT R18, R61, 0x3340, R66", False),
        ("LDG.E.128.CONSTANT R16, [R2.64]", False),
        ("LDSM.16.M88.4 R16, [R202+UR19]", False),
        ("IMAD.MOV.U32 R18, RZ, RZ, R5", False),
        ("LDC R1, c[0x0][0x28]", True),  # what follows are from kernels that ptxas 12.8 made
        ("IMAD.MOV.U32 R18, RZ, RZ, -0x800000", True),
        ("FMUL R18, R50, R59", True),
    ],
)
def test_lost_codes_are_found(before, lost):
    line = "        /*{:04x}*/                   {} ;   /* 0x00000001ff0b723e */\n"
    unpack = "F2FP.F16.E4M3.UNPACK_B R11, R18.H1"
    assert lost_codes(line.format(0x10, before) + line.format(0x20, unpack)) == lost


@pytest.mark.parametrize(
    ("layout", "axis", "scattered"),
    [
        ("lane = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0]], warp = [[2, 0], [4, 0], [16, 0]]", 0, True),  # seen
        ("lane = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0]], warp = [[2, 0], [4, 0], [16, 0]]", 1, True),
        ("lane = [[0, 1], [0, 2], [0, 4], [1, 0], [8, 0]], warp = [[2, 0], [4, 0], [16, 0]]", 0, False),
        ("lane = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], warp = [[1, 0], [2, 0]]", 0, False),
    ],
)
@pytest.mark.parametrize("sliced", [False, True])
def test_reductions_over_lanes_that_are_not_evenly_apart_are_found(layout, axis, scattered, sliced):
    """Also of a slice of such a layout, whose first dimension is gone."""
    if sliced:
        layout = re.sub(r"\[(\d+), (\d+)\]", r"[0, \1, \2]", layout)
    of = "#ttg.slice<{dim = 0, parent = #linear}>" if sliced else "#linear"
    text = (
        f"#linear = #ttg.linear<{{register = [], {layout}, block = []}}>\n"
        f'  %2 = "tt.reduce"(%1) <{{axis = {axis} : i32}}> ({{\n    tt.reduce.return %3 : f32\n'
        f"  }}) : (tensor<16x8xf32, {of}>) -> tensor<8xf32>\n"
    )
    assert scattered_reductions(text) == scattered


@pytest.mark.parametrize("target", TARGETS)
def test_representative_kernels(target):
    assert faults_of(compile_for(target), target) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target):
    assert faults_of(compile_for(target, "--full"), target) == []
