"""The peer of `--compare-hf`: stock Hugging Face decoding with a static cache under `torch.compile`.

What `generate` runs with `cache_implementation="static"`: eager prefill, then a compiled one-token forward with CUDA
graphs (`mode="reduce-overhead"`) and an arg-max, without generate's own bookkeeping.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.session import Result, Session, progress, table
from benchmarks.timing import time_calls


@torch.no_grad()
def _measure(session: Session, batch: int) -> dict[str, Any]:
    from transformers import StaticCache

    o, model = session.options, session.model
    prompts = torch.tensor(session.prompts([o.context] * batch, batch), device=session.device)
    cache = StaticCache(config=model.config, max_cache_len=-(-(o.context + 2 * o.steps + 16) // 64) * 64)
    logits = model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    state = {"token": logits[:, -1].argmax(-1, keepdim=True), "at": o.context}

    def one(token: Tensor, position: Tensor) -> Tensor:
        out = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    compiled = torch.compile(one, mode="reduce-overhead" if session.device.type == "cuda" else None, fullgraph=True)

    def step() -> None:
        position = torch.full((1, 1), state["at"], device=session.device)
        # A replayed graph owns its output: the next call must not read it in place.
        state["token"] = compiled(state["token"], position).clone()
        state["at"] += 1

    start = time.perf_counter()
    step()
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    samples = time_calls(step, session.device, calls=o.steps, warm_up=5)
    return {"batch": batch, "step": samples.to_dict(), "step_ms": samples.median, "first_call_s": round(first, 2)}


def compare(session: Session) -> Result:
    """Static cache and compile at each of `Options.hf_batches`, once the engine's memory is given back."""
    session.release_engine()
    rows = []
    for batch in session.options.hf_batches:
        progress(f"Hugging Face, static cache and compile, batch {batch}")
        rows.append(_measure(session, batch))
        torch._dynamo.reset()
    lines = [[r["batch"], r["step_ms"], r["step"]["p10_ms"], r["step"]["p90_ms"], r["first_call_s"]] for r in rows]
    text = "Hugging Face, static cache and torch.compile\n"
    return Result({"batches": rows}, text + table(["batch", "step ms", "p10", "p90", "first call s"], lines))
