"""Quantized linears: their kernels under the interpreter, their configurations, and how a call falls back."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS
from fusecomp.lowerings.quant import heuristics
from fusecomp.lowerings.quant.heuristics import TILE_LIMIT, fitting_columns, quant_config, unit
from fusecomp.lowerings.quant.lowering import explain_choices, refusal
from fusecomp.ops.quant import FP4, FP8, INT, NF4, WeightSpec
from fusecomp.ops.quant_linear import QuantShape
from fusecomp.patterns.quant_examples import random_weight

ROOT = Path(__file__).parents[2]
KINDS = ((INT, 4), (INT, 8), (FP8, 8), (FP4, 4), (NF4, 4))


def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "tests/lowerings/interpreted/check_quant.py"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    sizes, dtypes = (2, 1000, 14336), ("bfloat16", "float32")
    for n, k, groups, tokens, dtype in itertools.product(sizes, sizes, (1, 2), (1, 2, 33, 500, 5000), dtypes):
        for (kind, bits), cols in itertools.product(KINDS, (0, 16, 32, 48, 128, 160)):
            shape = QuantShape(n, k, groups, dtype, kind, bits, 1, cols, False)
            config = quant_config(target, shape, tokens)
            assert (config.kernel == "vector") == (tokens == 1)
            assert (config.kernel == "dequantize") == (tokens > TILE_LIMIT)
            if config.kernel == "tile":
                assert cols == 0 or cols % config.block_k == 0 or config.block_k % cols == 0
                assert config.block_k >= 16 and config.block_r % groups == 0
                stage = (
                    config.block_r * bits // 8 + config.block_t * (2 if dtype == "bfloat16" else 4)
                ) * config.block_k
                assert config.num_stages * stage <= target.smem_bytes
            elif config.kernel == "vector":
                assert cols % unit(shape) == 0 and config.block_k % unit(shape) == 0


def test_columns_of_a_tile_keep_to_those_of_a_scale():
    assert [fitting_columns(128, cols) for cols in (0, 32, 128, 48, 96, 256)] == [128, 128, 128, 16, 32, 128]


def test_shape_is_its_text():
    for (kind, bits), zero, groups in itertools.product(KINDS, (False, True), (1, 2)):
        shape = QuantShape(4096, 14336, groups, "bfloat16", kind, bits, 1, 128, zero)
        assert QuantShape.parse(str(shape)) == shape
    assert QuantShape.parse("linear 4096 x 14336 identity bfloat16") is None


def test_choices_are_explained():
    shape = QuantShape(4096, 4096, 1, "bfloat16", INT, 4, 1, 128, False)
    lines = explain_choices(SM90, shape, [0, 1, 8, 600, 8192])
    assert [line.split(", from")[0] for line in lines] == [
        "1 tokens: quantized vector",
        "8 tokens: quantized tile",
        "600 to 8192 tokens: dequantize, then linear",
    ]
    assert "no multiple of 16" in explain_choices(SM90, QuantShape(64, 64, 1, "bfloat16", INT, 4, 1, 8, False), [1])[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, s, z: (q.t().contiguous().t(), s, z), "strides"),
        (lambda q, s, z: (q.view(torch.int8), s, z), "codes are torch.int8"),
        (lambda q, s, z: (q, s.double(), z), "scales are torch.float64"),
        (lambda q, s, z: (q, s.t().contiguous().t(), z), "not contiguous"),
    ],
)
def test_refusals(change, reason):
    spec = WeightSpec(INT, 4, 1, 16, "bfloat16")
    weight = random_weight((32, 64), spec, torch.bfloat16, zero=True)
    assert refusal(*weight, spec) is None
    assert reason in refusal(*change(*weight), spec)
    odd = WeightSpec(INT, 4, 1, 8, "bfloat16")
    assert "no multiple of 16" in refusal(*random_weight((32, 64), odd, torch.bfloat16), odd)
    assert heuristics.reason(QuantShape(32, 64, 1, "bfloat16", INT, 4, 1, 8, False))
