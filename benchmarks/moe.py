"""One mixture-of-experts layer alone on a GPU: correctness first, then times against the read and matmul limits.

    python -m benchmarks.moe                                   # the committed configurations and the peers
    python -m benchmarks.moe --tune --out DIR --seconds 200    # sweep, write DIR/<gpu>.json
    python -m benchmarks.moe --scheme fp8 int4 [--tune ...]    # weights that are codes, DIR/<gpu>_codes.json

Routing is random and spread; each launch has inputs and routing of its own and takes the next of several layers, so
weights come from memory. The experts have their ids from outside, so their rows are counted and sorted; behind a router
of their own, decode steps list them (`experts/listed.py`). Times are medians of CUDA-graph replays. Peers, in the same
dtype: `torch._grouped_mm` between a sort and a scatter, batched products over copies of the chosen experts (few rows
only), and a loop over the experts, which waits for the device and so has no graph. Peers of codes are the same layer in
16 bits, and one dequantized in each call; their check's reference is the dequantized layer. Shares are of limits
measured in the same run; bytes are the weights of the touched experts. The last line is JSON. A failed check ends the
run.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.moe_schemes import SCHEMES, expert_weight, make_layer
from benchmarks.moe_tune import build_all, frames
from benchmarks.timing import time_calls, time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import DEFAULT_TABLE, ExpertsConfig, Tiles, experts_config, load_table
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.quant_heuristics import (
    DEQUANTIZE,
    KEYS,
    load_codes_table,
    quant_experts_config,
)
from fusecomp.lowerings.experts.quant_lowering import run_quant_experts
from fusecomp.lowerings.paged_attention.heuristics import Target
from fusecomp.ops.experts import Activation, codes_shape

DTYPE = torch.bfloat16
TOKENS = (1, 16, 64, 512, 8192)
CODES_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 8192)
CONTRACT = 1.5
RACE_REPLAYS = 20
BATCHED_BYTES = 12e9  # copies of experts that the batched peer may make
LEAST_DEQUANTIZED = 64  # tokens of a call that may be worth dequantizing all experts for
WIDTH = 160  # of a line of the output
LOGGED = 1  # configurations of a tuned case that are printed


@dataclass(frozen=True)
class Shape:
    """A gated layer; `layers` of them are larger than any L2, also where one token touches a few experts."""

    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int

    def expert_bytes(self, scheme: str = "") -> float:
        """Of one expert's weights; a scheme's with scales and zero points."""
        if scheme:
            both = ((2 * self.width, self.hidden), (self.hidden, self.width))
            return sum(SCHEMES[scheme].bytes(*size) for size in both)
        return 3 * self.hidden * self.width * DTYPE.itemsize

    def config(self, target: Target, tokens: int, scheme: str) -> ExpertsConfig:
        """The committed choice."""
        if scheme:
            spec, sizes = SCHEMES[scheme].spec, (self.experts, self.top_k, self.hidden, self.width)
            return quant_experts_config(target, codes_shape(spec, spec, sizes, DTYPE.itemsize), tokens)
        return experts_config(target, itemsize=DTYPE.itemsize, **self.keys(tokens))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.top_k * 3 * self.hidden * self.width

    def keys(self, tokens: int) -> dict[str, int]:
        """As the tables name them."""
        return {
            "experts": self.experts, "top_k": self.top_k, "hidden": self.hidden, "width": self.width, "tokens": tokens,
        }  # fmt: skip


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336, 2),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768, 3),
}
LAYERS = {"fp8": 2, "fp8-block": 2, "int8": 2}  # times as many of codes; of 4 bits four times


class WrongError(Exception):
    """No configuration of a case computes what it should."""


class Case:
    """Inputs of one number of tokens over the layers of a shape."""

    def __init__(self, shape: Shape, layers: list[Experts], tokens: int, scheme: str = "") -> None:
        self.shape, self.layers, self.tokens, self.scheme = shape, layers, tokens, scheme
        self.launches = max(2, min(24, int(6e-3 / (self._floor() + 1e-5))))
        scores = torch.rand(self.launches, tokens, shape.experts, device="cuda")
        weights, self.index = scores.topk(shape.top_k, dim=-1)
        self.weights = weights.softmax(-1).to(DTYPE)
        self.x = torch.randn(self.launches, tokens, shape.hidden, dtype=DTYPE, device="cuda")
        self.use_pdl = device_target(0).has_pdl

    def _floor(self) -> float:
        """About the seconds of one call, by an H200's limits."""
        touched = min(self.shape.experts, self.tokens * self.shape.top_k)
        return max(touched * self.shape.expert_bytes(self.scheme) / 4.6e12, self.shape.flops(self.tokens) / 6e14)

    def run(self, config: ExpertsConfig, i: int = 0, use_pdl: bool | None = None) -> Tensor:
        pdl = self.use_pdl if use_pdl is None else use_pdl
        return run_quant_experts(
            config, self.x[i], self.index[i], self.weights[i], self.layers[i % len(self.layers)], None, pdl
        )

    def seconds(self, config: ExpertsConfig, replays: int = 5) -> float:
        return time_chain(lambda i: self.run(config, i), self.launches, replays)

    def touched_bytes(self) -> float:
        """Bytes of the experts that a launch touches, on average."""
        counts = [len(index.unique()) for index in self.index]
        return statistics.fmean(counts) * self.shape.expert_bytes(self.scheme)

    def check(self, config: ExpertsConfig) -> float:
        """Error over that of the loop in the same dtype, both against fp32, on up to 256 tokens of a full launch.

        Raises:
            SystemExit: it is above the contract, or replays under dependent launch differ from an ordered launch.
        """
        what = f"{self.scheme} {self.tokens} tokens {short(config)}"
        ordered = self.run(config, 0, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.run(config)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = self.run(config)
        for _ in range(RACE_REPLAYS):
            found.fill_(float("nan"))
            graph.replay()
            if not torch.equal(found, ordered):
                broken = (found != ordered).float().mean().item()
                raise SystemExit(f"{what}: {broken:.1%} of a replay differs, {found.isnan().sum()} are NaN")
        some = slice(0, min(self.tokens, 256))
        args = self.x[0, some], self.index[0, some], self.weights[0, some], self.layers[0]
        exact, unfused = expert_loop(*args, torch.float32), expert_loop(*args, DTYPE)
        error, allowed = ((y.float() - exact).norm().item() for y in (found[some], unfused))
        if not error <= CONTRACT * allowed:
            raise SystemExit(f"{what}: error {error:.3g}, unfused {allowed:.3g}")
        return error / allowed


def make_layers(shape: Shape, scheme: str = "") -> list[Experts]:
    if scheme:
        count = shape.layers * LAYERS.get(scheme, 4)
        return [make_layer(SCHEMES[scheme], shape.experts, shape.hidden, shape.width) for _ in range(count)]

    def weight(rows: int, columns: int) -> Tensor:
        empty = torch.empty(shape.experts, rows, columns, dtype=DTYPE, device="cuda")
        return empty.normal_(std=columns**-0.5)

    return [
        Experts(
            weight(2 * shape.width, shape.hidden), None, weight(shape.hidden, shape.width), None, Activation("silu"),
            gated=True, interleaved=False, transposed=False,
        )
        for _ in range(shape.layers)
    ]  # fmt: skip


def expert_loop(x: Tensor, index: Tensor, weights: Tensor, layer: Experts, dtype: torch.dtype) -> Tensor:
    """As Hugging Face's eager experts, every operation in `dtype`."""
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in index.unique().tolist():
        token, k = torch.where(index == expert)
        first = expert_weight(layer.up, layer.up_codes, expert, dtype)
        second = expert_weight(layer.down, layer.down_codes, expert, dtype)
        gate, up = (x[token].to(dtype) @ first.T).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ second.T
        out.index_add_(0, token, rows * weights[token, k, None].to(dtype))
    return out


def grouped_mm(x: Tensor, index: Tensor, weights: Tensor, layer: Experts) -> Tensor:
    """PyTorch's grouped products over rows sorted by expert."""
    ids, order = index.flatten().sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(len(layer.up), device=x.device), right=True).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // index.shape[1]], layer.up.mT, offs=offsets).chunk(2, -1)
    rows = torch._grouped_mm(torch.nn.functional.silu(gate) * up, layer.down.mT, offs=offsets)
    parts = torch.empty_like(rows)
    parts[order] = rows
    return (parts.view(*index.shape, -1) * weights[..., None]).sum(1)


