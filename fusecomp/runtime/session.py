"""Drives an engine: lists of requests in, their tokens and texts out, whatever happens in between.

Invariants: requests of a call are admitted all together before their first step; on any exception, Ctrl-C included,
every unfinished request of that call is aborted, so the engine stays usable. Calls of several threads, and streams that
are open at the same time, share the engine's steps: whoever steps it hands the others what is theirs.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fusecomp.config import EngineConfig, is_int
from fusecomp.errors import CheckpointError, FusecompError
from fusecomp.imports import fast_imports
from fusecomp.runtime.call import Admissible, Call, Progress
from fusecomp.runtime.detokenizer import Detokenizer
from fusecomp.runtime.loading import EXCLUSIVE

if TYPE_CHECKING:
    import torch

    from fusecomp.runtime.engine import Engine

OnStep = Callable[["list[Progress]", "list[Progress]"], None]


def engine_class() -> type[Engine]:
    """The engine sessions drive. Imported late: it brings the compiler."""
    with fast_imports():
        from fusecomp.runtime.engine import Engine

    return Engine


class Session:
    """An engine with the loop that drives it."""

    def __init__(self, model: torch.nn.Module, config: EngineConfig) -> None:
        with EXCLUSIVE:
            self.engine = engine_class()(model, config, eos_token_ids=eos_token_ids(model))
        self._ids = itertools.count()
        self.lock = threading.Lock()
        self.calls: dict[str, tuple[Call, Progress]] = {}

    def run(
        self,
        requests: Sequence[Admissible | FusecompError],
        *,
        errors: str = "raise",
        on_step: OnStep | None = None,
        detokenizer: Detokenizer | None = None,
    ) -> list[Progress]:
        """Serve `requests` and return their progress, all finished: in the same order, samples of one in theirs.

        Args:
            requests: (prompt token ids, parameters) and perhaps a priority, or the error for which a caller already
                refuses one.
            errors: "raise" refuses the whole list, before anything runs, when one request cannot be admitted;
                "return" records the error in its place and serves the others.
            on_step: called after admission and after each step with the progress of all requests, and of those that
                ended just now.
            detokenizer: makes texts and finds stop texts; closed at the end.

        Raises:
            FusecompError: a request cannot be admitted, under `errors="raise"`; it names the index.
        """
        with interrupts_between_steps() as check_interrupt, self.call(requests, errors, detokenizer) as call:
            ended = [progress for progress in call.all if progress.finished]
            while True:
                if on_step is not None:
                    on_step(call.all, ended)
                if call.finished:
                    return call.all
                check_interrupt()
                ended = [progress for progress in call.advance() if progress.finished]

    @contextmanager
    def call(
        self,
        requests: Sequence[Admissible | FusecompError],
        errors: str = "raise",
        detokenizer: Detokenizer | None = None,
        *,
        live: bool = False,
    ) -> Iterator[Call]:
        """Admit `requests`; what is unfinished at the end of the block is aborted.

        Args:
            live: texts grow with the tokens, and are not only made at the end.
        """
        call = Call(self, detokenizer, live)
        try:
            call.admit(requests, errors)
            yield call
        finally:
            call.close()

    def abort(self, request_id: str) -> None:
        """End a request, all its samples, with "abort"; unknown ids are ignored, since it may just have finished."""
        with self.lock:
            for name in [name for name in self.calls if name.split("/")[0] == request_id.split("/", maxsplit=1)[0]]:
                call, progress = self.calls.pop(name)
                call.end(progress, "abort", self.engine.end_request(name, "abort"))

    def next_id(self) -> str:
        """An engine's name for a request."""
        return f"request-{next(self._ids)}"

    def step(self) -> None:
        """Run one step under the lock. This loop runs for every token: it stays short."""
        if not self.engine.has_unfinished_requests():
            raise RuntimeError(f"the engine lost requests {', '.join(self.calls)}")
        for output in self.engine.step():
            entry = self.calls.get(output.request_id)
            if entry is None:  # a token that was in flight when its request was aborted
                continue
            call, progress = entry
            call.receive(progress, output)
            if output.finish_reason is not None or output.error is not None:
                del self.calls[output.request_id]


@contextmanager
def interrupts_between_steps() -> Iterator[Callable[[], None]]:
    """Hold back the first Ctrl-C until the step in progress has ended, so that no engine state is left half updated.

    Yields a function that raises the `KeyboardInterrupt` held back. A second Ctrl-C is not held back.
    """
    caught = threading.Event()

    def hold(signum: int, frame: Any) -> None:
        if caught.is_set():
            raise KeyboardInterrupt
        caught.set()

    def check() -> None:
        if caught.is_set():
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check  # only the main thread may set handlers, and a caller's own handler stays
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def eos_token_ids(model: Any) -> tuple[int, ...]:
    """The model's end-of-sequence ids, from its generation configuration first as in `generate`."""
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            ids = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
            if not all(is_int(i) for i in ids):
                raise CheckpointError(f"eos_token_id={ids}", where=type(source).__name__, remedy="give token ids")
            return ids
    return ()
