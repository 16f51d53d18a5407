"""`startup`: seconds from nothing to ready to serve, with empty compile caches and again with the caches just filled.

Each start is a process of its own, `python -m benchmarks.startup <options as JSON>`, with cache folders of its own. The
cold and the warm one also run the gate, after their times are taken. A deep shape starts once more with few layers and
empty caches: time to compile should not grow with depth.

Installers write Python's bytecode. Where the installation has none, an untimed start of the smallest shape writes it
first, to a folder of the benchmark's own: compiling sources of 4,000 modules is no part of what is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fusecomp.errors import VerificationError
from fusecomp.imports import fast_imports

BORN = "FUSECOMP_BENCH_BORN"
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "FUSECOMP_CACHE_DIR": "fusecomp"}
COMPILES = "capture and compile"  # phase of the engine
FEW_LAYERS = 4
MARK = "startup-figures "
WRONG = 3


def child(text: str, *, check: bool) -> dict[str, Any]:
    """Start an engine in this process and serve one token; returns seconds by phase."""
    begin = float(os.environ.get(BORN, time.time()))
    with fast_imports(own_process=True):
        import torch

        import_module("transformers.generation.utils")  # building any causal LM needs it
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
        "program": engine.report.program,
        "graphs": engine.report.cuda_graphs,
        "fallbacks": engine.report.fallbacks,
    }
    if check:
        figures["check"] = check_engine(engine, model, options.seed).to_dict()
    return figures


def _spawn(options: Any, caches: Path, bytecode: Path | None, *, check: bool = False) -> dict[str, Any]:
    environment = dict(os.environ) | {name: str(caches / folder) for name, folder in CACHES.items()}
    environment["FUSECOMP_COMPILE_CACHE"] = "1"
    if bytecode is not None:
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
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

    chosen = replace(options, benchmarks=("startup",))
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder, bytecode = Path(name), None
        if not _has_bytecode():
            bytecode = folder / "bytecode"
            progress("start-up, untimed, to write the bytecode that this installation lacks")
            _spawn(replace(chosen, shape="tiny", layers=None), folder / "rehearsal", bytecode)
        figures: dict[str, Any] = {}
        for start in ("cold", "warm"):
            progress(f"start-up, {start}")
            figures[start] = _spawn(chosen, folder / "caches", bytecode, check=True)
        layers = _layers(chosen)
        if layers is not None and layers > FEW_LAYERS:
            progress(f"start-up, cold, {FEW_LAYERS} layers")
            few = _spawn(replace(chosen, layers=FEW_LAYERS), folder / "few", bytecode)
            figures["few layers"] = few
            times = [figures[start]["engine_phases"].get(COMPILES) for start in ("cold", "few layers")]
            figures["compile"] = {
                "layers": [layers, FEW_LAYERS],
                "seconds": times,
                "ratio": round(times[0] / times[1], 3) if all(times) else None,
            }
        figures["bytecode"] = (
            "installed" if bytecode is None else "written before the starts: the installation has none"
        )
    return Result(figures, render(figures))


def _has_bytecode() -> bool:
    """Whether the sources of torch, found but not imported, have their bytecode beside them."""
    import importlib.util

    found = importlib.util.find_spec("torch")
    return found is not None and found.cached is not None and Path(found.cached).is_file()


def _layers(options: Any) -> int | None:
    """Depth of a shape with random weights."""
    from benchmarks.shapes import SHAPES

    config = SHAPES[options.shape].config
    return options.layers or (None if config is None else config().num_hidden_layers)


def render(figures: dict[str, Any]) -> str:
    """The table: phases side by side."""
    from benchmarks.session import table

    starts = {name: figures[name] for name in ("cold", "warm", "few layers") if name in figures}
    rows = [["ready to serve", *(start["ready_s"] for start in starts.values())]]
    rows += [[name, *(s["phases"].get(name) for s in starts.values())] for name in figures["cold"]["phases"]]
    inner = dict.fromkeys(name for start in starts.values() for name in start["engine_phases"])
    rows += [[f"engine: {name}", *(s["engine_phases"].get(name) for s in starts.values())] for name in inner]
    text = "start-up, seconds (phases of the engine may contain one another)\n" + table(["phase", *starts], rows)
    if (compiling := figures.get("compile")) and compiling["ratio"]:
        deep, few = compiling["layers"]
        text += f"\ncompiling {deep} layers takes {compiling['ratio']:.2f} times as long as {few}"
    text += f"\nPython's bytecode: {figures['bytecode']}"
    return text + "".join(f"\n{name}: {start['program']}" for name, start in starts.items())


if __name__ == "__main__":
    try:
        print(MARK + json.dumps(child(sys.argv[1], check="--check" in sys.argv[2:])))
    except VerificationError as wrong:
        print(wrong, file=sys.stderr)
        sys.exit(WRONG)