def batched_mm(x: Tensor, index: Tensor, weights: Tensor, layer: Experts) -> Tensor:
    """Hugging Face's batched form: one product per row with a copy of its expert."""
    ids, rows = index.flatten(), x.repeat_interleave(index.shape[1], 0)
    gate, up = torch.bmm(layer.up[ids], rows[..., None])[..., 0].chunk(2, -1)
    rows = torch.bmm(layer.down[ids], (torch.nn.functional.silu(gate) * up)[..., None])[..., 0]
    return (rows.view(*index.shape, -1) * weights[..., None]).sum(1)


def measure_peers(case: Case) -> dict[str, float]:
    """Seconds of one call of each peer that fits."""

    def args(i: int) -> tuple[Tensor, Tensor, Tensor, Experts]:
        return case.x[i], case.index[i], case.weights[i], case.layers[i % len(case.layers)]

    graphed: dict[str, Callable[..., Tensor]] = {"grouped_mm": grouped_mm}
    if case.tokens * case.shape.top_k * case.shape.expert_bytes() <= BATCHED_BYTES:
        graphed["batched_mm"] = batched_mm
    found = {}
    for name, peer in graphed.items():
        found[name] = time_chain(lambda i, peer=peer: peer(*args(i)), min(4, case.launches))
    loop = time_calls(lambda: expert_loop(*args(0), DTYPE), torch.device("cuda"), calls=5)
    return found | {"loop": loop.median * 1e-3}


