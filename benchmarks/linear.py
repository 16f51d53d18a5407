"""Linear layers of few tokens on a GPU: correctness first, then single layers and whole-model chains.

    python -m benchmarks.linear --shape llama-8b --tokens 1,8,16,64         # the committed configurations
    python -m benchmarks.linear --tune --shape llama-8b --tokens 16 --out DIR

Times are medians of CUDA-graph replays; weights are distinct and larger than the L2. Shares are of the read bandwidth
measured in the same run. The last line is JSON. A failed check ends the run before any timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from benchmarks.builds import refusal
from benchmarks.ceilings import read_bandwidth
from benchmarks.linear_chain import EPS, MODELS, Chain, Configs, Kind, Model
from benchmarks.timing import time_replays
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL
from fusecomp.lowerings.linear.skinny import run_skinny
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig, skinny_config

TUNE_LAYERS = {"llama-8b": 4, "llama-1b": 8, "qwen3-30b-a3b": 16}
RACE_REPLAYS = 50


def default_configs(model: Model, tokens: int) -> Configs:
    target = device_target(0)
    return {
        name: skinny_config(target, n=kind.n, k=kind.k, groups=kind.groups, tokens=tokens, itemsize=2)
        for name, kind in model.kinds.items()
    }


def check_race(chain: Chain, tokens: int, configs: Configs) -> None:
    """Replays of the dependent chain equal one of the ordered chain, bit for bit."""
    x = chain.random(tokens, chain.model.hidden)
    expected = chain.ours(x, configs, pdl=False)().clone()
    run = chain.ours(x, configs, pdl=True)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for replay in range(RACE_REPLAYS):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected), f"{tokens} tokens, replay {replay}: the dependent chain differs: a race"


def measure(chain: Chain, tokens: int, ceiling: float) -> dict:
    """Chains and single layers at one number of tokens."""
    x = chain.random(tokens, chain.model.hidden)
    configs = default_configs(chain.model, tokens)
    for name in chain.model.kinds:
        chain.check(name, tokens, configs[name], pdl=True)
    check_race(chain, tokens, configs)
    row: dict = {"tokens": tokens, "GB": round(chain.bytes() / 1e9, 3)}
    for label, run in (
        ("pdl", chain.ours(x, configs, True)), ("no_pdl", chain.ours(x, configs, False)), ("cublas", chain.peer(x))
    ):  # fmt: skip
        run()
        seconds = time_replays(run)
        row[label] = {"ms": round(seconds * 1e3, 4), "share": round(chain.bytes() / seconds / ceiling, 3)}
    print(
        f"{tokens:4} tokens  chain {row['pdl']['ms']:.3f} ms {row['pdl']['share']:.1%}  without dependent launch "
        f"{row['no_pdl']['ms']:.3f} ms  cuBLAS {row['cublas']['ms']:.3f} ms {row['cublas']['share']:.1%}",
        flush=True,
    )
    row["single"] = {}
    for name, kind in chain.model.kinds.items():
        cells = {}
        for label, config in (("ours", configs[name]), ("cublas", None)):
            run, count = chain.single(name, x, config, pdl=True)
            run()
            seconds = time_replays(run) / count
            cells[label] = {"us": round(seconds * 1e6, 2), "TB_s": round(kind.numel * 2 / seconds / 1e12, 3)}
        row["single"][name] = cells | {"config": asdict(configs[name])}
        print(f"     {name:8} {cells['ours']['us']:8.2f} us {cells['ours']['TB_s']:.2f} TB/s   "
              f"cuBLAS {cells['cublas']['us']:8.2f} us {cells['cublas']['TB_s']:.2f} TB/s", flush=True)  # fmt: skip
    return row


def candidates(kind: Kind, tokens: int) -> Iterator[SkinnyConfig]:
    """Tiles worth a try; for the tile kernel, splits for one to four programs per multiprocessor."""
    if tokens == 1:
        for r, k, w in itertools.product((2, 4, 8, 16), (512, 1024, 2048, 4096, 8192), (2, 4, 8)):
            if 64 <= r * k * 2 // (32 * w) <= 256 and k <= kind.k * 1.2:
                yield SkinnyConfig("vector", 1, r, k, w)
        return
    t = max(8, triton.next_power_of_2(tokens))
    small = [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2), (64, 256, 4, 3)]
    large = [(128, 64, 8, 4), (128, 64, 8, 6), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)]
    tiles = {8: small, 16: [*small, large[2]], 32: [*small[:2], *large[:3]], 64: large, 128: [*large[:1], *large[2:4]]}
    orders = {8: (True,), 128: (False,)}.get(t, (True, False))
    for r, k, w, s in tiles.get(t, []):
        for splits, early in itertools.product(split_counts(kind, r, k), orders):
            yield SkinnyConfig("tile", t, r, k, w, splits, s, early=early)


def split_counts(kind: Kind, r: int, k: int) -> Iterator[int]:
    """Splits that leave each program two tiles of K, and every multiprocessor a program."""
    blocks, tiles = math.ceil(kind.n * kind.groups / r), math.ceil(kind.k / k)
    counts = {max(1, int(132 * per / blocks)) for per in (1, 2, 3, 4)} | {1}
    seen = set()
    for count in sorted(counts):
        actual = math.ceil(tiles / math.ceil(tiles / count)) if count <= tiles // 2 else 0
        if 0 < actual <= 12 and blocks * actual >= 100 and actual not in seen:
            seen.add(actual)
            yield actual


Job = tuple[str, int, SkinnyConfig, bool]  # kind, tokens, configuration, whether tiles divide K


def job(name: str, kind: Kind, tokens: int, config: SkinnyConfig) -> Job:
    """What decides a kernel's code: kinds with the same norm and epilogue share it."""
    return {"lm_head": "qkv", "down": "o"}.get(name, name), tokens, config, kind.k % config.block_k == 0


