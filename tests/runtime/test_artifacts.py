"""The store of compiled programs: what is written is found, what is damaged or foreign is refused with a reason."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from fusecomp.errors import ConfigError
from fusecomp.runtime import artifacts
from fusecomp.runtime.artifacts import ArtifactStore, Unusable, cache_root, differences, enabled_by_environment, key_of

PARTS = {"torch": "2.13", "config": {"layers": 2, "eps": 1e-5}, "tensors": {"w": ["float32", [4, 4]]}}
FILES = {"piece-a.bin": b"a" * 100, "piece-b.bin": b"b" * 10}


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "cache")


def saved(store):
    key = store.save(PARTS, {"plan": [1, 2]}, FILES)
    return store.programs / key


def refusal(store, parts=PARTS):
    lookup = store.look_up(parts)
    assert lookup.found is None
    return lookup.reason


def test_what_is_saved_is_found(store):
    folder = saved(store)
    found = store.look_up(PARTS).found
    assert found.key == folder.name == key_of(PARTS)
    assert found.record["plan"] == [1, 2]
    assert {name: path.read_bytes() for name, path in found.files.items()} == FILES
    assert folder.stat().st_mode & 0o077 == 0


def test_an_empty_store_says_so(store):
    assert refusal(store) == "no program is stored"
    assert not store.root.exists()  # looking up writes nothing


@pytest.mark.parametrize(
    "part, value, names",
    [
        ("torch", "2.14", "torch: 2.13 -> 2.14"),
        ("config", {"layers": 3, "eps": 1e-5}, "config.layers: 2 -> 3"),
        ("tensors", {"w": ["float32", [4, 8]]}, "tensors.w[1][1]: 4 -> 8"),
        ("tensors", {"v": ["float32", [4, 4]]}, "tensors.v: absent -> "),
    ],
)
def test_a_miss_names_the_part_that_differs(store, part, value, names):
    saved(store)
    store.save({**PARTS, "torch": "1.0", "config": {}, "tensors": {}}, {}, {})  # shares less, and is not named
    reason = refusal(store, {**PARTS, part: value})
    assert names in reason
    assert reason.count("->") == 1


@pytest.mark.parametrize("name", ["program.json", "piece-a.bin"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed", "emptied"])
def test_a_damaged_file_is_a_miss_with_its_name_and_is_replaced(store, name, damage):
    path = saved(store) / name
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        at = len(data) // 2
        path.write_bytes({"truncated": data[:at], "changed": data[:at] + b"?" + data[at + 1 :], "emptied": b""}[damage])
    lookup = store.look_up(PARTS)
    assert lookup.found is None
    assert lookup.warning
    assert name in lookup.reason
    saved(store)
    assert store.look_up(PARTS).found is not None


def test_a_record_of_another_program_is_refused(store):
    folder = saved(store)
    other = store.programs / store.save({**PARTS, "torch": "1.0"}, {}, FILES)
    (folder / "program.json").write_bytes((other / "program.json").read_bytes())
    assert "another program's" in refusal(store)


@pytest.mark.parametrize("place", ["root", "programs", "folder", "record", "piece"])
def test_what_others_may_write_to_is_refused(store, place):
    folder = saved(store)
    path = {
        "root": store.root,
        "programs": store.programs,
        "folder": folder,
        "record": folder / "program.json",
        "piece": folder / "piece-a.bin",
    }[place]
    path.chmod(path.stat().st_mode | 0o002)
    reason = refusal(store)
    assert f"{path} may be written by others" in reason
    if place in ("root", "programs"):
        with pytest.raises(Unusable, match="may be written by others"):
            saved(store)


def test_what_another_user_owns_is_refused(store, monkeypatch):
    saved(store)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(store.root).st_uid + 1)
    assert "is owned by user" in refusal(store)
    with pytest.raises(Unusable, match="is owned by user"):
        saved(store)


def test_a_symbolic_link_is_not_followed(store, tmp_path):
    folder = saved(store)
    elsewhere = tmp_path / "elsewhere.bin"
    elsewhere.write_bytes(FILES["piece-a.bin"])
    (folder / "piece-a.bin").unlink()
    (folder / "piece-a.bin").symlink_to(elsewhere)
    assert "cannot be used" in refusal(store)
    os.rename(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    assert "is a symbolic link" in refusal(store)


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Unusable, match="cannot be written"):
        ArtifactStore(tmp_path / "file" / "cache").save(PARTS, {}, FILES)


def test_the_programs_unused_for_longest_are_removed(store, monkeypatch):
    monkeypatch.setattr(artifacts, "MOST_PROGRAMS", 3)
    for version in range(5):
        folder = store.programs / store.save({**PARTS, "torch": str(version)}, {}, FILES)
        os.utime(folder, (version, version))
    left = [version for version in range(5) if store.look_up({**PARTS, "torch": str(version)}).found]
    assert left == [2, 3, 4]


def _write(root, number, start):
    start.wait()
    for _ in range(20):
        ArtifactStore(Path(root)).save(PARTS, {"plan": number}, {"piece.bin": bytes([number]) * 50_000})


def test_writers_of_one_program_never_mix(store):
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    writers = [context.Process(target=_write, args=(str(store.root), n, start)) for n in range(3)]
    for writer in writers:
        writer.start()
    start.set()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if found := store.look_up(PARTS).found:
            assert found.files["piece.bin"].read_bytes() == bytes([found.record["plan"]]) * 50_000
            seen += 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen
    assert [path.name for path in store.programs.iterdir()] == [key_of(PARTS)]  # nothing half-built is left


def test_differences_name_at_most_a_few_places():
    assert differences({"a": 1}, {"a": 1}) == []
    assert differences({"a": 1, "b": [1, {"c": 2}]}, {"a": 1, "b": [1, {"c": 3}]}) == ["b[1].c: 2 -> 3"]
    many = differences(dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1), "part")
    assert many == [f"part.{name}: 0 -> 1" for name in "abc"]


def test_the_environment_chooses_the_folder_and_can_turn_the_store_off(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSECOMP_CACHE_DIR", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("FUSECOMP_CACHE_DIR", "relative")
    with pytest.raises(ConfigError, match="FUSECOMP_CACHE_DIR"):
        cache_root()
    for value, enabled in (("0", False), ("1", True)):
        monkeypatch.setenv("FUSECOMP_COMPILE_CACHE", value)
        assert enabled_by_environment() is enabled
    monkeypatch.setenv("FUSECOMP_COMPILE_CACHE", "no")
    with pytest.raises(ConfigError, match="FUSECOMP_COMPILE_CACHE"):
        enabled_by_environment()


def test_the_record_is_json_with_its_parts(store):
    digest, body = (saved(store) / "program.json").read_text().split("\n")
    assert len(digest) == 64
    assert json.loads(body)["parts"] == PARTS
