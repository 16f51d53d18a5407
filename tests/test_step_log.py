"""The log of a run's steps, against steps written by hand."""

import pytest

from benchmarks.step_log import Group, StepLog
from fusecomp.runtime.outputs import StepOutput


def step(*names):
    return [StepOutput(name, [7]) for name in names]


def test_steps_are_grouped_by_how_many_sequences_they_served():
    log = StepLog()
    log.add(0.5, [])  # a prompt's first part
    log.add(0.3, step("a"))
    log.add(0.2, step("a", "b"))  # b's prompt ends
    for seconds in (0.01, 0.04, 0.03):
        log.add(seconds, step("a", "b"))
    log.add(0.02, step("b"))
    prompts, few = log.groups({"a": 10, "b": 100})
    assert (len(log), log.advanced) == (7, 10)
    assert (prompts.rows, prompts.steps, prompts.median_ms) == (None, 3, pytest.approx(300))
    assert prompts.seconds == pytest.approx(1.0) and prompts.tokens == pytest.approx((0 + 0 + 11) / 3)
    assert (few.rows, few.steps, few.median_ms) == ((1, 8), 4, pytest.approx(25))
    # a has 12, b 101 tokens when the first of these begins; each step adds one to both.
    assert few.seconds == pytest.approx(0.1) and few.tokens == pytest.approx((113 + 115 + 117 + 104) / 4)
    assert few.to_dict() == {"rows": [1, 8], "steps": 4, "seconds": 0.1, "median_ms": 25.0, "tokens": 112.2}


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [(8, (1, 8)), (9, (9, 16)), (64, (33, 64)), (65, (65, 96)), (256, (225, 256)), (257, (257, 320))],
)
def test_groups_are_as_wide_as_graphs_differ(rows, bounds):
    log = StepLog()
    names = [str(i) for i in range(rows)]
    log.add(1.0, step(*names))
    log.add(1.0, step(*names))
    assert log.groups(dict.fromkeys(names, 3)) == [
        Group(None, 1, 1.0, 1000.0, 0.0),
        Group(bounds, 1, 1.0, 1000.0, 4.0 * rows),
    ]
