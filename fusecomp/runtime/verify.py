"""Receipts: the rewritten model against the original and against fp32, on the same tokens.

Both halves of serving are compared: whole prompts packed into steps, and last tokens decoded from cached keys. With an
FP8 cache, the original computes with keys and values rounded alike: the yardstick is then what that rounding costs it.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusecomp.errors import ConfigError, VerificationError
from fusecomp.ops.kv_cache import FP8
from fusecomp.quant.modules import RoundedInput, as_in_step
from fusecomp.report import Receipt

if TYPE_CHECKING:
    from fusecomp.config import EngineConfig
    from fusecomp.runtime.engine import Engine

# Error allowed to the rewritten model, relative to that of the original in the same dtype; the floor is for fp32,
# where the original's error against itself is zero.
ALLOWED_RATIO, FLOOR = 1.5, 1e-5
LENGTHS = (1, 17, 5, 12, 21, 9, 14)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative RMS error; NaN or infinity in `actual` gives infinity."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def model_error(actual: Tensor, exact: Tensor, *, routed: bool) -> float:
    """Relative RMS error of logits [S, V]; for a `routed` model (one with experts), of the row in the middle.

    Where two experts' scores nearly tie, any rounding may choose the other one, the original's own experts
    implementations among themselves included; such a row is wrong by a whole expert and says nothing of the rewrite.
    """
    if not routed or not bool(torch.isfinite(actual).all()):
        return relative_error(actual, exact)
    return sorted(relative_error(a, e) for a, e in zip(actual, exact, strict=True))[len(actual) // 2]


def within_contract(error: float, reference: float) -> bool:
    """Whether the rewritten model's `error` is allowed, given the original's. NaN and infinity never are."""
    return math.isfinite(error) and error <= max(ALLOWED_RATIO * reference, FLOOR)


def pack(prompts: list[list[int]], config: EngineConfig, num_blocks: int) -> list[list[list[int]]]:
    """Split `prompts` in order into lists that fit one step each; leaves out those that would not fit even alone."""
    assert config.max_model_len is not None
    longest = min(config.max_model_len, config.max_num_batched_tokens, num_blocks * config.block_size)
    steps: list[list[list[int]]] = [[]]
    tokens = blocks = 0
    for prompt in prompts:
        if len(prompt) > longest:
            continue
        needed = -(-len(prompt) // config.block_size)
        full = len(steps[-1]) == config.max_num_seqs
        if full or tokens + len(prompt) > config.max_num_batched_tokens or blocks + needed > num_blocks:
            steps.append([])
            tokens = blocks = 0
        steps[-1].append(prompt)
        tokens, blocks = tokens + len(prompt), blocks + needed
    return [step for step in steps if step]


@torch.no_grad()
def packed_logits(model: nn.Module, prompts: list[list[int]], device: torch.device, *, decode_last: bool) -> Tensor:
    """Logits [S, V] of a stock model after each prompt, run one by one and rounded as a step of all of them is.

    With `decode_last` each prompt's last token is run after the others, on the keys and values that they left.
    """
    rounds = any(isinstance(module, RoundedInput) for module in model.modules())
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        if not (decode_last and rounds):  # otherwise one pass is the same as two
            with as_in_step(model, sum(map(len, prompts))):
                rows.append(model(ids).logits[0, -1])
            continue
        with as_in_step(model, sum(map(len, prompts)) - len(prompts)):
            past = model(ids[:, :-1], use_cache=True).past_key_values
        with as_in_step(model, len(prompts)):
            rows.append(model(ids[:, -1:], past_key_values=past).logits[0, -1])
    return torch.stack(rows)


@torch.no_grad()
def _rounded_logits(engine: Engine, model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """As `packed_logits` in one pass, over keys and values rounded as the engine's FP8 cache does."""
    with as_in_step(model, sum(map(len, prompts))):
        rows = [logits[0, -1] for p in prompts if (logits := engine.rounded_logits(p)) is not None]
    if len(rows) < len(prompts):
        raise ConfigError(
            "an FP8 cache cannot be verified for this model",
            where=engine.report.model,
            why="its attention is not called through Hugging Face's interface: the original's keys are out of reach",
            remedy='use verify="off" or kv_cache_dtype="auto"',
        )
    return torch.stack(rows)


def verify_engine(engine: Engine, model: nn.Module) -> list[Receipt]:
    """Compare last-token logits of a few random prompts and file one receipt for prefill and one for decode.

    Raises:
        VerificationError: the rewritten model is further from fp32 than the contract allows.
        ConfigError: with an FP8 cache, keys and values of the original cannot be reached to be rounded.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, engine.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    steps = pack(prompts, engine.config, engine.num_kv_blocks)
    exact_model = copy.deepcopy(model).float()
    routed = engine.report.count("experts") > 0
    receipts = []
    for what in ("prefill", "decode"):
        decodes = what == "decode"  # a decode has a token before it
        chosen = [kept for step in steps if (kept := [p for p in step if len(p) > decodes])]
        if not chosen:
            continue
        fused = torch.cat([engine.prompt_logits(step, decode_last=decodes) for step in chosen])
        unfused, exact = (
            torch.cat([packed_logits(m, step, engine.device, decode_last=decodes) for step in chosen])
            for m in (model, exact_model)
        )
        if engine.config.kv_cache_dtype == FP8:
            unfused = torch.cat([_rounded_logits(engine, model, step) for step in chosen])
        error = model_error(fused, exact, routed=routed)
        reference = model_error(unfused, exact, routed=routed)
        receipts.append(Receipt(what, error, reference, within_contract(error, reference)))
    del exact_model
    engine.report.receipts += receipts
    for receipt in receipts:
        if not receipt.passed:
            raise VerificationError(
                f"the rewritten model's error against fp32 is {receipt.error:.2e} in {receipt.what}, "
                f"the original's {receipt.reference_error:.2e}",
                where=engine.report.model,
                remedy="run the model with stock transformers and report this",
            )
    return receipts
