"""What tests of whole engines share: families' models and engines, built once a process; Hugging Face as the oracle.

The oracle runs every sequence alone: no batch, no padding, no cache but Hugging Face's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import pytest
import torch
from transformers import PreTrainedModel

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from models.registry import FAMILIES, build

# Awkward on purpose: prompts are longer than a step, and more than the rows.
CONFIG = EngineConfig(
    max_model_len=96, max_num_seqs=5, max_num_batched_tokens=48, kv_cache_bytes=4 << 20, enforce_eager=True
)
BLOCK_SIZES: Mapping[str, int] = dict(zip(FAMILIES, cycle((16, 1, 32, 16, 64, 1)), strict=False))
NAMES = [pytest.param(name, marks=() if family.core else pytest.mark.slow) for name, family in FAMILIES.items()]
EAGER = [  # of families that are no core, what is served at each change is fp32
    pytest.param(name, dtype, marks=() if family.core or dtype == torch.float32 else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for dtype in family.dtypes
]
VARIANTS = [
    pytest.param(name, dtype, marks=() if family.core else pytest.mark.slow)
    for name, family in FAMILIES.items()
    for dtype in family.dtypes
]


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model. Not the one that an engine holds, so that neither sees what is done to the other."""
    return build(name, dtype)


@cache
def engine(name: str, dtype: torch.dtype = torch.float32, fuse: str = "auto") -> Engine:
    """An idle engine of the family that has passed its own verification."""
    config = CONFIG.replace(block_size=BLOCK_SIZES[name], verify="first", fuse=fuse, enforce_eager=fuse == "auto")
    return Engine(build(name, dtype), config)


def tokens(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    """Random ids; those of one seed are prefixes of each other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (512,), generator=generator).tolist()[:length]


@dataclass(frozen=True)
class Greedy:
    """What `generate` made of one prompt: ids, and the logits [N, V] that each was chosen from."""

    token_ids: list[int]
    logits: torch.Tensor


@torch.no_grad()
def hf_greedy(stock: PreTrainedModel, prompt: Sequence[int], max_tokens: int) -> Greedy:
    """Hugging Face's own greedy `generate` on one prompt; it stops at the model's `eos`, if it has one."""
    out = stock.generate(
        torch.tensor([prompt], device=stock.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=stock.device),
        max_new_tokens=max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Greedy(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits))


@torch.no_grad()
def hf_last_logits(stock: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [S, V] after each prompt, computed alone."""
    return torch.stack([stock(torch.tensor([list(p)], device=stock.device)).logits[0, -1] for p in prompts])


@dataclass
class Served:
    """What an engine gave one request."""

    token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None


def serve(served_by: Engine, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> list[Served]:
    """Run the requests, all added at once, to their end."""
    outputs = [Served([]) for _ in requests]
    for index, (prompt, params) in enumerate(requests):
        served_by.add_request(str(index), list(prompt), params)
    while served_by.has_unfinished_requests():
        for out in served_by.step():
            request = outputs[int(out.request_id)]
            request.token_ids += out.new_token_ids
            request.finish_reason, request.error = out.finish_reason, out.error
    return outputs
