"""Which matmul serves each linear of a decode step, by the time of whole steps, attention and sampling included.

    python -m benchmarks.step_tune --shape llama-1b --tokens 64,256 --out DIR/step_tune.json

A launch alone says little here: whether it begins while the one before ends, whether the one behind it may, and what a
library copies first, show between launches. So an engine captures its step of so many decodes anew for each candidate
of one linear, and its replays are timed; the best stays while the next linear is tried. Then come the finalists of all,
in turns. Every winner is checked: a linear against fp32, a whole step against the committed one, and every step against
itself without a graph.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.decode import DecodeRun
from benchmarks.idle import profile_idle
from benchmarks.linear_large import LAYERS, Case, Layer, check, random_pool
from benchmarks.session import Options, Session
from benchmarks.timing import Samples, kernel_times, time_calls
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.linear import large_heuristics, lowering
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, Target
from fusecomp.ops.linear import LinearShape
from fusecomp.runtime.choice import Kind
from fusecomp.runtime.mailbox import NOWHERE

Config = LargeConfig | DecodeConfig
NAMES = ("qkv", "o", "gate_up", "down", "lm_head")
ATTENTION = "attention"
MOST_DIFFERENT = 0.05  # logits of a step, relative to those with the committed kernels; they are bf16
POOL = 1 << 28  # elements of the weights of a check
PROFILED, STEPS = 24, 20


def candidates(layer: Layer, tokens: int, num_sms: int) -> Iterator[Config]:
    """Tiles with splits of K for about one program a multiprocessor, or two of those that leave room for two."""
    library = ["cublas"] + ["cublas_addmm"] * (layer.kind == "residual")
    yield from (LargeConfig(method=method) for method in library)
    rows = 64 if tokens <= 64 else 128
    stages = 1 if rows == 64 else 0
    tiles = [
        LargeConfig(block_t=rows, block_n=128, num_stages=6 + stages),
        LargeConfig(block_t=rows, block_n=128, num_stages=6 + stages, swap=True),
        LargeConfig(block_t=rows, block_n=128, num_warps=4, num_stages=3 + stages, per_sm=2),
        LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=6 + 2 * stages, pieces=1),
        LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=3 + 2 * stages, pieces=1, per_sm=2),
    ]
    if layer.groups == 2:  # as many columns of each
        halves = [replace(tile, block_n=tile.block_n // 2) for tile in tiles if not tile.swap]
        tiles = [*halves, LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=5 + stages)]
    for tile in tiles:
        count, most = _tiles(layer, tokens, tile), num_sms * tile.per_sm
        found = {1, most // count, most // count // 2} if count <= most and layer.groups == 1 else {1}
        steps = layer.k // tile.block_k
        for splits in sorted(found):
            if 0 < splits <= steps // 2 and count * splits >= 0.6 * num_sms:
                yield LargeConfig(**tile.constants() | {"splits": splits})


def _tiles(layer: Layer, tokens: int, config: LargeConfig) -> int:
    return math.ceil(tokens / config.block_t) * math.ceil(layer.n / config.block_n)


def attention_candidates(committed: DecodeConfig) -> Iterator[DecodeConfig]:
    """Other tiles, with and without the first one read ahead; the splits, which unequal lengths want, stay."""
    shapes = [(16, 1, 3), (16, 1, 4), (32, 1, 3), (32, 1, 4), (32, 2, 3), (64, 2, 3), (64, 4, 3)]
    ahead = [(32, 1, 2), (32, 2, 2), (64, 2, 2), (64, 4, 2), (128, 4, 2), (128, 8, 2)]
    for block_n, warps, stages in (*shapes, *ahead):
        tile = {"block_n": block_n, "num_warps": warps, "num_stages": stages, "read_ahead": stages == 2, "source": ""}
        yield replace(committed, **tile)


Key = tuple[int, int, int, str] | str


def key_of(layer: Layer | None) -> Key:
    """What a choice is found by; None is the attention."""
    return ATTENTION if layer is None else (layer.n, layer.k, layer.groups, layer.kind)


@contextmanager
def chosen(configs: dict[Key, Config]) -> Iterator[None]:
    """Linears of these shapes run as said, and the attention of decodes, others as ever."""
    choose, large, decode = lowering.choose, large_heuristics.large_config, heuristics.decode_config

    def patched_choose(target: Target, shape: LinearShape, tokens: int) -> Config:
        return configs.get((shape.n, shape.k, shape.groups, shape.kind)) or choose(target, shape, tokens)

    def patched_large(target: Target, *, n: int, k: int, groups: int, kind: str, **sizes: int) -> LargeConfig:
        found = configs.get((n, k, groups, kind))
        return found if isinstance(found, LargeConfig) else large(target, n=n, k=k, groups=groups, kind=kind, **sizes)

    def patched_decode(target: Target, **sizes: int) -> DecodeConfig:
        found = configs.get(ATTENTION)
        return found if isinstance(found, DecodeConfig) else decode(target, **sizes)

    with (
        mock.patch.object(heuristics, "decode_config", patched_decode),
        mock.patch.object(lowering, "choose", patched_choose),
        mock.patch.object(large_heuristics, "large_config", patched_large),
    ):
        yield


def brief(config: Config) -> str:
    """A configuration in a few letters."""
    if isinstance(config, DecodeConfig):
        splits = f"s{config.num_splits} from {config.min_split}"
        return f"n{config.block_n} w{config.num_warps} st{config.num_stages} {splits}" + " ahead" * config.read_ahead
    if config.method != "persistent":
        return config.method
    swap, per_sm = " swap" if config.swap else "", f" x{config.per_sm}" if config.per_sm > 1 else ""
    tile = f"{config.block_t}x{config.block_n}"
    return f"{tile} s{config.splits} w{config.num_warps} st{config.num_stages}{swap}{per_sm}"


@dataclass
class StepTuner:
    """One engine's decode step of so many rows."""

    session: Session
    tokens: int
    context: int
    layers: dict[str, Layer | None]
    replays: int = 15
    kept: dict[Key, Config] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = DecodeRun(self.session, self.tokens, self.context)
        self.target = device_target(0)
        self.committed = {name: self._committed(layer) for name, layer in self.layers.items()}

    def _committed(self, layer: Layer | None) -> Config:
        if layer is None:
            step, builder = self.run.engine._step, self.run.engine._builder
            config = self.session.model.config
            return heuristics.decode_config(
                self.target, head_dim=step.layers[0][2], itemsize=2, num_kv_heads=step.layers[0][1],
                page_size=step.block_size, num_rows=self.tokens, capacity=builder.longest,
                group=config.num_attention_heads // step.layers[0][1],
            )  # fmt: skip
        shape = LinearShape(layer.n, layer.k, layer.groups, layer.kind, "bfloat16")
        config = lowering.choose(self.target, shape, self.tokens)
        assert isinstance(config, LargeConfig), "benchmarks.linear tunes launches of so few tokens"
        return config

    def others(self, name: str) -> Iterator[Config]:
        """What may be better than what is committed."""
        layer, committed = self.layers[name], self.committed[name]
        if layer is None:
            assert isinstance(committed, DecodeConfig)
            yield from attention_candidates(committed)
        else:
            yield from candidates(layer, self.tokens, self.target.num_sms)

    def compile(self, pools: dict[str, list[Config]]) -> None:
        """All candidates' kernels, in threads."""
        engine = self.run.engine
        with compile_ahead(self.session.device):
            for i in range(max(map(len, pools.values()))):
                configs = {key_of(self.layers[name]): pool[i] for name, pool in pools.items() if i < len(pool)}
                with chosen(configs):
                    engine._step(engine._builder.padding(self.tokens))
        torch.cuda.synchronize()

    def logits(self, configs: dict[Key, Config]) -> torch.Tensor:
        """Of the latest step, launched without a graph."""
        engine = self.run.engine
        assert engine._latest is not None
        self._feed_again()
        with chosen(self.kept | configs):
            return engine._step(engine._latest[0]).float()

    def seconds(self, configs: dict[Key, Config]) -> float:
        """Median of a replay of the step; infinite for what the device refuses."""
        engine, key = self.run.engine, (self.tokens, Kind())
        assert engine.graphs is not None
        with chosen(self.kept | configs):
            engine.graphs._graphs.pop(key, None)
            try:
                engine._capture(engine.graphs, *key)
                self._feed_again()
                assert engine._latest is not None
                engine.graphs.check(engine._latest[0], *key)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{configs}: {error}", flush=True)
                return math.inf
            return time_calls(engine.repeat_step, self.session.device, calls=self.replays).median * 1e-3

    def _feed_again(self) -> None:
        """The inputs of the latest step, which a capture replaced by padding; only the ids may be others."""
        mailbox = self.run.engine._mailbox
        mailbox.wait()
        mailbox.send(0, 0, NOWHERE)
        self.run.engine._builder.launch_feed(self.tokens)

    def tune(self, pools: dict[str, list[Config]]) -> list[dict[str, Any]]:
        """For each linear in turn: the time of a step with each candidate, the best first; the best is kept."""
        rows = []
        for name, pool in pools.items():
            key, before = key_of(self.layers[name]), self.committed[name]
            found = sorted(((self.seconds({key: config}), config) for config in pool), key=lambda pair: pair[0])
            finals = [before, *(config for _, config in found[:3] if config != before)]
            times: dict[str, list[float]] = {brief(config): [] for config in finals}
            for _ in range(3):
                for config in finals:
                    times[brief(config)].append(self.seconds({key: config}))
            medians = {text: statistics.median(values) for text, values in times.items()}
            best = min(finals, key=lambda config: medians[brief(config)])
            exact, other = self.logits({key: before}), self.logits({key: best})
            difference = ((other - exact).norm() / exact.norm()).item()
            if not difference <= MOST_DIFFERENT:
                raise SystemExit(f"{name} by {best}: logits differ by {difference}")
            self.kept[key] = best
            layer = self.layers[name]
            if layer is not None and isinstance(best, LargeConfig):
                check(Case(layer, self.tokens, random_pool(POOL)), best)
            tried = "; ".join(f"{seconds * 1e6:.0f} {brief(config)}" for seconds, config in found)
            turns = ", ".join(f"{text} {seconds * 1e6:.1f}" for text, seconds in medians.items())
            print(f"{self.tokens:4d} {name}: {brief(best)} | {turns} | {tried}"[:300], flush=True)
            entry: dict[str, Any] = {"name": name, "tokens": self.tokens, "difference": difference}
            if layer is not None:
                entry |= {"n": layer.n, "k": layer.k, "groups": layer.groups, "kind": layer.kind}
            constants = best.constants() | {"method": best.method} if isinstance(best, LargeConfig) else asdict(best)
            entry |= {"config": constants, "step_us": round(medians[brief(best)] * 1e6, 1)}
            entry |= {"committed": brief(before), "committed_step_us": round(medians[brief(before)] * 1e6, 1)}
            rows.append(entry | {"turns": turns, "tried": tried})
        return rows

    def idle(self) -> dict[str, Any]:
        """Of steps with what is kept."""
        self.seconds({})
        with chosen(self.kept):
            return profile_idle(self.run.step, PROFILED).to_dict(PROFILED)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LAYERS, default="llama-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", default="64")
    parser.add_argument(
        "--names", default=",".join(NAMES), help="linears, or attention, in the order in which they are tuned"
    )
    parser.add_argument("--context", default="200", help="tokens of a sequence")
    parser.add_argument("--out")
    args = parser.parse_args()
    tokens, contexts, names = *(_numbers(text) for text in (args.tokens, args.context)), args.names.split(",")
    options = Options(
        ("decode",),
        args.shape,
        "cuda",
        layers=args.layers,
        batches=tuple(tokens),
        context=max(contexts),
        steps=60,
        max_num_batched_tokens=4096,
    )
    session = Session(options)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shape": args.shape, **session.ceilings.to_dict()}
    _ = session.engine
    named = dict(zip(NAMES, LAYERS[args.shape], strict=False))
    layers = {name: None if name == ATTENTION else named[name] for name in names}
    for count, context in itertools.product(tokens, contexts):
        tuner = StepTuner(session, count, context, layers)
        pools = {name: [tuner.committed[name], *tuner.others(name)] for name in names}
        tuner.compile(pools)
        before = tuner.seconds({})
        rows = tuner.tune(pools)
        idle, walls = tuner.idle(), Samples.of([tuner.run.step() for _ in range(STEPS)])
        print(f"    engine steps {walls.median:.4f} ms", flush=True)
        after, kernels = tuner.seconds({}), kernel_times(session.engine.repeat_step)
        print(
            f"{args.shape} {count} x {context}: {before * 1e3:.4f} -> {after * 1e3:.4f} ms, idle {idle['share']:.2%}",
            flush=True,
        )
        for gap in idle["gaps"][:8]:
            print(f"    {gap['before'][:50]} -> {gap['after'][:50]} {gap['per_step']} {gap['us_per_step']}", flush=True)
        case = f"{count}x{context}"
        result[case] = {
            "before_ms": before * 1e3,
            "after_ms": after * 1e3,
            "step_ms": walls.median,
            "linears": rows,
            "idle": idle,
            "kernels": kernels,
        }
        tuner.run.close()
        if args.out:  # after every number of tokens, lest a time limit takes all
            Path(args.out).write_text(json.dumps(result))
    print(json.dumps({k: v for k, v in result.items() if not isinstance(v, dict)}))


if __name__ == "__main__":
    main()
