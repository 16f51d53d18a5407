"""Calibration text -> token ids [B, L]: windows of equal length, so that one batch needs no padding.

By default the text that comes with the package: Python source of CPython's standard library.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusecomp.errors import ConfigError

DEFAULT = Path(__file__).with_name("calibration.txt")
HEADER = re.compile(r"^# ===== training file: \S+ =====\n", re.MULTILINE)
WINDOWS, LENGTH, SHORTEST = 16, 512, 32
Given = str | Path | Sequence[Any] | None


@dataclass(frozen=True)
class Calibration:
    """Token ids [B, L] on the CPU, and where they come from in a few words."""

    ids: Tensor
    source: str


def calibration(given: Given, tokenizer: Callable[[], Any], longest: int, vocabulary: int | None) -> Calibration | None:
    """What a user gave as token ids.

    Args:
        given: path of a text file, texts, lists of token ids, or None for the package's own text. An empty list: no
            calibration, which gives None.
        tokenizer: gives the one for texts, or None.
        longest: most tokens of a window.
        vocabulary: ids are below it; None if that is unknown.

    Raises:
        ConfigError: it is nothing of that, or text without a tokenizer.
    """
    if given is not None and not isinstance(given, str | Path) and not len(given):
        return None
    texts, source = _texts(given)
    made = tokenizer() if any(isinstance(text, str) for text in texts) else None
    if made is None and any(isinstance(text, str) for text in texts):
        raise ConfigError(
            "calibration needs the model's tokenizer, and none was found",
            where="quantize",
            remedy="give calibration= as lists of token ids, or calibration=[] to do without",
        )
    stream = [i for text in texts for i in (_ids(made, text) if isinstance(text, str) else text)]
    strange = [i for i in stream if vocabulary is not None and not 0 <= i < vocabulary]
    if strange:
        raise _refused(f"token id {strange[0]} is outside the vocabulary of {vocabulary}")
    length = min(LENGTH, longest, len(stream))
    if length < min(SHORTEST, longest):
        raise _refused(f"{len(stream)} tokens are too few")
    count = min(WINDOWS, len(stream) // length)
    ids = torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)
    return Calibration(ids, f"calibrated on {count} x {length} tokens of {source}")


def _texts(given: Given) -> tuple[Sequence[Any], str]:
    if given is None:
        return HEADER.split(DEFAULT.read_text(encoding="utf-8"))[1:], "the default text"
    if isinstance(given, str | Path):
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "cannot be read", where=f"calibration={str(given)!r}", why=str(error), remedy="give a text file"
            ) from error
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return [text], f"{Path(given).name} (SHA-256 {digest})"
    for item in given:
        plain = isinstance(item, str) or (
            isinstance(item, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in item)
        )
        if not plain:
            raise _refused(f"it holds a {type(item).__name__}")
    return given, f"{len(given)} texts"


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos, *ids] if bos is not None else ids


def _refused(what: str) -> ConfigError:
    return ConfigError(what, where="calibration", remedy="give a text file, texts, or lists of token ids")
