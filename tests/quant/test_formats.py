"""Every format, dense and with experts: weights, logits and tokens are those of the plain model it stands for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fusecomp.lowerings.experts.heuristics import METHODS
from fusecomp.lowerings.experts.quant_heuristics import quant_experts_config
from fusecomp.lowerings.experts.quant_lowering import supports
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.ops.experts import codes_shape
from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.modules import QuantizedLinear, QuantizedWeight
from tests.quant import packers
from tests.quant.checkpoints import LINEARS, PROMPT, check_logits, make, weights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MIXTRAL = r"model\.layers\.\d+\..*((q|k|v|o)_proj|\.w[123])"
MXFP4 = r"model\.layers\.\d+\.mlp\.experts\.(gate_up|down)_proj"


def ct(weights, activations=None, layout="pack-quantized", targets=("Linear",), **more):
    group = {"targets": list(targets), "weights": weights, "input_activations": activations}
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "format": layout, **groups, **more}


def ints(bits, strategy="group", size=32, symmetric=True, **more):
    args = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    return args | ({"group_size": size} if strategy == "group" else {}) | more


def floats(strategy, **more):
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}


def orders():
    return np.random.default_rng(0)


WEIGHT_ONLY = {
    "gptq": ("llama", packers.gptq, GPTQ),
    "gptq symmetric act-order": ("llama", lambda w: packers.gptq(w, symmetric=True, act_order=orders()), GPTQ),
    "gptq 8 bits v2": (
        *("qwen3", lambda w: packers.gptq(w, bits=8, version=2)),
        {**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"},
    ),
    "gptq experts act-order": ("qwen3-moe", lambda w: packers.gptq(w, act_order=orders()), GPTQ),
    "awq": ("llama", packers.awq, AWQ),
    "awq experts": ("mixtral", packers.awq, AWQ, MIXTRAL),
    "packed": ("qwen3", packers.ct_packed, ct(ints(4))),
    "packed channels, 8 bits": (
        *("llama", lambda w: packers.ct_packed(w, bits=8, size=None)),
        ct(ints(8, "channel"), targets=("re:.*proj$",)),
    ),
    "packed asymmetric act-order": (
        *("llama", lambda w: packers.ct_packed(w, symmetric=False, act_order=orders())),
        ct(ints(4, symmetric=False, actorder="group")),
    ),
    "packed experts": ("qwen3-moe", packers.ct_packed, ct(ints(4))),
    "int8 zero points": (
        *("llama", lambda w: packers.ct_int8(w, symmetric=False)),
        ct(ints(8, "channel", symmetric=False), layout="int-quantized"),
    ),
    "fp8 tensor, experts": (
        *("qwen3-moe", lambda w: packers.fp8(w, 0, 0)),
        ct(floats("tensor"), layout="float-quantized"),
    ),
    "nf4": ("llama", lambda w: packers.nf4(w, 8), NF4),
    "nf4 nested": ("llama", lambda w: packers.nf4(w, 8, nested=True), NF4),
}


@pytest.mark.parametrize("case", WEIGHT_ONLY)
def test_weight_only(tmp_path, case):
    checkpoint = make(tmp_path, *WEIGHT_ONLY[case])
    model = check_logits(checkpoint)
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert linears and not any(module.codes.q.is_floating_point() and "fp8" not in case for module in linears)
    assert type(model.lm_head) is torch.nn.Linear


def fake_int8(x):
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    return np.round(x / scale) * scale


def fake_static_int8(x):
    scale = np.float32(0.05)
    return np.clip(np.round(x / scale), -128, 127) * scale


def fake_fp8(x, block=None):
    parts = [x[..., i : i + (block or x.shape[-1])] for i in range(0, x.shape[-1], block or x.shape[-1])]
    done = []
    for part in parts:
        scale = np.abs(part).max(-1, keepdims=True) / np.float32(448)
        done.append(packers.E4M3[packers.to_e4m3(part / scale)] * scale)
    return np.concatenate(done, -1)


def with_scale(pack, name):
    def packed(w):
        tensors, value = pack(w)
        return tensors | {name: np.array([0.05], np.float32)}, value

    return packed


INT_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
INT_STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
ACTIVATIONS = {
    "int8 dynamic": (packers.ct_int8, ct(ints(8, "channel"), INT_TOKEN, "int-quantized"), fake_int8),
    "int8 static": (
        with_scale(lambda w: packers.ct_int8(w, per="tensor"), "input_scale"),
        ct(ints(8, "tensor"), INT_STATIC, "int-quantized"),
        fake_static_int8,
    ),
    "fp8 channel and token": (
        lambda w: packers.fp8(w, 1, 0),
        ct(floats("channel"), floats("token", dynamic=True), "float-quantized"),
        fake_fp8,
    ),
    "fp8 block": (lambda w: packers.fp8(w, 128, 128, "weight_scale_inv"), FP8, lambda x: fake_fp8(x, 128)),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_quantized_activations(tmp_path, case):
    pack, config, fake = ACTIVATIONS[case]
    checkpoint = make(tmp_path, "llama", pack, config, num_hidden_layers=1)
    model, plain = checkpoint.load(), checkpoint.load_plain()
    check_logits(checkpoint, exact=False)
    for name, module in plain.named_modules():
        if name in checkpoint.values:
            module.register_forward_pre_hook(lambda _, args: torch.from_numpy(fake(args[0].numpy())))
    with torch.no_grad():
        got, wanted = model(PROMPT).logits, plain(PROMPT).logits
    # A value between two codes may fall to either side of them.
    assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_blocks_that_experts_share_are_split(tmp_path):
    """gate and up have 48 rows each, so that a block of 32 rows would straddle them once they are one."""
    pack = lambda w: packers.fp8(w, 32, 32, "weight_scale_inv")  # noqa: E731
    config = {**FP8, "weight_block_size": [32, 32]}
    check_logits(make(tmp_path, "qwen3-moe", pack, config, only=r".*experts.*proj"))


def mxfp4(w):  # the parameter is [E, K, N]
    tensors, value = packers.mxfp4(np.swapaxes(w, 1, 2))
    return tensors, np.ascontiguousarray(np.swapaxes(value, 1, 2))


def test_mxfp4_is_what_transformers_reads(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {"intermediate_size": 64, "hidden_size": 128}
    checkpoint = make(tmp_path, "gpt-oss", mxfp4, {"quant_method": "mxfp4"}, only=MXFP4, sep="_", **sizes)
    held = dict(weights(check_logits(checkpoint)))
    assert len(held) == 4
    for name, value in held.items():
        parts = [torch.from_numpy(checkpoint.tensors[f"{name}_{part}"]) for part in ("blocks", "scales")]
        assert torch.equal(value, convert_moe_packed_tensors(*parts, dtype=torch.float32)), name


def test_fp8_is_what_transformers_reads(tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_attention_heads": 8}
    pack = lambda w: packers.fp8(w, 128, 128, "weight_scale_inv")  # noqa: E731
    checkpoint = make(tmp_path, "llama", pack, FP8, num_hidden_layers=1, **sizes)
    held = list(weights(checkpoint.load()))
    assert len(held) == 7
    for name, value in held:
        codes = torch.from_numpy(checkpoint.tensors[name][1]).view(torch.float8_e4m3fn)
        scale = torch.from_numpy(checkpoint.tensors[f"{name}_scale_inv"])
        assert torch.equal(value, Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)), name


def test_dtype_follows_the_model_and_codes_stay(tmp_path):
    checkpoint = make(tmp_path, "qwen3-moe", packers.gptq, GPTQ)
    model = checkpoint.load("bfloat16")
    linear, experts = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.experts
    assert linear.weight.dtype == experts.gate_up_proj.dtype == model.dtype == torch.bfloat16
    exact = linear.codes.scale.clone()
    wide = model.float()
    assert linear.weight.dtype == experts.down_proj.dtype == wide.lm_head.weight.dtype == torch.float32
    assert linear.codes.q.dtype == torch.uint8 and linear.codes.scale.dtype == torch.float16
    assert torch.equal(linear.codes.scale, exact)
    expected = dict(checkpoint.load_plain().named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(linear.weight, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["int8 dynamic", "int8 static", "fp8 block"])
def test_dtype_of_quantized_inputs_follows(tmp_path, case):
    checkpoint = make(tmp_path, "llama", *ACTIVATIONS[case][:2], num_hidden_layers=1)
    wanted = checkpoint.load()(PROMPT).logits
    half = checkpoint.load("bfloat16")
    assert half(PROMPT).logits.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.input.scale is None or "static" in case
    got = half.float()(PROMPT).logits
    assert got.dtype == torch.float32 and (got - wanted).norm() < 0.05 * wanted.norm()


def test_layers_that_the_model_ignores(tmp_path, monkeypatch):
    """DeepSeek V3 has a further layer, for speculation, in its checkpoint."""
    from transformers import LlamaForCausalLM

    checkpoint = make(tmp_path, "llama", packers.gptq, GPTQ)
    extra = {name.replace("layers.0", "layers.3"): value for name, value in checkpoint.tensors.items()}
    checkpoint.tensors |= {name: value for name, value in extra.items() if "layers.3" in name}
    checkpoint.rewrite()
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    check_logits(checkpoint)


def test_dynamic_settings_of_gptq(tmp_path):
    """One layer has 8 bits, and the router stays plain although nothing says so."""
    bits = iter([8, 8, 8, 8, 8, 8, 8] + [4] * 14)  # in the order of names: layer 0 first
    config = {**GPTQ, "dynamic": {r"+:model\.layers\.0\..*": {"bits": 8}, r"-:.*lm_head.*": {}}}
    check_logits(make(tmp_path, "llama", lambda w: packers.gptq(w, bits=next(bits)), config))


def test_layers_that_stay_plain(tmp_path):
    checkpoint = make(tmp_path, "llama", packers.awq, AWQ, only=LINEARS.replace(r"\d+", "[02]"))
    model = check_logits(checkpoint)
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear


def test_a_quantized_model_is_not_saved(tmp_path):
    model = make(tmp_path, "llama", packers.awq, AWQ).load()
    assert model.config.quantization_config["quant_method"] == "awq"
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("family", ["deepseek-v3", "phimoe", "ernie4.5-moe"])
def test_families_of_experts(tmp_path, family):
    """Their checkpoints call experts differently, and some linears stand outside of them."""
    only = r"model\.layers\.\d+\.(?!.*gate$).*(proj\w*|w\d)"
    config = {**FP8, "weight_block_size": [32, 32]}
    checkpoint = make(tmp_path, family, lambda w: packers.fp8(w, 32, 32, "weight_scale_inv"), config, only)
    assert len(list(weights(check_logits(checkpoint, exact=False)))) < len(checkpoint.values)


def test_the_engine_serves_it(tmp_path):
    from fusecomp import LLM, SamplingParams
    from tests.conftest import ENGINE_OPTIONS

    checkpoint = make(tmp_path, "qwen3-moe", lambda w: packers.gptq(w, act_order=orders()), GPTQ)
    wanted = checkpoint.load().generate(PROMPT, max_new_tokens=6, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    llm = LLM(checkpoint.folder, dtype="float32", **ENGINE_OPTIONS)
    served = llm.generate([PROMPT[0].tolist()], SamplingParams(max_tokens=6, temperature=0))
    assert served[0].outputs[0].token_ids == wanted


def gpt_oss(tmp_path):
    """Its experts are stored as codes along the inputs, and read as [E, in, out]."""
    config = {"quant_method": "mxfp4"}
    return make(tmp_path, "gpt-oss", mxfp4, config, only=MXFP4, sep="_", intermediate_size=64, hidden_size=128)


FOLDS = {
    "gptq": {"quant_linear": 12},
    "packed experts": {"quant_experts": 2, "routed_quant_experts": 2},
    "gpt-oss": {"quant_experts": 2, "routed_quant_experts": 2},
    "gptq experts act-order": {"quant_experts": 0, "routed_quant_experts": 0},
}


@pytest.mark.parametrize("case", FOLDS)
def test_the_pass_folds_it(tmp_path, case, request):
    """Inductor compiles one of them here, and models of quantized linears in `test_quant_engine.py`."""
    from fusecomp import LLM, SamplingParams
    from tests.conftest import ENGINE_OPTIONS

    if case != "packed experts":
        request.getfixturevalue("without_codegen")
    checkpoint = gpt_oss(tmp_path) if case == "gpt-oss" else make(tmp_path, *WEIGHT_ONLY[case])
    wanted = checkpoint.load().generate(PROMPT, max_new_tokens=6, do_sample=False)[0, PROMPT.shape[1] :].tolist()
    llm = LLM(checkpoint.folder, dtype="float32", **{**ENGINE_OPTIONS, "enforce_eager": False}, fuse="always")
    served = llm.generate([PROMPT[0].tolist()], SamplingParams(max_tokens=6, temperature=0))
    assert served[0].outputs[0].token_ids == wanted
    assert {name: llm.fusion_report.count(name) for name in FOLDS[case]} == FOLDS[case]
    reasons = [miss.reason for miss in llm.fusion_report.near_misses if miss.pattern.startswith("quant")]
    assert all("as act-order asks for" in reason for reason in reasons), reasons
    assert bool(reasons) == ("act-order" in case)


BLOCKS = {**FP8, "weight_block_size": [32, 32]}
EXPERTS = {
    "gptq": lambda path: make(path, "qwen3-moe", packers.gptq, GPTQ),
    "awq": lambda path: make(path, *WEIGHT_ONLY["awq experts"]),
    "packed": lambda path: make(path, *WEIGHT_ONLY["packed experts"]),
    "fp8 tensor": lambda path: make(path, *WEIGHT_ONLY["fp8 tensor, experts"]),
    "fp8 blocks": lambda path: make(
        *(path, "qwen3-moe", lambda w: packers.fp8(w, 32, 32, "weight_scale_inv"), BLOCKS), only=r".*experts.*proj"
    ),
    "mxfp4": gpt_oss,
}


@pytest.mark.parametrize("case", EXPERTS)
def test_kernels_read_the_experts_of_every_format(tmp_path, case):
    """What a GPU would run follows from shapes and layouts: no layer would be dequantized, for any number of tokens."""
    model = EXPERTS[case](tmp_path).load("bfloat16")
    held = [m for m in model.modules() if isinstance(m, QuantizedWeight) and m.q.dim() == 3]
    assert len(held) == 2 * len(model.model.layers)
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    for up, down in zip(held[::2], held[1::2], strict=True):
        specs = [WeightSpec.from_text(weight.spec) for weight in (up, down)]
        parts = [(weight.q, weight.scale, weight.zero) for weight in (up, down)]
        assert supports(x, parts[0], None, parts[1], None, False, *specs) is None
        experts, hidden, width = specs[1].shape(down.q.shape)
        shape = codes_shape(*specs, (experts, 2, hidden, width), 2)
        for tokens in (1, 2, 8, 64, 512, 8192):
            assert quant_experts_config(SM90, shape, tokens).method in METHODS


def test_tied_embeddings_shards_and_dtype(tmp_path):
    """qwen3 ties its output to its embeddings; the checkpoint comes in two files."""
    checkpoint = make(tmp_path, "qwen3", packers.gptq, GPTQ)
    names = sorted(checkpoint.tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        packers.write(checkpoint.folder / shard, {name: checkpoint.tensors[name] for name in held})
    (checkpoint.folder / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (checkpoint.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = check_logits(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
