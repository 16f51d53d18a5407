"""What is printed of the project's targets, by results written by hand; `test_benchmarks.py` has those of real runs."""

import json
import subprocess

import pytest

from benchmarks import targets
from benchmarks.targets import RUNS, TARGETS, Run, Target, line, main

RESULTS = {
    "8b": {"decode": {"batches": [{"batch": 64, "graph_ms": 5.0}, {"batch": 128, "graph_ms": 6.0}]}},
    "linears": {"rows": [{"scheme": s, "tokens": t, "chain": t / 10} for s in ("fp8", "int4-zero") for t in (1, 8)]},
    "fp8-cache": {"rows": [{"label": "a", "us": 6.0}, {"label": "a", "us": 5.0}, {"label": "b", "us": 12.0}]},
}


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Target("8b", "x", ("decode", "batches", 128, "graph_ms"), 6.0, True), "met        x: 6, at most 6"),
        (Target("8b", "x", ("decode", "batches", 64, "graph_ms"), 5.5), "missed     x: 5, at least 5.5"),
        (Target("8b", "x", ("decode", "batches", 64, "graph_ms"), 14_000.0), "missed     x: 5, at least 14,000"),
        (Target("8b", "x", ("decode", "batches", 1, "graph_ms"), 5.5), "no figure  x"),
        (Target("8b", "x", ("offline", "wall_s"), 5.5), "no figure  x"),
        (Target("30b", "x", ("offline",), 5.5), "no figure  x"),
        (Target("linears", "x", ("rows", "int4-zero", 8, "chain"), 0.75), "met        x: 0.8, at least 0.75"),
        (
            Target("fp8-cache", "x", ("rows", "a", "us"), 0.6, True, ("rows", "b", "us")),
            "met        x: 0.5, at most 0.6",
        ),
        (Target("fp8-cache", "x", ("rows", "c", "us"), 0.6, True, ("rows", "b", "us")), "no figure  x"),
        (
            Target("fp8-cache", "x", ("rows", "a", "us"), ("8b", ("decode", "batches", 64, "graph_ms")), True),
            "missed     x: 6, at most 5",
        ),
        (Target("8b", "x", ("decode", "batches", 64, "graph_ms"), ("30b", ("offline",))), "no figure  x"),
    ],
)
def test_a_figure_is_held_to_its_target(target, text):
    assert line(target, RESULTS).strip() == text
    assert target.met(RESULTS) is {"met": True, "mis": False, "no ": None}[text[:3]]


def test_every_target_has_a_run_and_every_run_a_target():
    assert {target.run for target in TARGETS} == RUNS.keys()


def test_runs_are_processes_whose_failures_are_told(monkeypatch, tmp_path, capsys):
    program = 'import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text(\'{"rows": [{"tokens": 1, "us": 3}]}\')'
    runs = {"good": Run("benchmarks.x", ("a",)), "bad": Run("benchmarks.y", ())}
    wanted = (Target("good", "time", ("rows", 1, "us"), 4, True), Target("bad", "rate", ("rate",), 4))
    monkeypatch.setattr(targets, "RUNS", runs)
    monkeypatch.setattr(targets, "TARGETS", wanted)
    real = subprocess.run

    def run(command, **options):
        assert command[1] == "-m"
        return real([command[0], "-c", program if command[2] == "benchmarks.x" else "1 / 0", *command[3:]], **options)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["--only", "good,bad", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "  met        time: 3, at most 4" in out and "  no figure  rate" in out
    assert "ZeroDivisionError" in (tmp_path / "bad" / "output.txt").read_text()
    result = json.loads(out[-1])
    assert result["failed"] == ["bad"] and [t["met"] for t in result["targets"]] == [True, None]
    assert main(["--only", "good", "--out", str(tmp_path), "--seconds", "-1"]) == 1


def test_an_unknown_run_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "8b,9b"])
    assert "9b" in capsys.readouterr().err
