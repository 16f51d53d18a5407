"""What Python's collector looks through while requests run."""

import gc
import weakref

import pytest

from fusecomp.runtime.collection import earlier_objects_spared


class Cycle:
    def __init__(self):
        self.itself = self


@pytest.fixture(autouse=True)
def nothing_frozen():
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_cycles_from_before_wait_until_the_outermost_block_ends():
    gc.collect()
    gc.disable()
    try:
        before = weakref.ref(Cycle())
        with earlier_objects_spared():
            inside = weakref.ref(Cycle())
            with earlier_objects_spared():
                gc.collect()
                assert inside() is None and before() is not None and gc.get_freeze_count() > 0
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert before() is None
    finally:
        gc.enable()


def test_an_error_ends_the_block_too():
    with pytest.raises(ZeroDivisionError), earlier_objects_spared():
        1 / 0  # noqa: B018
    assert gc.get_freeze_count() == 0


def test_what_the_program_froze_stays_frozen():
    gc.disable()
    try:
        before = weakref.ref(Cycle())
        gc.freeze()
        with earlier_objects_spared():
            pass
        gc.collect()
        assert before() is not None
        gc.unfreeze()
        gc.collect()
        assert before() is None
    finally:
        gc.enable()
