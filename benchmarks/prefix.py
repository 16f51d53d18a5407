"""`prefix`: time to the first token of requests that begin with one long prefix, by the host's clock.

The first request computes the prefix; those after it, one at a time, find its blocks. Between them come requests with
other prefixes of the same length, so that hits and misses are timed on the same warm engine.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.session import PREFIX_TAIL as TAIL
from benchmarks.session import Result, Session, table
from benchmarks.timing import Samples

LATER = 8


def _first_token(session: Session, name: str, prompt: list[int]) -> float:
    """Milliseconds from the request's arrival to its first token, alone on the engine."""
    start = time.perf_counter()
    session.add(name, [prompt], [1])
    outputs = []
    while session.engine.has_unfinished_requests():
        outputs += session.engine.step()
    elapsed = time.perf_counter() - start
    if [out.error for out in outputs] != [None]:
        raise RuntimeError(f"{name}: {outputs}")
    return elapsed * 1e3


def prefix(session: Session) -> Result:
    """A shared prefix of `prompt_len` tokens: first request, later ones, and their ratio."""
    o, engine = session.options, session.engine
    hits: list[float] = []
    misses: list[float] = []
    _first_token(session, "prefix warm", session.prompts([o.prompt_len + TAIL], 3000)[0])
    cached = 0
    for turn in range(o.repeat):
        shared, *others = session.prompts([o.prompt_len] * (1 + LATER), 3001 + turn)
        tails = session.prompts([TAIL] * (1 + LATER), 4001 + turn)
        misses.append(_first_token(session, f"prefix {turn} first", shared + tails[0]))
        before = engine.metrics.prefix_cache_hits
        for number, (other, tail) in enumerate(zip(others, tails[1:], strict=True)):
            hits.append(_first_token(session, f"prefix {turn} later {number}", shared + tail))
            cached = engine.metrics.prefix_cache_hits - before
            misses.append(_first_token(session, f"prefix {turn} other {number}", other + tail))
    first, later = Samples.of(misses), Samples.of(hits)
    figures: dict[str, Any] = {
        "prefix": o.prompt_len,
        "tail": TAIL,
        "cached_tokens": cached // LATER,
        "miss": first.to_dict(),
        "hit": later.to_dict(),
        "ratio": later.median / first.median,
    }
    headers = ["prefix", "found", "miss ms", "hit ms", "hit / miss"]
    line = [o.prompt_len, cached // LATER, first.median, later.median, f"{figures['ratio']:.3f}"]
    return Result(figures, f"prefix (time to first token, {TAIL} more tokens each)\n{table(headers, [line])}")