def measure_forms(case: Case, plain: Case) -> dict[str, float]:
    """Seconds of one call of the same layer in 16 bits, and of one that dequantizes its codes first."""
    target, none = device_target(0), Tiles(1, 1)
    found = {"16 bits": plain.seconds(plain.shape.config(target, plain.tokens, ""), 7)}
    if case.tokens >= LEAST_DEQUANTIZED:
        found[DEQUANTIZE] = case.seconds(ExpertsConfig(DEQUANTIZE, none, none), 7)
    return found


def report(
    name: str, case: Case, config: ExpertsConfig, ceilings: Ceilings, peers: Callable[[], dict[str, float]]
) -> dict:
    """One line of the output."""
    error, seconds, read = case.check(config), case.seconds(config, 9), case.touched_bytes()
    flops = case.shape.flops(case.tokens)
    row = {
        "shape": name, "scheme": case.scheme, "tokens": case.tokens, "us": round(seconds * 1e6, 2),
        "error_ratio": round(error, 3),
        "read_share": round(read / seconds / ceilings.read_bytes_per_s, 3),
        "matmul_share": round(flops / seconds / ceilings.matmul_flops_per_s, 3),
        "TFLOP_s": round(flops / seconds / 1e12, 1), "config": asdict(config),
        "peers_us": {k: round(v * 1e6, 1) for k, v in peers().items()},
    }  # fmt: skip
    print(
        f"{name:14} {case.scheme:9} {case.tokens:5} tokens {row['us']:9.2f} us  read {row['read_share']:6.1%}  matmul "
        f"{row['matmul_share']:6.1%} ({row['TFLOP_s']:.0f} TFLOP/s)  peers {row['peers_us']}  {config.source}"[:WIDTH],
        flush=True,
    )
    return row


def tune(case: Case) -> tuple[ExpertsConfig, list[tuple[float, ExpertsConfig]]]:
    """The fastest configuration that is right: each frame's up tiles, then its down tiles with the best of those."""
    log: list[tuple[float, ExpertsConfig]] = []
    shape = case.shape
    for frame, ups, downs in frames(shape.top_k, shape.experts, shape.width, case.tokens, case.scheme):
        best = frame
        for name, pool in (("up", ups), ("down", downs)):
            tried = []
            for config in (replace(best, **{name: tiles}) for tiles in pool):
                try:
                    tried.append((case.seconds(config, 3), config))
                except (triton.errors.TritonError, RuntimeError) as error:
                    print(f"not run: {config.to_entry()}: {str(error)[:120]}", flush=True)
            tried.sort(key=lambda pair: pair[0])
            log += tried
            best = tried[0][1] if tried else best
    log.sort(key=lambda pair: pair[0])
    finals = sorted(((case.seconds(config, 9), config) for _, config in log[:4]), key=lambda pair: pair[0])
    for _, config in finals:
        try:
            case.check(config)
            return config, [*finals, *log]
        except SystemExit as error:
            print(f"CHECK FAILED {error}", flush=True)
    raise WrongError(f"{case.scheme} {case.tokens} tokens: no configuration is right")


