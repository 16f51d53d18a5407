"""Put what `step_tune` found into the package's tables of launches.

    python -m benchmarks.step_tables FILE [FILE ...]

Linears and products of codes that make a step faster by `LEAST_GAIN` or more replace the entry of the same sizes, or
are added to the table of their GPU. Attention's are printed only: one entry serves every context.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fusecomp.lowerings.linear import large_heuristics
from fusecomp.lowerings.quant import tables

LEAST_GAIN = 0.003  # of a step; two captures of one step differ by less
SIZES = ("n", "k", "groups", "tokens")


def entry_of(row: dict[str, Any], case: str, gpu: str) -> dict[str, Any]:
    """A table's entry for one row of `step_tune`'s result."""
    sizes = {key: row[key] for key in SIZES[:3]}
    if row["codes"]:
        sizes = {"kind": "fp8", "block": 0, **sizes, "epilogue": row["kind"]}
    else:
        sizes["kind"] = row["kind"]
    own = {"own": row["own"]} if "own" in row else {}
    times = {"step_us": row["step_us"], "step_us_before": row["committed_step_us"], "step": case}
    return {**sizes, "tokens": row["tokens"], "config": row["config"], **own, "gpu": gpu, **times}


def merge(path: Path, entries: list[dict[str, Any]]) -> None:
    """Replace or add `entries` in the table at `path`, one line each, and leave the rest of the file as it is."""
    keys = ("kind", "block", "n", "k", "groups", "epilogue", "tokens")

    def key(entry: dict[str, Any]) -> tuple:
        return tuple(entry.get(name) for name in keys)

    text = path.read_text()
    merged = {key(entry): entry for entry in (*json.loads(text)["entries"], *entries)}
    begin = text.index('"entries": [') + len('"entries": [')
    lines = ",\n".join("    " + json.dumps(entry) for entry in merged.values())
    path.write_text(text[:begin] + "\n" + lines + text[text.rindex("\n  ]") :])
    json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    for file in args.files:
        result = json.loads(file.read_text())
        table = result["gpu"].lower().replace(" ", "_")
        found: dict[Path, list[dict[str, Any]]] = {}
        for name, value in result.items():
            for row in value["linears"] if isinstance(value, dict) else []:
                gain = 1 - row["step_us"] / row["committed_step_us"]
                kept = gain >= LEAST_GAIN and "n" in row
                print(
                    f"{result['shape']} {name} {row['name']}: {gain:.2%} by {row['config']}{'' if kept else ', left'}"
                )
                if kept:
                    folder = tables.TABLES if row["codes"] else large_heuristics.TABLES
                    path = folder / f"{table}_{'scaled' if row['codes'] else 'large'}.json"
                    case = f"{result['shape']}, {row['tokens']} rows"
                    found.setdefault(path, []).append(entry_of(row, case, result["gpu"]))
        for path, entries in found.items():
            merge(path, entries)


if __name__ == "__main__":
    main()
