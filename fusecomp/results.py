"""From what a session gives to what a user gets: `RequestOutput`s, whole or as a stream's increments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecomp.request import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams
from fusecomp.runtime.call import Progress
from fusecomp.runtime.logprobs import unpack


@dataclass
class Asked:
    """One prompt as it was given, its token ids (none when it was refused) and its parameters."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams


@dataclass
class Assembler:
    """Puts completions of one list of prompts together.

    Args:
        asked: the prompts.
        tokenizer: names the tokens of log-probabilities; None leaves them without.
    """

    asked: Sequence[Asked]
    tokenizer: Any
    _names: dict[int, str] = field(default_factory=dict)
    _samples: dict[int, list[Progress]] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    _given: dict[Progress, tuple[int, int]] = field(default_factory=dict)  # tokens and characters of a stream's deltas

    def expect(self, everything: Sequence[Progress]) -> None:
        """Note all completions there will be."""
        for progress in everything:
            self._samples.setdefault(progress.index, []).append(progress)

    @property
    def expected(self) -> bool:
        """Whether `expect` was called."""
        return bool(self._samples)

    def name(self, index: int, request_id: str) -> None:
        """Give a request another name than its position."""
        self._names[index] = request_id

    def whole(self, progress: Progress) -> RequestOutput | None:
        """The output of a request, when its last completion, `progress`, ended; None otherwise, and the second time."""
        samples = self._samples[progress.index]
        if progress.index in self._ended or not all(sample.finished for sample in samples):
            return None
        self._ended.add(progress.index)
        failed = next((sample for sample in samples if sample.error is not None), None)
        if failed is not None:
            return self._failure(failed, str(failed.error))
        try:
            output = self._request(samples[0], finished=True)
            output.outputs = [self._completion(sample, 0, 0, len(sample.token_ids)) for sample in samples]
        except Exception as error:  # a tokenizer's
            return self._failure(progress, _unnamed(error))
        return output

    def _failure(self, progress: Progress, error: str) -> RequestOutput:
        """The last output of a request that failed."""
        self._ended.add(progress.index)
        asked = self.asked[progress.index]
        name = self._names.get(progress.index, str(progress.index))
        return RequestOutput(name, asked.text, asked.token_ids, error=error, finished=True, metrics=progress.metrics)

    def increment(self, progress: Progress) -> RequestOutput | None:
        """A stream's next output after news of `progress`, as its `output_kind` has it; None for nothing to show."""
        kind, samples = progress.params.output_kind, self._samples[progress.index]
        if progress.index in self._ended:  # it failed, and was told to end
            return None
        try:
            return self._increment(progress, kind, samples)
        except Exception as error:  # a tokenizer's
            return self._failure(progress, _unnamed(error))

    def _increment(self, progress: Progress, kind: RequestOutputKind, samples: list[Progress]) -> RequestOutput | None:
        if kind is RequestOutputKind.FINAL_ONLY or progress.error is not None:
            return self.whole(progress) if progress.finished else None
        output = self._request(progress, finished=all(sample.finished for sample in samples))
        end = len(progress.token_ids) if progress.finished else progress.num_shown
        tokens, characters = self._given.get(progress, (0, 0)) if kind is RequestOutputKind.DELTA else (0, 0)
        if progress not in self._given or kind is not RequestOutputKind.DELTA or progress.finished or end > tokens:
            output.outputs = [self._completion(progress, tokens, characters, end)]
            self._given[progress] = end, len(progress.text)
            return output
        return None

    def _request(self, progress: Progress, *, finished: bool) -> RequestOutput:
        asked = self.asked[progress.index]
        name = self._names.get(progress.index, str(progress.index))
        output = RequestOutput(name, asked.text, asked.token_ids, finished=finished, metrics=progress.metrics)
        wanted = asked.params.prompt_logprobs
        if wanted is not None and progress.error is None:
            rows = [progress.prompt_scores.get(at) for at in range(1, len(asked.token_ids))]
            output.prompt_logprobs = [
                None,
                *(None if row is None else self._named(unpack(row, wanted)) for row in rows),
            ]
        return output

    def _completion(self, progress: Progress, tokens: int, characters: int, end: int) -> CompletionOutput:
        output = CompletionOutput(
            progress.sample,
            progress.text[characters:],
            progress.token_ids[tokens:end],
            progress.finish_reason,
            progress.stop_reason,
        )
        wanted = progress.params.logprobs
        if wanted is not None:
            output.logprobs = [self._named(unpack(row, wanted)) for row in progress.scores[tokens:end]]
            own = zip(progress.scores[:end], progress.token_ids[:end], strict=True)
            output.cumulative_logprob = sum(unpack(row, 0)[token].logprob for row, token in own)
        return output

    def _named(self, found: dict[int, Logprob]) -> dict[int, Logprob]:
        if self.tokenizer is not None:
            for token, value in found.items():
                value.decoded_token = str(self.tokenizer.decode([token]))
        return found


def _unnamed(error: Exception) -> str:
    return f"tokens of its log-probabilities have no name: {type(error).__name__}: {error}"
