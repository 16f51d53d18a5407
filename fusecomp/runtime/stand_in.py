"""Steps outside the scheduler, on blocks of the KV cache that nobody holds: for start-up, checks and measuring."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.config import EngineConfig
from fusecomp.errors import RequestError
from fusecomp.request import SamplingParams
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.sequence import ScheduledStep, SequenceState
from fusecomp.runtime.step import CompiledStep
from fusecomp.runtime.step_batch import MixedShape, StepBatch


class StandIns:
    """Batches of sequences that no one asked for, and their logits.

    Args:
        step, builder, config: the engine's.
    """

    def __init__(self, step: CompiledStep, builder: BatchBuilder, config: EngineConfig) -> None:
        self._step, self._builder, self._config = step, builder, config
        self._admissions = itertools.count(-2, -1)

    def prefill(self, prompts: list[list[int]], blocks: list[list[int]]) -> StepBatch:
        """A batch of whole prompts, each on its blocks."""
        seqs = [self._sequence(row, p, b) for row, (p, b) in enumerate(zip(prompts, blocks, strict=True))]
        lengths = [len(p) for p in prompts]
        step = ScheduledStep(seqs, [0] * len(seqs), lengths, [True] * len(seqs), 0, sum(lengths), 0)
        return self._builder.build(step)

    def decodes(self, size: int, num_blocks: int) -> StepBatch:
        """Rows with two cached tokens and a new one, or only a new one where `num_blocks` are too few."""
        pages = -(-3 // self._config.block_size)
        tokens, pages = ([1, 2, 3], pages) if size * pages <= num_blocks else ([1], 1)
        seqs = [self._sequence(row, tokens, list(range(row * pages, (row + 1) * pages))) for row in range(size)]
        step = ScheduledStep(seqs, [len(tokens) - 1] * size, [1] * size, [True] * size, size, size, 0)
        return self._builder.build(step, size)

    def mixed(self, shape: MixedShape, num_blocks: int, vocab_size: int) -> StepBatch:
        """Prompts of different tokens that all but fill a mixed shape, if `num_blocks` let them, all on the first."""
        config, count = self._config, min(shape.prefills - 1, self._config.max_num_seqs)
        assert config.max_model_len is not None
        length = min((shape.tokens - 1) // count, config.max_model_len - 1, num_blocks * config.block_size)
        blocks = list(range(-(-length // config.block_size)))
        ids = [[(31 * row + 7 * i) % vocab_size for i in range(length)] for row in range(count)]
        seqs = [self._sequence(row, prompt, blocks) for row, prompt in enumerate(ids)]
        step = ScheduledStep(seqs, [0] * count, [length] * count, [True] * count, 0, count * length, 0)
        return self._builder.build(step, shape)

    def prompt_logits(self, kv: KVCacheManager, prompts: list[list[int]], *, decode_last: bool) -> Tensor:
        """`Engine.prompt_logits` of an idle engine."""
        per_prompt = [kv.blocks_for(len(p)) for p in prompts]
        shortest, config = (2 if decode_last else 1), self._config
        if not prompts or min(map(len, prompts)) < shortest:
            raise RequestError("too few tokens", where="prompt_logits", remedy=f"give at least {shortest} a prompt")
        assert config.max_model_len is not None
        if (
            len(prompts) > config.max_num_seqs
            or max(map(len, prompts)) > config.max_model_len
            or sum(map(len, prompts)) > config.max_num_batched_tokens
            or sum(per_prompt) > kv.num_blocks
        ):
            raise RequestError("the prompts do not fit one step", where="prompt_logits", remedy="give fewer or shorter")
        kv.pool.forget_all()  # the first blocks are written below, whoever's content they keep
        ends = list(itertools.accumulate(per_prompt))
        blocks = [list(range(end - n, end)) for n, end in zip(per_prompt, ends, strict=True)]
        if not decode_last:
            return self._step(self.prefill(prompts, blocks))
        self._step(self.prefill([p[:-1] for p in prompts], blocks))
        seqs = [self._sequence(row, p, b) for row, (p, b) in enumerate(zip(prompts, blocks, strict=True))]
        rows = len(prompts)
        step = ScheduledStep(seqs, [len(p) - 1 for p in prompts], [1] * rows, [True] * rows, rows, rows, 0)
        return self._step(self._builder.build(step))

    def token_logits(self, kv: KVCacheManager, prompt: list[int]) -> Tensor:
        """`Engine.token_logits` of an idle engine."""
        config = self._config
        assert config.max_model_len is not None
        if not 0 < len(prompt) <= config.max_model_len or kv.blocks_for(len(prompt)) > kv.num_blocks:
            raise RequestError(f"a prompt of {len(prompt)} tokens does not fit", where="token_logits")
        kv.pool.forget_all()  # as in `prompt_logits`
        seq, logits = self._sequence(0, prompt, []), []
        for start in range(0, len(prompt), config.max_num_batched_tokens):
            size = min(config.max_num_batched_tokens, len(prompt) - start)
            seq.blocks = list(range(kv.blocks_for(start + size)))  # grown as the scheduler does
            batch = self._builder.build(ScheduledStep([seq], [start], [size], [True], 0, size, 0))
            logits.append(self._step(replace(batch, logit_indices=torch.arange(size, device=self._builder.device))))
        return torch.cat(logits)

    def _sequence(self, row: int, tokens: list[int], blocks: list[int]) -> SequenceState:
        """Its admission number, negative and new, never meets a real one."""
        seq = SequenceState(f"stand-in {row}", tokens, SamplingParams(temperature=0.0))
        seq.row, seq.admission, seq.blocks = row, next(self._admissions), blocks
        return seq
