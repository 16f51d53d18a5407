"""`decode`: one token for each of B sequences, again and again.

Per batch size: `Options.context` prompt tokens a sequence, then
    graph   the device work of one step (model and greedy sampling) repeated back to back on the buffers of the step
            just served: a CUDA graph replay where the engine has one; timed by device events (GPU only);
    step    `Engine.step()` end to end by the host's clock: scheduling, filling buffers, device work, tokens read.
    idle    of a profile of engine steps, the share of the time in which no kernel ran (GPU only).
Replays are taken in the middle of the timed steps, so both see the same mean context.

floor = max(bytes / measured read bandwidth, FLOPs / measured matmul rate); MBU is the first alone over the time.
A mixture of experts touches what its routing touches: the distinct experts are counted on the sequences served.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.idle import WARM_UP_CALLS, profile_idle
from benchmarks.roofline import touched_experts
from benchmarks.session import PROFILED_STEPS, Result, Session, kernel_table, progress, table
from benchmarks.timing import Samples, kernel_times, time_calls

WARM_UP_STEPS = 3


class DecodeRun:
    """B sequences in the engine, all of them decoding."""

    def __init__(self, session: Session, batch: int, context: int | None = None) -> None:
        self.session, self.engine, self.batch = session, session.engine, batch
        o = session.options
        context = context or o.context
        self.engine.capture_graphs([batch])
        prompts = session.prompts([context] * batch, batch + context)
        budget = o.repeat * o.steps + o.settle_steps + PROFILED_STEPS + WARM_UP_CALLS
        ids = session.add(f"decode {batch}", prompts, [budget] * batch)
        self.tokens = dict(zip(ids, prompts, strict=True))
        for _ in range(o.settle_steps - WARM_UP_STEPS):
            before = self.engine.metrics.computed_tokens
            self.step()
            state = self.engine.metrics
            if state.running == batch and state.computed_tokens - before == batch:
                break
        else:
            raise RuntimeError(f"{batch} sequences of {context} tokens never all decode: give the KV cache more room")
        for _ in range(WARM_UP_STEPS):
            self.step()

    def step(self) -> float:
        """One engine step; returns its wall time in ms."""
        start = time.perf_counter()
        outputs = self.engine.step()
        ms = (time.perf_counter() - start) * 1e3
        for out in outputs:
            self.tokens[out.request_id] += out.new_token_ids
        return ms

    @property
    def context(self) -> float:
        """Mean tokens a sequence has read at the latest step."""
        return sum(map(len, self.tokens.values())) / self.batch - 1

    def close(self) -> None:
        for request in self.tokens:
            self.engine.abort_request(request)
        assert not self.engine.has_unfinished_requests()


def _measure(session: Session, batch: int) -> dict[str, Any]:
    o, on_gpu = session.options, session.device.type == "cuda"
    run = DecodeRun(session, batch)
    steps: list[Samples] = []
    replays: list[Samples] = []
    contexts: list[float] = []
    kernels = None
    for _ in range(o.repeat):
        walls = [run.step() for _ in range(o.steps // 2)]
        contexts.append(run.context)
        if on_gpu:
            replays.append(time_calls(run.engine.repeat_step, session.device, calls=o.replays))
        walls += [run.step() for _ in range(o.steps - o.steps // 2)]
        steps.append(Samples.of(walls))
    idle = profile_idle(run.step, PROFILED_STEPS).to_dict(PROFILED_STEPS) if on_gpu else None
    if o.profile and on_gpu:
        kernels = kernel_times(run.engine.repeat_step)
    run.close()
    bucket = run.engine.graphs.bucket(batch) if run.engine.graphs is not None else None
    figures: dict[str, Any] = {"batch": batch, "bucket": bucket, "context": round(sum(contexts) / len(contexts), 1)}
    figures |= _shares(session, run, figures["context"], steps, replays)
    figures["idle"] = idle
    if kernels is not None:
        figures["kernels"] = kernels
    return figures


def _shares(
    session: Session, run: DecodeRun, context: float, steps: list[Samples], replays: list[Samples]
) -> dict[str, Any]:
    work, limit, rows = session.workload, session.ceilings, run.batch
    touched = touched_experts(session.model, list(run.tokens.values())) if work.num_experts else None
    moved = work.decode_bytes(rows, context, touched)
    memory = moved / limit.read_bytes_per_s * 1e3
    flops = rows * (work.linear_flops + work.head_flops + context * work.attention_flops)
    floor = max(memory, flops / limit.matmul_flops_per_s * 1e3)
    step = Samples.of([v for s in steps for v in s.values])
    graph = Samples.of([v for s in replays for v in s.values]) if replays else None
    best = graph or step
    figures: dict[str, Any] = {
        "graph": graph.to_dict() if graph else None,
        "step": step.to_dict(),
        "graph_ms": graph.median if graph else None,
        "step_ms": step.median,
        "repeats_ms": {"graph": [s.median for s in replays], "step": [s.median for s in steps]},
        "bytes": round(moved),
        "floor_ms": floor,
        "bound": "memory" if floor == memory else "compute",
        "mbu": memory / best.median,
        "mbu_step": memory / step.median,
        "share_of_floor": floor / best.median,
        "step_over_graph": step.median / graph.median if graph else None,
        "tokens_per_s": rows / step.median * 1e3,
    }
    if touched is not None:
        figures["experts_touched"] = round(touched, 2)
        figures["experts_expected"] = round(work.expected_experts(rows), 2)
    return figures


def decode(session: Session) -> Result:
    """Time per decode step at every batch size, against the floor."""
    rows = []
    for batch in session.options.batches:
        progress(f"decode, batch {batch}")
        rows.append(_measure(session, batch))
    experts = session.workload.num_experts > 0
    headers = ["batch", "context", "graph ms", "step ms", "p10", "p90", "GB", "floor ms", "bound", "MBU", "of floor"]
    headers += ["tok/s", "step/graph", "idle"] + (["experts"] if experts else [])
    lines = []
    for r in rows:
        line = [r["batch"], r["context"], r["graph_ms"], r["step_ms"], r["step"]["p10_ms"], r["step"]["p90_ms"]]
        line += [r["bytes"] / 1e9, r["floor_ms"], r["bound"], f"{r['mbu']:.1%}", f"{r['share_of_floor']:.1%}"]
        idle = r["idle"] and f"{r['idle']['share']:.2%}"
        lines.append(
            line + [r["tokens_per_s"], r["step_over_graph"], idle] + ([r["experts_touched"]] if experts else [])
        )
    text = "decode (MBU of the graph, or of the step where there is none; tok/s of the step)\n" + table(headers, lines)
    for r in rows:
        if kernels := r.get("kernels"):
            text += f"\nkernels of one step, batch {r['batch']}\n{kernel_table(kernels)}"
    return Result({"batches": rows}, text)