def _prepare(job: Job) -> str:
    """Compile one configuration into Triton's disk cache, from a process of its own; returns why it cannot."""
    name, tokens, config, even = job
    kind = MODELS["llama-8b"].kinds[name]
    n, k = 256, config.block_k * 2 * config.splits - (0 if even else 16)
    x, out, weight = (
        torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        for shape in ((tokens, k), (tokens, n), (kind.groups * n, k))
    )
    args, strides = ((out,), (n,)) if kind.epilogue is RESIDUAL else ((), ())
    norm, eps = (x[0], EPS) if kind.norm else (None, None)

    def launch() -> None:
        run_skinny(config, x, weight, out, norm, eps, False, kind.epilogue, args, strides, kind.groups, True)
        torch.cuda.synchronize()

    why = refusal(launch)
    return f"{config}: {why}" if why else ""


def prepare(jobs: list[Job]) -> set[Job]:
    """Compile all; returns the jobs that failed."""
    start = time.time()
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("spawn").Pool(min(15, os.cpu_count() or 1, len(jobs))) as pool:
        failures = pool.map(_prepare, jobs, chunksize=4)
    print(f"{len(jobs)} kernels built: {time.time() - start:.0f} s", flush=True)
    for text in [f for f in failures if f][:3]:
        print(f"  not built: {text}", flush=True)
    return {job for job, text in zip(jobs, failures, strict=True) if text}


