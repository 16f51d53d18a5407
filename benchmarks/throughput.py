"""`prefill` and `offline`: tokens per second through the serving loop, by the host's clock.

`prefill`: a few long prompts and one new token each, in steps of at most `max_num_batched_tokens` tokens.
`offline`: many requests at once, input and output lengths uniform, ended by length alone.
"""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.idle import WARM_UP_CALLS, Idle, profile_idle
from benchmarks.session import Result, Session, kernel_table, progress, table
from benchmarks.step_log import Group, StepLog
from benchmarks.timing import Samples, compiled_kernels, kernel_times
from fusecomp.runtime.collection import earlier_objects_spared

PREFILL_REPEATS = 7
PROFILED_STEPS, PROFILED_AT = 8, (8, 200, 600)  # offline: steps profiled together, and the first ones of each window


def _drain(session: Session) -> tuple[float, StepLog]:
    """Step until nothing is left, as `LLM.serve` does; returns wall seconds, and what each step took and gave."""
    engine, log = session.engine, StepLog()
    with earlier_objects_spared():
        start = last = time.perf_counter()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            log.add(now - last, outputs)
            last = now
            for out in outputs:
                if out.error is not None:
                    raise RuntimeError(f"{out.request_id}: {out.error}")
    return last - start, log


def _where(session: Session, groups: list[Group]) -> str:
    """A table of groups of steps; keys and values as the read limit has them."""
    ms = session.engine.kv_bytes_per_token / session.ceilings.read_bytes_per_s * 1e3
    lines = [
        ["with prompts" if g.rows is None else f"{g.rows[0]} to {g.rows[1]}", g.steps, g.seconds, g.median_ms,
         g.tokens * ms]
        for g in groups
    ]  # fmt: skip
    headers = ["sequences of a step", "steps", "s", "median ms", "keys and values at the read limit, ms"]
    return table(headers, lines)


def _profiled(session: Session) -> dict[str, Any] | None:
    """Serve until the last of short runs of steps that are profiled: the share of their time without a kernel."""
    engine, found, at = session.engine, list[tuple[int, Idle]](), 0
    while engine.has_unfinished_requests() and len(found) < len(PROFILED_AT):
        if at in PROFILED_AT:
            found.append((at, profile_idle(engine.step, PROFILED_STEPS)))
            at += WARM_UP_CALLS + PROFILED_STEPS
        else:
            engine.step()
            at += 1
    session.clear()
    wall = sum(idle.wall for _, idle in found)
    if not found:
        return None
    return {
        "share": 1 - sum(idle.busy for _, idle in found) / wall,
        "windows": [{"step": step, **idle.to_dict(PROFILED_STEPS)} for step, idle in found],
    }


def _captures(session: Session) -> int:
    graphs = session.engine.graphs
    return 0 if graphs is None else graphs.num_captures


def prefill(session: Session) -> Result:
    """Prompt tokens per second and the share of the measured matmul rate."""
    o = session.options
    lengths = [o.prompt_len] * o.prompts
    walls, steps = [], 0
    for turn in range(1 + PREFILL_REPEATS * o.repeat):
        session.add(f"prefill {turn}", session.prompts(lengths, 1000 + turn), [1] * o.prompts)
        seconds, log = _drain(session)
        steps = len(log)
        if turn:  # the first warms up
            walls.append(seconds * 1e3)
    samples = Samples.of(walls)
    flops, tokens = session.workload.prefill_flops(lengths), sum(lengths)
    seconds = samples.median * 1e-3
    figures: dict[str, Any] = {
        "prompts": o.prompts,
        "prompt_len": o.prompt_len,
        "max_num_batched_tokens": session.engine.config.max_num_batched_tokens,
        "steps": steps,
        "wall": samples.to_dict(),
        "tokens_per_s": tokens / seconds,
        "tflop_per_s": flops / seconds / 1e12,
        "share_of_matmul": flops / seconds / session.ceilings.matmul_flops_per_s,
    }
    profiled = ""
    if o.profile and session.device.type == "cuda":
        figures["kernels"] = kernel_times(session.engine.repeat_step, calls=2)
        profiled = f"\nkernels of the last step\n{kernel_table(figures['kernels'])}"
    line = [f"{o.prompts} x {o.prompt_len}", steps, samples.median, samples.quantile(0.1), samples.quantile(0.9)]
    line += [figures["tokens_per_s"], figures["tflop_per_s"], f"{figures['share_of_matmul']:.1%}"]
    headers = ["prompts", "steps", "wall ms", "p10", "p90", "tok/s", "TFLOP/s", "of matmul"]
    title = f"prefill (steps of at most {figures['max_num_batched_tokens']} tokens)"
    return Result(figures, f"{title}\n{table(headers, [line])}{profiled}")


