"""Hugging Face's `generate` contract in terms of engine requests.

In: what `GenerationMixin.generate` was called with, and what it prepared. Out: a `Plan` the engine can serve token for
token, or the reason why it cannot, as one clause. Nothing is ignored: an option, logits processor or stopping criterion
that is not known here is a reason.

Legend: B rows of the batch (prompts times `num_return_sequences`), P padded prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.configuration_utils import (
    ALL_STATIC_CACHE_IMPLEMENTATIONS,
    GenerationConfig,
    GenerationMode,
)
from transformers.generation.utils import GenerationMixin

from fusecomp.errors import CapacityError, ConfigError, RequestError
from fusecomp.processors import Prompt, row_fields, sampling_fields
from fusecomp.request import SamplingParams
from fusecomp.runtime.session import interrupts_between_steps

if TYPE_CHECKING:
    from fusecomp.runtime.call import Progress
    from fusecomp.runtime.session import Session

# Model inputs the packed step reproduces; `position_ids` are those that `generate` derives from the mask.
MODEL_INPUTS = {"input_ids", "attention_mask"}
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")


@dataclass(frozen=True)
class Plan:
    """What the engine is asked for.

    Attributes:
        requests: one per row.
        pad_token_id: fills rows that end early; None without one.
        criteria: stopping rules that are asked on the host after each position.
        rows_end: rows end one by one; otherwise, without end-of-sequence ids, all go on until the last has met a rule.
    """

    requests: Sequence[tuple[list[int], SamplingParams]]
    pad_token_id: int | None
    criteria: stopping_criteria.StoppingCriteriaList
    rows_end: bool


def refuse_call(
    model: Any,
    stock_class: type[GenerationMixin],
    generation_config: GenerationConfig | None,
    *,
    custom_generate: Any,
    assistant_model: Any,
    synced_gpus: bool | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why this call to `generate` cannot be served, judged by its arguments; None when it may be."""
    if stock_class.generate is not GenerationMixin.generate:
        return f"{stock_class.__name__} has its own generate"
    if model.training:
        return "the model is in training mode (call model.eval())"
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    for name, value in (("custom_generate", custom_generate), ("assistant_model", assistant_model)):
        if value is not None:
            return f"{name} was given"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if synced_gpus or (synced_gpus is None and distributed and torch.distributed.get_world_size() > 1):
        return "synced_gpus is needed"
    options = {k: v for k, v in kwargs.items() if k not in ("tokenizer", "assistant_tokenizer", "trust_remote_code")}
    if options.get("cache_implementation") == "paged":
        return "cache_implementation='paged' asks for transformers' own continuous batching"
    config, inputs = model._prepare_generation_config(generation_config, **options)
    model._validate_model_kwargs(inputs.copy())  # a misspelt option raises what stock generate raises
    extra = sorted(name for name, value in inputs.items() if value is not None and name not in MODEL_INPUTS)
    outputs = [name for name in OUTPUTS if getattr(config, name)]
    if outputs:
        return f"{outputs[0]} was asked for"
    if extra:
        return f"the model input {extra[0]} was given"
    return _refuse_config(config)


def _refuse_config(config: GenerationConfig) -> str | None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        beams = f" (num_beams={config.num_beams})" if (config.num_beams or 1) > 1 else ""
        return f"{mode.value.replace('_', ' ')}{beams} was asked for"
    if config.token_healing:
        return "token_healing was asked for"
    # A dynamic or static cache gives the same tokens as pages do; a quantized or offloaded one is a wish of its own.
    cache = config.cache_implementation
    if cache not in (None, "dynamic") and (cache not in ALL_STATIC_CACHE_IMPLEMENTATIONS or "offloaded" in cache):
        return f"cache_implementation={cache!r} was given"
    return None


