"""Which matmul serves each linear of a decode step, by the time of whole steps, attention and sampling included.

    python -m benchmarks.step_tune --shape llama-1b --tokens 64,256 --out DIR/step_tune.json
    python -m benchmarks.step_tables DIR/step_tune.json      # what is faster goes into the tables of the package

A launch alone says little here: whether it begins while the one before ends, whether the one behind it may, and what a
library copies first, show between launches. So an engine captures its step of so many decodes anew for each candidate
of one linear, and replays of all are timed in short turns: steps that reach the card's power limit take 5% more or less
from one second to the next. The best stays while the next linear is tried. Every winner is checked: a linear against
fp32, a whole step against the committed one, and every step against itself without a graph. With `--quantize` linears
of layers read weights of codes; with fp8 and 16 tokens or more they are products of codes by codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import quant_cases
from benchmarks.decode import DecodeRun
from benchmarks.idle import profile_idle
from benchmarks.linear_large import Case, check
from benchmarks.linear_layers import LAYERS, Layer, random_pool
from benchmarks.quant_schemes import SCHEMES, quant_shape_of
from benchmarks.session import Options, Session
from benchmarks.step_candidates import (
    ATTENTION,
    EXPERTS,
    Config,
    Key,
    attention_candidates,
    brief,
    chosen,
    code_candidates,
    digit_candidates,
    key_of,
    linear_candidates,
    weight_candidates,
)
from benchmarks.timing import Samples, kernel_times, time_in_turns
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import DigitTiles
from fusecomp.lowerings.experts.quant_heuristics import quant_experts_config
from fusecomp.lowerings.launch import compile_ahead
from fusecomp.lowerings.linear import lowering
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig
from fusecomp.lowerings.quant.heuristics import QuantConfig, quant_config
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, ScaledConfig, ScaledShape, scaled_config
from fusecomp.ops.experts import codes_shape
from fusecomp.ops.linear import LinearShape
from fusecomp.ops.quant import FP8
from fusecomp.quant.online.schemes import LEAST_TOKENS
from fusecomp.runtime.choice import Kind
from fusecomp.runtime.mailbox import NOWHERE

SCHEMES_OF = {"fp8": "fp8", "int4": "int4-zero"}  # as `quantize=` makes them
NAMES = ("qkv", "o", "gate_up", "down", "lm_head")
MOST_DIFFERENT = 0.05  # logits of a step, relative to those with the committed kernels; they are bf16
# Sums in another order give other codes of fp8 here and there, each of them 3% apart from its neighbour.
MOST_DIFFERENT_CODES = 0.1
POOL = 1 << 28  # elements of the weights of a check, at least
PROFILED, STEPS = 24, 20
GRAPH_BYTES = 1 << 34  # that the graphs of a sweep may take
CODES, WEIGHTS = "codes", "weights"  # what multiplies: codes by codes, or numbers by codes


@dataclass
class StepTuner:
    """One engine's decode step of so many rows."""

    session: Session
    tokens: int
    context: int
    layers: dict[str, Layer | None]
    scheme: str = ""  # of the weights of layers
    kept: dict[Key, Config] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = DecodeRun(self.session, self.tokens, self.context)
        self.target = device_target(0)
        assert self.run.engine.graphs is not None
        self.run.engine.graphs._budget = GRAPH_BYTES
        committed = {name: self._committed(name, layer) for name, layer in self.layers.items()}
        self.committed = {
            name: config if isinstance(config, DigitTiles) else replace(config, source="")
            for name, config in committed.items()
        }

    def _committed(self, name: str, layer: Layer | None) -> Config:
        if name == EXPERTS:
            return self._digits()
        if layer is None:
            step, builder = self.run.engine._step, self.run.engine._builder
            config = self.session.model.config
            return heuristics.decode_config(
                self.target, head_dim=step.layers[0][2], itemsize=2, num_kv_heads=step.layers[0][1],
                page_size=step.block_size, num_rows=self.tokens, capacity=builder.longest,
                group=config.num_attention_heads // step.layers[0][1], new_key=True,
            )  # fmt: skip
        if self._form(name) == CODES:
            shape = ScaledShape(layer.n, layer.k, layer.groups, FP8, 0, layer.kind)
            return scaled_config(self.target, shape, self.tokens)
        if self._form(name) == WEIGHTS:
            return quant_config(self.target, quant_shape_of(self.scheme, layer), self.tokens)
        dense = LinearShape(layer.n, layer.k, layer.groups, layer.kind, "bfloat16")
        config = lowering.choose(self.target, dense, self.tokens)
        assert isinstance(config, LargeConfig), "benchmarks.linear tunes launches of so few tokens"
        return config

    def _digits(self) -> DigitTiles:
        """Tiles of experts of fp8 codes by digits.

        Raises:
            SystemExit: the step has none.
        """
        config = self.session.model.config
        sizes = (config.num_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size)
        spec = SCHEMES[SCHEMES_OF[FP8]][0]
        found = quant_experts_config(self.target, codes_shape(spec, spec, sizes, 2), self.tokens).digits
        if self.scheme != FP8 or found is None:
            raise SystemExit(f"experts of {self.scheme or 'numbers'} at {self.tokens} tokens are not by digits")
        return found

    def _form(self, name: str) -> str:
        """What multiplies in a linear: numbers, codes of both sides, or codes of its weight."""
        if name not in NAMES[:4] or not self.scheme:
            return ""
        return CODES if self.scheme == FP8 and self.tokens >= LEAST_TOKENS else WEIGHTS

    def others(self, name: str) -> Iterator[Config]:
        """What may be better than what is committed."""
        layer, committed = self.layers[name], self.committed[name]
        if isinstance(committed, DigitTiles):
            yield from digit_candidates(committed)
        elif layer is None:
            assert isinstance(committed, DecodeConfig)
            _, kv_heads, head_dim = self.run.engine._step.layers[0][:3]
            group = self.session.model.config.num_attention_heads // kv_heads
            refusal = heuristics.apart_refusal(self.target, head_dim=head_dim, itemsize=2, group=group, quantized=False)
            yield from attention_candidates(committed, self.tokens * kv_heads, apart=refusal is None)
        elif self._form(name) == CODES:
            yield from code_candidates(layer, self.tokens, self.target.num_sms)
        elif self._form(name) == WEIGHTS:
            yield from weight_candidates(layer, self.tokens, self.scheme)
        else:
            yield from linear_candidates(layer, self.tokens, self.target.num_sms)

    def compile(self, pools: dict[str, list[Config]]) -> None:
        """All candidates' kernels, in threads."""
        engine = self.run.engine
        with compile_ahead(self.session.device):
            for i in range(max(map(len, pools.values()))):
                configs = {key_of(name, self.layers[name]): pool[i] for name, pool in pools.items() if i < len(pool)}
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

    def seconds(self, *steps: dict[Key, Config], rounds: int = 12) -> list[float]:
        """Median of a replay of the step with each of these, in turns; infinite for what the device refuses."""
        replays = [self.capture(configs) for configs in steps]
        self._feed_again()
        runs = [replay for replay in replays if replay is not None]
        medians = iter(time_in_turns(runs, self.session.device, rounds=rounds))
        return [math.inf if replay is None else next(medians).median * 1e-3 for replay in replays]

    def capture(self, configs: dict[Key, Config]) -> Callable[[], object] | None:
        """A replay of the step with these, checked, which is the engine's from now on; None if the device refuses."""
        engine, key = self.run.engine, (self.tokens, Kind())
        assert engine.graphs is not None and engine._latest is not None
        with chosen(self.kept | configs):
            engine.graphs._graphs.pop(key, None)
            try:
                engine._capture(engine.graphs, *key)
                self._feed_again()
                engine.graphs.check(engine._latest[0], *key)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{configs}: {error}", flush=True)
                return None
        return engine.graphs._graphs[key][0]

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
            layer, before = self.layers[name], self.committed[name]
            key = key_of(name, layer)
            times = zip(self.seconds(*({key: config} for config in pool)), pool, strict=True)
            found = sorted(times, key=lambda pair: pair[0])
            finals = [before, *(config for _, config in found[:3] if config != before)]
            finalists = self.seconds(*({key: config} for config in finals), rounds=60)
            medians = dict(zip(finals, finalists, strict=True))
            best = min(medians, key=lambda config: medians[config])
            difference = self._checked(name, before, best)
            self.kept[key] = best
            tried = "; ".join(f"{seconds * 1e6:.0f} {brief(config)}" for seconds, config in found)
            turns = ", ".join(f"{brief(config)} {seconds * 1e6:.1f}" for config, seconds in medians.items())
            print(f"{self.tokens:4d} {name}: {brief(best)} | {turns} | {tried}"[:300], flush=True)
            entry: dict[str, Any] = {"name": name, "tokens": self.tokens, "difference": difference}
            if layer is not None:
                entry |= {"n": layer.n, "k": layer.k, "groups": layer.groups, "kind": layer.kind}
                entry |= {"form": self._form(name), "scheme": self.scheme}
            entry |= {"config": _constants(best), "step_us": round(medians[best] * 1e6, 1)}
            entry |= {"committed": brief(before), "committed_step_us": round(medians[before] * 1e6, 1)}
            if isinstance(best, ScaledConfig) and best.method == LIBRARY:  # for scales that it does not serve
                ours = (config for _, config in found if isinstance(config, ScaledConfig) and config.method != LIBRARY)
                entry["own"] = _constants(next(ours))
            rows.append(entry | {"turns": turns, "tried": tried})
        return rows

    def _checked(self, name: str, before: Config, best: Config) -> float:
        """The difference of a step's logits with the one and the other; a linear is compared with fp32 too.

        Raises:
            SystemExit: one of them is too large.
        """
        layer = self.layers[name]
        key = key_of(name, layer)
        exact, other = self.logits({key: before}), self.logits({key: best})
        difference = ((other - exact).norm() / exact.norm()).item()
        codes = self.scheme == FP8 and self.tokens >= LEAST_TOKENS  # somewhere behind it, whatever it is
        if not difference <= (MOST_DIFFERENT_CODES if codes else MOST_DIFFERENT):
            raise SystemExit(f"{name} by {best}: logits differ by {difference}")
        if layer is not None and isinstance(best, LargeConfig):
            check(Case(layer, self.tokens, random_pool(max(POOL, layer.groups * layer.n * layer.k))), best)
        elif layer is not None and isinstance(best, ScaledConfig):
            case = quant_cases.Case(layer, self.tokens, FP8, quant_cases.random_codes(POOL, FP8))
            if wrong := quant_cases.check(case, best)[1]:
                raise SystemExit(wrong)
        return difference

    def idle(self) -> dict[str, Any]:
        """Of steps with what is kept."""
        self.capture({})
        with chosen(self.kept):
            return profile_idle(self.run.step, PROFILED).to_dict(PROFILED)


