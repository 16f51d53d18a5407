"""`startup`: seconds from nothing to ready to serve, with empty compile caches and again with the caches just filled.

Each start is a process of its own, `python -m benchmarks.startup <options as JSON>`, with its own
TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR. The first also runs the gate, after its times are taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusecomp.errors import VerificationError

BORN = "FUSECOMP_BENCH_BORN"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
MARK = "startup-figures "
WRONG = 3


def child(text: str, *, check: bool) -> dict[str, Any]:
    """Start an engine in this process and serve one token; returns seconds by phase."""
    begin = float(os.environ.get(BORN, time.time()))
    import torch

    from benchmarks.check import check_engine
    from benchmarks.session import Options
    from benchmarks.shapes import SHAPES
    from fusecomp.request import SamplingParams
    from fusecomp.runtime.engine import Engine

    marks = [("imports", time.time())]
    options = Options.from_json(text)
    device = options.torch_device
    torch.zeros(1, device=device)
    marks.append(("device", time.time()))
    model = SHAPES[options.shape].build(device, options.torch_dtype, layers=options.layers, seed=options.seed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    marks.append(("weights", time.time()))
    engine = Engine(model, options.engine_config())
    marks.append(("engine", time.time()))
    engine.add_request("first", list(range(1, 17)), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    while engine.has_unfinished_requests():
        engine.step()
    marks.append(("first tokens", time.time()))
    phases, last = {}, begin
    for name, at in marks:
        phases[name], last = round(at - last, 3), at
    figures: dict[str, Any] = {
        "phases": phases,
        "engine_phases": {k: round(v, 3) for k, v in engine.report.seconds.items()},
        "ready_s": round(marks[3][1] - begin, 3),
        "graphs": engine.report.cuda_graphs,
        "fallbacks": engine.report.fallbacks,
    }
    if check:
        figures["check"] = check_engine(engine, model, options.seed).to_dict()
    return figures


def _spawn(options: Any, caches: Path, *, check: bool) -> dict[str, Any]:
    environment = dict(os.environ) | {name: str(caches / folder) for name, folder in CACHES.items()}
    environment[BORN] = repr(time.time())
    command = [sys.executable, "-m", "benchmarks.startup", options.to_json(), *(["--check"] if check else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == WRONG:
        raise VerificationError("the started engine's numbers are wrong", where="startup", remedy="see above")
    if done.returncode or not lines:
        raise RuntimeError(f"the started process ended with {done.returncode} and reported nothing")
    return json.loads(lines[-1].removeprefix(MARK))


def measure(options: Any) -> Any:
    """Cold and warm start, in fresh processes, as a `Result`. Call before this process holds a model."""
    from benchmarks.session import Result, progress

    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        figures = {}
        for name, check in (("cold", True), ("warm", False)):
            progress(f"start-up, {name}")
            figures[name] = _spawn(replace(options, benchmarks=("startup",)), Path(folder), check=check)
    return Result(figures, render(figures))


def render(figures: dict[str, Any]) -> str:
    """The table: phases side by side."""
    from benchmarks.session import table

    rows = [["ready to serve", *(figures[k]["ready_s"] for k in figures)]]
    rows += [[name, *(figures[k]["phases"].get(name) for k in figures)] for name in figures["cold"]["phases"]]
    inner = dict.fromkeys(name for k in figures for name in figures[k]["engine_phases"])
    rows += [[f"engine: {name}", *(figures[k]["engine_phases"].get(name) for k in figures)] for name in inner]
    return "start-up, seconds (phases of the engine may contain one another)\n" + table(["phase", *figures], rows)


if __name__ == "__main__":
    try:
        print(MARK + json.dumps(child(sys.argv[1], check="--check" in sys.argv[2:])))
    except VerificationError as wrong:
        print(wrong, file=sys.stderr)
        sys.exit(WRONG)
