"""The store of compiled programs on disk: what was compiled in one process is found by the next.

A program is a folder `<root>/programs/<key>` with `program.json` and artefact files that it names with their hashes.
The key is the hash of named parts (`identity.py`); the parts are stored beside it, so that a miss can say which differ.

Artefacts hold code. Nothing is read from a folder or file that another user owns or could write to, and no file whose
hash is not the one recorded. Writers put a finished folder in place with one rename: readers see all of it or nothing,
and of two writers of one key the first stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecomp.errors import ConfigError

FORMAT = 1
RECORD = "program.json"
MOST_PROGRAMS = 64
# Environment variable -> meaning; the values are checked by `cache_root` and `enabled_by_environment`.
ENVIRONMENT = {
    "FUSECOMP_CACHE_DIR": "folder of compiled programs, default ~/.cache/fusecomp",
    "FUSECOMP_COMPILE_CACHE": "0 neither reads nor writes compiled programs, 1 (default) does",
}


class Unusable(Exception):
    """A stored program cannot be used; the message says why."""


@dataclass(frozen=True)
class Stored:
    """A program found in the store: its record, and the path of each artefact, already checked."""

    key: str
    record: dict[str, Any]
    files: dict[str, Path]


@dataclass(frozen=True)
class Lookup:
    """What the store has for a key: a program, or the reason why there is none."""

    found: Stored | None
    reason: str = ""
    warning: bool = False  # something is wrong with the store or its files


def cache_root() -> Path:
    """The folder that holds stored programs.

    Raises:
        ConfigError: FUSECOMP_CACHE_DIR is empty or relative.
    """
    given = os.environ.get("FUSECOMP_CACHE_DIR")
    if given is None:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusecomp"
    path = Path(given).expanduser()
    if not path.is_absolute():
        raise ConfigError(f"FUSECOMP_CACHE_DIR={given!r}", where="environment", remedy="give an absolute path")
    return path


def enabled_by_environment() -> bool:
    """Whether the environment allows stored programs.

    Raises:
        ConfigError: FUSECOMP_COMPILE_CACHE is neither 0 nor 1.
    """
    given = os.environ.get("FUSECOMP_COMPILE_CACHE", "1")
    if given not in ("0", "1"):
        raise ConfigError(f"FUSECOMP_COMPILE_CACHE={given!r}", where="environment", remedy="give 0 or 1")
    return given == "1"


def key_of(parts: Mapping[str, Any]) -> str:
    """Hash of the named parts of a program's identity."""
    return hashlib.sha256(_canonical({"format": FORMAT, **parts}).encode()).hexdigest()[:40]


