"""What a step is given: `StepBatch`, the shape that a CUDA graph pads it to, and what its rows need of the sampler.

Legend: T tokens, S rows (padding included), n real rows, P pages per row of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fusecomp.request import SamplingParams


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tensors of one step. All on the device except `host_meta`.

    Attributes:
        tokens: [3, T] int64, contiguous: ids, positions, KV slots.
        logit_indices: [S] int64.
        cu_q_lens: [S + 1] int32.
        seq_lens: [S] int32.
        block_tables: [S, P] int32; entries that are never read hold stale but valid block ids.
        host_meta: [4] int32 on the CPU: num_decodes, max_q_len, max_seq_len, num_rows. Padding rows count as decodes;
            not those of a step that is not all decodes, has no bucket and so no token for them.
        temperature: [S] float32; 0 is greedy, also in padding rows.
        top_k: [S] int32; 0 keeps all.
        top_p: [S] float32; 1 keeps all.
        seeds: [S] int64.
        rows: [S] int64, the line of each row in tables of running sequences; `max_num_seqs` for padding. It and what
            rows are sampled by, from `temperature` on, hold only where `needs` is not 0: nothing reads them elsewhere.
        num_rows: n, rows of the step that are not padding.
        needs: what the rows need of the sampler together, of the flags below.
        logprobs: most log-probabilities that a row asks for; -1 when none asks.
    """

    tokens: torch.Tensor
    logit_indices: torch.Tensor
    cu_q_lens: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    host_meta: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    rows: torch.Tensor
    num_rows: int
    needs: int
    logprobs: int

    @property
    def all_greedy(self) -> bool:
        """Every row takes the arg-max."""
        return not self.needs & DRAWN

    @property
    def filtered(self) -> bool:
        """Some row that is not greedy has a top-k or top-p."""
        return bool(self.needs & FILTERED)

    @property
    def typical(self) -> bool:
        """Some row that is not greedy has a typical-p."""
        return bool(self.needs & TYPICAL)

    @property
    def adjusted(self) -> bool:
        """Some row has a bias, bans or penalties."""
        return bool(self.needs & ADJUSTED)


class MixedShape(NamedTuple):
    """The sizes to which a step of decodes and prefills is padded, so that a CUDA graph serves it.

    Tokens stay packed, and padding tokens, of slot -1, follow them. Attention sees `decodes` decode rows and then
    `prefills` others. Of the decode rows those beyond the step's have no token and length 0: what a kernel may write
    for them, at the tokens of their row numbers, belongs to prefills, which it computes afterwards. The padding tokens
    are a prompt of their own, the last row that has tokens, so nothing unset enters the model. What the sampler reads
    is in the order of the step's rows, padding last; a padding row's logits are those of the first token.

    `logit_indices` and the sampler's tensors have decodes + prefills entries, as `seq_lens` and `block_tables` have.
    """

    tokens: int
    decodes: int
    prefills: int

    @property
    def rows(self) -> int:
        return self.decodes + self.prefills

    def holds(self, num_tokens: int, num_decodes: int, num_prefills: int) -> bool:
        """Whether such a step fits; a row is left for the padding."""
        assert self.decodes <= self.tokens, "a padding row may write to the token of its number"
        return num_tokens <= self.tokens and num_decodes <= self.decodes and num_prefills < self.prefills


# Prefill rows and tokens of a `MixedShape`, at most.
MOST_PREFILLS, MOST_MIXED_TOKENS = 64, 16384

# What a row may need of the sampler.
DRAWN, FILTERED, TYPICAL, ADJUSTED = 1, 2, 4, 8


def needs_of(params: SamplingParams) -> int:
    """The flags of one request."""
    needs = 0
    if not params.greedy:
        needs |= DRAWN | (FILTERED if params.top_k > 0 or params.top_p < 1 else 0)
        needs |= TYPICAL if params.typical_p < 1 else 0
    banned = params.bad_words or params.min_tokens or params.allowed_token_ids is not None
    return needs | (ADJUSTED if params.penalised or params.logit_bias or banned else 0)
