"""Models quantized in memory: what becomes codes, what does not, how far results move, what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fusecomp
import fusecomp.runtime.loading
from fusecomp import LLM, SamplingParams
from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError, UnsupportedModelError
from fusecomp.ops.quant import dequantize_reference
from fusecomp.quant.modules import QuantizedLinear, QuantizedWeight
from fusecomp.quant.online.record import record_of
from fusecomp.quant.online.rounding import make_codes, round_trip
from fusecomp.quant.online.schemes import LEAST_TOKENS, SCHEMES, scheme
from fusecomp.quant.online.transform import quantize_model
from models.registry import FAMILIES, build
from tests.conftest import ENGINE_OPTIONS
from tests.quant import packers
from tests.quant.checkpoints import PROMPT, weights

IDS = [torch.randint(3, 90, (96,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
# Relative error of logits of the tiny random models, whose layers are few and narrow: about twice what is found.
WITHIN = {"fp8": 0.1, "int8": 0.04, "int4": 0.5}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def value(codes):
    return dequantize_reference(codes.q, codes.scale, codes.zero, codes.spec.to_text())


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def logits(model, ids=PROMPT):
    return model(ids).logits.clone()


# ---------------------------------------------------------------------- codes


def test_fp8_is_what_the_format_says():
    w = random(48, 80)
    _, wanted = packers.fp8(w.numpy(), 1, 0)
    np.testing.assert_allclose(value(make_codes(w, SCHEMES["fp8"], torch.float32)).numpy(), wanted, rtol=1e-6)


def test_int8_rounds_to_the_nearest_of_255_codes():
    w = random(48, 80).numpy()
    scale = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float32)
    codes = make_codes(torch.from_numpy(w), SCHEMES["int8"], torch.float32)
    assert np.array_equal(codes.q.numpy(), np.round(w / scale)) and codes.q.dtype == torch.int8
    np.testing.assert_array_equal(codes.scale.numpy(), scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_errs_by_half_a_step(symmetric):
    w = random(40, 256)
    w[3] = 0
    codes = make_codes(w, SCHEMES["int4"], torch.float32, symmetric=symmetric)
    assert codes.q.shape == (40, 128) and codes.scale.shape == (40, 2) and (codes.zero is None) == symmetric
    error = (value(codes) - w).abs().unflatten(-1, (2, 128))
    assert bool((error <= 0.5001 * codes.scale.unsqueeze(-1) + 1e-6).all())
    assert torch.equal(value(codes)[3], w[3])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_of_experts_are_those_of_each(name, dtype, monkeypatch):
    w = random(5, 32, 96, dtype=dtype)
    monkeypatch.setattr("fusecomp.quant.online.rounding.MOST_ELEMENTS", 2 * 32 * 96)
    together = make_codes(w, SCHEMES[name], dtype, symmetric=False)
    for i in range(5):
        alone = make_codes(w[i], SCHEMES[name], dtype, symmetric=False)
        assert torch.equal(value(together)[i], value(alone))
    exact = round_trip(w.float(), SCHEMES[name], dtype, False)
    assert torch.equal(value(together), exact.to(dtype))


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen2-moe", "gpt-oss", "deepseek-v2", "aria"])
def test_families(family, name):
    model = build(FAMILIES[family]).eval()
    before, taken = logits(model), size(model)
    record = quantize_model(model, SCHEMES[name].from_tokens(0), text=IDS)
    assert 0 < relative(logits(model), before) < WITHIN[name]
    assert size(model) < taken
    held = {name.removesuffix(".weight") for name, _ in weights(model)}
    assert held == {weight.name for weight in record.weights}
    everything = {n.removesuffix(".weight") for n, p in build(FAMILIES[family]).named_parameters() if p.dim() >= 2}
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
    left = {name.removesuffix(".weight") for name, _ in record.left_out}
    assert held | left == everything | tied
    assert not held & left


def size(model):
    return sum(tensor.nbytes for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())


def test_routers_embeddings_and_gates_are_left_out():
    model = build(FAMILIES["qwen2-moe"])
    reasons = dict(quantize_model(model, "fp8").left_out)
    assert "computes something else" in reasons["model.layers.0.mlp.gate"]
    assert "too few" in reasons["model.layers.0.mlp.shared_expert_gate"]
    assert "no decoder layer" in reasons["lm_head"] and "no decoder layer" in reasons["model.embed_tokens"]
    aria = dict(quantize_model(build(FAMILIES["aria"]), "fp8").left_out)
    assert "chooses among 6 experts" in aria["model.layers.0.mlp.router"]
    assert "experts interface" in aria["model.layers.0.mlp.experts.fc1.weight"]


def test_shared_weights_and_hooked_modules_stay():
    model = build(FAMILIES["llama"])
    first, second = (layer.mlp for layer in model.model.layers[:2])
    first.up_proj.weight = second.up_proj.weight
    first.gate_proj.register_forward_hook(lambda *_: None)
    reasons = dict(quantize_model(model, "fp8").left_out)
    assert "same parameter" in reasons["model.layers.0.mlp.up_proj"] == reasons["model.layers.1.mlp.up_proj"]
    assert "hooks" in reasons["model.layers.0.mlp.gate_proj"]
    assert isinstance(second.gate_proj, QuantizedLinear)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_linears_are_known_by_what_they_compute():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=151, n_positions=128)
    model = GPT2LMHeadModel(config).eval()  # its linears are Conv1D, whose weights are [K, N]
    odd = Scaled(64, 64)
    model.transformer.h[0].add_module("odd", odd)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:, -64:-60] *= 30  # values with outliers, which scales can move
    before = logits(model)
    record = quantize_model(model, "int8", text=IDS)
    assert len(record.weights) == 8 and isinstance(model.transformer.h[1].mlp.c_fc, QuantizedLinear)
    assert "computes something else" in dict(record.left_out)["transformer.h.0.odd"]
    assert 0 < relative(logits(model), before) < 0.02
    assert any("last rows" in weight.detail for weight in record.weights)  # values of the fused c_attn


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_same_text_same_codes(name):
    models = [build(FAMILIES["qwen3-moe"]) for _ in range(2)]
    for model in models:
        quantize_model(model, name, text=IDS)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(as_bytes(first[key]), as_bytes(second[key])) for key in first)
    other = build(FAMILIES["qwen3-moe"])
    quantize_model(other, name, text=[[i + 1 for i in ids] for ids in IDS])
    assert any(not torch.equal(as_bytes(first[key]), as_bytes(v)) for key, v in other.state_dict().items())


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_activations_stay_in_small_steps():
    model = build(FAMILIES["llama"]).eval()
    quantize_model(model, "fp8")
    layer = model.model.layers[0].self_attn.q_proj
    exact = nn.functional.linear
    few, many = random(LEAST_TOKENS - 1, 96), random(LEAST_TOKENS, 96)
    assert torch.equal(layer(few), exact(few, layer.weight))
    assert not torch.equal(layer(many), exact(many, layer.weight))
    torch.testing.assert_close(layer(many), exact(many, layer.weight), rtol=0.1, atol=0.5)


def test_conversion_and_copies():
    model = build(FAMILIES["llama"]).eval()
    quantize_model(model, "int4", text=[])
    twin = copy.deepcopy(model).double().float()
    assert torch.equal(logits(twin), logits(model)) and record_of(twin) == record_of(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained("never")


# ---------------------------------------------------------------------- refusals


def test_refusals(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="fp8, int8, int4"):
        EngineConfig(quantize="int3")
    with pytest.raises(ConfigError, match="fp8, int8, int4"):
        scheme("int3")
    with pytest.raises(ConfigError, match="calibration without quantize"):
        EngineConfig(calibration=["text"])
    with pytest.raises(ConfigError, match="list of lists of token ids"):
        EngineConfig(quantize="int4", calibration=[1.5])
    with pytest.raises(ConfigError, match="cannot be read"):
        quantize_model(tiny_model, "int4", text=str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="none was found"):
        quantize_model(tiny_model, "int4")
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        quantize_model(tiny_model, "int4", text=[[5] * 40 + [10_000]])
    with pytest.raises(ConfigError, match="too few"):
        quantize_model(tiny_model, "int4", text=[[5, 6]])
    assert not any(isinstance(m, QuantizedLinear | QuantizedWeight) for m in tiny_model.modules())
    quantize_model(tiny_model, "int4", text=[])
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(tiny_model, "fp8")
    with pytest.raises(ConfigError, match="quantized already"):
        LLM(tiny_model, quantize="fp8", **ENGINE_OPTIONS)
    with pytest.raises(UnsupportedModelError, match="no list of layers"):
        quantize_model(nn.Linear(32, 32), "fp8")


def test_text_that_is_not_used_is_noted(tiny_model):
    assert "not used" in quantize_model(tiny_model, "fp8", text=IDS).notes[0]


def test_a_weight_that_is_no_number_is_named(tiny_model):
    tiny_model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        quantize_model(tiny_model, "fp8")


# ---------------------------------------------------------------------- users' doors


@pytest.mark.parametrize("name", SCHEMES)
def test_llm(tiny_folder, name):
    options = {**ENGINE_OPTIONS, "dtype": "float32", "fuse": "always", "verify": "first"}
    llm = LLM(tiny_folder, quantize=name, calibration=IDS, **options)
    report = llm.fusion_report
    assert report.count("quantize") == 14 and {m.numerics for m in report.matches[:14]} == {"quantizing"}
    assert ("quantize", "lm_head") in {(miss.pattern, miss.where) for miss in report.near_misses}
    assert report.notes[0].startswith(f"quantized by {name}, ")
    assert [receipt.passed for receipt in report.receipts] == [True, True]
    out = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=6, temperature=0), use_tqdm=False)[0]
    model = fusecomp.runtime.loading.load_model(tiny_folder, "float32", "cpu", name, IDS)[0]
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)[0, 3:]
    assert out.outputs[0].token_ids == wanted.tolist()


def test_fuse_and_unfuse(tiny_model):
    stock = type(tiny_model)
    model = fusecomp.fuse(tiny_model, quantize="int4", calibration=IDS, **ENGINE_OPTIONS)
    ids = torch.tensor([[5, 6, 7, 8]])
    fused = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert not model.fusion_fallbacks and model.fusion_report.count("quantize") == 14
    twin = copy.deepcopy(model)  # has its codes, and must not be quantized again
    assert torch.equal(twin.generate(ids, max_new_tokens=6, do_sample=False), fused)
    assert type(fusecomp.unfuse(model)) is stock
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), fused)


def test_explain_changes_no_model_in_memory(tiny_model, tiny_folder):
    with pytest.raises(ConfigError, match="in memory"):
        fusecomp.explain(tiny_model, quantize="fp8")
    assert fusecomp.explain(tiny_folder, quantize="fp8", **ENGINE_OPTIONS).count("quantize") == 14


def test_programs_are_told_apart(tiny_folder):
    from fusecomp.runtime.identity import _Description, _tensors

    def parts(**options):
        model = fusecomp.runtime.loading.load_model(tiny_folder, "float32", "cpu", **options)[0]
        described = _Description(model)
        return {n: described.module(m, n) for n, m in model.named_modules()}, _tensors(model)

    found = [parts(), *(parts(quantize=name, calibration=()) for name in SCHEMES)]
    assert all(a[0] != b[0] and a[1] != b[1] for i, a in enumerate(found) for b in found[:i])
    assert parts(quantize="int4", calibration=()) == found[3]
