"""What a user asks for and gets back: `SamplingParams`, `RequestOutput`, `CompletionOutput`.

Field names are vLLM's. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecomp.config import check_keys, is_int, is_real, refuses_unknown_options
from fusecomp.errors import ConfigError


@refuses_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a request ends.

    Attributes:
        max_tokens: most tokens to generate; None means up to `max_model_len`.
        temperature: 0 is greedy (arg-max); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        seed: with it, the same prompt gives the same tokens whatever the batch; None takes the engine's seed.
        stop_token_ids: ids that end the request besides the model's end-of-sequence ids.
        ignore_eos: do not stop at the model's end-of-sequence ids.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def refuse(name: str, remedy: str) -> None:
            raise ConfigError(f"{name}={getattr(self, name)!r}", where="SamplingParams", remedy=remedy)

        if self.max_tokens is not None and (not is_int(self.max_tokens) or self.max_tokens < 1):
            refuse("max_tokens", "give an integer of at least 1, or None for up to max_model_len")
        if not is_real(self.temperature) or self.temperature < 0:
            refuse("temperature", "give a finite number of at least 0; 0 is greedy")
        if not is_int(self.top_k) or self.top_k < -1:
            refuse("top_k", "give an integer of at least 1, or 0 or -1 for all tokens")
        if not is_real(self.top_p) or not 0 < self.top_p <= 1:
            refuse("top_p", "give a number in (0, 1]")
        if self.seed is not None and not is_int(self.seed):
            refuse("seed", "give an integer or None")
        ids = self.stop_token_ids
        if not isinstance(ids, Sequence) or isinstance(ids, str) or not all(is_int(i) and i >= 0 for i in ids):
            refuse("stop_token_ids", "give a sequence of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @property
    def greedy(self) -> bool:
        """Whether the arg-max is taken (temperature 0 or top_k 1)."""
        return self.temperature == 0 or self.top_k == 1

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied and checked."""
        check_keys(SamplingParams, changes, "SamplingParams")
        return dataclasses.replace(self, **changes)


@dataclass
class CompletionOutput:
    """One completion of a request. `finish_reason` is "stop", "length", "abort", "error" or None while running."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    """A request with its completions, in the order the prompts were given.

    `error` carries the message of a request that failed by itself; its `outputs` is then empty.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
