"""The requests of one caller under way in a session: admission, news of their tokens and texts, and their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fusecomp.errors import FusecompError
from fusecomp.request import RequestMetrics, SamplingParams
from fusecomp.runtime.detokenizer import Detokenizer, Followed, News

if TYPE_CHECKING:
    import numpy as np

    from fusecomp.runtime.outputs import StepOutput
    from fusecomp.runtime.session import Session

# Prompt token ids, parameters, and the priority: a lower number goes first.
Admissible = tuple[Sequence[int], SamplingParams] | tuple[Sequence[int], SamplingParams, int]


@dataclass(eq=False)
class Progress:
    """One completion under way: number `sample` of the request at position `index` of the list given.

    Finished once `finish_reason` or `error` is set. Tokens, scores and text are complete then, and at any time a prefix
    of what they will be, except that a stop text found later ends them earlier.

    Attributes:
        request_id: the engine's name; empty when it was refused.
        stop_reason: the stop text or id that ended it.
        scores, prompt_scores: packed log-probabilities by output token, and by index in the prompt.
        metrics: when things happened; None before the first token, or when it was refused.
        num_shown: tokens whose text is in `text`, while it grows with them.
    """

    index: int
    sample: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    stop_reason: int | str | None = None
    scores: list[np.ndarray] = field(default_factory=list)
    prompt_scores: dict[int, np.ndarray] = field(default_factory=dict)
    metrics: RequestMetrics | None = None
    num_shown: int = 0
    _texts: list[str] = field(default_factory=list)
    _reason: str | None = None  # the engine's, before the text is complete

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def text(self) -> str:
        """Characters so far."""
        self._texts = ["".join(self._texts)]
        return self._texts[0]


class Call:
    """The requests of one caller, from admission to end. Made by `Session.call`.

    Attributes:
        all: their progress, in order.
    """

    def __init__(self, session: Session, detokenizer: Detokenizer | None, live: bool) -> None:
        self.all: list[Progress] = []
        self._session, self._detokenizer, self._live = session, detokenizer, live
        self._followed: dict[Progress, Followed] = {}
        self._unfinished: set[Progress] = set()
        # What steps gave since the last look, under the session's lock.
        self._fresh: dict[Progress, list[int]] = {}

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return not self._unfinished

    def admit(self, requests: Sequence[Admissible | FusecompError], errors: str) -> None:
        """Hand all requests to the engine."""
        with self._session.lock:
            for index, request in enumerate(requests):
                self._admit(index, request, errors)

    def _admit(self, index: int, request: Admissible | FusecompError, errors: str) -> None:
        base = self._session.next_id()
        prompt, params, *rest = ([], SamplingParams()) if isinstance(request, FusecompError) else request
        priority = rest[0] if rest else 0
        for sample in range(params.n):
            progress = Progress(index, sample, params.sample(sample))
            self.all.append(progress)
            request_id = base if params.n == 1 else f"{base}/{sample}"
            try:
                if isinstance(request, FusecompError):
                    raise request
                self._session.engine.add_request(request_id, list(prompt), progress.params, priority=priority)
            except FusecompError as error:
                # The engine's own name of the request means nothing to the caller.
                where = f"prompt {index}" if errors == "raise" else error.where if error is request else ""
                named = type(error)(error.what, where=where, why=error.why, remedy=error.remedy)
                if errors == "raise":
                    raise named from error
                progress.error = str(named)
            else:
                progress.request_id = request_id
                self._session.calls[request_id] = self, progress
                self._unfinished.add(progress)
                if self._detokenizer is not None:
                    self._followed[progress] = Followed(progress, progress.params, self._live)

    def receive(self, progress: Progress, output: StepOutput) -> None:
        """Take what a step gave; under the session's lock."""
        new = self._fresh.setdefault(progress, [])
        new += output.new_token_ids
        if output.scores is not None:
            progress.scores.append(output.scores)
        if output.prompt_scores is not None:
            progress.prompt_scores |= enumerate(output.prompt_scores, output.prompt_start)
        if output.error is not None:
            progress.error, progress._reason = output.error, "error"
        elif output.finish_reason is not None:
            progress._reason = output.finish_reason
        if output.metrics is not None:
            progress.metrics = output.metrics

    def end(self, progress: Progress, reason: str, metrics: RequestMetrics | None) -> None:
        """The engine was told to end a request; under the session's lock."""
        progress.metrics, progress._reason = metrics, reason
        self._fresh.setdefault(progress, [])

    def stop(self, progress: Progress, num_tokens: int, reason: int | str | None = None) -> None:
        """End a completion after its first `num_tokens`, whatever came after them: a caller's own stop rule."""
        session = self._session
        with session.lock:
            if session.calls.pop(progress.request_id, None) is not None:
                progress.metrics = session.engine.end_request(progress.request_id, "stop")
            self._fresh.pop(progress, None)
        self._finish(progress, "stop", num_tokens, reason)

    def fail(self, progress: Progress, error: str) -> None:
        """End a completion that something outside the engine went wrong with; all others go on."""
        session = self._session
        with session.lock:
            if session.calls.pop(progress.request_id, None) is not None:
                progress.metrics = session.engine.end_request(progress.request_id, "error")
            self._fresh.pop(progress, None)
        progress.error, progress._reason = error, "error"
        self._unfinished.discard(progress)

    def advance(self) -> list[Progress]:
        """Wait for news and return what has some. The engine steps if nothing came from other callers' steps."""
        session = self._session
        with session.lock:
            if not self._fresh and any(progress._reason is None for progress in self._unfinished):
                session.step()
            fresh, self._fresh = self._fresh, {}
        for progress, new in fresh.items():
            progress.token_ids += new
        if self._detokenizer is None:
            for progress in fresh:
                if progress._reason is not None and not progress.finished:
                    self._finish(progress, progress._reason, len(progress.token_ids))
                elif progress.error is not None:
                    self._unfinished.discard(progress)
            return list(fresh)
        updates = []
        for progress, new in fresh.items():
            if progress.error is not None:
                self._unfinished.discard(progress)
            elif progress in self._unfinished:
                if self._live or progress.params.stop:
                    updates.append((self._followed[progress], new, progress._reason))
                elif progress._reason is not None:  # nobody looks at its text before
                    updates.append((self._followed[progress], list(progress.token_ids), progress._reason))
        self._detokenizer.put(updates)
        news = self._detokenizer.take(wait=all(progress._reason is not None for progress in self._unfinished))
        changed = dict.fromkeys(progress for progress in fresh if progress.error is not None)
        for each in news:
            self._hear(each)
            changed[each.key] = None
        return list(changed)

    def _hear(self, news: News) -> None:
        progress = news.key
        if progress.finished:
            return
        if news.error is not None:
            self.fail(progress, news.error)
            return
        progress.num_shown = news.num_tokens
        if news.text:
            progress._texts.append(news.text)
        if not news.finished:
            return
        if news.stop_reason is None:
            self._finish(progress, progress._reason, news.num_tokens)
        else:
            self.stop(progress, news.num_tokens, news.stop_reason)

    def _finish(self, progress: Progress, reason: str, num_tokens: int, stopped_by: int | str | None = None) -> None:
        del progress.token_ids[num_tokens:], progress.scores[num_tokens:]
        progress.finish_reason, progress.stop_reason = reason, stopped_by
        if reason == "stop" and stopped_by is None and progress.token_ids[-1] in progress.params.stop_token_ids:
            progress.stop_reason = progress.token_ids[-1]
        self._unfinished.discard(progress)

    def close(self) -> None:
        """Abort what is unfinished and end the detokenizer's thread."""
        session = self._session
        with session.lock:
            for progress in self.all:
                if session.calls.pop(progress.request_id, None) is not None:
                    session.engine.abort_request(progress.request_id)
        self._unfinished.clear()
        if self._detokenizer is not None:
            self._detokenizer.close()
