"""Log-probabilities of chosen and of most likely tokens, computed on the device and read with the tokens.

Legend: N rows, V vocabulary, K most likely tokens. They are those of the model's own logits, in float32: log softmax
before any penalty, temperature or filter, as vLLM's default has it. A rank counts the tokens that are at least as
likely.

On the device they are one int32 tensor [N, 2 K + 3], so that one copy brings them to the host: the bits of K + 1
float32 log-probabilities, K + 1 ids (the token itself first, then the most likely), and the token's rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fusecomp.request import Logprob
from fusecomp.runtime.scheduler import ScheduledStep
from fusecomp.runtime.step_batch import StepBatch

# K is one of these, so that CUDA graphs are few; the last is `request.MAX_LOGPROBS`.
WIDTHS = (1, 8, 32, 128)
# Prompt tokens whose logits are made in one pass of the model, and those whose softmax is made at once: what they need
# comes from the memory that the KV cache leaves. 1,024 rows of 128,256 bf16 logits are 263 MB.
PASS_ROWS, SOFTMAX_ROWS = 1024, 64


def width_for(count: int) -> int:
    """The smallest of `WIDTHS` that holds `count`."""
    return next(width for width in WIDTHS if width >= count)


def score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What needs a pass over each row: log of the normaliser, log-probability and rank of the row's token.

    logits [N, V]; tokens [N] int64, negative ones count as 0 -> float32 [N, 1], float32 [N, 1], int32 [N, 1].
    """
    x = logits.float()
    best = x.amax(dim=-1, keepdim=True)
    normaliser = best + (x - best).exp().sum(dim=-1, keepdim=True).log()
    own = x.gather(1, tokens.clamp(min=0)[:, None])
    rank = (x >= own).sum(dim=-1, keepdim=True)
    return normaliser, own - normaliser, rank.to(torch.int32)


def exact_score(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`score` whose sum is one of integers, in units of 2^-40: its order, which may follow N, does not matter."""
    x = logits.float()
    best = x.amax(dim=-1, keepdim=True)
    mass = ((x - best).exp() * 2.0**40).long().sum(dim=-1, keepdim=True)
    normaliser = best + (mass.double() * 2.0**-40).log().float()
    own = x.gather(1, tokens.clamp(min=0)[:, None])
    rank = (x >= own).sum(dim=-1, keepdim=True)
    return normaliser, own - normaliser, rank.to(torch.int32)


def pack(logits: Tensor, tokens: Tensor, width: int, scores: Callable = score, *, stable: bool = False) -> Tensor:
    """The packed tensor [N, 2 K + 3] of `tokens` [N], with K = min(width, V).

    Args:
        stable: of equal logits the lowest ids, in order; otherwise what the library's choice for N rows gives.
    """
    normaliser, own, rank = scores(logits, tokens)
    count = min(width, logits.shape[-1])
    if stable:
        top, ids = (x[:, :count] for x in logits.sort(dim=-1, descending=True, stable=True))
    else:
        top, ids = logits.topk(count, dim=-1)  # in falling order
    values = torch.cat([own, top.float() - normaliser], dim=-1)
    ids = torch.cat([tokens.clamp(min=0)[:, None], ids], dim=-1).to(torch.int32)
    return torch.cat([values.view(torch.int32), ids, rank], dim=-1)


def unpack(row: np.ndarray, count: int) -> dict[int, Logprob]:
    """A packed row [2 K + 3] as vLLM shows it: the token, then the `count` most likely, which may hold it again."""
    half = (len(row) - 1) // 2
    values = row[:half].view(np.float32).tolist()
    ids = row[half:-1].tolist()
    found = {ids[0]: Logprob(values[0], int(row[-1]))}
    for rank, (token, value) in enumerate(zip(ids[1 : count + 1], values[1 : count + 1], strict=True), start=1):
        found.setdefault(token, Logprob(value, rank))
    return found


@dataclass(frozen=True)
class PromptTokens:
    """Tokens of prompts that a step can score, as the step makes the logits before them.

    Attributes:
        order: places in the step whose logits are made: those of its rows first, then others, none twice.
        targets: for each of them the id of the token that follows, or 0.
        chosen: which of them are scored, in the order of `slices`.
        slices: per row of the step with such tokens: request id, index of the first in its prompt, and how many.
        width: K.
    """

    order: list[int]
    targets: list[int]
    chosen: list[int]
    slices: list[tuple[str, int, int]]
    width: int


def prompt_tokens(step: ScheduledStep) -> PromptTokens | None:
    """What `prompt_logprobs` asks of `step`; None for nothing."""
    if step.decode_only or all(seq.params.prompt_logprobs is None for seq in step.seqs[step.num_decodes :]):
        return None
    own = [end - 1 for end in accumulate(step.num_new_tokens)]
    place = {token: i for i, token in enumerate(own)}
    targets, chosen, slices = [0] * len(own), [], []
    most = -1
    for i in range(step.num_decodes, len(step.seqs)):
        seq, start, size = step.seqs[i], step.starts[i], step.num_new_tokens[i]
        wanted, first = seq.params.prompt_logprobs, own[i] + 1 - size
        count = min(start + size, len(seq.prompt_ids) - 1) - start
        if wanted is None or count <= 0:
            continue
        most = max(most, wanted)
        slices.append((seq.request_id, start + 1, count))
        for offset in range(count):
            at = place.setdefault(first + offset, len(targets))
            if at == len(targets):
                targets.append(0)
            targets[at] = seq.prompt_ids[start + 1 + offset]
            chosen.append(at)
    return PromptTokens(list(place), targets, chosen, slices, width_for(most)) if slices else None


def with_prompt(
    run: Callable[[StepBatch], Tensor], batch: StepBatch, wanted: PromptTokens, packs: Callable = pack
) -> tuple[Tensor, Tensor]:
    """Run a step for its own logits [S, V] and the packed scores [N, 2 K + 3] of `wanted`.

    The model gives logits of `PASS_ROWS` tokens at a time; a step that wants more runs again, which writes the same
    keys and values to the same slots.

    Args:
        packs: `pack`, or another way to the same.
    """
    device, rows = batch.logit_indices.device, batch.logit_indices.shape[0]
    pinned = device.type == "cuda"

    def move(values: list[int]) -> Tensor:
        return torch.tensor(values, pin_memory=pinned).to(device, non_blocking=True)

    own, packed = None, []
    size = max(PASS_ROWS, rows)
    for first in range(0, len(wanted.order), size):
        logits = run(dataclasses.replace(batch, logit_indices=move(wanted.order[first : first + size])))
        targets = move(wanted.targets[first : first + size])
        own = logits[:rows] if own is None else own
        for part, ids in zip(logits.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True):
            packed.append(packs(part, ids, wanted.width))
    assert own is not None
    return own, torch.cat(packed)[move(wanted.chosen)]
