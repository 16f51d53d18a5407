"""Variants of the experts' launches against the committed ones, one section per number of tokens. Scratch."""

from __future__ import annotations

import argparse
import itertools
import json
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ceilings import measure_ceilings
from benchmarks.moe import SHAPES, Case, make_layers
from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import Tiles, experts_config
from fusecomp.lowerings.experts import launch as launch_module
from fusecomp.lowerings.experts.launch import Router, run_chosen, run_experts
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.linear import lowering as linear_lowering
from fusecomp.lowerings.route.lowering import launch_router_op
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.ops.linear import FULL, Program
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec

SHAPE = SHAPES["qwen3-30b-a3b"]
SPEC = RouteSpec(SOFTMAX, 8, SUM, dtype="bfloat16")
FOUND: dict[str, float] = {}


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
            Router((2 * randn(e, c) / c**0.5).bfloat16(), None, (1 + 0.1 * randn(c)).bfloat16(), None, norm,
                   torch.bfloat16, SPEC)
            for _ in range(launches)
        ]  # fmt: skip

    def apart(self, config, i, x, pdl=True):
        r, layer = self.routers[i], self.layers[i % len(self.layers)]
        y, ids, weights = launch_router_op(x, r.weight, None, r.norm_weight, None, None, r.norm, r.logits, r.spec)
        return run_experts(config, y, ids, weights, layer, x, pdl)

    def chosen(self, config, i, x, pdl=True):
        return run_chosen(config, x, self.routers[i], self.layers[i % len(self.layers)], x, pdl)[1]

    def seconds(self, step, config, replays=9):
        state = {}

        def run(i):
            state["x"] = step(config, i, self.x if i == 0 else state["x"])

        return time_chain(run, self.launches, replays)

    def check(self, step, config):
        """Replays against an ordered launch, bit for bit, and both against the launches apart."""
        want = self.apart(config_of(self.tokens), 0, self.x)
        ordered = step(config, 0, self.x, False)
        torch.cuda.synchronize()
        error = (ordered.float() - want.float()).norm() / want.float().norm()
        graph = torch.cuda.CUDAGraph()
        step(config, 1, step(config, 0, self.x))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            mid = step(config, 0, self.x)
            end = step(config, 1, mid)
        wanted = step(config, 1, ordered, False)
        same = True
        for _ in range(20):
            end.fill_(float("nan"))
            graph.replay()
            same &= torch.equal(end, wanted)
        return f"{error:.1e}{'' if same and error < 2e-2 else ' WRONG'}"


def text(t: Tiles) -> str:
    marks = "T" * t.use_tma + "F" * t.flatten + "H" * t.half + "R" * t.rows_tma
    return f"{t.block_n}x{t.block_d}w{t.num_warps}s{t.num_stages}p{t.per_sm}{marks}"


UP_CHOSEN = [
    *[Tiles(2, 2048, 1, 1, p) for p in (0, 8, 20)],
    *[Tiles(2, 2048, 2, 1, p) for p in (7, 12)],
    *[Tiles(4, 2048, 4, 1, p) for p in (4, 6)],
    *[Tiles(2, 2048, 1, 4, p) for p in (9, 13)],
    *[Tiles(2, 2048, 1, 3, p) for p in (0, 12, 18)],
    Tiles(4, 2048, 1, 1, 0), Tiles(4, 2048, 2, 1, 3),
]
DOWN_CHOSEN = [
    Tiles(4, 256, 4), Tiles(8, 256, 8), Tiles(4, 128, 2), Tiles(4, 128, 4), Tiles(2, 128, 1), Tiles(2, 256, 1),
    Tiles(1, 256, 1), Tiles(2, 256, 2),
]
FEW = [Tiles(n, d, w, s, 0, tma) for n, d, w, s, tma in (
    (64, 128, 4, 6, False), (64, 128, 4, 4, False), (64, 128, 4, 6, True), (64, 128, 4, 4, True),
    (128, 64, 4, 6, True), (128, 128, 4, 3, True), (128, 64, 4, 4, False), (64, 256, 4, 3, True),
)]  # fmt: skip


LOGITS = [(1, 4), (1, 1), (1, 2), (2, 2), (2, 4), (1, 8)]


def ups(tokens):
    return UP_CHOSEN if tokens == 1 else UP_CHOSEN[:6]


