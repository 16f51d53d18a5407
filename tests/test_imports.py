"""What makes starts faster without changing what is computed."""

import gc
import sys
import threading

import pytest
import triton.runtime.cache

from fusecomp import imports
from fusecomp._compat import compiler_prepared
from fusecomp.imports import fast_imports


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("own_process", [False, True])
def test_only_what_lasts_is_left_out_of_later_collections(unfrozen, own_process):
    before = gc.get_freeze_count()
    with fast_imports(own_process=own_process):
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    assert gc.isenabled()
    assert (gc.get_freeze_count() - before >= len(kept)) == own_process


def test_the_compiler_is_imported_and_hashed_beside_other_work(monkeypatch):
    threads, done = [], threading.Event()
    monkeypatch.setattr(
        triton.runtime.cache, "triton_key", lambda: (threads.append(threading.current_thread()), done.set())
    )
    with compiler_prepared():
        pass
    assert "torch._inductor.select_algorithm" in sys.modules
    assert done.wait(10)
    assert threads != [threading.main_thread()]


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package of one module that says when it is imported."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("")
    (tmp_path / "heavy" / "part.py").write_text("def double(x):\n    return 2 * x\n\nFACT = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(imports, "DEFERRED", {"heavy.part": "double", "absent_package.part": "anything"})
    yield
    for name in ("heavy", "heavy.part"):
        sys.modules.pop(name, None)


def test_a_deferred_function_brings_its_package_when_it_is_called(package):
    with fast_imports():
        from heavy.part import double

        assert not hasattr(sys.modules["heavy.part"], "__file__")  # as `inspect` asks
    assert not {"heavy", "heavy.part", "absent_package.part"} & set(sys.modules)
    assert double(3) == 6
    assert sys.modules["heavy.part"].double(3) == 6


def test_anything_else_of_a_deferred_package_is_the_real_one(package):
    with fast_imports():
        from heavy.part import FACT, double
    assert FACT == 5
    assert double is sys.modules["heavy.part"].double


def test_an_absent_package_stays_absent(package):
    with fast_imports(), pytest.raises(ModuleNotFoundError):
        import absent_package.part  # noqa: F401


def test_a_package_that_is_there_already_is_left_alone(package):
    import heavy.part

    with fast_imports():
        assert sys.modules["heavy.part"] is heavy.part
    assert sys.modules["heavy.part"] is heavy.part


def test_modules_are_imported_beside_other_work(package, monkeypatch):
    with imports.import_beside(("absent_package", "heavy.part")):
        pass  # what cannot be imported is left to whoever needs it
    assert sys.modules["heavy.part"].FACT == 5
