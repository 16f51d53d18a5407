"""Scratch: variants of the experts' launches, in child processes that compile side by side and time in turn."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.moe import SHAPES, Case, make_layers
from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts import routed
from fusecomp.lowerings.experts.heuristics import Tiles, experts_config
from fusecomp.lowerings.experts.launch import run_experts
from fusecomp.lowerings.experts.routed import Router, run_chosen
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.route.lowering import launch_router_op
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec

SHAPE = SHAPES["qwen3-30b-a3b"]
SPEC = RouteSpec(SOFTMAX, 8, SUM, dtype="bfloat16")
LOCK = "/tmp/moe-timing.lock"


def config_of(tokens):
    return experts_config(device_target(0), itemsize=2, **SHAPE.keys(tokens))


class Chain:
    """Router with its norm, experts, residual: each launch reads what the one before wrote."""

    def __init__(self, layers, tokens, launches):
        g = torch.Generator(device="cuda").manual_seed(tokens)

        def randn(*shape):
            return torch.randn(shape, generator=g, device="cuda")

        self.layers, self.tokens, self.launches = layers, tokens, launches
        c, e = SHAPE.hidden, SHAPE.experts
        self.x = randn(tokens, c).bfloat16()
        norm = NormSpec(RMS, 1e-6)
        self.routers = [
            Router((2 * randn(e, c) / c**0.5).bfloat16(), None, (1 + 0.1 * randn(c)).bfloat16(), None, None, norm,
                   torch.bfloat16, SPEC)
            for _ in range(launches)
        ]  # fmt: skip

    def apart(self, config, i, x, pdl=True):
        r, layer = self.routers[i], self.layers[i % len(self.layers)]
        y, ids, weights = launch_router_op(x, r.weight, None, r.norm_weight, None, None, r.norm, r.logits, r.spec)
        return run_experts(config, y, ids, weights, layer, x, pdl)

    def chosen(self, config, i, x, pdl=True):
        return run_chosen(config, x, self.routers[i], self.layers[i % len(self.layers)], x, pdl)[1]

    def seconds(self, step, config, replays=11):
        state = {}

        def run(i):
            state["x"] = step(config, i, self.x if i == 0 else state["x"])

        return time_chain(run, self.launches, replays)

    def check(self, step, config):
        """Replays against an ordered launch, bit for bit, and both against the launches apart."""
        want = self.apart(config_of(self.tokens), 0, self.x)
        ordered = step(config, 0, self.x, False)
        error = (ordered.float() - want.float()).norm() / (want.float() - self.x.float()).norm()
        wanted = step(config, 1, ordered, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            end = step(config, 1, step(config, 0, self.x))
        same = True
        for _ in range(20):
            end.fill_(float("nan"))
            graph.replay()
            same &= torch.equal(end, wanted)
        return f"{error:.1e}{'' if same and error < 2e-2 else ' WRONG'}"


def text(t: Tiles) -> str:
    marks = "T" * t.use_tma + "F" * t.flatten + "H" * t.half + "R" * t.rows_tma
    return f"{t.block_n}x{t.block_d}w{t.num_warps}s{t.num_stages}p{t.per_sm}{marks}"


def variants(section):
    """(name, config) of prefill variants: up alone, then down alone, changed."""
    base = config_of(8192)
    yield "base", base
    if section == "safe":
        up, down = base.up, base.down
        for group in (4, 8, 32):
            yield f"g{group}", replace(base, group_t=group)
        for s, tma, half in ((3, True, False), (4, True, False), (3, False, True), (3, True, True), (4, True, True)):
            tiles = replace(up, num_stages=s, use_tma=tma, half=half)
            yield "up:" + text(tiles), replace(base, up=tiles)
        for s, half, rows in itertools.product((3, 4), (False, True), (False, True)):
            tiles = replace(down, num_stages=s, half=half, rows_tma=rows)
            if tiles != down:
                yield "down:" + text(tiles), replace(base, down=tiles)
        both = replace(base, up=replace(up, half=True), down=replace(down, half=True, rows_tma=True))
        yield "both:H", both
        yield "both:H,g8", replace(both, group_t=8)
        yield "down:128x64w4s3p2TR", replace(base, down=Tiles(128, 64, 4, 3, 2, True, False, False, True))
    else:
        flat_ups = [replace(base.up, num_stages=s, use_tma=tma, flatten=True) for s, tma in ((3, True), (4, True), (3, False))]
        flat_downs = [replace(base.down, num_stages=s, rows_tma=r, flatten=True) for s, r in ((3, True), (4, True), (4, False))]
        for tiles in flat_downs:
            yield "down:" + text(tiles), replace(base, down=tiles)
        for tiles in flat_ups:
            yield "up:" + text(tiles), replace(base, up=tiles)
        yield "both:F", replace(base, up=flat_ups[1], down=flat_downs[1])
        yield "both:F,g8", replace(base, up=flat_ups[1], down=flat_downs[1], group_t=8)
        two = Tiles(128, 64, 4, 3, 2, True, True, False, True)
        yield "down:" + text(two), replace(base, down=two)


def table(title, found):
    print(textwrap.fill(f"{title}: " + "  ".join(f"{n}={v * 1e6:.1f}" for n, v in found.items()), 158), flush=True)


def prefill(section, lock):
    layers = make_layers(SHAPE)
    case = Case(SHAPE, layers, 8192)
    case.launches = 4
    pool = list(variants(section))
    with compile_ahead(torch.device("cuda", 0)):
        for _, config in pool:
            case.run(config)
    with lock():
        if section == "safe":
            print(torch.cuda.get_device_name(), measure_ceilings(torch.device("cuda")).to_dict(), flush=True)
        found, wrong = {}, []
        try:
            for name, config in pool:
                try:
                    case.check(config)
                except SystemExit as error:
                    wrong.append(f"{name} WRONG {str(error)[-60:]}")
                    continue
                found[name] = case.seconds(config, 7)
            found["base again"] = case.seconds(pool[0][1], 7)
        finally:
            table(f"T=8192 {section} us", found)
            print("\n".join(wrong), flush=True)


def few(_, lock):
    layers = make_layers(SHAPE)
    chains = {t: Chain(layers, t, 24) for t in (1, 2)}
    downs = [Tiles(4, 256, 4), Tiles(2, 128, 1), Tiles(4, 128, 2), Tiles(8, 128, 4), Tiles(2, 256, 2)]
    ups = [Tiles(2, 2048, 1), Tiles(4, 2048, 2)]
    warps = (4, 1, 2, 8)
    configs = [replace(config_of(1), up=u, down=d) for u, d in [*[(ups[0], d) for d in downs], *[(u, downs[0]) for u in ups[1:]]]]
    with compile_ahead(torch.device("cuda", 0)):
        for t, chain in chains.items():
            chain.apart(config_of(t), 0, chain.x)
            for c in configs:
                chain.chosen(c, 0, chain.x)
        for w in warps[1:]:
            routed.logits_warps = lambda columns, w=w: w
            chains[1].chosen(configs[0], 0, chains[1].x)
    with lock():
        for t, chain in chains.items():
            routed.logits_warps = lambda columns: 4
            found = {"apart": chain.seconds(chain.apart, config_of(t))}
            for c in configs:
                found[f"{text(c.up)}/{text(c.down)}"] = chain.seconds(chain.chosen, c)
            for w in warps[1:]:
                routed.logits_warps = lambda columns, w=w: w
                found[f"logits w{w}"] = chain.seconds(chain.chosen, configs[0])
            found["apart again"] = chain.seconds(chain.apart, config_of(t))
            table(f"T={t} us", found)
            routed.logits_warps = lambda columns: 4
            print(f"T={t} error {chain.check(chain.chosen, configs[0])} chosen, {chain.check(chain.apart, config_of(t))} apart", flush=True)


class Lock:
    def __enter__(self):
        self.file = open(LOCK, "w")  # noqa: SIM115
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


SECTIONS = {"few": few, "safe": prefill, "flat": prefill}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", nargs="?", choices=SECTIONS)
    args = parser.parse_args()
    if args.section:
        torch.manual_seed(0)
        SECTIONS[args.section](args.section, Lock)
        return
    start = time.time()
    for section in SECTIONS:
        command = [sys.executable, "-m", "benchmarks.moe_round", section]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for section, child in zip(SECTIONS, children, strict=True):
        try:
            out, _ = child.communicate(timeout=max(1, 57 - (time.time() - start)))
        except subprocess.TimeoutExpired:
            child.kill()
            out = (child.communicate()[0] or "") + "TIMED OUT"
        lines = [line for line in out.splitlines() if "did not compile" not in line]
        print(f"--- {section} {time.time() - start:.0f} s", *lines[-18:], sep="\n", flush=True)


children: list[subprocess.Popen] = []

if __name__ == "__main__":
    main()
