"""Greedy sampling under Triton's interpreter against its eager reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.sampling import greedy
from fusecomp.ops.sampling import greedy_reference


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 7, 4095, 4096, 4097, 9001, 20000]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
def test_is_the_first_of_the_largest(rows, vocab, dtype, seed):
    logits = torch.randn(rows, vocab + 3, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :vocab]
    assert torch.equal(greedy.launch_greedy(logits), greedy_reference(logits))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 5000, 9999])
def test_one_bad_value_spoils_its_row_only(value, at):
    logits = torch.randn(3, 10000)
    logits[1, at] = value
    tokens = greedy.launch_greedy(logits)
    assert tokens[1] == -1 and torch.equal(tokens[[0, 2]], logits[[0, 2]].argmax(1))


def test_a_row_of_minus_infinity_has_no_token():
    logits = torch.full((2, 5000), float("-inf"))
    logits[1, 4321] = -5.0
    assert greedy.launch_greedy(logits).tolist() == [-1, 4321]


def test_ties_take_the_lowest_id_across_splits():
    logits = torch.zeros(1, 30000)
    logits[0, [29999, 8191, 8192]] = 1.0
    assert greedy.launch_greedy(logits).tolist() == [8191]
