"""One mixture-of-experts layer alone on a GPU: correctness first, then times against the read and matmul limits.

    python -m benchmarks.moe                                   # the committed configurations and the peers
    python -m benchmarks.moe --tune --out DIR --seconds 200    # sweep, write DIR/<gpu>.json

Routing is random and spread; each launch has inputs and routing of its own and takes the next of several layers, so
weights come from memory. Times are medians of CUDA-graph replays. Peers, in the same dtype: `torch._grouped_mm` between
a sort and a scatter, batched products over copies of the chosen experts (few rows only), and a loop over the experts,
which waits for the device and so has no graph. Shares are of limits measured in the same run; bytes are the weights of
the touched experts. The last line is JSON. A failed check ends the run.

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
from benchmarks.moe_tune import build_all, frames
from benchmarks.timing import time_calls, time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.experts.heuristics import DEFAULT_TABLE, ExpertsConfig, experts_config, load_table
from fusecomp.lowerings.experts.launch import Experts, run_experts
from fusecomp.ops.experts import Activation

DTYPE = torch.bfloat16
TOKENS = (1, 16, 64, 512, 8192)
CONTRACT = 1.5
RACE_REPLAYS = 20
BATCHED_BYTES = 12e9  # copies of experts that the batched peer may make


@dataclass(frozen=True)
class Shape:
    """A gated layer; `layers` of them are larger than any L2, also where one token touches a few experts."""

    experts: int
    top_k: int
    hidden: int
    width: int
    layers: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * DTYPE.itemsize

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


class Case:
    """Inputs of one number of tokens over the layers of a shape."""

    def __init__(self, shape: Shape, layers: list[Experts], tokens: int) -> None:
        self.shape, self.layers, self.tokens = shape, layers, tokens
        self.launches = max(2, min(24, int(6e-3 / (self._floor() + 1e-5))))
        scores = torch.rand(self.launches, tokens, shape.experts, device="cuda")
        weights, self.index = scores.topk(shape.top_k, dim=-1)
        self.weights = weights.softmax(-1).to(DTYPE)
        self.x = torch.randn(self.launches, tokens, shape.hidden, dtype=DTYPE, device="cuda")
        self.use_pdl = device_target(0).has_pdl

    def _floor(self) -> float:
        """About the seconds of one call, by an H200's limits."""
        touched = min(self.shape.experts, self.tokens * self.shape.top_k)
        return max(touched * self.shape.expert_bytes / 4.6e12, self.shape.flops(self.tokens) / 6e14)

    def run(self, config: ExpertsConfig, i: int = 0, use_pdl: bool | None = None) -> Tensor:
        pdl = self.use_pdl if use_pdl is None else use_pdl
        return run_experts(
            config, self.x[i], self.index[i], self.weights[i], self.layers[i % len(self.layers)], None, pdl
        )

    def seconds(self, config: ExpertsConfig, replays: int = 5) -> float:
        return time_chain(lambda i: self.run(config, i), self.launches, replays)

    def touched_bytes(self) -> float:
        """Bytes of the experts that a launch touches, on average."""
        counts = [len(index.unique()) for index in self.index]
        return statistics.fmean(counts) * self.shape.expert_bytes

    def check(self, config: ExpertsConfig) -> float:
        """Error over that of the loop in the same dtype, both against fp32, on up to 256 tokens of a full launch.

        Raises:
            SystemExit: it is above the contract, or replays under dependent launch differ from an ordered launch.
        """
        what = f"{self.shape} {self.tokens} tokens {config.to_entry()}"
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
                raise SystemExit(f"{what}: a replay differs from the ordered launch")
        some = slice(0, min(self.tokens, 256))
        args = self.x[0, some], self.index[0, some], self.weights[0, some], self.layers[0]
        exact, unfused = expert_loop(*args, torch.float32), expert_loop(*args, DTYPE)
        error, allowed = ((y.float() - exact).norm().item() for y in (found[some], unfused))
        if not error <= CONTRACT * allowed:
            raise SystemExit(f"{what}: error {error:.3g}, unfused {allowed:.3g}")
        return error / allowed


