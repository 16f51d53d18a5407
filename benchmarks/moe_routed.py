"""Router and experts of codes at very few tokens on a GPU: launched apart, and in three launches that choose inside.

    python -m benchmarks.moe_routed --scheme fp8 int4                    # the committed entries
    python -m benchmarks.moe_routed --scheme fp8 --tune --out DIR        # sweep, write DIR/<gpu>_codes.json

A layer of Qwen3-30B-A3B with its norm and residual. Each way is checked first: one layer against fp32, and replays of
the chain under dependent launch against the first one. Then it is timed: a chain of layers in one CUDA graph, each fed
by the one before, whose touched weights are several times the L2. Times are of one layer, medians of replays; shares
are of the read bandwidth measured in the same run, by the weights of the touched experts and of the router. A table
gets entries from one token on, up to the first number of tokens at which three launches are no faster. The last line
is JSON. A failed check ends the run.

Legend: T tokens, C hidden size, E experts, K chosen per token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.builds import refusal
from benchmarks.ceilings import read_bandwidth
from benchmarks.moe import CONTRACT, DTYPE, KEYS, SHAPES, codes_name, short, table_text
from benchmarks.moe_schemes import SCHEMES, make_layer
from benchmarks.timing import time_replays
from fusecomp.lowerings import register
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.quant_heuristics import load_codes_table, quant_experts_config, routed_codes_config
from fusecomp.lowerings.experts.routed import run_chosen
from fusecomp.lowerings.experts.router import Router
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.ops import OPS
from fusecomp.ops.experts import codes_shape
from fusecomp.ops.norm import RMS, NormSpec
from fusecomp.ops.routed_quant_experts import routed_quant_experts_reference
from fusecomp.ops.router import SOFTMAX, SUM, RouteSpec

SHAPE = SHAPES["qwen3-30b-a3b"]
TOKENS = (1, 2, 4, 8)
TOUCHED = 200e6  # bytes of weights that a chain reads at least, four times an H200's L2
NORM = NormSpec(RMS, 1e-6).to_text()
ROUTE = RouteSpec(SOFTMAX, SHAPE.top_k, SUM, dtype="bfloat16")
RACE_REPLAYS = 20
FINALS, ROUNDS = 3, 5
FASTER = 0.99  # of the time of launches apart, below which an entry is worth having

# Rows and columns of a weight tile, warps; as many codes a thread as `fit_registers` leaves, or fewer.
UP = (
    (2, 1024, 1), (4, 512, 1), (8, 256, 1), (2, 512, 1), (2, 2048, 2), (4, 1024, 2), (8, 512, 2), (2, 1024, 2),
    (4, 512, 2), (4, 2048, 4), (8, 1024, 4), (16, 512, 4), (4, 1024, 4), (8, 512, 4), (16, 1024, 8),
)  # fmt: skip
DOWN = (
    (1, 256, 1), (2, 128, 1), (1, 512, 2), (2, 256, 2), (4, 128, 2), (1, 1024, 4), (2, 512, 4),
    (4, 256, 4), (8, 128, 4), (1, 512, 4), (2, 256, 4), (2, 1024, 8), (4, 512, 8), (8, 256, 8), (16, 128, 8),
    (4, 256, 8),
)  # fmt: skip

Layer = Callable[[int, Tensor], Tensor]  # (which layer, its hidden state [T, C]) -> the next one's


class Chain:
    """Distinct layers of a scheme, and the ways to run one."""

    def __init__(self, scheme: str) -> None:
        C, E, self.scheme = SHAPE.hidden, SHAPE.experts, SCHEMES[scheme]
        self.expert_bytes = SHAPE.expert_bytes(scheme)
        self.count = math.ceil(TOUCHED / (SHAPE.top_k * self.expert_bytes))
        self.layers = [make_layer(self.scheme, E, C, SHAPE.width) for _ in range(self.count)]
        eye, ones = torch.eye(E, C, dtype=DTYPE, device="cuda"), torch.ones(E, dtype=DTYPE, device="cuda")
        # A column of the hidden state speaks for an expert: which are chosen is the same in any precision.
        self.gates = [
            (eye[torch.randperm(E)].contiguous(), None, torch.cat([ones, 1 + 0.2 * self._randn(C - E)]), None, None)
            for _ in range(self.count)
        ]
        self.shape = codes_shape(self.scheme.spec, self.scheme.spec, (E, SHAPE.top_k, C, SHAPE.width), DTYPE.itemsize)
        self.use_pdl = device_target(0).has_pdl

    @staticmethod
    def _randn(*size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device="cuda")

    def input(self, tokens: int) -> Tensor:
        """[T, C]; logits lie apart by more than any rounding."""
        x = self._randn(tokens, SHAPE.hidden)
        steps = torch.stack([torch.randperm(SHAPE.experts) for _ in range(tokens)]) / 16 - 4
        x[:, : SHAPE.experts] = steps.to(x)
        return x

    def experts(self, i: int, dtype: torch.dtype = DTYPE) -> tuple:
        """The arguments of layer i's experts, in their order, without the residual."""
        layer, name = self.layers[i], str(dtype).removeprefix("torch.")
        up, down = layer.up_codes, layer.down_codes
        assert up is not None and down is not None
        specs = [replace(codes.spec, dtype=name).to_text() for codes in (up, down)]
        parts = (layer.up, up.scale, up.zero, None, layer.down, down.scale, down.zero, None)
        return *parts, "silu", True, False, False, *specs

    def apart(self, i: int, x: Tensor) -> Tensor:
        """The launches of the router, then those of the experts."""
        y, ids, weights = OPS.router(x, *self.gates[i], NORM, "bfloat16", ROUTE.to_text())
        return OPS.quant_experts(y, ids, weights, *self.experts(i), x)

    def inside(self, config: ExpertsConfig) -> Layer:
        """Three launches."""
        routers = [Router.of(*gate, NORM, "bfloat16", ROUTE.to_text()) for gate in self.gates]
        return lambda i, x: run_chosen(config, x, routers[i], self.layers[i], x, self.use_pdl)[1]

    def run(self, layer: Layer, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = layer(i, x)
        return x

    def bytes(self, tokens: int) -> float:
        """Of one layer: its router, and the experts that the tokens touch."""
        x, counts = self.input(tokens), []
        for i in range(self.count):
            counts.append(len(OPS.router(x, *self.gates[i], NORM, "bfloat16", ROUTE.to_text())[1].unique()))
            x = self.apart(i, x)
        return statistics.fmean(counts) * self.expert_bytes + self.gates[0][0].nbytes

    def check(self, layer: Layer, tokens: int, what: str) -> float:
        """Error of the first layer over that of the reference in bf16, both against fp32.

        Raises:
            SystemExit: it is above the contract, or a replay of the chain differs from the first.
        """
        x, (router, *rest) = self.input(tokens), self.gates[0]
        plain = routed_quant_experts_reference(
            x, router, *rest, NORM, "bfloat16", ROUTE.to_text(), *self.experts(0), x
        )[1]  # fmt: skip
        wide = [t if t is None else t.float() for t in (x, router, *rest)]
        route = replace(ROUTE, dtype="float32").to_text()
        exact = routed_quant_experts_reference(
            *wide, NORM, "float32", route, *self.experts(0, torch.float32), wide[0]
        )[1]  # fmt: skip
        error, allowed = ((out.float() - exact).norm().item() for out in (layer(0, x), plain))
        if not error <= CONTRACT * allowed:
            raise SystemExit(f"{what}: error {error:.3g}, unfused {allowed:.3g}")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.run(layer, x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = self.run(layer, x)
        graph.replay()
        expected = found.clone()
        for _ in range(RACE_REPLAYS):
            found.fill_(float("nan"))
            graph.replay()
            if not torch.equal(found, expected):
                raise SystemExit(f"{what}: replays differ")
        return error / allowed

    def seconds(self, layer: Layer, tokens: int, replays: int = 15) -> float:
        """Of one layer."""
        x = self.input(tokens)
        self.run(layer, x)
        return time_replays(lambda: self.run(layer, x), replays) / self.count

    def start(self, tokens: int) -> ExpertsConfig:
        """Where a sweep begins: as the experts run apart, if those are the vector kernels."""
        config = quant_experts_config(device_target(0), self.shape, tokens)
        return config if config.method == "vector" else ExpertsConfig("vector", Tiles(*UP[0]), Tiles(*DOWN[0]))


def build(chain: Chain, counts: list[int], sweep: bool) -> None:
    """Compile what will be launched, in threads."""
    first = ExpertsConfig("vector", Tiles(*UP[0]), Tiles(*DOWN[0]))
    pools = (("up", UP), ("down", DOWN)) if sweep else ()
    configs = [replace(first, **{name: Tiles(*tiles)}) for name, pool in pools for tiles in pool]
    with compile_ahead(torch.device("cuda")):  # what does not compile is logged, and met again when it is timed
        for tokens in counts:
            chain.apart(0, chain.input(tokens))
            config = chain.start(tokens) if sweep else routed_codes_config(device_target(0), chain.shape, tokens)
            configs += [config] if config else []
        for config in configs:
            chain.inside(config)(0, chain.input(1))


def tune(chain: Chain, tokens: int) -> ExpertsConfig:
    """The fastest tiles of the up projection, then of the down projection with those; checked."""
    best, log = chain.start(tokens), []
    for name, pool in (("up", UP), ("down", DOWN)):
        tried = []
        for config in [best, *(replace(best, **{name: Tiles(*tiles)}) for tiles in pool)]:
            layer = chain.inside(config)
            if why := refusal(lambda layer=layer: chain.run(layer, chain.input(tokens))):
                print(f"  not run: {short(config)}: {why}", flush=True)
                continue
            tried.append((chain.seconds(layer, tokens, 5), config))
        tried.sort(key=lambda pair: pair[0])
        log += tried
        best = tried[0][1]
    log.sort(key=lambda pair: pair[0])
    finals = list(dict.fromkeys(config for _, config in log))[:FINALS]
    return min(finals, key=lambda config: chain.seconds(chain.inside(config), tokens))


def measure(scheme: str, chain: Chain, tokens: int, sweep: bool, ceiling: float) -> dict[str, Any]:
    """Both ways, in turns; "us" has no three launches where the table has none."""
    config = tune(chain, tokens) if sweep else routed_codes_config(device_target(0), chain.shape, tokens)
    ways: dict[str, Layer] = {"apart": chain.apart} | ({"inside": chain.inside(config)} if config else {})
    errors = {name: chain.check(layer, tokens, f"{scheme}, {tokens} tokens, {name}") for name, layer in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, layer in ways.items():
            times[name].append(chain.seconds(layer, tokens))
    seconds, read = {name: statistics.median(found) for name, found in times.items()}, chain.bytes(tokens)
    shares = {name: round(read / s / ceiling, 3) for name, s in seconds.items()}
    row = {
        "scheme": scheme, "tokens": tokens, "us": {name: round(s * 1e6, 2) for name, s in seconds.items()},
        "read_share": shares, "error_ratio": {name: round(e, 3) for name, e in errors.items()},
        "config": config.to_entry() if config else None,
    }  # fmt: skip
    text = "  ".join(f"{name} {s * 1e6:7.2f} us {shares[name]:6.1%}" for name, s in seconds.items())
    ratio = f"  {seconds['inside'] / seconds['apart']:.3f}  {short(config)}" if config else "  no entry"
    print(f"{scheme:9} {tokens:2} tokens  {text}{ratio}", flush=True)
    return row


def routed_entries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of one scheme's rows, by tokens upwards: those before the first that is no faster than launches apart."""
    entries = []
    for row in rows:
        us = row["us"]
        if "inside" not in us or us["inside"] > FASTER * us["apart"]:
            break
        sizes = SHAPE.keys(row["tokens"])
        times = {"us": us["inside"], "apart_us": us["apart"]}
        entries.append({"codes": codes_name(row["scheme"]), **sizes, "config": row["config"], **times})
    return entries


def write_routed(path: Path, environment: dict[str, Any], schemes: list[str], entries: list[dict[str, Any]]) -> None:
    """The card's table of codes, with these "routed" entries for the schemes that were tuned."""
    kept = load_codes_table(path.stem.removesuffix("_codes"))
    own = kept["gpu"] == environment["gpu"]
    tuned = {codes_name(scheme) for scheme in schemes}
    before = [entry for entry in kept.get("routed", ()) if own and not _replaces(tuned, entry)]
    merged = sorted((*before, *entries), key=lambda entry: tuple(entry[key] for key in KEYS))
    others = kept["entries"] if own else [{"gpu": kept["gpu"]} | entry for entry in kept["entries"]]
    measured = kept["measured"] if own else environment
    path.write_text(table_text(environment["gpu"], measured, others, merged))


def _replaces(tuned: set[str], entry: dict[str, Any]) -> bool:
    return entry["codes"] in tuned and entry == entry | SHAPE.keys(entry["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", nargs="*", choices=[s for s in SCHEMES if s != "nf4"], default=["fp8"])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of moe-routed.json and, tuned, of the table")
    args = parser.parse_args()
    register()
    target, ceiling = device_target(0), read_bandwidth(torch.device("cuda"))
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "read_TB_per_s": round(ceiling / 1e12, 4),
    }  # fmt: skip
    print(environment, flush=True)
    rows: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for at, scheme in enumerate(args.scheme):
        chain = Chain(scheme)
        build(chain, args.tokens, args.tune)
        found = [measure(scheme, chain, tokens, args.tune, ceiling) for tokens in sorted(args.tokens)]
        rows, entries = rows + found, entries + routed_entries(found)
        if args.tune and args.out:
            write_routed(args.out / f"{target.table}_codes.json", environment, args.scheme[: at + 1], entries)
        del chain  # the next one's weights take its place
        torch.cuda.empty_cache()
    result = {**environment, "rows": rows}
    if args.out:
        (args.out / "moe-routed.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