def differences(old: Any, new: Any, path: str = "", most: int = 3) -> list[str]:
    """Where two parts differ, as `path: old -> new`, at most `most` places."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for name in sorted({*old, *new}, key=str):
            if len(found) < most:
                step = f"{path}.{name}" if path else str(name)
                found += differences(old.get(name, "absent"), new.get(name, "absent"), step, most - len(found))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = []
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            if len(found) < most:
                found += differences(a, b, f"{path}[{i}]", most - len(found))
        return found
    return [f"{path}: {_short(old)} -> {_short(new)}"]


@dataclass
class ArtifactStore:
    """Programs below `root`, which is created when first written to."""

    root: Path = field(default_factory=cache_root)

    @property
    def programs(self) -> Path:
        return self.root / "programs"

    def look_up(self, parts: Mapping[str, Any]) -> Lookup:
        """The program stored for `parts`, every file of it checked."""
        key = key_of(parts)
        folder = self.programs / key
        if not folder.is_dir():
            return self._explain_miss(parts)
        try:
            for place in (self.root, self.programs, folder):
                _require_private(place, os.stat(place, follow_symlinks=place == self.root))
            record = _read_record(folder)
            if record.get("parts") != json.loads(_canonical(parts)):
                raise Unusable(f"{folder / RECORD} is another program's")
            files = {name: _checked(folder / name, digest) for name, digest in record["files"].items()}
        except (Unusable, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return Lookup(None, f"the stored program {key[:12]} cannot be used: {_describe(error)}", warning=True)
        with contextlib.suppress(OSError):  # the time of last use, for eviction
            os.utime(folder)
        return Lookup(Stored(key, record, files))

    def save(self, parts: Mapping[str, Any], record: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
        """Store a program and return its key; one that cannot be used is replaced.

        Raises:
            Unusable: the store cannot be written to, or belongs to another user.
        """
        key = key_of(parts)
        try:
            for place in (self.root, self.programs):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                _require_private(place, os.stat(place))
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=self.programs))
            try:
                hashes = {}
                for name, data in files.items():
                    _write(building / name, data)
                    hashes[name] = hashlib.sha256(data).hexdigest()
                body = _canonical({"format": FORMAT, "parts": parts, "files": hashes, **record})
                digest = hashlib.sha256(body.encode()).hexdigest()
                _write(building / RECORD, f"{digest}\n{body}".encode())
                self._put(building, key, parts)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        except OSError as error:
            raise Unusable(f"{self.root} cannot be written: {_describe(error)}") from error
        self._evict(key)
        return key

    def _put(self, building: Path, key: str, parts: Mapping[str, Any]) -> None:
        place = self.programs / key
        try:
            os.rename(building, place)
        except OSError:
            if self.look_up(parts).found is not None:  # another process was faster
                return
            broken = Path(tempfile.mkdtemp(prefix=".broken-", dir=self.programs))
            os.rename(place, broken / key)
            shutil.rmtree(broken, ignore_errors=True)
            os.rename(building, place)

    def _explain_miss(self, parts: Mapping[str, Any]) -> Lookup:
        """Name what differs from the stored program that shares most parts with this one."""
        wanted = json.loads(_canonical(parts))
        nearest: tuple[int, float, list[str], str] | None = None
        for folder in self._folders():
            try:
                _require_private(folder, os.stat(folder, follow_symlinks=False))
                stored = _read_record(folder)["parts"]
                same = sum(stored.get(name) == value for name, value in wanted.items())
                changed = [text for name in wanted for text in differences(stored.get(name), wanted[name], name, 1)]
                candidate = same, folder.stat().st_mtime, changed, folder.name
            except (Unusable, OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            nearest = max(nearest, candidate) if nearest else candidate
        if nearest is None:
            return Lookup(None, "no program is stored")
        return Lookup(None, f"no stored program matches; the nearest ({nearest[3][:12]}) has {'; '.join(nearest[2])}")

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.programs.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []

    def _evict(self, keep: str) -> None:
        """Remove the programs unused for longest, beyond `MOST_PROGRAMS`."""
        with contextlib.suppress(OSError):
            by_use = sorted(self._folders(), key=lambda path: (path.name == keep, path.stat().st_mtime))
            for path in by_use[: max(0, len(by_use) - MOST_PROGRAMS)]:
                shutil.rmtree(path, ignore_errors=True)


def _require_private(path: Path, status: os.stat_result) -> None:
    """Refuse what another user owns or may write to: artefacts hold code."""
    if stat.S_ISLNK(status.st_mode):
        raise Unusable(f"{path} is a symbolic link")
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        raise Unusable(f"{path} is owned by user {status.st_uid}, and artefacts hold code")
    if status.st_mode & 0o022:
        raise Unusable(
            f"{path} may be written by others (mode {stat.S_IMODE(status.st_mode):o}), and artefacts hold code"
        )


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        _require_private(path, os.fstat(descriptor))
        return file.read()


def _read_record(folder: Path) -> dict[str, Any]:
    digest, _, body = _read(folder / RECORD).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise Unusable(f"{folder / RECORD} is damaged")
    return json.loads(body)


def _checked(path: Path, digest: str) -> Path:
    if hashlib.sha256(_read(path)).hexdigest() != digest:
        raise Unusable(f"{path} is damaged")
    return path


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _canonical(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