def make_layers(shape: Shape) -> list[Experts]:
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
        gate, up = (x[token].to(dtype) @ layer.up[expert].to(dtype).T).chunk(2, -1)
        rows = (torch.nn.functional.silu(gate) * up) @ layer.down[expert].to(dtype).T
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
    if case.tokens * case.shape.top_k * case.shape.expert_bytes <= BATCHED_BYTES:
        graphed["batched_mm"] = batched_mm
    found = {}
    for name, peer in graphed.items():
        found[name] = time_chain(lambda i, peer=peer: peer(*args(i)), min(4, case.launches))
    loop = time_calls(lambda: expert_loop(*args(0), DTYPE), torch.device("cuda"), calls=5)
    return found | {"loop": loop.median * 1e-3}


def report(name: str, case: Case, config: ExpertsConfig, ceilings: Ceilings, peers: bool) -> dict:
    """One line of the output."""
    error, seconds, read = case.check(config), case.seconds(config, 9), case.touched_bytes()
    flops = case.shape.flops(case.tokens)
    row = {
        "shape": name, "tokens": case.tokens, "us": round(seconds * 1e6, 2), "error_ratio": round(error, 3),
        "read_share": round(read / seconds / ceilings.read_bytes_per_s, 3),
        "matmul_share": round(flops / seconds / ceilings.matmul_flops_per_s, 3),
        "TFLOP_s": round(flops / seconds / 1e12, 1), "config": asdict(config),
        "peers_us": {k: round(v * 1e6, 1) for k, v in measure_peers(case).items()} if peers else {},
    }  # fmt: skip
    print(
        f"{name:14} {case.tokens:5} tokens {row['us']:10.2f} us  read {row['read_share']:6.1%}  matmul "
        f"{row['matmul_share']:6.1%} ({row['TFLOP_s']:.0f} TFLOP/s)  peers {row['peers_us']}  {config.source}",
        flush=True,
    )
    return row


def tune(case: Case) -> tuple[ExpertsConfig, list[tuple[float, ExpertsConfig]]]:
    """The fastest configuration that is right: each frame's up tiles, then its down tiles with the best of those."""
    log: list[tuple[float, ExpertsConfig]] = []
    for frame, ups, downs in frames(case.shape.top_k, case.shape.experts, case.shape.width, case.tokens):
        best = frame
        for name, pool in (("up", ups), ("down", downs)):
            tried = []
            for config in (replace(best, **{name: tiles}) for tiles in pool):
                try:
                    tried.append((case.seconds(config, 3), config))
                except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
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
    raise SystemExit(f"{case.shape} {case.tokens} tokens: no configuration is right")


def write_table(path: Path, environment: dict, entries: list[dict]) -> None:
    """A table with one line per entry; what was not tuned keeps its entry."""
    keys = ("experts", "top_k", "hidden", "width", "tokens")
    kept = load_table(DEFAULT_TABLE)
    merged = {tuple(entry[key] for key in keys): entry for entry in (*kept["entries"], *entries)}
    body = ",\n".join("    " + json.dumps(merged[key]) for key in sorted(merged))
    routed = ",\n".join("    " + json.dumps(entry) for entry in kept["routed"])
    head = f'  "gpu": {json.dumps(environment["gpu"])},\n  "measured": {json.dumps(environment)},\n'
    path.write_text("{\n" + head + '  "entries": [\n' + body + '\n  ],\n  "routed": [\n' + routed + "\n  ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0, help="tune no further case after this long")
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    start, target = time.time(), device_target(0)
    cases = [(name, tokens) for tokens in args.tokens for name in args.shapes]
    if args.tune:
        build_all([SHAPES[name].keys(tokens) for name, tokens in cases])
    ceilings = measure_ceilings(torch.device("cuda"))
    environment = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        **ceilings.to_dict(),
    }  # fmt: skip
    print(environment, flush=True)
    layers = {name: make_layers(SHAPES[name]) for name in args.shapes}
    rows, entries = [], []
    for name, tokens in cases:
        shape = SHAPES[name]
        case = Case(shape, layers[name], tokens)
        config = experts_config(target, itemsize=DTYPE.itemsize, **shape.keys(tokens))
        if args.tune:
            if time.time() - start > args.seconds:
                print(f"out of time before {name}, {tokens} tokens")
                break
            config, log = tune(case)
            entries.append({**shape.keys(tokens), "config": config.to_entry(), "us": round(log[0][0] * 1e6, 2)})
            for seconds, tried in log[:8]:
                print(f"    {seconds * 1e6:10.2f} us {tried.to_entry()}", flush=True)
            write_table(args.out / f"{target.table}.json", environment, entries)
        rows.append(report(name, case, config, ceilings, not (args.tune or args.no_peers)))
    result = {**environment, "layers": rows}
    (args.out / "moe.json").write_text(json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
