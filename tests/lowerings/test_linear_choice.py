"""Which kernel runs a linear, and what the report says about it."""

import pytest

from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.lowering import SKINNY_LIMIT, choose, explain_choices
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS
from fusecomp.ops.linear import LinearShape

SHAPES = [
    LinearShape(14336, 4096, 2, "other", "bfloat16"),
    LinearShape(4096, 14336, 1, "residual", "bfloat16"),
    LinearShape(200, 96, 1, "identity", "float32"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_survives_its_text(shape):
    assert LinearShape.parse(str(shape)) == shape and LinearShape.parse("attention 1 x 2") is None


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_tokens_has_a_kernel(target, shape):
    for tokens in (0, 1, 2, SKINNY_LIMIT, SKINNY_LIMIT + 1, 256, 8192):
        kind = SkinnyConfig if 0 < tokens <= SKINNY_LIMIT else LargeConfig
        assert isinstance(choose(target, shape, tokens), kind)


def test_the_report_names_every_count_once_and_the_source():
    lines = explain_choices(SM90, SHAPES[0], [1, 2, 4, 8, 64, 8192, 1])
    spans = [line.split(" tokens: ")[0] for line in lines]
    assert spans[0] == "1" and spans[-1].endswith("8192")
    assert "skinny vector, from NVIDIA H200" in lines[0] and "(exact)" in lines[0]