def offline(session: Session) -> Result:
    """Throughput of a queue of requests of mixed lengths."""
    o, engine = session.options, session.engine
    draw = random.Random(o.seed)
    pairs = [(draw.randint(*o.lengths), draw.randint(*o.lengths)) for _ in range(o.requests)]
    # A short run first: whatever is made when first used stays out of the figure.
    warm = min(8, o.requests)
    session.add("warm", session.prompts([o.lengths[0]] * warm, 1), [8] * warm)
    _drain(session)
    runs, groups = [], list[list[Group]]()
    for turn in range(o.repeat):
        progress(f"offline, {o.requests} requests")
        prompts = session.prompts([n for n, _ in pairs], 2000 + turn)
        before, captures = engine.metrics, _captures(session)
        ids = session.add(f"offline {turn}", prompts, [n for _, n in pairs])
        with compiled_kernels() as compiled:
            wall, log = _drain(session)
        groups.append(log.groups({request: len(prompt) for request, prompt in zip(ids, prompts, strict=True)}))
        after = engine.metrics
        made = after.generation_tokens - before.generation_tokens
        expected = sum(n for _, n in pairs)
        if made != expected:
            raise RuntimeError(f"{made} tokens were generated, {expected} were asked for")
        runs.append(
            {
                "wall_s": wall,
                "output_tokens": made,
                "output_tokens_per_s": made / wall,
                "total_tokens_per_s": (made + sum(n for n, _ in pairs)) / wall,
                "steps": len(log),
                "mean_running": log.advanced / len(log),
                "by_rows": [group.to_dict() for group in groups[-1]],
                "host_share": (after.host_seconds - before.host_seconds) / wall,
                "preemptions": after.preemptions - before.preemptions,
                "computed_tokens": after.computed_tokens - before.computed_tokens,
                "captures": _captures(session) - captures,
                "kernels_compiled": sorted(compiled),
            }
        )
    idle = None
    if o.profile and session.device.type == "cuda":
        session.add("profiled", session.prompts([n for n, _ in pairs], 3000), [n for _, n in pairs])
        idle = _profiled(session)
    at = sorted(range(len(runs)), key=lambda turn: runs[turn]["wall_s"])[len(runs) // 2]
    middle = runs[at]
    figures: dict[str, Any] = {
        "requests": o.requests,
        "lengths": list(o.lengths),
        "max_num_seqs": engine.config.max_num_seqs,
        "kv_blocks": engine.num_kv_blocks,
        **middle,
        "walls_s": [r["wall_s"] for r in runs],
        "runs": runs,
        "idle": idle,
    }
    headers = ["requests", "wall s", "output tok/s", "total tok/s", "steps", "running", "host", "preempted"]
    headers += ["captures", "compiled", "idle"]
    line: list[Any] = [o.requests, middle["wall_s"], middle["output_tokens_per_s"], middle["total_tokens_per_s"]]
    line += [middle["steps"], middle["mean_running"], f"{middle['host_share']:.1%}", middle["preemptions"]]
    line += [middle["captures"], len(middle["kernels_compiled"]), idle and f"{idle['share']:.2%}"]
    title = f"offline (inputs and outputs U{o.lengths}, running: mean rows that got a token per step)"
    return Result(figures, f"{title}\n{table(headers, [line])}\n{_where(session, groups[at])}")
