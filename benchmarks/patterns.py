"""`patterns`: what each pattern brings, by leaving it out: decode steps with all, without each one, without any.

Every variant is an engine of its own, which passes the gate. A pattern that another needs takes that one's matches with
it (no norm is folded where no matmul became a `linear`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.decode import decode
from benchmarks.session import Options, Result, Session, progress, table
from fusecomp.backend import MERGE
from fusecomp.fusion import FUSE

ALL, NONE = "all", "none"
# A difference of medians below this share is noise of the measurement.
NOISE = 0.01


def _variants(options: Options) -> dict[str, Options]:
    fused = options.fuse == "always" or (options.fuse == "auto" and options.device == "cuda")
    names = [p.name for p in (*MERGE, *(FUSE if fused else ()))]
    base = dataclasses.replace(options, benchmarks=("decode",), profile=False)
    variants = {ALL: base}
    if len(names) > 1:
        variants |= {name: dataclasses.replace(base, disabled_patterns=(name,)) for name in names}
    return variants | {NONE: dataclasses.replace(base, fuse="never")}


def patterns(session: Session) -> Result:
    """Step time of every variant and batch, and the ratio to that with all patterns."""
    model = session.model
    session.release_engine()
    measured: dict[str, dict[int, dict[str, Any]]] = {}
    for name, options in _variants(session.options).items():
        progress(f"patterns: {name if name in (ALL, NONE) else f'without {name}'}")
        variant = Session(options)
        variant.__dict__ |= {"model": model, "ceilings": session.ceilings}
        rows = decode(variant).figures["batches"]
        measured[name] = {row["batch"]: {"graph_ms": row["graph_ms"], "step_ms": row["step_ms"]} for row in rows}
        variant.release_engine()
    return Result({"variants": measured}, _table(measured, session.options.batches))


def _table(measured: dict[str, dict[int, dict[str, Any]]], batches: tuple[int, ...]) -> str:
    def ms(name: str, batch: int) -> float:
        row = measured[name][batch]
        return row["graph_ms"] or row["step_ms"]

    lines = []
    for name in measured:
        label = name if name in (ALL, NONE) else f"without {name}"
        cells = [f"{ms(name, b):.3f} ({ms(name, b) / ms(ALL, b):.2f}x)" for b in batches]
        lines.append([label, *cells])
    slower = [f"{name} at batch {b}" for name in measured for b in batches if ms(name, b) < ms(ALL, b) * (1 - NOISE)]
    verdict = f"slower with the pattern than without: {', '.join(slower) or 'none'}"
    header = "patterns (ms of a decode step, graph replays where there are graphs; ratio to all patterns)"
    return f"{header}\n{table(['patterns', *[f'batch {b}' for b in batches]], lines)}\n{verdict}"
