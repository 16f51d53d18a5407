"""Candidates of sweeps: what may be refused, what may not, and that launches which were chosen can be chosen again."""

from dataclasses import replace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks.attention_quick import CLASSES, ON_REQUEST
from benchmarks.builds import SHOWN, refusal
from fusecomp.lowerings.paged_attention.heuristics import SM90, decode_config, load_table


def raising(error):
    def launch():
        raise error

    return launch


def test_a_refusal_says_why():
    assert refusal(lambda: None) == ""
    assert refusal(raising(OutOfResources(300, 200, "shared memory"))).startswith("OutOfResources out of resource")
    long = refusal(raising(RuntimeError("x" * SHOWN + "PassManager::run failed")))
    assert long.startswith("RuntimeError x") and long.endswith("run failed") and len(long) < SHOWN + 20


@pytest.mark.parametrize("error", [TypeError("launch()"), AssertionError("shape"), torch.AcceleratorError("illegal")])
def test_mistakes_and_lost_devices_are_no_refusals(error):
    with pytest.raises(type(error)):
        refusal(raising(error))


def chosen_at(one) -> bool:
    """Whether an entry of the table was chosen at the lengths of a class."""
    low, high = one.spread
    label = f"batch {one.batch} context {low} to {high}"
    return any(
        label in name and ("H32/4" in name) == (one.layer.kv_heads == 4)
        for entry in load_table("nvidia_h200")["decode"]
        if entry["head_dim"] == one.layer.head_dim
        for name in entry.get("measured", {})
    )


CHOSEN = [one for one in ON_REQUEST if chosen_at(one)]


@pytest.mark.parametrize("one", CHOSEN, ids=lambda one: one.name)
def test_launches_chosen_at_spread_lengths_are_among_those_tried(one):
    layer = one.layer
    found = decode_config(
        SM90, head_dim=layer.head_dim, itemsize=2, num_kv_heads=layer.kv_heads, page_size=layer.page_size,
        num_rows=one.batch, capacity=1 << 20, group=layer.heads // layer.kv_heads, new_key=True,
    )  # fmt: skip
    assert found.source.endswith("(exact)")
    assert replace(found, source="") in one.configs()
    low, high = one.spread
    assert low > 100 and high > 1024 and one.shapes[2].lengths.tolist()[:: one.batch - 1] == [low, high]


def test_launches_were_chosen_for_three_kinds_of_layers():
    assert {(one.layer.head_dim, one.layer.kv_heads) for one in CHOSEN} == {(128, 8), (64, 8), (128, 4)}


def test_classes_are_told_apart_by_name():
    names = [one.name for one in (*CLASSES, *ON_REQUEST)]
    assert len(set(names)) == len(names)
