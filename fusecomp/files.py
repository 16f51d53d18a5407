"""Prompt files in, output files out.

A bad line never loses the others: it becomes a `PromptLine` that carries its error. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fusecomp.config import check_keys
from fusecomp.errors import ConfigError, FusecompError, RequestError
from fusecomp.request import RequestOutput, SamplingParams

FORMATS = ("text", "jsonl")
RESERVED = ("id", "prompt", "prompt_token_ids")


@dataclass
class PromptLine:
    """One prompt with what its line says besides. `id` is the line's own, or its number from 1."""

    id: Any
    prompt: str | list[int] | None
    options: dict[str, Any] = field(default_factory=dict)
    error: FusecompError | None = None

    def params(self, base: SamplingParams) -> SamplingParams | FusecompError:
        """`base` with this line's own sampling options, or the error of the line."""
        if self.error is not None:
            return self.error
        try:
            return base.replace(**self.options)
        except ConfigError as error:
            return error


def read_prompts(path: str, file_format: str | None = None) -> list[PromptLine]:
    """The prompts of a file, one a line; `-` is standard input.

    Args:
        path: `.jsonl` holds objects with "prompt" or "prompt_token_ids", optional "id" and sampling options; any other
            file holds one prompt a line. Standard input counts as JSONL when its first line is a JSON object.
        file_format: "text" or "jsonl" overrides that.

    Raises:
        ConfigError: the file cannot be read or holds no line.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError("cannot be read", where=path, why=error.strerror or str(error), remedy="check it") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not lines:
        where = "standard input" if path == "-" else path
        raise ConfigError("holds no prompts", where=where, remedy="give one prompt a line")
    if file_format is None:
        file_format = "jsonl" if path.endswith(".jsonl") or (path == "-" and _is_object(lines[0])) else "text"
    parse = _parse_json if file_format == "jsonl" else _parse_text
    return [parse(number, line) for number, line in enumerate(lines, start=1)]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_text(number: int, line: bytes) -> PromptLine:
    try:
        return PromptLine(number, line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _refused(number, number, "not UTF-8", str(error), "write the file in UTF-8")


def _parse_json(number: int, line: bytes) -> PromptLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _refused(number, number, "invalid JSON", str(error), "write one JSON object a line")
    if not isinstance(record, dict):
        return _refused(number, number, f"a JSON {type(record).__name__}, not an object", "", "write one object a line")
    line_id = record.get("id", number)
    given = [key for key in ("prompt", "prompt_token_ids") if key in record]
    if len(given) != 1:
        what = "both prompt and prompt_token_ids" if given else "neither prompt nor prompt_token_ids"
        return _refused(number, line_id, what, "", "give one of them")
    prompt = record[given[0]]
    if not isinstance(prompt, str if given[0] == "prompt" else list):
        return _refused(number, line_id, f"{given[0]} is a {type(prompt).__name__}", "", "give a text or a list of ids")
    if isinstance(prompt, str) and not _encodable(prompt):
        return _refused(number, line_id, "the prompt holds half of a surrogate pair", "", "write valid Unicode")
    options = {key: value for key, value in record.items() if key not in RESERVED}
    try:
        check_keys(SamplingParams, options, f"line {number}", also=RESERVED)
    except ConfigError as error:
        return PromptLine(line_id, None, error=error)
    return PromptLine(line_id, prompt, options)


def _refused(number: int, line_id: Any, what: str, why: str, remedy: str) -> PromptLine:
    return PromptLine(line_id, None, error=RequestError(what, where=f"line {number}", why=why, remedy=remedy))


def record_of(line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    """One line of an output file."""
    completion = output.outputs[0] if output.outputs else None
    return {
        "id": line.id,
        "prompt": line.prompt if isinstance(line.prompt, str) else output.prompt_token_ids or line.prompt,
        "text": completion.text if completion else None,
        "token_ids": completion.token_ids if completion else None,
        "finish_reason": completion.finish_reason if completion else "error",
        "error": output.error,
    }


class OutputFile:
    """A JSONL file that appears under its name only when it is whole.

    Lines go to `<name>.partial` as requests finish, in that order, each flushed. `commit` writes them in the order of
    the prompts and moves the result into place; without it the partial file stays for the user to find.
    """

    def __init__(self, path: str) -> None:
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        if self.path.is_dir():
            raise ConfigError("is a folder", where=path, remedy="give a file name")
        if self.path.exists() and not self.path.is_file():  # a device or a pipe, which a rename would replace
            raise ConfigError("is not a regular file", where=path, remedy="give a file name, or use standard output")
        if self.path.is_symlink():
            self.path = self.path.resolve()
        self._records: dict[int, str] = {}
        self._file: IO[str] = self._open(self.partial, "a")  # what an earlier run left stays until there is better

    def _open(self, path: Path, mode: str) -> IO[str]:
        try:
            return path.open(mode, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                "cannot be written", where=str(path), why=error.strerror or str(error), remedy="give another --output"
            ) from error

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Append the record of prompt `index`."""
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # Python reads NaN in a line's id, JSON does not have it
            record = json.loads(json.dumps(record), parse_constant=str)
            text = json.dumps(record, ensure_ascii=False)
        if not _encodable(text):
            text = json.dumps(record)
        if not self._records:
            self._file.truncate(0)
        self._records[index] = text + "\n"
        self._file.write(self._records[index])
        self._file.flush()

    def commit(self) -> None:
        """Put the records, in the order of the prompts, under the file's name."""
        self._file.close()
        ordered = Path(f"{self.path}.tmp-{os.getpid()}")
        try:
            with self._open(ordered, "w") as file:
                file.writelines(self._records[index] for index in sorted(self._records))
                file.flush()
                os.fsync(file.fileno())
            os.replace(ordered, self.path)
        finally:
            ordered.unlink(missing_ok=True)
        self.partial.unlink(missing_ok=True)

    def abandon(self) -> int:
        """Close without moving into place; an empty partial file is removed. Returns how many records it holds."""
        self._file.close()
        if not self._records and self.partial.stat().st_size == 0:
            with contextlib.suppress(OSError):
                self.partial.unlink()
        return len(self._records)