class Tuner:
    """Coordinate descent over the kinds of layers, timed on the chain, at one number of tokens."""

    def __init__(self, shape: str, chain: Chain, tokens: int) -> None:
        self.shape, self.chain, self.tokens = shape, chain, tokens
        self.x = chain.random(tokens, chain.model.hidden)
        self.configs = default_configs(chain.model, tokens)
        self.kinds = chain.model.kinds
        self.log: dict[str, list[tuple[float, SkinnyConfig]]] = {}

    def job(self, name: str, config: SkinnyConfig) -> Job:
        return job(name, self.kinds[name], self.tokens, config)

    def seconds(self, name: str, config: SkinnyConfig, replays: int) -> float:
        try:
            run = self.chain.ours(self.x, self.configs | {name: config}, True, head=name == "lm_head")
            run()
            return time_replays(run, replays)
        except triton.runtime.errors.OutOfResources:
            return math.inf

    def tune(self, pools: dict[str, list[SkinnyConfig]], budget: float) -> None:
        """Take the best of each pool; the largest layers first, and twice where they depend on each other."""
        start = time.time()
        done: set[str] = set()
        for name in ("gate_up", "down", "qkv", "o", "gate_up", "down", "lm_head"):
            if name not in self.kinds:
                continue
            again = name in done
            pool = [c for _, c in self.log[name][:6]] if again else pools[name]
            done.add(name)
            results = []
            for config in pool:
                if time.time() - start > budget:
                    break
                results.append((self.seconds(name, config, 5), config))
            results.sort(key=lambda r: r[0])
            finals = sorted(((self.seconds(name, c, 21), c) for _, c in results[:4]), key=lambda r: r[0])
            if finals:
                self.log[name] = [*finals, *results[4:]]
                self.configs[name] = finals[0][1]
                rate = self.chain.bytes(name == "lm_head") / finals[0][0] / 1e12
                top = "; ".join(_brief(s, c) for s, c in self.log[name][:5])
                print(f"{self.shape} {self.tokens} {name}: {rate:.3f} TB/s of {len(results)}; {top}", flush=True)

    def entries(self) -> list[dict]:
        """Table entries of what was found, checked."""
        entries = []
        for name, kind in self.kinds.items():
            self.chain.check(name, self.tokens, self.configs[name], True)
            config = {k: v for k, v in asdict(self.configs[name]).items() if k != "source"}
            tried = [_brief(s, c) for s, c in self.log.get(name, [])]
            entries.append(
                {"rows": kind.n * kind.groups, "k": kind.k, "groups": kind.groups, "tokens": self.tokens, "itemsize": 2,
                 "config": config, "shape": self.shape, "kind": name, "tried": tried}
            )  # fmt: skip
        check_race(self.chain, self.tokens, self.configs)
        return entries


def tune(shapes: list[str], tokens: list[int], layers: int | None, budget: float) -> list[dict]:
    """Table entries for every shape and number of tokens."""
    chains = {shape: Chain(MODELS[shape], layers or TUNE_LAYERS[shape]) for shape in shapes}
    tuners = [Tuner(shape, chain, t) for shape, chain in chains.items() for t in tokens]
    pools = [{name: list(candidates(k, tuner.tokens)) for name, k in tuner.kinds.items()} for tuner in tuners]
    failed = prepare([t.job(n, c) for t, pool in zip(tuners, pools, strict=True) for n in pool for c in pool[n]])
    entries = []
    for tuner, pool in zip(tuners, pools, strict=True):
        tuner.tune({n: [c for c in cs if tuner.job(n, c) not in failed] for n, cs in pool.items()}, budget)
        try:
            entries += tuner.entries()
        except AssertionError as error:
            print(f"CHECK FAILED {error}", flush=True)
    return entries


def _brief(seconds: float, c: SkinnyConfig) -> str:
    tile = f"{c.kernel[0]} t{c.block_t} r{c.block_r} k{c.block_k} s{c.splits}"
    return f"{seconds * 1e6:.1f} {tile} w{c.num_warps} st{c.num_stages} e{c.early:d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", help=f"some of {', '.join(MODELS)}, separated by commas")
    parser.add_argument("--tokens", default="1,8,16,64")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tuning per number of tokens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokens = [int(t) for t in args.tokens.split(",")]
    result: dict = {"gpu": torch.cuda.get_device_name()}
    if args.tune:
        result["tuned"] = tune(args.shape.split(","), tokens, args.layers, args.budget)
    else:
        ceiling = read_bandwidth(torch.device("cuda"))
        result["read_TB_s"] = round(ceiling / 1e12, 3)
        for shape in args.shape.split(","):
            print(f"== {shape}: read ceiling {ceiling / 1e12:.2f} TB/s", flush=True)
            chain = Chain(MODELS[shape], args.layers or MODELS[shape].layers)
            result[shape] = [measure(chain, t, ceiling) for t in tokens]
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"linear-{'tune' if args.tune else 'time'}-{args.tokens.replace(',', '-')}.json"
        (args.out / name).write_text(json.dumps(result))
    print(json.dumps({k: v for k, v in result.items() if k != "tuned"}))


if __name__ == "__main__":
    main()
