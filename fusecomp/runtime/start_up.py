"""What an engine does once, before it serves: compile the step, size the KV cache, try the program."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusecomp.config import EngineConfig
from fusecomp.errors import RequestError
from fusecomp.lowerings.launch import compile_ahead, compiling_ahead
from fusecomp.runtime import memory
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.graphs import Shape, bucket_sizes, mixed_shapes, shapes_to_meet
from fusecomp.runtime.packing import DECODED, OTHER_SHAPES, row_errors
from fusecomp.runtime.sampler import greedy
from fusecomp.runtime.stand_in import StandIns
from fusecomp.runtime.step import CompiledStep
from fusecomp.runtime.step_batch import MixedShape

# Relative error of logits above which a program is another model's, whatever the dtype. It leaves room for what stock
# SDPA leaves out: without Gemma 2's softcap of scores, logits differ by 0.7%.
WRONG_PROGRAM = 0.02


class Sized(NamedTuple):
    """What the trial step gave: blocks of the KV cache, bytes for graphs of long steps beside it, and tokens of a
    prefill per second."""

    num_blocks: int
    long_graphs: int
    tokens_per_s: float


def mixed_shapes_of(config: EngineConfig, *, long: bool) -> list[MixedShape]:
    """Candidates for graphs of mixed steps, `long` ones too, of which nothing but padding is prompts that may be."""
    assert config.max_model_len is not None
    shapes = mixed_shapes(config.max_num_seqs, config.max_num_batched_tokens, long=long)
    return [shape for shape in shapes if shape.tokens <= shape.prefills * config.max_model_len]


def limit_to_proof(step: CompiledStep, config: EngineConfig) -> EngineConfig:
    """`config` with a context no longer than the step is proven for."""
    assert config.max_model_len is not None
    if config.max_model_len <= step.proven_length:
        return config
    step.report.notes.append(f"max_model_len limited to {step.proven_length}: inline masks are proven to it")
    return config.replace(max_model_len=step.proven_length)


def compile_and_size(step: CompiledStep, builder: BatchBuilder, stand_ins: StandIns, config: EngineConfig) -> Sized:
    """Compile on a first batch, the largest prefill on a GPU so that its memory is known."""
    device = builder.device
    blocks = -(-config.max_model_len // config.block_size)  # type: ignore[operator]
    budget = memory.KVBudget(device, config, step.block_bytes, blocks)
    step.allocate(budget.trial_blocks)
    size = budget.trial_tokens
    prompts, places = [[1] * size.tokens_per_row] * size.rows, [[0] * blocks] * size.rows
    with compile_ahead(device):
        step.warm_up(stand_ins.prefill(prompts, places))
        start = time.perf_counter()
        if compiling_ahead():
            _meet_kernels(step, builder, stand_ins, config)
    if device.type == "cuda":
        step.report.seconds["kernels ahead"] = time.perf_counter() - start
    budget.begin()
    seconds = []
    for _ in range(3 if device.type == "cuda" else 1):  # what the first takes is not all the step's
        start = time.perf_counter()
        greedy(step(stand_ins.prefill(prompts, places))).tolist()
        seconds.append(time.perf_counter() - start)
    num_blocks = budget.end()
    return Sized(num_blocks, budget.long_graphs, size.rows * size.tokens_per_row / min(seconds))


def _meet_kernels(step: CompiledStep, builder: BatchBuilder, stand_ins: StandIns, config: EngineConfig) -> None:
    """Under `compile_ahead`, go through the shapes of graphs and the checks' tiny steps."""
    checked = DECODED[0]
    sizes = {min(len(checked), config.max_num_seqs)}
    mixed: list[MixedShape] = []
    if not config.enforce_eager:
        sizes |= {*bucket_sizes(config.max_num_seqs)}
        candidates = mixed_shapes_of(config, long=not config.deterministic)
        mixed = shapes_to_meet(candidates, config.max_num_batched_tokens)
    shapes: list[Shape] = [*sorted(sizes, reverse=True), *mixed]
    for shape in shapes:
        tokens = greedy(step(builder.padding(shape)))
    stand_ins.decodes(1, 1)  # what feeds a step of decodes
    builder.mailbox.deliver(tokens)
    if len(checked) <= config.max_num_seqs and sum(checked) <= config.max_num_batched_tokens:
        step(stand_ins.prefill([[1] * tokens for tokens in checked], [[0]] * len(checked)))


def confirm_program(step: CompiledStep, stand_ins: StandIns, logits: Callable[[list[list[int]]], Tensor]) -> None:
    """Try a program that no trace of the whole model made here on a prompt; compile anew when it is wrong.

    Args:
        logits: prompts -> logits [S, V] after each.
    """
    trial = step.trial()
    if step.confirm("" if trial is None else _difference(logits, *trial)):
        return
    step.warm_up(stand_ins.prefill([[1]], [[0]]))
    step.confirm("")


def _difference(logits: Callable[[list[list[int]]], Tensor], prompt: list[int], expected: Tensor | None) -> str | None:
    """How the logits after each token of `prompt` differ from those expected by more than rounding; empty if not.

    None when there is nothing to compare. The row in the middle is judged: nearly tied routing scores may spoil one, a
    wrong program spoils all.
    """
    if expected is None:
        return None
    for first in range(1, len(prompt) + 1):  # as many prompts as fit one step
        try:
            actual = logits([prompt[:end] for end in range(first, len(prompt) + 1)])
        except RequestError:
            continue
        errors = sorted(row_errors(actual, expected[first - 1 :]))
        middle = errors[len(errors) // 2] if errors else 0.0
        allowed = max(OTHER_SHAPES[0] * torch.finfo(expected.dtype).eps, WRONG_PROGRAM)
        return f"{middle:.2g} (relative)" if middle > allowed else ""
    return None
