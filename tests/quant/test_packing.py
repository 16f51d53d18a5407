"""Any shape, group size, width, zero points and order of columns: what a format reads is what was packed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.ops import OPS
from fusecomp.quant.config import quantization_format
from fusecomp.quant.files import TensorFiles
from fusecomp.runtime.checkpoint import read_header
from tests.quant import packers
from tests.quant.test_formats import FP8, GPTQ, NF4, ct, floats, ints

EXAMPLES = settings(max_examples=60)
_number = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


def read(folder, tensors, config, shape, name="a.b"):
    """Write one weight, read it back, and return its codes and the plain weight."""
    file = f"{next(_number)}.safetensors"
    packers.write(folder / file, {f"{name}.{part}": tensor for part, tensor in tensors.items()})
    files = TensorFiles(folder, {file: read_header(folder / file)})
    format_ = quantization_format({"quantization_config": config}, "config.json")
    codes = format_.read(name, format_.find(files)[name], files, *shape, "float32")
    (folder / file).unlink()
    weight = OPS.dequantize(codes.q, codes.scale, codes.zero, codes.spec.to_text())
    return codes, weight if codes.order is None else weight[:, codes.order.argsort()]


def assert_same(weight, value):
    torch.testing.assert_close(weight, torch.from_numpy(value), rtol=1e-6, atol=0)


def random_weight(seed, n, k):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, k)).astype(np.float32) * rng.uniform(0.01, 3), rng


@EXAMPLES
@given(
    st.integers(0, 9999), st.integers(1, 5), st.integers(1, 9), st.sampled_from([4, 8]),
    st.sampled_from([8, 32, 40, -1]), *(st.booleans(),) * 3, st.sampled_from([1, 2]),
)  # fmt: skip
def test_gptq(folder, seed, n8, k8, bits, size, symmetric, act_order, with_index, version):
    w, rng = random_weight(seed, 8 * n8, 8 * k8)
    columns = w.shape[1] if size == -1 else size
    tensors, value = packers.gptq(
        w, bits, columns, symmetric, rng if act_order else None, version, with_index or act_order
    )
    config = {**GPTQ, "bits": bits, "group_size": size, "checkpoint_format": ["gptq", "gptq_v2"][version - 1]}
    codes, weight = read(folder, tensors, config, w.shape)
    assert_same(weight, value)
    assert (codes.zero is None) == bool((packed_zeros(tensors, bits, version) == 2 ** (bits - 1)).all())
    spec = codes.spec
    assert (codes.scale.shape[1] == 1) == (spec.cols == 0) and codes.q.dtype in (torch.uint8, torch.int8)


def packed_zeros(tensors, bits, version):
    words = tensors["qzeros"].view(np.uint32)
    lanes = [words >> np.uint32(bits * i) & np.uint32(2**bits - 1) for i in range(32 // bits)]
    return np.stack(lanes) + (version == 1)


def test_gptq_zero_points_at_both_ends(folder):
    """v1 stores zero - 1: 15 on disk is 16, as every kernel of that format computes it, and not 0."""
    w, _ = random_weight(0, 8, 32)
    tensors, _ = packers.gptq(w)
    tensors["qzeros"] = np.array([[np.uint32(0xF0F0F0F0).astype(np.int32)]], np.int32)
    codes, _ = read(folder, tensors, GPTQ, w.shape)
    assert codes.zero.float().flatten().tolist() == [1, 16] * 4


@EXAMPLES
@given(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 40), st.sampled_from([2, 16, 32, 64, -1]))
def test_awq(folder, seed, n8, k2, size):
    w, _ = random_weight(seed, 8 * n8, 2 * k2)
    tensors, value = packers.awq(w, w.shape[1] if size == -1 else size)
    assert_same(read(folder, tensors, {"quant_method": "awq", "bits": 4, "group_size": size}, w.shape)[1], value)


@EXAMPLES
@given(
    st.integers(0, 9999), st.integers(1, 21), st.integers(1, 40), st.sampled_from([4, 8]),
    st.sampled_from([None, 2, 32, 48]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_packed(folder, seed, n, k2, bits, size, symmetric, act_order):
    w, rng = random_weight(seed, n, 2 * k2)
    tensors, value = packers.ct_packed(w, bits, size, symmetric, rng if act_order and size else None)
    args = ints(bits, "group" if size else "channel", size, symmetric)
    assert_same(read(folder, tensors, ct(args), w.shape)[1], value)


@EXAMPLES
@given(
    st.integers(0, 9999), st.integers(1, 40), st.integers(1, 70), st.sampled_from([(0, 0), (1, 0), (16, 32), (8, 5)])
)
def test_fp8(folder, seed, n, k, block):
    w, _ = random_weight(seed, n, k)
    if block[1]:
        tensors, value = packers.fp8(w, *block, "weight_scale_inv")
        assert_same(read(folder, tensors, {**FP8, "weight_block_size": list(block)}, w.shape)[1], value)
        args = floats("block", block_structure=list(block))
    else:
        args = floats("channel" if block[0] else "tensor")
    tensors, value = packers.fp8(w, *block)
    assert_same(read(folder, tensors, ct(args, layout="float-quantized"), w.shape)[1], value)


@EXAMPLES
@given(st.integers(0, 9999), st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 16, 64]), st.booleans())
def test_nf4(folder, seed, n, blocks, block, nested):
    w, _ = random_weight(seed, n, blocks * block)
    tensors, value = packers.nf4(w, block, nested)
    assert_same(read(folder, tensors, NF4, w.shape)[1], value)
