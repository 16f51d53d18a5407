"""What an assembled kernel takes and whether the assembler broke it, read from its machine code.

ptxas 12.8, where fp8 codes are both packed four to a register and converted back, reads half of the latter from
registers that hold something else, or nothing yet. The kernel compiles, and is wrong. Where ptxas cannot follow the
sums of asynchronous products it waits after each of their instructions, which is slow.

Triton 3.6 reduces over lanes as if those of a dimension were neighbours, or evenly apart. In a layout that it has made
of others, by reshapes and permutations, they need not be: then it adds numbers of other rows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

import triton

# Instructions whose results are no fp8 codes: floating point, constants, and the stack pointer.
NO_CODES = r"F(MUL|ADD|FMA|SEL|MNMX)\b|MUFU|LDC R1,|(IMAD\.)?MOV\S* R\d+, (RZ, RZ, )?(-?0x|c\[)"


def _dump(compiled: Any, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cuda_usage(compiled: Any) -> tuple[int, int, int]:
    """(registers per thread, bytes of local memory per thread, lost codes) of a cubin; spills live in that memory."""
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(compiled, "--dump-resource-usage")))
    ptx = compiled.asm["ptx"]
    both_ways = "e4m3x2.f32" in ptx and "f16x2.e4m3x2" in ptx
    lost = lost_codes(_dump(compiled, "--dump-sass")) if both_ways else 0
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), lost


def waits_for_each_product(compiled: Any) -> bool:
    """Whether a cubin of compute capability 9.0 waits more often for asynchronous products than its PTX does."""
    waits = _dump(compiled, "--dump-sass").count("WARPGROUP.DEPBAR")
    return waits > compiled.asm["ptx"].count("wgmma.wait_group")


def lost_codes(sass: str) -> int:
    """Conversions of fp8 codes, in a disassembly, whose register nothing wrote before, or something that is no code."""
    wrote: dict[int, str] = {}  # register -> the latest instruction, in the order of the code
    lost = 0
    for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", sass):
        if read := re.search(r"E4M3\.UNPACK_B R\d+, R(\d+)", text):
            writer = wrote.get(int(read[1]))
            lost += writer is None or re.match(NO_CODES, writer) is not None
        if written := re.match(r"(?:@!?U?P\d+ )?((\S+) R(\d+)\b.*)", text):
            width = (
                4 if re.search(r"\.(128|4)\b", written[2]) else 2 if re.search(r"\.(64|WIDE|2)\b", written[2]) else 1
            )
            wrote.update(dict.fromkeys(range(int(written[3]), int(written[3]) + width), written[1]))
    return lost


def scattered_reductions(ttgir: str) -> int:
    """Reductions over a dimension whose lanes are not evenly apart, which Triton 3.6 makes wrongly."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = 0
    for match in re.finditer(r'"tt\.reduce".*?axis = (\d+) : i32.*?\}\) : \((tensor<.*?)\) ->', ttgir, re.DOTALL):
        layout = re.search(r", (#.*?)>(?:, tensor|$)", match[2])
        assert layout is not None, match[2]
        found += not _evenly_apart(_lanes(layout[1], named, int(match[1])))
    return found


def _lanes(layout: str, named: dict[str, str], axis: int) -> list[int]:
    """How far each bit of a lane's number goes along a dimension of a linear layout; nothing of any other."""
    while (
        sliced := re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (#.*)\}>", named.get(layout, layout))
    ) is not None:
        axis, layout = axis + (axis >= int(sliced[1])), sliced[2]
    lanes = re.search(r"#ttg\.linear<.*?lane = \[(\[.*?\])\], warp", named.get(layout, layout))
    if lanes is None:
        return []
    return [int(basis.split(",")[axis]) for basis in re.findall(r"\[([^\[\]]*)\]", lanes[1])]


def _evenly_apart(lanes: list[int]) -> bool:
    bits = [bit for bit, along in enumerate(lanes) if along]
    return not bits or bits == list(range(bits[0], bits[-1] + 1))


def hip_usage(amdgcn: str) -> tuple[int, int]:
    """(vector registers, spilled vector and scalar registers) from the assembly's metadata."""

    def read(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", amdgcn))

    return read("vgpr_count"), read("vgpr_spill_count") + read("sgpr_spill_count")
