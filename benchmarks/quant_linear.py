"""Quantized linear layers of few tokens on a GPU: correctness first, then single layers and whole-model chains.

    python -m benchmarks.quant_linear --schemes fp8,int4 --tokens 1,16,64         # the committed configurations
    python -m benchmarks.quant_linear --tune --schemes int4 --tokens 16 --out DIR

As `benchmarks.linear`, whose chains these are with weights of codes; lm_head stays in bf16. Shares are of the read
bandwidth measured in the same run, by the bytes of codes, scales and zero points. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import read_bandwidth
from benchmarks.linear import check_race, default_configs
from benchmarks.linear import job as dense_job
from benchmarks.linear import prepare as dense_prepare
from benchmarks.linear_chain import MODELS, Chain, Model
from benchmarks.quant_schemes import LAYERS, SCHEMES, committed_configs, make_weight, program_of, quant_shape_of
from benchmarks.quant_tune import job, prepare, seconds_of, tune
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear.lowering import launch_linear, launch_norm_op
from fusecomp.lowerings.quant.heuristics import DEQUANTIZE, norms_inside, quant_config
from fusecomp.lowerings.quant.launches import launch_dequantize, run_quant
from fusecomp.ops.quant import dequantize_reference


class QuantChain(Chain):
    """A chain whose layers hold codes."""

    def __init__(self, model: Model, layers: int, scheme: str) -> None:
        self.spec, self.zero = SCHEMES[scheme]
        super().__init__(model, layers)

    def make_weight(self, name: str) -> Any:
        if name == "lm_head":
            return super().make_weight(name)
        kind = self.model.kinds[name]
        return make_weight(kind.groups * kind.n, kind.k, self.spec, self.zero)

    def weight_bytes(self, name: str) -> int:
        if name == "lm_head":
            return super().weight_bytes(name)
        return sum(part.nbytes for part in self.weights[name][0] if part is not None)

    def dense_weight(self, name: str, dtype: torch.dtype) -> Tensor:
        if name == "lm_head":
            return super().dense_weight(name, dtype)
        spec = replace(self.spec, dtype=str(dtype).removeprefix("torch."))
        return dequantize_reference(*self.weights[name][0], spec.to_text())

    def launch(self, name: str, i: int, x: Tensor, out: Tensor, added: Tensor | None, config: Any, pdl: bool) -> Tensor:
        if name == "lm_head":
            return super().launch(name, i, x, out, added, config, pdl)
        kind = self.model.kinds[name]
        norm = self.norms[2 * i + (name == "gate_up")] if kind.norm else None
        operands = [] if added is None else [added]
        program = program_of(kind)
        if kind.norm and not norms_inside(config, self.spec.fold, len(x)):  # as `launch_quant_linear`
            x, norm, program = launch_norm_op(x, norm, None, program.norm), None, replace(program, norm=None)
        if config.kernel == DEQUANTIZE:
            return launch_linear(x, launch_dequantize(*self.weights[name][i], self.spec), None, None, operands, program)
        run_quant(config, x, *self.weights[name][i], norm, operands, program, self.spec, out, pdl)
        return out


def peers(tokens: list[int], ceiling: float, library: bool) -> list[dict]:
    """The same layers in bf16, ours and, if `library`, cuBLAS."""
    chain, rows = Chain(MODELS["llama-8b"], LAYERS), []
    chosen = [(t, name, c) for t in tokens for name, c in default_configs(chain.model, t).items() if name != "lm_head"]
    dense_prepare([dense_job(name, chain.model.kinds[name], t, config) for t, name, config in chosen])
    for t in tokens:
        x = chain.random(t, chain.model.hidden)
        runs = {"ours": chain.ours(x, default_configs(chain.model, t), True, head=False)}
        if library:
            runs["cuBLAS"] = chain.peer(x, False)
        cells = {label: seconds_of(run, 15) for label, run in runs.items()}
        rows.append({"tokens": t, **{k: round(v * 1e3, 4) for k, v in cells.items()}})
        share = chain.bytes(False) / cells["ours"] / ceiling
        text = ", ".join(f"{label} {seconds * 1e3:.4f} ms" for label, seconds in cells.items())
        print(f"bf16 {t} tokens: chain of {text}; ours {share:.1%}", flush=True)
    return rows


def measure(schemes: list[str], tokens: list[int], ceiling: float) -> list[dict]:
    """Whole models with the committed configurations."""
    model, rows = MODELS["llama-8b"], []
    prepare(
        [job(s, n, t, quant_config(device_target(0), quant_shape_of(s, kind), t))
         for s in schemes for t in tokens for n, kind in model.kinds.items() if n != "lm_head"]
    )  # fmt: skip
    for scheme in schemes:
        chain = QuantChain(model, LAYERS, scheme)
        for t in tokens:
            configs = committed_configs(scheme, model, t)
            for name in chain.weights:
                if name != "lm_head":
                    chain.check(name, t, configs[name], True)
            x = chain.random(t, model.hidden)
            check_race(chain, t, configs)
            seconds = seconds_of(chain.ours(x, configs, True, head=False), 15)
            cells = {}
            for name in chain.weights:
                run, count = chain.single(name, x, configs[name], True)
                cells[name] = chain.weight_bytes(name) / (seconds_of(run, 15) / count) / ceiling
            whole = chain.bytes(False) / seconds / ceiling
            rows.append({"scheme": scheme, "tokens": t, "ms": seconds * 1e3, "chain": whole, "share": cells})
            text = "  ".join(f"{name} {share:.1%}" for name, share in cells.items())
            print(f"{scheme:9} {t:4} tokens {LAYERS} layers {seconds * 1e3:.4f} ms "
                  f"{whole:.1%}  alone: {text}", flush=True)  # fmt: skip
        del chain
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="fp8,int4", help=f"some of {', '.join(SCHEMES)}, separated by commas")
    parser.add_argument("--tokens", default="1,8,16,64")
    parser.add_argument("--kinds", default="qkv,o,gate_up,down")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--peers", action="store_true", help="also time the same layers in bf16, ours and cuBLAS")
    parser.add_argument("--bf16", action="store_true", help="also time ours in bf16")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    args = parser.parse_args()
    schemes, tokens = args.schemes.split(","), [int(t) for t in args.tokens.split(",")]
    ceiling = read_bandwidth(torch.device("cuda"))
    result: dict = {"gpu": torch.cuda.get_device_name(), "read_TB_s": round(ceiling / 1e12, 3)}
    print(result, flush=True)
    if args.peers or args.bf16:
        result["bf16"] = peers(tokens, ceiling, args.peers)
    if args.tune:
        chain_of = partial(QuantChain, MODELS["llama-8b"], LAYERS)
        result["tuned"] = tune(schemes, tokens, args.kinds.split(","), ceiling, args.out, chain_of)
    else:
        result["rows"] = measure(schemes, tokens, ceiling)
    if args.out:
        args.out.write_text(json.dumps(result))
    print(json.dumps({k: v for k, v in result.items() if k != "tuned"}))


if __name__ == "__main__":
    main()
