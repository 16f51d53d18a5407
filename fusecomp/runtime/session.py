"""Drives an engine: a list of requests in, their tokens out, whatever happens in between.

Invariants: requests are admitted all together before the first step; on any exception, Ctrl-C included, every
unfinished request is aborted, so the engine stays usable; one call runs at a time (a lock), others wait.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fusecomp.config import EngineConfig, is_int
from fusecomp.errors import CheckpointError, FusecompError
from fusecomp.imports import fast_imports
from fusecomp.request import SamplingParams
from fusecomp.runtime.loading import EXCLUSIVE

if TYPE_CHECKING:
    import torch

    from fusecomp.runtime.engine import Engine

Admissible = tuple[Sequence[int], SamplingParams]
OnStep = Callable[["list[Progress]", "list[Progress]"], None]


@dataclass
class Progress:
    """One request under way, at position `index` of the list given. Finished once either reason is set."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None


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
        self._lock = threading.Lock()

    def run(
        self,
        requests: Sequence[Admissible | FusecompError],
        *,
        errors: str = "raise",
        on_step: OnStep | None = None,
    ) -> list[Progress]:
        """Serve `requests` and return their progress, all finished, in the same order.

        Args:
            requests: (prompt token ids, parameters), or the error for which a caller already refuses one.
            errors: "raise" refuses the whole list, before anything runs, when one request cannot be admitted;
                "return" records the error in its place and serves the others.
            on_step: called after admission and after each step with the progress of all requests, and of those that
                ended just now.

        Raises:
            FusecompError: a request cannot be admitted, under `errors="raise"`; it names the index.
        """
        pending: dict[str, Progress] = {}
        with self._lock, _interrupts_between_steps() as check_interrupt:
            try:
                done = self._admit(requests, errors, pending)
                ended = [progress for progress in done if progress.finished]
                while True:
                    if on_step is not None:
                        on_step(done, ended)
                    if not pending:
                        return done
                    check_interrupt()
                    ended = self._step(pending)
            finally:
                for request_id in pending:
                    self.engine.abort_request(request_id)

    def _admit(
        self, requests: Sequence[Admissible | FusecompError], errors: str, pending: dict[str, Progress]
    ) -> list[Progress]:
        everything = []
        for index, request in enumerate(requests):
            progress = Progress(index)
            everything.append(progress)
            request_id = f"request-{next(self._ids)}"
            try:
                if isinstance(request, FusecompError):
                    raise request
                self.engine.add_request(request_id, list(request[0]), request[1])
            except FusecompError as error:
                # The engine's own name of the request means nothing to the caller.
                where = f"prompt {index}" if errors == "raise" else error.where if error is request else ""
                named = type(error)(error.what, where=where, why=error.why, remedy=error.remedy)
                if errors == "raise":
                    raise named from error
                progress.error = str(named)
            else:
                pending[request_id] = progress
        return everything

    def _step(self, pending: dict[str, Progress]) -> list[Progress]:
        """Run one step and return the requests it ended. This loop runs for every token: it stays short."""
        if not self.engine.has_unfinished_requests():
            raise RuntimeError(f"the engine lost requests {', '.join(pending)}")
        ended = []
        for output in self.engine.step():
            progress = pending.get(output.request_id)
            if progress is None:  # a token that was in flight when its request was aborted
                continue
            progress.token_ids += output.new_token_ids
            if output.finish_reason is not None or output.error is not None:
                progress.finish_reason, progress.error = output.finish_reason, output.error
                ended.append(pending.pop(output.request_id))
        return ended


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], None]]:
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
