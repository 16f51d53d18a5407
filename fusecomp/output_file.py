"""Output files that lose nothing: whole under their name, partial beside it, resumed after an interruption."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fusecomp.errors import ConfigError
from fusecomp.files import PromptLine, encodable


class OutputFile:
    """A JSONL file that appears under its name only when it is whole.

    Lines go to `<name>.partial` as requests finish, in that order, each flushed. `commit` writes them in the order of
    the prompts and moves the result into place; without it the partial file stays, for `resume`.
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
        self._resumed = 0
        self._file: IO[str] = self._open(self.partial, "a")  # what an earlier run left stays until there is better

    def _open(self, path: Path, mode: str) -> IO[str]:
        try:
            return path.open(mode, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                "cannot be written", where=str(path), why=error.strerror or str(error), remedy="give another --output"
            ) from error

    def resume(self, lines: Sequence[PromptLine]) -> list[int]:
        """Take over what an interrupted run for the same prompts finished; returns the positions that are still to do.

        A record belongs to the prompt of its id, or of its number, and only if the prompt is the same. Records of lines
        that failed are done again, and so is a last line that was cut off. What is no longer asked for is dropped.

        Raises:
            ConfigError: ids are not unique, so that nothing says which prompt a record belongs to.
        """
        places = {_key(line.id): index for index, line in enumerate(lines)}
        if len(places) != len(lines):
            raise ConfigError("ids of prompts repeat", where=str(self.path), remedy="give unique ids to resume by")
        for path in (self.path, self.partial):
            for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
                try:
                    record = json.loads(text)
                    index = places.get(_key(record["id"]))
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
                if index is None or not text.endswith(b"\n") or record.get("error") is not None:
                    continue
                if _asked(lines[index]) == _asked_by(record):
                    self._records[index] = text.decode("utf-8")
        self._resumed = len(self._records)
        if self._resumed:
            self._rewrite_partial()
        return [index for index in range(len(lines)) if index not in self._records]

    def _rewrite_partial(self) -> None:
        """Begin the partial file with the records taken over, so that another interruption loses none of them."""
        fresh = Path(f"{self.partial}.tmp-{os.getpid()}")
        try:
            with self._open(fresh, "w") as file:
                file.writelines(self._records.values())
                file.flush()
                os.fsync(file.fileno())
            self._file.close()
            os.replace(fresh, self.partial)
        finally:
            fresh.unlink(missing_ok=True)
        self._file = self._open(self.partial, "a")

    @property
    def resumed(self) -> int:
        """Records taken over from an interrupted run."""
        return self._resumed

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Append the record of prompt `index`."""
        try:
            text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError:  # Python reads NaN in a line's id, JSON does not have it
            record = json.loads(json.dumps(record), parse_constant=str)
            text = json.dumps(record, ensure_ascii=False)
        if not encodable(text):
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


def _key(line_id: Any) -> str:
    """An id as it comes back from a file: NaN, which JSON does not have, is written as a text."""
    return json.dumps(line_id, sort_keys=True).replace("NaN", '"NaN"')


def _asked(line: PromptLine) -> Any:
    return line.prompt if line.messages is None else line.messages


def _asked_by(record: dict[str, Any]) -> Any:
    return record.get("messages", record.get("prompt"))
