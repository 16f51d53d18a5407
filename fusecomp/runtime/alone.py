"""How `deterministic=True` runs a step on the CPU: every token by itself, as a decode of one row.

Libraries and compiled loops there sum in orders that follow the number of rows, and round the end of a buffer by other
code than its middle. A token alone has one shape, in memory of one alignment: the same bits, by construction, whatever
else was scheduled. Slow, and the way for tests and for checking what a GPU gives, not for serving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.runtime.step_batch import StepBatch


def each_token_alone(run: Callable[[StepBatch], Tensor], batch: StepBatch, num_logits: int) -> Tensor:
    """Logits [S, V] at `batch.logit_indices`, of steps of one token each, in order of the rows.

    A token's keys and values are in the cache before the next one is computed. Padding rows give zeros.
    """
    starts, lengths = batch.cu_q_lens.tolist(), batch.seq_lens.tolist()
    wanted: dict[int, list[int]] = {}
    for place, token in enumerate(batch.logit_indices.tolist()):
        wanted.setdefault(token, []).append(place)
    out: Tensor | None = None
    for row, length in enumerate(lengths):
        table = batch.block_tables[row : row + 1].clone()
        for token in range(starts[row], starts[row + 1]):
            known = length - (starts[row + 1] - 1 - token)  # tokens of its sequence up to this one
            if known <= 0:
                continue
            alone = replace(
                batch,
                tokens=batch.tokens[:, token : token + 1].clone(),
                logit_indices=torch.zeros(1, dtype=torch.int64),
                cu_q_lens=torch.tensor([0, 1], dtype=torch.int32),
                seq_lens=torch.tensor([known], dtype=torch.int32),
                block_tables=table,
                host_meta=torch.tensor([1, 1, known, 1], dtype=torch.int32),
            )
            logits = run(alone)
            if token in wanted:
                out = logits.new_zeros(len(batch.logit_indices), logits.shape[1]) if out is None else out
                out[wanted[token]] = logits
    return torch.zeros(len(batch.logit_indices), num_logits) if out is None else out