def write_table(path: Path, environment: dict, entries: list[dict], codes: bool = False) -> None:
    """A table with one line per entry; what was not tuned, and tiles of digits, which are not tuned here, stay."""
    keys = KEYS if codes else KEYS[1:]
    kept = load_codes_table(path.stem.removesuffix("_codes")) if codes else load_table(DEFAULT_TABLE)
    before = [{"gpu": kept["gpu"]} | entry for entry in kept["entries"]] if codes else kept["entries"]
    merged = {tuple(entry[key] for key in keys): entry for entry in before}
    for entry in entries:
        key, config = tuple(entry[key] for key in keys), entry["config"]
        digits = merged[key]["config"].get("digits") if key in merged and config["method"] == "grouped" else None
        merged[key] = {**entry, "config": {**config, "digits": digits}} if digits else entry
    # Another card's say nothing about this one.
    routed = kept.get("routed", []) if not codes or kept["gpu"] == environment["gpu"] else []
    path.write_text(table_text(environment["gpu"], environment, [merged[key] for key in sorted(merged)], routed))


def table_text(gpu: str, measured: dict, entries: list[dict], routed: list[dict]) -> str:
    """A table with one line per entry; "routed" are those of router and experts in one, if there are any."""
    parts = [f'  "gpu": {json.dumps(gpu)}', f'  "measured": {json.dumps(measured)}']
    for name, lines in (("entries", entries), *((("routed", routed),) if routed else ())):
        parts.append(f'  "{name}": [\n' + ",\n".join("    " + json.dumps(line) for line in lines) + "\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--scheme", nargs="*", choices=SCHEMES, default=[""], help="of weights that are codes")
    parser.add_argument("--tokens", nargs="*", type=int)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="tune no further case after this long")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    start, target = time.time(), device_target(0)
    counts = args.tokens or (CODES_TOKENS if any(args.scheme) else TOKENS)
    cases = [(scheme, name, tokens) for scheme in args.scheme for name in args.shapes for tokens in counts]
    if args.tune:
        build_all([(SHAPES[name].keys(tokens), scheme) for scheme, name, tokens in cases])
    ceilings = measure_ceilings(torch.device("cuda"))
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        **ceilings.to_dict(),
    }  # fmt: skip
    print(environment, flush=True)
    rows, entries, held = [], [], {}
    for scheme, name, tokens in cases:
        shape = SHAPES[name]
        if (scheme, name) not in held:
            held.clear()  # those of one shape at a time: they fill the card
            held[scheme, name] = make_layers(shape, scheme)
            if scheme and not args.no_peers:
                held["", name] = make_layers(shape)
        case = Case(shape, held[scheme, name], tokens, scheme)
        config = shape.config(target, tokens, scheme)
        if args.tune:
            if time.time() - start > args.seconds:
                print(f"out of time before {scheme} {name}, {tokens} tokens")
                break
            try:
                config, log = tune(case)
            except WrongError as error:
                print(error, flush=True)
                continue
            entry = {"codes": codes_name(scheme)} if scheme else {}
            entries.append(
                {**entry, **shape.keys(tokens), "config": config.to_entry(), "us": round(log[0][0] * 1e6, 2)}
            )
            for seconds, tried in log[:LOGGED]:
                print(f"    {seconds * 1e6:10.2f} us {short(tried)}", flush=True)
            table = f"{target.table}_codes.json" if scheme else f"{target.table}.json"
            write_table(args.out / table, environment, entries, codes=bool(scheme))
        rows.append(report(name, case, config, ceilings, peers(args, case, held)))
    result = {**environment, "layers": rows}
    (args.out / "moe.json").write_text(json.dumps(result))
    print(json.dumps(result))


def peers(args: argparse.Namespace, case: Case, held: dict) -> Callable[[], dict[str, float]]:
    """What measures the peers of a case, or nothing."""
    if args.no_peers or (args.tune and not case.scheme):
        return dict
    if case.scheme:
        name = next(name for name, shape in SHAPES.items() if shape is case.shape)
        return lambda: measure_forms(case, Case(case.shape, held["", name], case.tokens))
    return lambda: measure_peers(case)


def codes_name(scheme: str) -> str:
    """As the tables name its layout."""
    spec = SCHEMES[scheme].spec
    return codes_shape(spec, spec, (1, 1, 1, 1), DTYPE.itemsize).codes


def short(config: ExpertsConfig) -> str:
    """On one line of a terminal."""
    tiles = (
        f"{t.block_n}x{t.block_d} w{t.num_warps} s{t.num_stages} p{t.per_sm}{' tma' * t.use_tma}"
        f"{' tokens' * t.tokens_tma}{f' flat {t.pieces}' * t.flat}"
        for t in (config.up, config.down)
    )
    return f"{config.method} t{config.block_t} g{config.group_t}{' swap' * config.swap}: {'; '.join(tiles)}"


if __name__ == "__main__":
    main()
