"""Limits and budgets: the longest context a model allows, and how many KV blocks fit beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusecomp.config import EngineConfig
from fusecomp.errors import CapacityError, ConfigError
from fusecomp.runtime.step_batch import MOST_MIXED_TOKENS

# A model that does not say how long its context may be gets this one.
DEFAULT_MAX_MODEL_LEN = 4096
CPU_KV_BYTES = 1 << 30
# Kept free on a GPU for CUDA graphs, their private pool, and libraries that allocate late.
RESERVE_BYTES = 1 << 30
# CUDA graphs of long steps (`graphs.py`) hold what such a step takes once more, and a quarter for the allocator's gaps.
# Of what the KV cache would have they take this share at most, or nothing.
LONG_GRAPHS_SHARE = 1 / 16
LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


def text_config(model: Any) -> Any:
    """The configuration of the language model, also inside a multimodal one; None without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: Any) -> int:
    """Token ids that the input embedding accepts.

    Raises:
        ConfigError: the model has neither an input embedding nor a `vocab_size`.
    """
    if hasattr(model, "get_input_embeddings") and model.get_input_embeddings() is not None:
        return int(model.get_input_embeddings().weight.shape[0])
    size = getattr(text_config(model), "vocab_size", None)
    if size is None:
        raise ConfigError("the vocabulary size is unknown", where=type(model).__name__, remedy="give config.vocab_size")
    return int(size)


def resolve_limits(model: nn.Module, config: EngineConfig) -> EngineConfig:
    """Fill in `max_model_len` from the model.

    Raises:
        ConfigError: the configured length exceeds what the model's positions allow.
    """
    source = text_config(model)
    limit = next(
        (n for n in (getattr(source, name, None) for name in LENGTH_NAMES) if isinstance(n, int) and n > 0), None
    )
    if config.max_model_len == 1:
        raise ConfigError("max_model_len=1 leaves no room for output", where="EngineConfig", remedy="use at least 2")
    if config.max_model_len is None:
        return config.replace(max_model_len=limit or DEFAULT_MAX_MODEL_LEN)
    if limit is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's {limit} positions",
            where=type(model).__name__,
            remedy=f"use at most {limit}",
        )
    return config


def kv_blocks(budget: int, block_bytes: int, config: EngineConfig) -> int:
    """KV blocks that fit `budget` bytes, at most what `max_num_seqs` sequences of `max_model_len` need."""
    assert config.max_model_len is not None
    wanted = config.max_num_seqs * -(-config.max_model_len // config.block_size)
    return min(budget // block_bytes, wanted)


def long_graphs_bytes(workspace: int, kv_budget: int, config: EngineConfig) -> int:
    """What is set apart for graphs of long steps, where the KV cache could have `kv_budget` bytes; 0 for none.

    Args:
        workspace: bytes that the largest step takes beside weights and cache.
    """
    most, given = config.max_num_batched_tokens, config.kv_cache_bytes
    wanted = workspace * min(most, MOST_MIXED_TOKENS) // most * 5 // 4
    room = kv_budget * LONG_GRAPHS_SHARE if given is None else kv_budget - given
    return 0 if config.enforce_eager or config.deterministic or wanted > room else wanted


@dataclass(frozen=True)
class TrialStep:
    """Shape of the first step: `rows` prefills of `tokens_per_row` tokens."""

    rows: int
    tokens_per_row: int


class KVBudget:
    """Finds the number of KV blocks around a trial step.

    On a GPU the trial is the largest prefill, and what it needs at its peak is not given to the cache. On the CPU
    the budget is `kv_cache_bytes`, or what `max_num_seqs` full contexts need up to 1 GiB.

    Attributes:
        long_graphs: bytes set apart for graphs of long steps, known at the end.
    """

    def __init__(self, device: torch.device, config: EngineConfig, block_bytes: int, blocks_per_seq: int) -> None:
        assert config.max_model_len is not None
        self._device, self._config, self._block_bytes = device, config, block_bytes
        self.trial_blocks = blocks_per_seq + 1
        self.long_graphs = self._before = 0
        if device.type == "cuda":
            per_row = min(config.max_model_len, config.max_num_batched_tokens)
            rows = min(max(1, config.max_num_batched_tokens // per_row), config.max_num_seqs)
            self.trial_tokens = TrialStep(rows, per_row)
        else:
            rows = min(2, config.max_num_seqs)
            self.trial_tokens = TrialStep(rows, min(3, config.max_model_len, config.max_num_batched_tokens // rows))

    def begin(self) -> None:
        """Start measuring the trial."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def end(self) -> int:
        """Number of KV blocks.

        Raises:
            CapacityError: not even one block fits.
        """
        budget, source = self._budget()
        blocks = kv_blocks(budget, self._block_bytes, self._config)
        if blocks < 1:
            raise CapacityError(
                f"the KV budget of {max(budget, 0)} bytes holds no block of {self._block_bytes} bytes",
                where=source,
                remedy="raise the budget, lower block_size, or use a smaller model",
            )
        return blocks

    def _budget(self) -> tuple[int, str]:
        config, given = self._config, self._config.kv_cache_bytes
        if self._device.type != "cuda":
            return (CPU_KV_BYTES, "CPU default budget") if given is None else (given, "kv_cache_bytes")
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
        workspace, peak = highest - self._before, highest - self.trial_blocks * self._block_bytes
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        budget = int(total * config.gpu_memory_utilization) - peak - others - RESERVE_BYTES
        self.long_graphs = long_graphs_bytes(workspace, budget, config)
        if given is not None:
            return given, "kv_cache_bytes"
        return budget - self.long_graphs, f"gpu_memory_utilization={config.gpu_memory_utilization}"