def wide(tokens):
    """(name, config) of prefill variants: up alone, then down alone, changed."""
    base = config_of(tokens)
    yield "base", base
    for s, (flatten, half), tma in itertools.product((3, 4), ((False, False), (True, False), (False, True)), (True, False)):
        if tma or s == 3:
            up = replace(base.up, num_stages=s, use_tma=tma, flatten=flatten, half=half)
            yield "up " + text(up), replace(base, up=up)
    for s, (flatten, half), rows in itertools.product((3, 4), ((False, False), (True, False), (False, True)), (True, False)):
        down = replace(base.down, num_stages=s, use_tma=True, flatten=flatten, half=half, rows_tma=rows)
        yield "down " + text(down), replace(base, down=down)
    for w, s, p in ((4, 3, 2), (8, 3, 2), (8, 5, 1)):
        for flatten in (False, True):
            down = Tiles(128, 64, w, s, p, True, flatten, False, True)
            yield "down " + text(down), replace(base, down=down)
            up = Tiles(128, 64, w, s, p, True, flatten)
            yield "up " + text(up), replace(base, up=up)


QKV = Program(1, (), (), "bfloat16", NormSpec(RMS, 1e-6))
O = Program(1, (FULL,), (("add", "a0", "i0"),), "bfloat16")


class Linears:
    """qkv with its norm, o with the residual, of layers with weights of their own."""

    def __init__(self, layers=12):
        def weight(n, k):
            return (torch.randn(n, k, device="cuda") / k**0.5).bfloat16()

        self.layers = [(weight(5120, 2048), weight(2048, 4096), torch.ones(2048, device="cuda").bfloat16()) for _ in range(layers)]

    def layer(self, i, x):
        qkv, o, norm = self.layers[i]
        rows = linear_lowering.launch_linear(x, qkv, norm, None, [], QKV)
        return linear_lowering.launch_linear(rows[:, :4096], o, None, None, [x], O)

    def seconds(self, tokens, limit):
        linear_lowering.SKINNY_LIMIT = limit
        linear_lowering.choose.cache_clear()
        state = {"x": torch.randn(tokens, 2048, device="cuda").bfloat16()}
        first = state["x"]

        def run(i):
            state["x"] = self.layer(i, first if i == 0 else state["x"])

        found = time_chain(run, len(self.layers), 9)
        linear_lowering.SKINNY_LIMIT = 32
        linear_lowering.choose.cache_clear()
        return found


def attempt(name, job):
    try:
        FOUND[name] = job() * 1e6
    except Exception as error:  # noqa: BLE001 - a variant that does not fit the card is a result
        FOUND[name] = float("inf")
        print(f"{name}: {type(error).__name__} {str(error)[:90]}")


def table(title, names):
    print(textwrap.fill(f"{title}: " + "  ".join(f"{n.split('|')[-1].replace(' ', ':')}={FOUND[n]:.2f}" for n in names), 158), flush=True)