def make_plan(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    processors: logits_process.LogitsProcessorList,
    criteria: stopping_criteria.StoppingCriteriaList,
    config: GenerationConfig,
    max_model_len: int,
) -> Plan | str:
    """The requests that give what stock decoding would give from the same prepared arguments, or why there are none.

    Args:
        input_ids: [B, P], left-padded.
        attention_mask: [B, P] of zeros and ones, or None for all ones.
        processors, criteria, config: as `generate` prepared them.
        max_model_len: the engine's limit on prompt plus output.
    """
    max_length: int | None = None
    eos_ids: set[int] = set()
    asked = stopping_criteria.StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is stopping_criteria.MaxLengthCriteria:
            max_length = criterion.max_length if max_length is None else min(max_length, criterion.max_length)
        elif type(criterion) is stopping_criteria.EosTokenCriteria:
            eos_ids.update(int(i) for i in criterion.eos_token_id.flatten().tolist())
        elif isinstance(criterion, stopping_criteria.ConfidenceCriteria):
            return f"the stopping criterion {type(criterion).__name__} needs scores"
        else:
            asked.append(criterion)
    if max_length is None:
        return "no length limit was given"
    max_tokens = max(max_length - input_ids.shape[1], 1)
    prompts = _unpad(input_ids, attention_mask)
    if isinstance(prompts, str):
        return prompts
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if longest + max_tokens > max_model_len:
        return f"{longest} prompt tokens and {max_tokens} new ones exceed max_model_len={max_model_len}"
    stop_ids = tuple(sorted(i for i in eos_ids if i >= 0))
    fields = sampling_fields(processors, bool(config.do_sample), prompts, stop_ids, max_tokens)
    if isinstance(fields, str):
        return fields
    common: dict[str, Any] = {"max_tokens": max_tokens, "stop_token_ids": stop_ids, "ignore_eos": True}
    # Rows draw their seeds from torch's generator, so torch.manual_seed governs sampling as it does in `generate`.
    seeds = torch.randint(2**62, (len(prompts),)).tolist() if config.do_sample else [None] * len(prompts)
    try:
        requests = [
            (prompt.token_ids, SamplingParams(seed=seed, **common, **row_fields(fields, prompt)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    except ConfigError as error:  # an infinite temperature, say
        return str(error)
    pad = config._pad_token_tensor
    rows_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    return Plan(requests, None if pad is None else int(pad), asked, rows_end)


def _unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[Prompt] | str:
    """The rows of `input_ids`, apart from their left padding."""
    rows = input_ids.tolist()
    if attention_mask is None:
        return [Prompt((), row) for row in rows]
    if attention_mask.shape != input_ids.shape:
        return f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
    prompts = []
    for index, (row, mask) in enumerate(zip(rows, attention_mask.tolist(), strict=True)):
        length = sum(1 for bit in mask if bit == 1)
        if length == 0:
            return f"attention_mask hides all of row {index}"
        if any(bit != 0 for bit in mask[:-length]) or any(bit != 1 for bit in mask[-length:]):
            return f"attention_mask of row {index} is not left padding"
        prompts.append(Prompt(row[:-length], row[-length:]))
    return prompts


class _Lockstep:
    """Rows of [B, P + new] that the engine advances at their own pace, seen position by position as `generate` does."""

    def __init__(self, plan: Plan, input_ids: torch.Tensor, streamer: Any) -> None:
        self._plan, self._streamer = plan, streamer
        self._pad = 0 if plan.pad_token_id is None else plan.pad_token_id  # without one, no row ends before the others
        self._length, most = input_ids.shape[1], max(params.max_tokens or 0 for _, params in plan.requests)
        self.ids = torch.full((len(input_ids), self._length + most), self._pad, device=input_ids.device)
        self.ids[:, : self._length] = input_ids
        self.shown = 0
        self.met = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def look(self, rows: list[Progress], stop: Callable[[Progress, int], None]) -> None:
        """Go over the positions that all rows have reached; `stop` ends a row after a number of tokens."""
        while self.shown < self._reached(rows):
            at = self.shown
            column = torch.tensor([(row.token_ids[at : at + 1] or [self._pad])[0] for row in rows])
            self.ids[:, self._length + at] = column.to(self.ids.device)
            self.shown = at + 1
            if self._plan.criteria:
                self.met = self.met | self._plan.criteria(self.ids[:, : self._length + at + 1], None)
                everyone = bool(self.met.all())
                for row, met in zip(rows, self.met.tolist(), strict=True):
                    if met and (everyone or self._plan.rows_end) and not _ended(row, at + 1):
                        stop(row, at + 1)
            if self._streamer is not None:
                self._streamer.put(column)

    @staticmethod
    def _reached(rows: list[Progress]) -> int:
        lengths = [len(row.token_ids) for row in rows]
        return min((n for n, row in zip(lengths, rows, strict=True) if not row.finished), default=max(lengths))


def _ended(row: Progress, length: int) -> bool:
    """Whether a row has ended with at most `length` tokens."""
    return row.finished and len(row.token_ids) <= length


def decode(session: Session, plan: Plan, input_ids: torch.Tensor, streamer: Any) -> torch.Tensor | str:
    """Serve `plan` and return [B, P + longest output], each row padded as stock decoding pads it.

    When the engine does not admit a row, nothing has run and the reason is returned instead.

    `streamer` gets one [B] tensor per position, as soon as every row has reached it, then `end()`. The prompt was put
    by `generate` already.

    Raises:
        RequestError: a row failed while it ran (the others cannot be returned in one tensor without it).
    """
    lockstep = _Lockstep(plan, input_ids, streamer) if streamer is not None or plan.criteria else None
    try:
        with interrupts_between_steps() as check_interrupt, session.call(plan.requests) as call:
            while not call.finished:
                check_interrupt()
                call.advance()
                if lockstep is not None and all(row.error is None for row in call.all):
                    lockstep.look(call.all, call.stop)
            results = call.all
    except (RequestError, CapacityError) as error:
        return str(error)
    for result in results:
        if result.error is not None:
            raise RequestError(result.error, where=f"row {result.index} of input_ids")
    if streamer is not None:
        streamer.end()
    pad = 0 if plan.pad_token_id is None else plan.pad_token_id
    longest = max(len(result.token_ids) for result in results)
    generated = [r.token_ids + [pad] * (longest - len(r.token_ids)) for r in results]
    new_ids = torch.tensor(generated, dtype=torch.long, device=input_ids.device)
    return torch.cat([input_ids, new_ids], dim=-1)
