"""4-bit integers of linears in the order that their kernel wants: the same weights, in as many bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusecomp.ops.quant import FP8, INT, NF4, WeightSpec, dequantize_reference, fold_codes, unfold_codes
from fusecomp.patterns.quant_examples import random_weight
from fusecomp.quant.codes import Codes, prepared
from fusecomp.quant.modules import QuantizedLinear
from fusecomp.quant.online import export
from fusecomp.runtime.loading import load_model
from models.registry import FAMILIES, build
from tests.quant import packers
from tests.quant.checkpoints import check_logits, make, weights
from tests.quant.test_formats import AWQ, GPTQ, ct, ints, orders

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
CASES = {
    "gptq": (lambda w: packers.gptq(w, size=128), {**GPTQ, "group_size": 128}),
    "gptq act-order": (lambda w: packers.gptq(w, size=32, act_order=orders()), GPTQ),
    "awq": (lambda w: packers.awq(w, size=64), {**AWQ, "group_size": 64}),
    "packed": (lambda w: packers.ct_packed(w, size=128, symmetric=False), ct(ints(4, size=128, symmetric=False))),
}


@given(st.lists(st.integers(1, 4), max_size=2), st.sampled_from([32, 64]), st.integers(1, 3), st.integers(0, 9))
def test_layout(leading, fold, blocks, seed):
    """Nibbles of word i of a block are the codes of column i of quarters 0, 2, 1 and 3."""
    codes = np.random.default_rng(seed).integers(0, 16, (*leading, blocks, 4, fold))
    flat = codes.reshape(*leading, -1)
    q = torch.from_numpy((flat[..., ::2] | flat[..., 1::2] << 4).astype(np.uint8))
    words = fold_codes(q, fold).numpy().view("<u2").reshape(*leading, blocks, fold)
    for nibble, quarter in enumerate((0, 2, 1, 3)):
        assert np.array_equal(words >> 4 * nibble & 15, codes[..., quarter, :])
    assert torch.equal(unfold_codes(fold_codes(q, fold), fold), q)


@pytest.mark.parametrize(
    ("k", "cols", "fold"),
    [
        (4096, 128, 64), (4096, 64, 64), (4096, 32, 32), (4096, 0, 64), (384, 128, 32), (384, 0, 32), (1024, 256, 64),
        (1024, 512, 64), (96, 32, 0), (4096, 16, 0), (4096, 48, 0), (960, 0, 0), (768, 96, 0), (768, 192, 0),
    ],
)  # fmt: skip
def test_fold_follows_the_shape(k, cols, fold):
    spec = WeightSpec(INT, 4, 1, cols, "float32")
    q, scale, zero = random_weight((24, k), spec, torch.float32, zero=True)
    found = prepared(Codes(q, scale, zero, spec))
    assert found.spec.fold == fold and found.q.nbytes == q.nbytes and found.q.is_contiguous()
    weight = dequantize_reference(q, scale, zero, spec.to_text())
    assert torch.equal(dequantize_reference(found.q, scale, zero, found.spec.to_text()), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [FP8, INT])
def test_scales_of_rows_become_fp32(kind, dtype):
    """Exactly: what the codes stand for stays. Scales of groups, which no library's product takes, stay too."""
    spec = WeightSpec(kind, 8, 1, 0, str(dtype).removeprefix("torch."))
    codes = Codes(*random_weight((24, 256), spec, dtype), spec)
    found = prepared(codes)
    assert codes.scale.dtype == dtype and found.scale.dtype == torch.float32 and found.q is codes.q
    weights = [dequantize_reference(c.q, c.scale, c.zero, spec.to_text()) for c in (codes, found)]
    assert torch.equal(*weights)
    grouped = replace(spec, cols=64)
    other = Codes(*random_weight((24, 256), grouped, dtype), grouped)
    assert prepared(other) is other


def test_others_stay():
    spec = WeightSpec(NF4, 4, 1, 64, "float32")
    codes = Codes(*random_weight((8, 256), spec, torch.float32), spec)
    assert prepared(codes) is codes
    with pytest.raises(ValueError, match="do not fold by 64"):
        WeightSpec(NF4, 4, 1, 64, "float32", 64)
    with pytest.raises(ValueError, match="do not fold by 48"):
        WeightSpec(INT, 4, 1, 48, "float32", 48)


def folds(model):
    return {WeightSpec.from_text(m.codes.spec).fold for m in model.modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("case", CASES)
def test_every_format_folds(tmp_path, case):
    checkpoint = make(tmp_path, "llama", *CASES[case], num_hidden_layers=1, **WIDE)
    assert folds(check_logits(checkpoint)) <= {32, 64}


def test_written_and_read(tmp_path):
    """Codes that were folded when they were made are unfolded on their way to a file."""
    family = replace(FAMILIES["llama"], config={**FAMILIES["llama"].config, **WIDE})
    model = build(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    model, _ = load_model(tmp_path / "plain", "auto", "cpu", "int4", (), portable=True)
    assert folds(model) <= {32, 64}
    export.export(model, tmp_path / "plain", tmp_path / "out")
    read, _ = load_model(tmp_path / "out", "auto", "cpu")
    wanted, found = (dict(weights(of)) for of in (model, read))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
