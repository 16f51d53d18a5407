"""Ahead-of-time compilation of every kernel for GPUs that are not there: shared memory, registers and spills.

    python -m fusecomp.lowerings.aot --target sm_90 [--full]

compiles the launches below with the configurations that the heuristics would choose on that target, and prints one
JSON object per kernel. It needs no GPU: Triton's compiler takes the target as an argument.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusecomp.lowerings.machine_code import cuda_usage, hip_usage, scattered_reductions
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import Target

TARGETS: dict[str, Target] = {
    "sm_80": heuristics.SM80,
    "sm_90": heuristics.SM90,
    "sm_100": heuristics.SM100,
    "gfx942": heuristics.GFX942,
}
TUNED = "sm_90"  # where spills count
MOST, MOST_ELSEWHERE = 3, 1  # cases of a kernel that CI compiles for it, and for each other target


@dataclass(frozen=True)
class Specialization:
    """One kernel with everything its compilation depends on.

    Args:
        pointers: element type of each pointer argument ("bf16", "i32", ...), a descriptor type, or a tuple of types.
        scalars: type of each scalar argument, or a tuple of types.
        aligned: scalars that are multiples of 16, besides strides.
        max_registers: of a thread; the assembler's choice by default.
        constants: value of each constexpr argument; `None` for an absent tensor.
    """

    name: str
    kernel: Any
    pointers: dict[str, Any]
    scalars: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    max_registers: int | None = None


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; `spills` counts bytes on sm_*, registers on gfx*, `lost_codes` is a bug
    of the assembler, `scattered` counts reductions that Triton 3.6 makes wrongly: see `machine_code.py`."""

    name: str
    target: str
    shared_bytes: int
    shared_limit: int
    registers: int
    spills: int
    lost_codes: int = 0
    scattered: int = 0
    config: dict[str, Any] = field(default_factory=dict)


def compile_one(spec: Specialization, target_name: str) -> tuple[Resources, Any]:
    """Compile one specialization; returns its resources and Triton's compiled kernel."""
    target = TARGETS[target_name]
    signature: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list] = {}
    unaligned = {param.name for param in spec.kernel.params if param.do_not_specialize_on_alignment}
    for index, name in enumerate(spec.kernel.arg_names):
        if name in spec.constants:
            signature[name] = "constexpr"
        elif isinstance(kinds := spec.pointers.get(name, spec.scalars.get(name)), tuple):
            signature[name] = tuple(f"*{kind}" if name in spec.pointers else kind for kind in kinds)
            attrs |= {(index, i): [["tt.divisibility", 16]] for i in range(len(kinds))}
        elif name in spec.pointers:
            kind = spec.pointers[name]
            signature[name] = kind if kind.startswith("tensordesc") else f"*{kind}"
            if not kind.startswith("tensordesc") and name not in unaligned:
                attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = spec.scalars[name]
            if name in spec.aligned or (name.startswith("stride_") and name != "stride_table"):
                attrs[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(spec.kernel, signature, spec.constants, attrs)
    options: dict[str, Any] = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.max_registers:
        options["maxnreg"] = spec.max_registers
    if spec.constants.get("USE_PDL"):
        options["launch_pdl"] = True
    gpu = GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    compiled = triton.compile(source, target=gpu, options=options)
    if target.backend == "cuda":
        registers, spills, lost = cuda_usage(compiled)
    else:
        (registers, spills), lost = hip_usage(compiled.asm["amdgcn"]), 0
    config = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    config |= {key: value for key, value in spec.constants.items() if key.startswith("BLOCK")}
    shared = compiled.metadata.shared
    scattered = scattered_reductions(compiled.asm["ttgir"])
    sizes = (shared, target.smem_bytes, registers, spills)
    return Resources(spec.name, target_name, *sizes, lost, scattered, config), compiled


def compile_all(target_name: str, *, full: bool = False) -> Iterator[Resources]:
    """Resources of every registered kernel on "sm_80", "sm_90", "sm_100" or "gfx942", each case once.

    Args:
        full: every case; otherwise those of CI, and of each kernel at most so many, the first and the last among them.
    """
    from fusecomp.lowerings.experts.experts_aot import experts_specializations
    from fusecomp.lowerings.experts.listed_aot import listed_specializations
    from fusecomp.lowerings.experts.routed_aot import routed_specializations
    from fusecomp.lowerings.feed_aot import specializations as feed_specializations
    from fusecomp.lowerings.invariant_aot import invariant_specializations
    from fusecomp.lowerings.linear.epilogue_aot import specializations as epilogue_specializations
    from fusecomp.lowerings.linear.large_aot import specializations as large_specializations
    from fusecomp.lowerings.linear.skinny_aot import skinny_specializations
    from fusecomp.lowerings.paged_attention.attention_aot import CASES, specializations
    from fusecomp.lowerings.quant.quant_aot import quant_specializations
    from fusecomp.lowerings.quant.scaled_aot import scaled_specializations
    from fusecomp.lowerings.route.route_aot import specializations as route_specializations
    from fusecomp.lowerings.sampling.greedy_aot import specializations as greedy_specializations

    target = TARGETS[target_name]
    attention = (spec for case in CASES[full] for spec in specializations(case, target))
    linear = itertools.chain(large_specializations(target), skinny_specializations(target, full=full))
    others = itertools.chain(
        epilogue_specializations(target),
        greedy_specializations(target),
        route_specializations(target),
        feed_specializations(target),
    )
    experts = itertools.chain(
        experts_specializations(target, full=full), routed_specializations(target), listed_specializations(target)
    )
    quantized = itertools.chain(quant_specializations(target, full=full), scaled_specializations(target, full=full))
    invariant = invariant_specializations(target, full=full)
    every = itertools.chain(attention, linear, others, experts, quantized, invariant)
    by_kernel: dict[Any, list[Specialization]] = {}
    for spec in {repr(replace(spec, name="")): spec for spec in every}.values():
        by_kernel.setdefault(spec.kernel, []).append(spec)
    most = MOST if target_name == TUNED else MOST_ELSEWHERE
    for cases in by_kernel.values():
        kept = cases
        if not full and len(cases) > most:
            kept = [cases[(i + 1) * (len(cases) - 1) // most] for i in range(most)]  # evenly, the last among them
        for spec in kept:
            yield compile_one(spec, target_name)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, choices=sorted(TARGETS))
    parser.add_argument("--full", action="store_true", help="every registered case, not the subset of CI")
    args = parser.parse_args()
    for resources in compile_all(args.target, full=args.full):
        print(json.dumps(asdict(resources)), flush=True)


if __name__ == "__main__":
    main()
