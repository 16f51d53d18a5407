"""Hugging Face's logits processors as fields of `SamplingParams`.

In: the processors that `generate` prepared. Out: fields that give the same tokens, or the reason why there are none, as
one clause. A processor that is not known here, or stands in another order, is a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.generation import logits_process as hf

INF = float("inf")
# In the order `generate` applies them, which is also the engine's. `LogitNormalization` changes no token.
SAMPLERS = {
    hf.TemperatureLogitsWarper: ("temperature", "temperature"),
    hf.TopKLogitsWarper: ("top_k", "top_k"),
    hf.TopPLogitsWarper: ("top_p", "top_p"),
    hf.MinPLogitsWarper: ("min_p", "min_p"),
    hf.TypicalLogitsWarper: ("mass", "typical_p"),
}
ADJUSTERS = (
    hf.SequenceBiasLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.NoBadWordsLogitsProcessor,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
)
ORDER = (*ADJUSTERS, *SAMPLERS, hf.LogitNormalization)


@dataclass(frozen=True)
class Prompt:
    """A row of `input_ids`: what pads it on the left, and its tokens."""

    padding: Sequence[int]
    token_ids: list[int]


def sampling_fields(
    processors: hf.LogitsProcessorList,
    do_sample: bool,
    prompts: Sequence[Prompt],
    stop_ids: Sequence[int],
    max_tokens: int,
) -> dict[str, Any] | str:
    """Fields of `SamplingParams` for all rows, without those that `row_fields` adds.

    Args:
        processors: as `generate` prepared them.
        stop_ids: what ends a row.
        max_tokens: most new tokens.
    """
    fields: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    bias: dict[int, float] = {}
    length = len(prompts[0].padding) + len(prompts[0].token_ids)
    reached = 0
    for processor in processors:
        kind = type(processor)
        if kind not in ORDER[reached:] or (kind in SAMPLERS and not do_sample):
            return f"the logits processor {kind.__name__} is not covered"
        reached = ORDER.index(kind) + 1
        reason = None
        if kind in SAMPLERS:
            reason = _sampler(processor, fields)
        elif kind is hf.SequenceBiasLogitsProcessor:
            if any(len(ids) > 1 for ids in processor.sequence_bias):
                return "sequence_bias of several tokens was given"
            bias |= {int(ids[0]): value for ids, value in processor.sequence_bias.items()}
        elif kind is hf.RepetitionPenaltyLogitsProcessor:
            if processor.prompt_ignore_length:
                return f"prompt_ignore_length={processor.prompt_ignore_length} was given"
            fields["repetition_penalty"] = processor.penalty
        elif kind is hf.NoBadWordsLogitsProcessor:
            words = [tuple(map(int, word)) for word in processor.sequence_bias]
            reason = _words_reason(words, prompts)
            fields["bad_words"] = tuple(words)
        elif kind is hf.SuppressTokensLogitsProcessor:
            bias |= dict.fromkeys(processor.suppress_tokens.tolist(), -INF)
        elif kind in (hf.MinLengthLogitsProcessor, hf.MinNewTokensLengthLogitsProcessor):
            if {*processor.eos_token_id.flatten().tolist()} != {*stop_ids}:
                return f"{kind.__name__} holds other tokens back than those that end a row"
            least = _least(processor) - length
            fields["min_tokens"] = min(max_tokens, max(0, least, fields.get("min_tokens", 0)))
        if reason is not None:
            return reason
    if fields.get("top_p") == 0:
        return "top_p=0 was given"
    return {**fields, "logit_bias": bias}


def row_fields(fields: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    """`fields` for one row: Hugging Face's repetition penalty sees the padding too."""
    if "repetition_penalty" not in fields or not prompt.padding:
        return fields
    return {**fields, "repetition_context": tuple(dict.fromkeys(prompt.padding))}


def _sampler(processor: Any, fields: dict[str, Any]) -> str | None:
    kind = type(processor)
    if getattr(processor, "filter_value", -INF) != -INF:
        return f"{kind.__name__} has filter_value={processor.filter_value}"
    if getattr(processor, "min_tokens_to_keep", 1) != 1:
        return f"{kind.__name__} has min_tokens_to_keep={processor.min_tokens_to_keep}"
    attribute, name = SAMPLERS[kind]
    fields[name] = getattr(processor, attribute)
    return None


def _least(processor: Any) -> int:
    """Length of prompt and output that the processor asks for."""
    if type(processor) is hf.MinLengthLogitsProcessor:
        return processor.min_length
    return processor.prompt_length_to_skip + processor.min_new_tokens


def _words_reason(words: Sequence[tuple[int, ...]], prompts: Sequence[Prompt]) -> str | None:
    """Where Hugging Face matches words otherwise: it sees the padding, and not a prefix that is the whole context."""
    prefixes = [word[:-1] for word in words if len(word) > 1]
    for prompt in prompts:
        if any(set(prefix) & set(prompt.padding) for prefix in prefixes):
            return "bad_words_ids hold a token that pads the prompts"
        start = tuple(prompt.token_ids)
        if not prompt.padding and any(prefix[: len(start)] == start for prefix in prefixes):
            return "the prompt is the beginning of one of bad_words_ids"
    return None
