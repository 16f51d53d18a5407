"""The figures that this project is held to on one NVIDIA H200: runs what shows them and says which are met.

    python -m benchmarks.targets                      # all: 10 to 15 minutes with empty compile caches
    python -m benchmarks.targets --only 8b-fp8,1b     # some of the runs below

Each run is a process of its own and passes its own checks first. A line a target, as its run ends; the last line is
JSON. Exit status 1 when a run failed; a target that is missed is a figure, not a failure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFFLINE = ("offline", "output_tokens_per_s")
NAMES = ("batch", "scheme", "tokens", "label")  # of entries of lists
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Run:
    """A command: a module, its arguments, the file that has its JSON, and whether `--out` takes that file's folder."""

    module: str
    arguments: tuple[str, ...]
    file: str = "result.json"
    names_folder: bool = False

    def command(self, folder: Path) -> list[str]:
        out = folder if self.names_folder else folder / self.file
        return [sys.executable, "-m", self.module, *self.arguments, "--out", str(out)]


@dataclass(frozen=True)
class Target:
    """A figure of a run's JSON, and what it is to be: at most, or at least, a number or the figure of another run.

    Places are keys, or the number of rows or tokens of an entry of a list, or its name.
    """

    run: str
    what: str
    place: Place
    limit: float | tuple[str, Place]
    at_most: bool = False
    over: Place = ()  # what the figure is divided by

    def figure(self, results: Mapping[str, Any]) -> float | None:
        return _ratio(results.get(self.run), self.place, self.over)

    def wanted(self, results: Mapping[str, Any]) -> float | None:
        if isinstance(self.limit, tuple):
            return _ratio(results.get(self.limit[0]), self.limit[1], ())
        return self.limit

    def met(self, results: Mapping[str, Any]) -> bool | None:
        """None where a figure is not there."""
        figure, wanted = self.figure(results), self.wanted(results)
        if figure is None or wanted is None:
            return None
        return figure <= wanted if self.at_most else figure >= wanted


def _engine(shape: str, *arguments: str) -> Run:
    return Run("benchmarks", (*arguments, "--shape", shape))


RUNS = {
    "8b-fp8": _engine("llama-8b", "decode", "prefill", "offline", "--quantize", "fp8", "--batches", "1,8,64,256"),
    "8b": _engine("llama-8b", "decode", "offline", "prefix", "--batches", "64,128", "--profile"),
    "8b-int4": _engine("llama-8b", "decode", "--quantize", "int4", "--batches", "1,64,128"),
    "1b": _engine("llama-1b", "decode", "offline", "--batches", "64", "--repeat", "3", "--profile"),
    "30b": _engine("qwen3-30b-a3b", "offline"),
    "30b-fp8": _engine("qwen3-30b-a3b", "decode", "--quantize", "fp8", "--batches", "1,64"),
    "linears": Run("benchmarks.quant_linear", ("--schemes", "fp8,int4-zero", "--tokens", "1,8,16")),
    "fp8-cache": Run("benchmarks.attention_quick", ("--only", "8x64-bf16,8x64-fp8"), "fp8kv-quick.json", True),
}


def _decode(batch: int, name: str = "graph_ms") -> Place:
    return "decode", "batches", batch, name


def _linears(scheme: str, share: float) -> list[Target]:
    what = f"8B {scheme}, linears, of the read bandwidth, tokens:"
    return [Target("linears", f"{what} {tokens}", ("rows", scheme, tokens, "chain"), share) for tokens in (1, 8, 16)]


def _attention(cache: str) -> Place:
    return "rows", f"decode  D128 H32/8 B16{cache} batch 64 context 8192", "us"


