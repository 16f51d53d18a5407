"""One round of folded int4 linears in chains: what asking the L2 ahead, fewer registers and two-warp programs change.

python -m benchmarks.int4_round [SECONDS]        # the search
python -m benchmarks.int4_round nowait FLAG      # chains whose launches do not wait, timed once FLAG exists
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from benchmarks.ceilings import read_bandwidth
from benchmarks.linear import check_race
from benchmarks.linear_chain import MODELS
from benchmarks.quant_linear import QuantChain
from benchmarks.quant_schemes import LAYERS, committed_configs
from benchmarks.quant_tune import job, prepare, seconds_of
from fusecomp.lowerings.quant.heuristics import QuantConfig

MODEL = MODELS["llama-8b"]
KINDS = ("gate_up", "down", "qkv", "o")
E, L, T, F = True, False, True, False


def made(t, rows, warps, stages, early, sums, parts, splits, ahead, registers=0, apart=False) -> QuantConfig:
    return QuantConfig(
        "folded", 8 if t <= 8 else 16, rows, 256, warps, stages, splits, early, sums, parts=parts, ahead=ahead,
        registers=registers, apart=apart,
    )  # fmt: skip


# ruff: noqa: E501
FEW: dict[str, list[tuple]] = {  # rows, warps, stages, early, sums, parts, splits, ahead, registers
    "gate_up": [
        (64, 4, 4, E, T, 1, 1, 8), (64, 4, 4, E, T, 1, 1, 0, 96), (64, 4, 4, L, T, 1, 1, 0), (64, 4, 4, L, T, 1, 1, 4),
        (64, 4, 4, L, T, 1, 1, 8), (64, 4, 3, L, T, 1, 1, 4), (32, 2, 4, L, T, 1, 1, 0), (32, 2, 4, L, T, 1, 1, 4),
        (32, 2, 4, E, T, 1, 1, 0), (64, 2, 4, L, T, 1, 1, 4), (128, 8, 4, L, T, 1, 1, 4), (16, 4, 3, L, T, 4, 1, 8),
        (64, 4, 4, L, T, 1, 1, 4, 0, T), (64, 4, 4, L, T, 1, 1, 4, 80, T), (64, 4, 4, E, T, 1, 1, 0, 0, T),
        (64, 4, 4, E, T, 1, 1, 8, 0, T), (64, 2, 4, L, T, 1, 1, 4, 0, T), (128, 4, 3, L, T, 1, 1, 4, 0, T),
        (16, 4, 3, L, T, 4, 1, 4, 80, T), (32, 4, 3, L, T, 4, 1, 4, 0, T),
    ],
    "down": [
        (64, 4, 4, L, T, 1, 4, 0), (64, 4, 4, L, T, 1, 4, 4), (64, 4, 4, L, T, 1, 4, 8), (64, 4, 4, L, T, 1, 4, 8, 80),
        (64, 4, 4, L, T, 1, 8, 0), (64, 4, 4, L, T, 1, 8, 8), (16, 8, 3, L, T, 8, 1, 0), (16, 8, 3, L, T, 8, 1, 16),
        (16, 4, 3, L, T, 4, 1, 0), (16, 4, 3, L, T, 4, 1, 16), (16, 4, 3, L, T, 4, 1, 16, 80), (16, 8, 2, L, T, 8, 1, 16),
        (32, 8, 3, L, T, 8, 1, 16), (32, 2, 4, L, T, 1, 4, 8), (32, 2, 4, L, T, 1, 2, 8), (64, 2, 4, L, T, 1, 4, 8),
    ],
    "qkv": [
        (64, 4, 4, L, T, 1, 2, 8), (64, 4, 4, L, T, 1, 3, 8), (64, 4, 4, L, T, 1, 4, 4), (64, 4, 4, E, T, 1, 4, 0),
        (32, 2, 4, L, T, 1, 1, 16), (32, 2, 4, L, T, 1, 2, 8), (16, 4, 3, L, T, 4, 1, 0), (16, 4, 3, L, T, 4, 1, 16),
        (16, 4, 4, E, T, 4, 1, 0), (32, 4, 3, L, T, 4, 1, 16), (16, 8, 2, L, T, 8, 1, 16),
        (64, 4, 4, L, T, 1, 3, 8, 0, T), (64, 4, 4, L, T, 1, 3, 8, 80, T), (64, 4, 4, E, T, 1, 4, 0, 0, T),
        (64, 2, 4, L, T, 1, 2, 8, 0, T), (16, 4, 3, L, T, 4, 1, 16, 80, T), (16, 8, 3, L, T, 8, 1, 16, 0, T),
        (16, 4, 5, L, T, 4, 1, 16, 80, T), (32, 4, 3, L, T, 4, 1, 16, 0, T),
    ],
    "o": [
        (64, 4, 4, L, T, 1, 4, 4), (64, 4, 4, L, T, 1, 8, 2), (64, 4, 4, E, T, 1, 4, 0), (32, 2, 4, L, T, 1, 2, 8),
        (32, 2, 4, L, T, 1, 4, 4), (16, 4, 3, L, T, 4, 1, 0), (16, 4, 3, L, T, 4, 1, 16), (16, 4, 3, L, T, 4, 1, 16, 80),
        (16, 8, 2, L, T, 8, 1, 16), (32, 4, 3, L, T, 4, 1, 0), (32, 4, 3, L, T, 4, 1, 16), (16, 4, 3, E, T, 4, 1, 0),
        (16, 4, 5, L, T, 4, 1, 16, 80), (16, 8, 3, L, T, 8, 1, 16), (64, 2, 4, L, T, 1, 4, 4),
    ],
}  # fmt: skip
MORE: dict[str, list[tuple]] = {
    "gate_up": [
        (64, 4, 3, L, F, 1, 1, 4), (64, 4, 4, L, F, 1, 1, 4), (64, 4, 4, L, T, 1, 1, 4), (32, 2, 4, L, T, 1, 1, 0),
        (32, 2, 4, L, T, 1, 1, 4), (32, 2, 4, L, F, 1, 1, 4), (32, 2, 3, L, T, 1, 1, 4), (64, 2, 4, L, T, 1, 1, 0),
        (64, 2, 4, L, T, 1, 1, 4), (64, 2, 3, L, T, 1, 1, 4),
    ],
    "down": [
        (64, 4, 4, L, F, 1, 8, 8), (64, 4, 4, L, F, 1, 4, 8), (32, 2, 4, L, T, 1, 4, 8), (32, 2, 4, L, T, 1, 2, 8),
        (32, 2, 4, L, T, 1, 8, 8), (64, 2, 4, L, T, 1, 4, 8), (64, 2, 4, L, T, 1, 8, 8), (64, 2, 4, L, T, 1, 8, 0),
        (16, 8, 2, L, T, 8, 1, 16), (16, 4, 3, L, T, 4, 1, 16),
    ],
    "qkv": [
        (64, 4, 3, L, F, 1, 3, 8), (64, 4, 3, L, F, 1, 4, 4), (32, 2, 4, L, T, 1, 1, 16), (32, 2, 4, L, T, 1, 2, 8),
        (32, 2, 4, L, T, 1, 3, 8), (64, 2, 4, L, T, 1, 2, 8), (64, 2, 4, L, T, 1, 3, 8), (64, 2, 4, L, T, 1, 4, 4),
        (16, 4, 3, L, T, 4, 1, 16),
    ],
    "o": [
        (64, 4, 3, L, F, 1, 4, 4), (32, 2, 4, L, T, 1, 2, 8), (32, 2, 4, L, T, 1, 4, 4), (64, 2, 4, L, T, 1, 4, 4),
        (64, 2, 4, L, T, 1, 2, 8), (64, 2, 4, L, T, 1, 8, 2), (16, 4, 3, L, T, 4, 1, 16), (16, 4, 3, L, T, 4, 1, 0),
        (16, 8, 2, L, T, 8, 1, 16),
    ],
}  # fmt: skip


def pool(kind: str, t: int) -> list[QuantConfig]:
    return [made(t, *fields) for fields in (FEW if t <= 8 else MORE)[kind]]


def short(c: QuantConfig) -> str:
    return (
        f"r{c.block_r}w{c.num_warps}p{c.parts}st{c.num_stages}s{c.splits}{'E' if c.early else 'L'}{'s' * c.sums}"
        f"a{c.ahead}" + (f"R{c.registers}" if c.registers else "") + "n" * c.apart
    )


@triton.jit
def _link(x, out, WAIT: tl.constexpr):
    gdc_launch_dependents()
    if WAIT:
        gdc_wait()
    at = tl.arange(0, 128)
    tl.store(out + at + tl.program_id(0) * 128, tl.load(x + at + tl.program_id(0) * 128) + 1.0)


def links() -> None:
    """What a chain of launches that do nothing takes."""
    a, b = (torch.zeros(2048 * 128, device="cuda") for _ in range(2))
    cells = []
    for programs, registers in ((132, 32), (264, 128), (512, 128), (512, 32)):

        def run(programs: int = programs, registers: int = registers) -> None:
            for i in range(32):
                x, out = (a, b) if i % 2 else (b, a)
                _link[(programs,)](x, out, True, num_warps=4, launch_pdl=True, maxnreg=registers)

        cells.append(f"{programs} programs {seconds_of(run, 15) / 32 * 1e6:.2f} us")
    print("links: " + ", ".join(cells), flush=True)


def search(chain: QuantChain, scheme: str, t: int, failed: set, ceiling: float, until: float) -> dict[str, Any]:
    """Coordinate descent in the whole chain."""
    configs = committed_configs(scheme, MODEL, t)
    x = chain.random(t, MODEL.hidden)

    def seconds(changes: dict[str, Any]) -> float:
        return seconds_of(chain.ours(x, configs | changes, True, head=False), 11)

    start = best = seconds({})
    tables = {}
    for round_ in range(2):
        for kind in KINDS:
            if time.time() > until:
                break
            tried = [c for c in pool(kind, t) if job(scheme, kind, t, c) not in failed]
            if round_:
                tried = [c for _, c in tables[kind][:4]]
            was, before = configs[kind], best
            found = sorted(((seconds({kind: c}), c) for c in tried), key=lambda pair: pair[0])
            tables[kind] = found
            if found and found[0][0] < best:
                best, configs[kind] = found[0][0], found[0][1]
            top = "; ".join(f"{(s - before) * 1e6 / LAYERS:+.2f} {short(c)}" for s, c in found[: 4 if round_ else 15])
            print(f"{t:2} {kind} was {short(was)}, us a layer: {top}", flush=True)
    size = chain.bytes(False)
    print(f"{scheme} {t}: {start * 1e3:.4f} -> {best * 1e3:.4f} ms, {size / best / ceiling:.1%}", flush=True)
    return configs


def finish(chain: QuantChain, scheme: str, t: int, configs: dict[str, Any], ceiling: float) -> None:
    """Checks of what was found, and single layers."""
    x, cells = chain.random(t, MODEL.hidden), []
    old = committed_configs(scheme, MODEL, t)
    for kind in KINDS:
        try:
            ratio = chain.check(kind, t, configs[kind], True)
        except AssertionError as error:
            ratio = float("nan")
            print(f"CHECK FAILED {error}"[:300], flush=True)
        times = []
        for c in (old[kind], configs[kind]):
            run, count = chain.single(kind, x, c, True)
            times.append(seconds_of(run, 15) / count * 1e6)
        cells.append(f"{kind} {short(configs[kind])} {times[0]:.1f} -> {times[1]:.1f} us err {ratio:.2f}")
    print(f"  {scheme} {t} alone: " + "; ".join(cells), flush=True)
    try:
        check_race(chain, t, configs)
    except AssertionError as error:
        print(f"CHECK FAILED {error}"[:300], flush=True)


def without_waits(flag: Path) -> None:
    """Chains of wrong results, whose launches all begin at once."""
    from fusecomp.lowerings.linear import norm
    from fusecomp.lowerings.quant import folded, folded_parts

    @triton.jit
    def no_wait():
        pass

    folded.gdc_wait = folded_parts.gdc_wait = no_wait
    if hasattr(norm, "gdc_wait"):
        norm.gdc_wait = no_wait
    chain = QuantChain(MODEL, LAYERS, "int4")
    runs = {}
    for t in (1, 8, 16):
        committed = committed_configs("int4", MODEL, t)
        late = dict(committed)
        for kind in KINDS:
            late[kind] = pool(kind, t)[{"gate_up": 2, "down": 0, "qkv": 0, "o": 0}[kind] if t <= 8 else 0]
        x = chain.random(t, MODEL.hidden)
        for name, configs in (("committed", committed), ("late", late)):
            runs[t, name] = chain.ours(x, configs, True, head=False)
            runs[t, name]()
    torch.cuda.synchronize()
    limit = time.time() + 90
    while not flag.exists() and time.time() < limit:
        time.sleep(0.2)
    text = ", ".join(f"{t} {name} {seconds_of(run, 15) * 1e3:.4f} ms" for (t, name), run in runs.items())
    print(f"int4 without waits: {text}", flush=True)


def main() -> None:
    start = time.time()
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    schemes, tokens = ("int4-zero", "int4"), (1, 8, 16)
    jobs = [
        job("int4-zero", kind, t, c)
        for t in tokens for kind in KINDS for c in (*pool(kind, t), committed_configs("int4-zero", MODEL, t)[kind])
    ]  # fmt: skip
    failed = prepare(jobs)
    ceiling = read_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()} {ceiling / 1e12:.2f} TB/s, {time.time() - start:.0f} s", flush=True)
    links()
    found = {}
    chain = QuantChain(MODEL, LAYERS, schemes[0])
    for i, t in enumerate(tokens):
        left = start + seconds - 12 - time.time()
        found[t] = search(chain, schemes[0], t, failed, ceiling, time.time() + left / (len(tokens) - i))
    print(f"searched, {time.time() - start:.0f} s", flush=True)
    for t in tokens:
        finish(chain, schemes[0], t, found[t], ceiling)
    print(json.dumps({t: {k: short(c) for k, c in cs.items() if k in KINDS} for t, cs in found.items()}), flush=True)
    del chain
    chain = QuantChain(MODEL, LAYERS, schemes[1])
    for t in tokens:
        if time.time() - start > seconds:
            break
        x = chain.random(t, MODEL.hidden)
        times = [
            seconds_of(chain.ours(x, c, True, head=False), 15)
            for c in (committed_configs(schemes[1], MODEL, t), found[t])
        ]
        text = " -> ".join(f"{s * 1e3:.4f} ms {chain.bytes(False) / s / ceiling:.1%}" for s in times)
        print(f"int4 {t}: {text}, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["nowait"]:
        without_waits(Path(sys.argv[2]))
    else:
        main()
