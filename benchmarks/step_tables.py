"""Put what `step_tune` found into the package's tables of launches.

    python -m benchmarks.step_tables FILE [FILE ...]

Launches of linears that make a step faster by `LEAST_GAIN` or more replace the entry of the same sizes, or are added to
the table of their GPU. Attention's are printed only: one entry serves every context. So are those of experts: their
table has other sizes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.quant_schemes import SCHEMES
from fusecomp.lowerings.linear import large_heuristics
from fusecomp.lowerings.quant import heuristics, scaled_heuristics, tables

LEAST_GAIN = 0.003  # of a step; medians of one step differ by 0.2% up to 192 rows, once by 0.6, by more beyond


def place_of(row: dict[str, Any], gpu: str) -> tuple[Path, str, tuple[str, ...]]:
    """The table for one row of `step_tune`'s result: its file, its list of entries, and what tells these apart."""
    table = gpu.lower().replace(" ", "_")
    if row["form"] == "codes":
        return tables.TABLES / f"{table}_scaled.json", "entries", scaled_heuristics.KEY
    if row["form"] == "weights":
        one = row["tokens"] == 1 and SCHEMES[row["scheme"]][0].fold and heuristics.held_entries(table)
        held = one or row["config"]["kernel"] == heuristics.FOLDED_HELD
        spec = SCHEMES[row["scheme"]][0]
        alike = [e["tokens"] for e in heuristics.digit_entries(table) if e["bits"] == spec.bits]
        few = 1 < row["tokens"] <= max(alike, default=0)
        digits = few or row["config"]["kernel"] in (heuristics.DIGITS, heuristics.FOLDED_DIGITS)
        section = "held" if held else "digits" if digits else "quant"
        return tables.TABLES / f"{table}.json", section, heuristics.KEY
    return large_heuristics.TABLES / f"{table}_large.json", "entries", ("n", "k", "groups", "kind", "tokens")


def entry_of(row: dict[str, Any], case: str, gpu: str) -> dict[str, Any]:
    """A table's entry for one row of `step_tune`'s result."""
    sizes = {key: row[key] for key in ("n", "k", "groups", "kind", "tokens")}
    if row["form"] == "codes":
        sizes |= {"kind": "fp8", "block": 0, "epilogue": row["kind"]}
    elif row["form"] == "weights":
        spec, zero = SCHEMES[row["scheme"]]
        sizes = {"kind": spec.kind, "bits": spec.bits} | ({"zero": True} if zero else {})
        sizes |= {"rows": row["n"] * row["groups"], **{key: row[key] for key in ("k", "groups", "tokens")}}
    own = {"own": row["own"]} if "own" in row else {}
    times = {"step_us": row["step_us"], "step_us_before": row["committed_step_us"], "step": case}
    return {**sizes, "config": row["config"], **own, "gpu": gpu, **times}


def merge(path: Path, section: str, key: tuple[str, ...], entries: list[dict[str, Any]]) -> None:
    """Replace or add `entries` in a list of the table at `path`, one line each, and leave the rest of it as it is."""
    text = path.read_text()
    if section not in json.loads(text):
        text = text.rstrip().removesuffix("}").rstrip() + f',\n  "{section}": [\n  ]\n}}\n'
    merged = {tuple(entry.get(name) for name in key): entry for entry in (*json.loads(text)[section], *entries)}
    begin = text.index(f'"{section}": [') + len(f'"{section}": [')
    lines = ",\n".join("    " + json.dumps(entry) for entry in merged.values())
    path.write_text(text[:begin] + "\n" + lines + text[text.index("\n  ]", begin) :])
    json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    for file in args.files:
        result = json.loads(file.read_text())
        found: dict[tuple[Path, str, tuple[str, ...]], list[dict[str, Any]]] = {}
        for name, value in result.items():
            for row in value["linears"] if isinstance(value, dict) else []:
                gain = 1 - row["step_us"] / row["committed_step_us"]
                kept = gain >= LEAST_GAIN and "n" in row
                text = f"{gain:.2%} by {row['config']}{'' if kept else ', left'}"
                print(f"{result['shape']} {name} {row['name']}: {text}")
                if kept:
                    entry = entry_of(row, f"{result['shape']}, {row['tokens']} rows", result["gpu"])
                    found.setdefault(place_of(row, result["gpu"]), []).append(entry)
        for (path, section, key), entries in found.items():
            merge(path, section, key, entries)


if __name__ == "__main__":
    main()
