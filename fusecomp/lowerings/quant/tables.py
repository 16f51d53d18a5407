"""Tuned tables of quantized linears: a GPU's own entries, and those of the default GPU that it has none instead of."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tuned"
DEFAULT_TABLE = "nvidia_h100_80gb_hbm3"  # where most was measured


@cache
def entries_of(name: str, suffix: str, section: str, key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Entries for a GPU, each with the `gpu` that it was measured on.

    Args:
        name: the GPU's, as `Target.table` gives it.
        suffix: what the file's name has behind that.
        section: where a table has its entries, if any.
        key: what tells entries apart; a GPU's own replaces the default GPU's.
    """
    own = TABLES / f"{name}{suffix}.json"
    default = _read(TABLES / f"{DEFAULT_TABLE}{suffix}.json", section)
    merged = default + (_read(own, section) if own.exists() else [])
    return [*{tuple(entry.get(part, False) for part in key): entry for entry in merged}.values()]


def _read(path: Path, section: str) -> list[dict[str, Any]]:
    table = json.loads(path.read_text())
    return [entry | {"gpu": table["gpu"]} for entry in table.get(section, [])]
