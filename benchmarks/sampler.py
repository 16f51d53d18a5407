"""What sampling costs a decode step: each variant of the sampler alone, in a CUDA graph. `python -m benchmarks.sampler`

Logits are random bf16 of a 128,256-token vocabulary; every row wants what the variant names. Before a variant is timed,
its graph's tokens are compared with those of the same functions run eagerly, and rows with those of the rows alone.
Times are medians of graph replays. "pass" is one read of the logits at the bandwidth measured in the same run. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.ceilings import read_bandwidth
from benchmarks.timing import time_replays
from fusecomp.request import SamplingParams
from fusecomp.runtime.adjust import RowTables
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.choice import TokenChoice
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import Scheduler, SequenceState

VOCAB, PROMPT = 128_256, 64
WORDS = tuple((i, i + 1, i + 2) for i in range(20))
DRAWN = SamplingParams(temperature=0.8, max_tokens=None)
VARIANTS = {
    "greedy": DRAWN.replace(temperature=0.0),
    "temperature": DRAWN,
    "min-p": DRAWN.replace(min_p=0.05),
    "top-k, top-p": DRAWN.replace(top_k=50, top_p=0.9),
    "typical-p": DRAWN.replace(typical_p=0.9),
    "bias, greedy": DRAWN.replace(temperature=0.0, logit_bias={5: 2.0}),
    "penalties, greedy": DRAWN.replace(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1),
    "bad words, greedy": DRAWN.replace(temperature=0.0, bad_words=WORDS),
    "all three, greedy": DRAWN.replace(
        temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={5: 2.0}, bad_words=WORDS
    ),
    "all three, drawn": DRAWN.replace(
        repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={5: 2.0}, bad_words=WORDS
    ),
    "5 logprobs, greedy": DRAWN.replace(temperature=0.0, logprobs=5),
}


COMPILED: dict = {}  # shared: what an engine compiles once


class Variant:
    """Rows that all want `params`, one decode after their prompts."""

    def __init__(self, params: SamplingParams, rows: int, device: str) -> None:
        self.tables = RowTables(rows, device, (2,))
        self.choice = TokenChoice(self.tables, torch.device(device))
        self.choice.set_vocabulary(VOCAB)
        self.choice._functions = COMPILED
        self.tables.reserve(params)
        scheduler = Scheduler(rows, max(8192, rows * PROMPT), 4096, KVCacheManager(rows * 8, 16))
        builder = BatchBuilder(rows, max(8192, rows * PROMPT), 256, 16, device, on_enter=self.tables.enter)
        generator = torch.Generator().manual_seed(rows)
        for i in range(rows):
            prompt = torch.randint(0, VOCAB, (PROMPT,), generator=generator).tolist()
            scheduler.add(SequenceState(str(i), prompt, params.replace(seed=i, max_tokens=60)))
        step = scheduler.schedule()
        assert step is not None and len(step.seqs) == rows
        builder.build(step)
        scheduler.update(step, [3] * rows, ())
        step = scheduler.schedule()
        assert step is not None and step.decode_only
        self.batch = builder.build(step, rows)
        self.kind = self.choice.kind(self.batch)

    def run(self, logits: torch.Tensor) -> torch.Tensor:
        return self.choice(logits, self.batch, self.kind).tokens


def check(variant: Variant, name: str, logits: torch.Tensor) -> None:
    """Compiled and captured against eager, which the tests compare with Hugging Face."""
    compiled = variant.run(logits).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = variant.run(logits)
    graph.replay()
    assert out.equal(compiled), f"{name}: the graph differs"
    with torch.compiler.set_stance("force_eager"):
        eager = variant.run(logits)
    differ = int((eager != compiled).sum())
    # Eager and compiled logarithms may differ in the last bit, which decides a draw once in many thousand.
    assert differ <= len(eager) // 64, f"{name}: {differ} of {len(eager)} tokens differ from eager"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ceiling = read_bandwidth(torch.device("cuda"))
    figures: dict = {"benchmark": "sampler", "card": torch.cuda.get_device_name(), "read_TB_per_s": ceiling / 1e12}
    print(f"{figures['card']}: {ceiling / 1e12:.2f} TB/s; us (passes over the logits)")
    print(f"{'variant':<22}" + "".join(f"{f'{rows} rows':>18}" for rows in args.rows))
    for name, params in VARIANTS.items():
        cells = []
        for rows in args.rows:
            variant = Variant(params, rows, "cuda")
            logits = (torch.randn(rows, VOCAB, device="cuda") * 3).bfloat16()
            check(variant, name, logits)
            seconds = time_replays(lambda variant=variant, logits=logits: variant.run(logits))
            passes = seconds / (logits.nbytes / ceiling)
            cells.append(f"{seconds * 1e6:.1f} ({passes:.1f})")
            figures.setdefault(name, {})[str(rows)] = round(seconds * 1e6, 2)
            del variant
        print(f"{name:<22}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