TARGETS = (
    Target("8b-fp8", "8B fp8, decode of 1: ms", _decode(1), 2.15, True),
    Target("8b-fp8", "of 64: ms", _decode(64), 3.4, True),
    Target("8b-fp8", "of 256: ms", _decode(256), 7.0, True),
    Target("8b-fp8", "prefill 8 x 2048: tok/s", ("prefill", "tokens_per_s"), 70_000),
    Target("8b-fp8", "the same: TFLOP/s", ("prefill", "tflop_per_s"), 1_050),
    Target("8b-fp8", "offline: output tok/s", OFFLINE, 14_000),
    Target("8b-int4", "8B int4, decode of 1: ms", _decode(1), 1.35, True),
    Target("8b-int4", "of 64, beside bf16: ms", _decode(64), ("8b", _decode(64)), True),
    Target("8b-int4", "of 128, beside bf16: ms", _decode(128), ("8b", _decode(128)), True),
    *_linears("fp8", 0.80),
    *_linears("int4-zero", 0.75),
    Target("30b-fp8", "30B fp8, decode of 1: ms", _decode(1), 1.5, True),
    Target("30b-fp8", "of 64: ms", _decode(64), 8.5, True),
    Target("fp8-cache", "attention of 64 x 8,192, of bf16's time", _attention(" fp8"), 0.6, True, _attention("")),
    Target("8b", "8B, GPU idle in decodes of 64", (*_decode(64, "idle"), "share"), 0.01, True),
    Target("8b", "step of 64, of its graph's time", _decode(64, "step_over_graph"), 1.03, True),
    Target("8b", "offline: output tok/s", OFFLINE, 11_500),
    Target("8b", "first token after 2,000 shared ones, of the first's time", ("prefix", "ratio"), 0.15, True),
    Target("1b", "1B, GPU idle in decodes of 64", (*_decode(64, "idle"), "share"), 0.03, True),
    Target("1b", "step of 64, of its graph's time", _decode(64, "step_over_graph"), 1.03, True),
    Target("1b", "offline: output tok/s", OFFLINE, 48_000),
    Target("30b", "30B, offline: output tok/s", OFFLINE, 7_500),
)  # fmt: skip


def _ratio(result: Any, place: Place, over: Place) -> float | None:
    figure, base = _find(result, place), _find(result, over) if over else 1.0
    return None if figure is None or base is None else figure / base


def _find(value: Any, place: Place) -> Any:
    """What is at a place of a run's JSON; None where there is nothing. Of entries of one name the first."""
    for key in place:
        if isinstance(value, list):
            named = [entry for entry in value if key in (entry.get(name) for name in NAMES)]
            value = named or (value[0].get(key) if value else None)
        else:
            value = value.get(key) if isinstance(value, dict) else None
    return value


def line(target: Target, results: Mapping[str, Any]) -> str:
    """What a target's figure is beside what it is to be."""
    figure, wanted, met = target.figure(results), target.wanted(results), target.met(results)
    if figure is None or wanted is None:
        return f"  {'no figure':10} {target.what}"
    bound = "at most" if target.at_most else "at least"
    return f"  {'met' if met else 'missed':10} {target.what}: {_shown(figure)}, {bound} {_shown(wanted)}"


def _shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.4g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help=f"some of {', '.join(RUNS)}, separated by commas")
    parser.add_argument("--out", type=Path, help="a folder for each run's JSON and output; a temporary one by default")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin no further run after so many")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f"--only {args.only}: {', '.join(unknown)} is none of {', '.join(RUNS)}")
    folder = args.out or Path(tempfile.mkdtemp(prefix="fusecomp-targets-"))
    results, failed, begin = dict[str, Any](), list[str](), time.time()
    for name in names:
        if time.time() - begin > args.seconds:
            print(f"{name}: not run, --seconds {args.seconds:g} are over", flush=True)
            failed.append(name)
            continue
        started, where = time.time(), folder / name
        where.mkdir(parents=True, exist_ok=True)
        run = RUNS[name]
        with (where / "output.txt").open("w") as output:
            code = subprocess.run(run.command(where), stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{name}: {time.time() - started:.0f} s", flush=True)
        if code:
            print(f"  exit status {code}: see {output.name}", flush=True)
            failed.append(name)
        if (where / run.file).exists():
            found = json.loads((where / run.file).read_text())
            results[name] = found.get("benchmarks", found)
        for target in TARGETS:
            if target.run == name:
                print(line(target, results), flush=True)
    figures = [
        {"run": t.run, "what": t.what, "figure": t.figure(results), "wanted": t.wanted(results), "met": t.met(results)}
        for t in TARGETS
    ]
    print(json.dumps({"targets": figures, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