def _constants(config: Config) -> dict[str, Any]:
    """As the tables keep it."""
    if isinstance(config, DigitTiles):
        return asdict(config)
    if isinstance(config, DecodeConfig | QuantConfig):
        default = QuantConfig("") if isinstance(config, QuantConfig) else None
        return {k: v for k, v in asdict(config).items() if k != "source" and v != getattr(default, k, None)}
    return config.constants() | {"method": config.method}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=LAYERS, default="llama-1b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", default="64")
    parser.add_argument(
        "--names", default=",".join(NAMES), help="linears, attention or experts (by digits), in the order of tuning"
    )
    parser.add_argument("--context", default="200", help="tokens of a sequence")
    parser.add_argument("--quantize", choices=SCHEMES_OF)
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
        quantize=args.quantize,
    )
    session = Session(options)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "shape": args.shape, **session.ceilings.to_dict()}
    _ = session.engine
    named = dict(zip(NAMES, LAYERS[args.shape], strict=False))
    layers = {name: None if name in (ATTENTION, EXPERTS) else named[name] for name in names}
    for count, context in itertools.product(tokens, contexts):
        tuner = StepTuner(session, count, context, layers, SCHEMES_OF.get(args.quantize, ""))
        graphs = session.engine.graphs
        assert graphs is not None
        if (bucket := graphs.bucket(count)) != count:
            print(f"{count} decodes run in the graph of {bucket}, which is as fast: not tuned", flush=True)
            tuner.run.close()
            continue
        pools = {name: list(dict.fromkeys([tuner.committed[name], *tuner.others(name)])) for name in names}
        tuner.compile(pools)
        (before,) = tuner.seconds({})
        rows = tuner.tune(pools)
        idle, walls = tuner.idle(), Samples.of([tuner.run.step() for _ in range(STEPS)])
        print(f"    engine steps {walls.median:.4f} ms", flush=True)
        (after,) = tuner.seconds({})
        kernels = kernel_times(session.engine.repeat_step)
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
