"""What a user asks for and gets back: `SamplingParams`, `RequestOutput`, `CompletionOutput`.

Field names are vLLM's. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecomp.config import check_keys, is_int, is_real, refuses_unknown_options
from fusecomp.errors import ConfigError

MAX_LOGPROBS = 128
MAX_SAMPLES = 1024


class RequestOutputKind(enum.Enum):
    """What each output of a stream holds: all text and tokens so far, only the new ones, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@refuses_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when a request ends.

    Logits take, in this order: `logit_bias` and the bans (`bad_words`, `allowed_token_ids`, `min_tokens`), the
    repetition, frequency and presence penalties, temperature, top-k, top-p, min-p, typical-p. It is Hugging Face's
    order.

    Attributes:
        max_tokens: most tokens to generate; None means up to `max_model_len`.
        temperature: 0 is greedy (arg-max); otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
        seed: with it, the same prompt gives the same tokens whatever the batch; None takes the engine's seed.
        stop_token_ids: ids that end the request besides the model's end-of-sequence ids.
        ignore_eos: do not stop at the model's end-of-sequence ids.
        n: completions of the prompt. Completion i of a request with a seed is what seed + i alone would give.
        min_p: keep tokens whose probability is at least this share of the most likely one's; 0 keeps all.
        typical_p: keep the smallest set of tokens whose surprise is nearest to the entropy and whose probability
            reaches this; 1 keeps all.
        repetition_penalty: logits of tokens in prompt or output are divided by this when positive, else multiplied.
        repetition_context: ids that the repetition penalty takes to be in the prompt besides those that are.
        presence_penalty: subtracted once from the logits of tokens in the output.
        frequency_penalty: subtracted from the logits of tokens in the output, as often as they occur there.
        logit_bias: token id -> number added to its logit; -inf bans it.
        bad_words: texts (for `LLM`, which tokenizes them with and without a space before) or sequences of token ids
            whose last token is not generated after the others, in the prompt or not.
        allowed_token_ids: the only ids that may be generated; None allows all.
        min_tokens: no end-of-sequence or stop id is generated, and no stop string looked for, before as many tokens.
        stop: texts that end the request once the output contains one.
        include_stop_str_in_output: leave the stop text at the end of the output's text.
        skip_special_tokens: leave special tokens out of texts.
        logprobs: give the log-probability of each output token and of this many most likely ones (0: of the token
            alone), by the model's own logits, before any of the above; None gives none.
        prompt_logprobs: the same for the prompt's tokens.
        output_kind: what `LLM.stream` yields.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    repetition_context: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (not is_int(self.max_tokens) or self.max_tokens < 1):
            self._refuse("max_tokens", "give an integer of at least 1, or None for up to max_model_len")
        if not is_int(self.top_k) or self.top_k < -1:
            self._refuse("top_k", "give an integer of at least 1, or 0 or -1 for all tokens")
        if self.seed is not None and not is_int(self.seed):
            self._refuse("seed", "give an integer or None")
        self._check_numbers()
        if not is_int(self.n) or not 1 <= self.n <= MAX_SAMPLES:
            self._refuse("n", f"give an integer from 1 to {MAX_SAMPLES}")
        if not is_int(self.min_tokens) or not 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            self._refuse("min_tokens", "give an integer of at least 0, and of at most max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or not 0 <= value <= MAX_LOGPROBS):
                self._refuse(name, f"give an integer from 0 to {MAX_LOGPROBS}, or None")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "give True or False")
        if not isinstance(self.output_kind, RequestOutputKind):
            self._refuse("output_kind", "give a RequestOutputKind")
        self._settle_sequences()

    def _refuse(self, name: str, remedy: str) -> None:
        raise ConfigError(f"{name}={getattr(self, name)!r}", where="SamplingParams", remedy=remedy)

    def _check_numbers(self) -> None:
        def real(name: str, valid: Any, remedy: str) -> None:
            value = getattr(self, name)
            if not is_real(value) or not valid(value):
                self._refuse(name, remedy)

        real("temperature", lambda x: x >= 0, "give a finite number of at least 0; 0 is greedy")
        real("top_p", lambda x: 0 < x <= 1, "give a number in (0, 1]")
        real("min_p", lambda x: 0 <= x <= 1, "give a number in [0, 1]; 0 keeps all tokens")
        real("typical_p", lambda x: 0 < x <= 1, "give a number in (0, 1]; 1 keeps all tokens")
        real("repetition_penalty", lambda x: x > 0, "give a finite number above 0; 1 is none")
        for name in ("presence_penalty", "frequency_penalty"):
            real(name, lambda x: True, "give a finite number; 0 is none")

    def _settle_sequences(self) -> None:
        """Check the fields that hold several values, and make them tuples: parameters are hashable."""
        self._settle("stop_token_ids", _ids(self.stop_token_ids), "give a sequence of token ids")
        self._settle("repetition_context", _ids(self.repetition_context), "give a sequence of token ids")
        if self.allowed_token_ids is not None:
            allowed = _ids(self.allowed_token_ids)
            self._settle("allowed_token_ids", allowed or None, "give at least one token id, or None for all")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        texts = isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop)
        self._settle("stop", tuple(stop) if texts else None, "give a text or texts, none of them empty")
        words = self.bad_words if isinstance(self.bad_words, Sequence) and not isinstance(self.bad_words, str) else [0]
        settled = [word if isinstance(word, str) else _ids(word) for word in words]
        self._settle(
            "bad_words", tuple(settled) if all(settled) else None, "give texts or non-empty lists of token ids"
        )
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping) or not all(
            _ids((i,)) and (is_real(x) or x == -float("inf")) for i, x in bias.items()
        ):
            self._refuse("logit_bias", "give a dictionary of token ids and finite numbers or -inf")
        object.__setattr__(self, "logit_bias", dict(bias))

    def _settle(self, name: str, value: Any, remedy: str) -> None:
        if value is None:
            self._refuse(name, remedy)
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the arg-max is taken (temperature 0 or top_k 1)."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether logits depend on which tokens occurred."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied and checked."""
        check_keys(SamplingParams, changes, "SamplingParams")
        return dataclasses.replace(self, **changes)

    def sample(self, index: int) -> SamplingParams:
        """The parameters of completion `index` of the `n` alone."""
        if self.n == 1:
            return self
        return self.replace(n=1, seed=None if self.seed is None else self.seed + index)


def _ids(values: Any) -> tuple[int, ...] | None:
    """Token ids as a tuple; None when they are something else."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    return tuple(values) if all(is_int(i) and i >= 0 for i in values) else None


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token by the model's own logits, and its rank among all (1 is the most likely)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds on `time.monotonic`'s clock; None: not yet.

    Attributes:
        arrival_time: the engine took the request.
        first_scheduled_time: its first step was launched.
        first_token_time: its first token reached the host.
        last_token_time: its latest token did.
        finished_time: it ended.
        num_generation_tokens: tokens so far.
        num_preemptions: times it lost its cache and was computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def mean_time_between_tokens(self) -> float | None:
        """Mean seconds from one token to the next; None under two tokens."""
        if self.first_token_time is None or self.last_token_time is None or self.num_generation_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_generation_tokens - 1)


@dataclass
class CompletionOutput:
    """One completion of a request.

    `finish_reason` is "stop", "length", "abort", "error" or None while running; `stop_reason` the stop text or id that
    ended it, None for an end-of-sequence id. `logprobs` has one dictionary a token, by token id, the token's own first.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestOutput:
    """A request with its completions, in the order the prompts were given.

    `prompt_logprobs` has one entry a prompt token, None for the first. `metrics` are those of the first completion.
    `error` carries the message of a request that failed by itself; its `outputs` is then empty.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    error: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = None
