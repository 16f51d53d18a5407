"""What makes starts faster without changing what is computed."""

import gc
import threading

import pytest
import triton.runtime.cache

from fusecomp._compat import hash_compiler
from fusecomp.imports import without_collection


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


@pytest.mark.parametrize("lasting", [False, True])
def test_only_what_lasts_is_left_out_of_later_collections(unfrozen, lasting):
    before = gc.get_freeze_count()
    with without_collection(lasting=lasting):
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    assert gc.isenabled()
    assert (gc.get_freeze_count() - before >= len(kept)) == lasting


def test_the_compiler_is_hashed_beside_other_work(monkeypatch):
    threads, done = [], threading.Event()
    monkeypatch.setattr(
        triton.runtime.cache, "triton_key", lambda: (threads.append(threading.current_thread()), done.set())
    )
    hash_compiler()
    assert done.wait(10)
    assert threads != [threading.main_thread()]
