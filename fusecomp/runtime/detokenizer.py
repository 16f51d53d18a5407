"""Token ids to text, piece by piece, and the search for stop texts, in a thread of their own.

A text grows by whole characters: bytes that do not make one yet are held back, and so is what may begin a stop text.
Only the tokens of the last few characters are decoded again, so the cost of an output is linear in its length.

The engine's loop hands over what a step gave (`Detokenizer.put`) and takes what is ready (`take`); it waits only when
it has nothing else to do. Completions that nobody streams and that have no stop text are decoded once, at their end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusecomp.request import SamplingParams

# What decoders write for bytes that are no character, or not yet one; a character has at most three bytes before its
# last.
UNFINISHED = "\ufffd"
MOST_UNFINISHED = 3
# A window in which no token ends a character, such as bytes that are no text, is cut each time it has grown by as many
# tokens, at one of the last few places where cutting changes nothing.
LONG_WINDOW, CUTS = 16, 8


class TextStream:
    """The text of one growing list of token ids.

    A window of the latest ids is decoded whole at each step; the first `_shown` characters of it were returned. It
    starts one finished piece early, because decoders treat the first token differently (a leading space is dropped).

    Args:
        decode: ids -> text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # ids at the start of the window that only give the context
        self._shown = 0

    def push(self, token: int) -> str:
        """Add a token; returns the characters that are now certain."""
        self._ids.append(token)
        window = self._decode(self._ids)
        certain = len(window.rstrip(UNFINISHED))
        end = max(certain, len(window) - MOST_UNFINISHED, self._shown)
        new, self._shown = window[self._shown : end], end
        if new and end == certain == len(window):
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = len(self._decode(self._ids))
        elif len(self._ids) % LONG_WINDOW == 0:
            self._cut(window)
        return new

    def finish(self) -> str:
        """No more tokens come: returns what was held back."""
        window = self._decode(self._ids) if self._ids else ""
        new, self._shown = window[self._shown :], len(window)
        return new

    def _cut(self, window: str) -> None:
        for at in range(len(self._ids) - 1, max(0, len(self._ids) - 1 - CUTS), -1):
            head = self._decode(self._ids[:at])
            if len(head) <= self._shown and head + self._decode(self._ids[at:]) == window:
                self._ids, self._context, self._shown = self._ids[at:], 0, self._shown - len(head)
                return


@dataclass(frozen=True, slots=True)
class News:
    """What became known of a completion: characters to show, and at the end how many tokens it has, and a stop text.

    With `error` it ended because its text could not be made; others go on.
    """

    key: Any
    text: str
    finished: bool
    num_tokens: int
    stop_reason: str | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Followed:
    """One completion as the thread knows it. The caller gives the first three fields.

    Attributes:
        key: the caller's name for it.
        params: of the request.
        live: characters are wanted as they come.
        held: characters that may begin a stop text.
    """

    key: Any
    params: SamplingParams
    live: bool
    finished: bool = False
    num_tokens: int = 0
    _ids: list[int] = field(default_factory=list)
    _stream: TextStream | None = None
    _ready: list[str] = field(default_factory=list)
    held: str = ""

    def add(self, ids: Sequence[int], reason: str | None, decode: Callable[[list[int]], str]) -> News | None:
        """Add ids and the finish reason, if it ended ("stop": by its last token, which is no text)."""
        if self.finished:
            return None  # tokens that were in flight when the stop text was found
        text_ids = ids[:-1] if reason == "stop" else ids
        if not (self.live or self.params.stop):
            self._ids += text_ids
            self.num_tokens += len(ids)
            if reason is None:
                return None
            self._ready.append(decode(self._ids))
            return self._end(None)
        if self._stream is None:
            self._stream = TextStream(decode)
        for token in text_ids:
            self.num_tokens += 1
            text, stop = self._search(self._stream.push(token))
            self._ready.append(text)
            if stop is not None:
                return self._end(stop)
        if reason is not None:
            self.num_tokens += len(ids) - len(text_ids)
            text, stop = self._search(self._stream.finish())
            self._ready += [text, self.held]
            return self._end(stop)
        return self._news(None) if self.live else None

    def _end(self, stop: str | None) -> News:
        self.finished = True
        return self._news(stop)

    def _news(self, stop: str | None) -> News:
        text, self._ready = "".join(self._ready), []
        return News(self.key, text, self.finished, self.num_tokens, stop)

    def _search(self, new: str) -> tuple[str, str | None]:
        """Characters to show after `new` ones came, and the stop text that they end."""
        params, text = self.params, self.held + new
        if not params.stop:
            return new, None
        if self.num_tokens > params.min_tokens and new:
            found = [(at, stop) for stop in params.stop if (at := text.find(stop)) >= 0]
            if found:
                at, stop = min(found, key=lambda each: each[0])
                self.held = ""
                return text[: at + len(stop) if params.include_stop_str_in_output else at], stop
        # A stop text can only begin where an end of the text begins one.
        longest = min(len(text), max(map(len, params.stop)) - 1)
        size = next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in params.stop)), 0)
        self.held = text[len(text) - size :]
        return text[: len(text) - size], None


class Detokenizer:
    """Follows completions in a thread, which starts with the first one and ends with `close`.

    Args:
        tokenizer: with `decode(ids, skip_special_tokens=...)`; None gives empty texts.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._in: queue.SimpleQueue = queue.SimpleQueue()
        self._out: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unanswered = 0

    def put(self, updates: list[tuple[Followed, list[int], str | None]]) -> None:
        """Hand over new ids of completions, and the finish reason of those that ended."""
        if not updates:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fusecomp-detokenizer", daemon=True)
            self._thread.start()
        self._unanswered += 1
        self._in.put(updates)

    def take(self, *, wait: bool = False) -> list[News]:
        """News since the last call. With `wait`, of all that was put."""
        news: list[News] = []
        while self._unanswered:
            try:
                found = self._out.get(block=wait)
            except queue.Empty:
                break
            self._unanswered -= 1
            if isinstance(found, BaseException):
                raise found
            news += found
        return news

    def close(self) -> None:
        """End the thread once it has worked off what it has."""
        if self._thread is not None:
            self._in.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (updates := self._in.get()) is not None:
            try:
                news = [self._follow(*update) for update in updates]
                self._out.put([each for each in news if each is not None])
            except BaseException as error:  # nothing that one completion is to blame for
                self._out.put(error)

    def _follow(self, followed: Followed, ids: list[int], reason: str | None) -> News | None:
        """What these ids make of one completion; a tokenizer that raises ends that completion."""
        try:
            return followed.add(ids, reason, self._decoder(followed.params))
        except Exception as error:
            followed.finished = True
            why = f"its text cannot be made: {type(error).__name__}: {error}"
            return News(followed.key, "", True, followed.num_tokens, error=why)

    def _decoder(self, params: SamplingParams) -> Callable[[list[int]], str]:
        tokenizer, skip = self._tokenizer, params.skip_special_tokens
        if tokenizer is None:
            return lambda ids: ""
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=skip))