def stub() -> None:
    """The script's flow without a card."""
    import contextlib
    import random
    import types

    g = globals()
    g["make_layers"] = lambda shape: []
    g["compile_ahead"] = lambda device: contextlib.nullcontext()
    g["measure_ceilings"] = lambda device: types.SimpleNamespace(to_dict=lambda: {})
    g["device_target"] = lambda i: SM90
    for kind in (Chain, Linears, Case):
        kind.__init__ = lambda self, *a: None
        kind.seconds = lambda self, *a: random.random() / 1e4
        kind.check = lambda self, *a: 1.0
    Chain.apart = Chain.chosen = Case.run = lambda self, *a: None
    Chain.x = None
    torch.cuda.get_device_name = lambda: "none"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--stub", action="store_true")
    args = parser.parse_args()
    if args.stub:
        stub()
    start = time.time()
    torch.manual_seed(0)
    layers = make_layers(SHAPE)
    chains = {t: Chain(layers, t, 24 if t == 1 else 12) for t in (1, 2, 4, 8, 16, 32, 64, 256)}
    few = {t: [replace(config_of(8), method="few", block_t=max(8, t), up=u, down=FEW[0]) for u in FEW]
           + [replace(config_of(8), method="few", block_t=max(8, t), up=FEW[0], down=d) for d in FEW[1:]]
           for t in (8, 16, 32, 64)}  # fmt: skip
    prefill = Case(SHAPE, layers, 8192)
    prefill.launches = 4
    variants = list(wide(8192))
    with compile_ahead(torch.device("cuda", 0)):
        for t in (1, 2, 4):
            c = config_of(t)
            for up in ups(t):
                chains[t].chosen(replace(c, up=up, down=DOWN_CHOSEN[0]), 0, chains[t].x)
            for launch_module.LOGITS in LOGITS[::-1]:
                chains[t].chosen(replace(c, up=UP_CHOSEN[0], down=DOWN_CHOSEN[0]), 0, chains[t].x)
            for down in DOWN_CHOSEN:
                chains[t].chosen(replace(c, up=UP_CHOSEN[0], down=down), 0, chains[t].x)
        for t, chain in chains.items():
            chain.apart(config_of(t), 0, chain.x)
        for t, configs in few.items():
            for c in configs:
                chains[t].apart(c, 0, chains[t].x)
        for _, c in variants:
            prefill.run(c)
    print(f"compiled: {time.time() - start:.0f} s")
    ceilings = measure_ceilings(torch.device("cuda"))
    print(torch.cuda.get_device_name(), ceilings.to_dict())

    for t in (1, 2, 4):
        chain, c = chains[t], config_of(t)
        attempt(f"{t}|apart", lambda: chain.seconds(chain.apart, c))
        for up in ups(t):
            config = replace(c, up=up, down=DOWN_CHOSEN[0])
            attempt(f"{t}|{text(up)}", lambda: chain.seconds(chain.chosen, config))
        best = min(ups(t), key=lambda up: FOUND[f"{t}|{text(up)}"])
        for down in DOWN_CHOSEN[1:]:
            config = replace(c, up=best, down=down)
            attempt(f"{t}|down {text(down)}", lambda: chain.seconds(chain.chosen, config))
        config = replace(c, up=best, down=DOWN_CHOSEN[0])
        for shape in LOGITS:
            launch_module.LOGITS = shape
            attempt(f"{t}|logits {shape[0]}w{shape[1]}", lambda: chain.seconds(chain.chosen, config))
        launch_module.LOGITS = LOGITS[0]
        attempt(f"{t}|apart again", lambda: chain.seconds(chain.apart, c))
        print(f"T={t} best up {text(best)}, error {chain.check(chain.chosen, config)}; apart {chain.check(chain.apart, c)}")
        table(f"T={t} us", [n for n in FOUND if n.startswith(f"{t}|")])
    for t in (8, 16, 32, 64):
        chain, c = chains[t], config_of(t)
        attempt(f"{t}|apart", lambda: chain.seconds(chain.apart, c))
        for config in few[t]:
            up = config.up is not FEW[0]
            attempt(f"{t}|{'up' if up else 'down'} {text(config.up if up else config.down)}", lambda: chain.seconds(chain.apart, config))
        attempt(f"{t}|apart again", lambda: chain.seconds(chain.apart, c))
        print(f"T={t} error {chain.check(chain.apart, few[t][0])} few, {chain.check(chain.apart, c)} apart")
        table(f"T={t} us", [n for n in FOUND if n.startswith(f"{t}|")])
    linears = Linears()
    for t in (32, 48, 64):
        for limit in (16, 64):
            attempt(f"lin{t}|limit{limit}", lambda: linears.seconds(t, limit))
    table("qkv and o, us a layer", [n for n in FOUND if n.startswith("lin")])
    del linears
    attempt("256|apart", lambda: chains[256].seconds(chains[256].apart, config_of(256)))
    table("T=256 us", ["256|apart"])
    for name, config in variants:
        attempt(f"8192|{name}", lambda: prefill.seconds(config, 5))
    names = {f"8192|{name}": config for name, config in variants}
    best = {part: min((FOUND[n], n) for n in names if n.startswith(f"8192|{part}"))[1] for part in ("up", "down")}
    print({part: n for part, n in best.items()})
    for group in (4, 8, 16, 32):
        config = replace(names[best["up"]], down=names[best["down"]].down, group_t=group)
        variants.append((f"both g{group}", config))
        attempt(f"8192|both g{group}", lambda: prefill.seconds(config, 5))
    for tokens in (2048, 16384):
        other = Case(SHAPE, layers, tokens)
        other.launches = 2
        attempt(f"{tokens}|table", lambda: other.seconds(config_of(tokens), 5))
        attempt(f"{tokens}|both", lambda: other.seconds(replace(config, group_t=16), 5))
        table(f"T={tokens} us", [f"{tokens}|table", f"{tokens}|both"])
    attempt("8192|base again", lambda: prefill.seconds(variants[0][1], 5))
    table("T=8192 us", [n for n in FOUND if n.startswith("8192|")])
    for name, config in sorted(variants[1:], key=lambda v: FOUND[f"8192|{v[0]}"])[:6]:
        try:
            print(f"  {name}: error ratio {prefill.check(config):.3f}")
        except SystemExit as error:
            print(f"  {name}: WRONG {str(error)[-90:]}")
    print(f"{time.time() - start:.0f} s")
    (args.out / "moe-round1.json").write_text(json.dumps({"card": torch.cuda.get_device_name(), **ceilings.to_dict(), "us": FOUND}))


if __name__ == "__main__":
    main()
