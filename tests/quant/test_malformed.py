"""A quantized checkpoint that is damaged, or of a variant that is not read, is an error that names what and where."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fusecomp.errors import CheckpointError, UnsupportedModelError
from fusecomp.quant.config import quantization_format
from tests.quant import packers
from tests.quant.checkpoints import make
from tests.quant.test_formats import ACTIVATIONS, AWQ, FP8, GPTQ, MXFP4, NF4, ct, floats, ints, mxfp4, orders

FIRST, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.3.up_proj"
PACKS = {
    "gptq": ("llama", lambda w: packers.gptq(w, act_order=orders()), GPTQ),
    "awq": ("llama", packers.awq, AWQ),
    "packed": ("llama", lambda w: packers.ct_packed(w, symmetric=False), ct(ints(4, symmetric=False))),
    "static": ("llama", *ACTIVATIONS["int8 static"][:2]),
    "fp8": ("llama", lambda w: packers.fp8(w, 128, 128, "weight_scale_inv"), FP8),
    "nf4": ("llama", lambda w: packers.nf4(w, 8, nested=True), NF4),
    "experts": ("qwen3-moe", packers.gptq, GPTQ),
    "mxfp4": ("gpt-oss", mxfp4, {"quant_method": "mxfp4"}),
}
SIZES = {"mxfp4": {"only": MXFP4, "sep": "_", "intermediate_size": 64, "hidden_size": 128}}
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
EXPERTS = "model.layers.0.mlp.experts.down_proj"


def lose(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def change(name, function):
    def damage(tensors):
        value = tensors[name]
        tensors[name] = (value[0], function(value[1])) if isinstance(value, tuple) else function(value)

    return damage


def cut(array):
    return array[:-1]


DAMAGES = [
    ("gptq", lose(f"{FIRST}.scales"), [f"{FIRST}.scales", "missing"]),
    ("gptq", lose(f"{FIRST}.qweight"), [f"{FIRST}.qweight", "missing"]),
    ("gptq", lose(*(f"{FIRST}.{part}" for part in GPTQ_PARTS)), [FIRST, "missing"]),
    ("gptq", change(f"{FIRST}.qweight", cut), [f"{FIRST}.qweight", "[11, 192], not [12, 192]"]),
    ("gptq", change(f"{FIRST}.qweight", lambda x: x.astype(np.int64)), [f"{FIRST}.qweight", "I64, not I32"]),
    ("gptq", change(f"{FIRST}.qzeros", cut), [f"{FIRST}.qzeros"]),
    ("gptq", change(f"{FIRST}.scales", lambda x: x.astype(np.int32)), [f"{FIRST}.scales", "I32"]),
    ("gptq", change(f"{FIRST}.g_idx", lambda x: x + 1), [f"{FIRST}.g_idx", "groups that do not exist"]),
    ("gptq", change(f"{FIRST}.g_idx", lambda x: x // 2), [f"{FIRST}.g_idx", "columns into group 0"]),
    ("awq", change(f"{FIRST}.qweight", lambda x: x[:, :-1]), [f"{FIRST}.qweight"]),
    ("awq", lose(f"{FIRST}.qzeros"), [f"{FIRST}.qzeros", "missing"]),
    ("packed", lose(f"{FIRST}.weight_scale"), [f"{FIRST}.weight_scale", "missing"]),
    ("packed", lose(f"{FIRST}.weight_zero_point"), [f"{FIRST}.weight_zero_point", "missing"]),
    ("packed", change(f"{FIRST}.weight_shape", lambda x: x[::-1]), [f"{FIRST}.weight_shape", "[96, 192]"]),
    ("packed", change(f"{FIRST}.weight_packed", cut), [f"{FIRST}.weight_packed"]),
    ("static", lose(f"{FIRST}.input_scale"), [f"{FIRST}.input_scale", "missing"]),
    ("static", change(f"{FIRST}.weight", cut), [f"{FIRST}.weight", "[191, 96]"]),
    ("fp8", lose(f"{FIRST}.weight_scale_inv"), [f"{FIRST}.weight_scale_inv", "missing"]),
    ("fp8", change(f"{FIRST}.weight_scale_inv", cut), [f"{FIRST}.weight_scale_inv"]),
    ("nf4", lose(f"{FIRST}.weight.absmax"), [f"{FIRST}.weight.absmax", "missing"]),
    ("nf4", lose(f"{FIRST}.weight.nested_quant_map"), [f"{FIRST}.weight.nested_quant_map", "missing"]),
    ("nf4", change(f"{FIRST}.weight.quant_state.bitsandbytes__nf4", cut), ["quant_state", "not JSON"]),
    ("experts", lose(*(f"{EXPERT}.{part}" for part in GPTQ_PARTS)), ["expert 3", "up_proj"]),
    ("experts", change(f"{EXPERT}.scales", cut), [f"{EXPERT}.scales"]),
    ("mxfp4", change(f"{EXPERTS}_blocks", cut), [f"{EXPERTS}_scales", "[5, 128, 2], not [4, 128, 2]"]),
    ("mxfp4", change(f"{EXPERTS}_scales", cut), [f"{EXPERTS}_scales"]),
    ("mxfp4", lose(f"{EXPERTS}_scales"), [f"{EXPERTS}_scales", "missing"]),
    ("gptq", change("model.norm.weight", cut), ["model.norm.weight", "[95]", "[96]"]),
    ("gptq", lose("model.norm.weight"), ["1 missing: model.norm.weight"]),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DAMAGES)))
def test_damage_names_the_tensor(tmp_path, case):
    kind, damage, parts = DAMAGES[case]
    checkpoint = make(tmp_path, *PACKS[kind], **SIZES.get(kind, {}))
    damage(checkpoint.tensors)
    checkpoint.rewrite()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load()
    text = str(caught.value)
    assert all(part in text for part in [*parts, str(checkpoint.folder), "Remedy"]), text


def test_experts_that_the_model_lacks(tmp_path):
    checkpoint = make(tmp_path, *PACKS["mxfp4"], **SIZES["mxfp4"])
    for part in ("blocks", "scales"):
        change(f"{EXPERTS}_{part}", cut)(checkpoint.tensors)
    checkpoint.rewrite()
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}_blocks.* hold 4 experts; the model has 5"):
        checkpoint.load()


def test_codes_of_a_module_that_the_model_lacks(tmp_path):
    checkpoint = make(tmp_path, *PACKS["gptq"])
    checkpoint.tensors |= {f"model.ghost.{part}": checkpoint.tensors[f"{FIRST}.{part}"] for part in GPTQ_PARTS}
    checkpoint.rewrite()
    with pytest.raises(CheckpointError, match=r"model\.ghost\.qweight.* belong to no parameter of LlamaForCausalLM"):
        checkpoint.load()


def test_quantized_embeddings_are_refused(tmp_path):
    checkpoint = make(tmp_path, "llama", packers.ct_int8, ct(ints(8, "channel")), only=".*embed_tokens")
    with pytest.raises(UnsupportedModelError, match=r"model\.embed_tokens\.weight.*Embedding"):
        checkpoint.load()


def test_a_weight_that_no_group_targets(tmp_path):
    config = ct(ints(4), targets=(r"re:.*mlp.*",))
    checkpoint = make(tmp_path, "llama", packers.ct_packed, config)
    with pytest.raises(CheckpointError, match=r"targets 'model\.layers\.0\.self_attn\.\w_proj'"):
        checkpoint.load()


def test_codes_without_a_configuration(tmp_path):
    checkpoint = make(tmp_path, *PACKS["fp8"])
    settings = json.loads((checkpoint.folder / "config.json").read_text())
    del settings["quantization_config"]
    (checkpoint.folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"layers\.\d\..*_proj\.weight' is F8_E4M3.*no quantization_config"):
        checkpoint.load()


def test_codes_that_are_not_of_this_format(tmp_path):
    checkpoint = make(tmp_path, *PACKS["gptq"])
    codes = np.ones((96, 200), np.uint8)
    checkpoint.tensors["model.layers.0.mlp.down_proj.weight"] = ("F8_E4M3", codes)
    for part in GPTQ_PARTS:
        del checkpoint.tensors[f"model.layers.0.mlp.down_proj.{part}"]
    checkpoint.rewrite()
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight' holds F8_E4M3 codes, and no scales of gptq"
    ):
        checkpoint.load()


def test_nf4_codes_alone(tmp_path):
    checkpoint = make(tmp_path, *PACKS["nf4"])
    for name in [name for name in checkpoint.tensors if name.startswith(f"{FIRST}.weight.")]:
        del checkpoint.tensors[name]
    checkpoint.rewrite()
    with pytest.raises(CheckpointError, match=rf"{FIRST}.weight' holds U8 codes, and no scales of bitsandbytes"):
        checkpoint.load()


def test_nothing_is_quantized(tmp_path):
    checkpoint = make(tmp_path, *PACKS["gptq"])
    plain = {name: value for name, value in checkpoint.tensors.items() if name.split(".")[-1] == "weight"}
    checkpoint.tensors = plain
    checkpoint.rewrite()
    with pytest.raises(CheckpointError, match="no tensor is quantized"):
        checkpoint.load()


@pytest.mark.parametrize(
    ("config", "error", "parts"),
    [
        ("gptq", CheckpointError, ["quantization_config is a str"]),
        ({"quant_method": "gptqq"}, UnsupportedModelError, ["'gptqq'", "nearest: gptq"]),
        ({"bits": 4}, UnsupportedModelError, ["method None"]),
        ({**GPTQ, "bits": 3}, UnsupportedModelError, ["bits=3"]),
        ({**GPTQ, "bits": "4"}, CheckpointError, ["quantization_config.bits", "'4'"]),
        ({**GPTQ, "group_size": 0}, CheckpointError, ["group_size"]),
        ({**GPTQ, "checkpoint_format": "marlin"}, UnsupportedModelError, ["'marlin'"]),
        ({**AWQ, "version": "gemv"}, UnsupportedModelError, ["'gemv'"]),
        ({**AWQ, "bits": 8}, UnsupportedModelError, ["bits=8"]),
        ({**FP8, "weight_block_size": [128]}, CheckpointError, ["weight_block_size"]),
        ({**FP8, "activation_scheme": "none"}, UnsupportedModelError, ["activation_scheme='none'"]),
        ({**FP8, "fmt": "e5m2"}, UnsupportedModelError, ["e5m2"]),
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, UnsupportedModelError, ["bitsandbytes fp4"]),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, UnsupportedModelError, ["bitsandbytes int8"]),
        (ct(ints(4), layout="marlin-24"), UnsupportedModelError, ["marlin-24"]),
        (ct(ints(3)), UnsupportedModelError, ["3 bits"]),
        (ct(floats("tensor"), floats("tensor", symmetric=False)), UnsupportedModelError, ["input_activations"]),
        (ct(ints(8, "channel"), ints(8, "token", symmetric=False, dynamic=True)), UnsupportedModelError, ["symmetric"]),
        (ct(ints(4, size=None)), CheckpointError, ["group_size is None"]),
        (ct(ints(4), sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedModelError, ["sparsity_config"]),
        (ct(ints(4), transform_config={"r1": {}}), UnsupportedModelError, ["transform_config"]),
        ({"quant_method": "compressed-tensors"}, CheckpointError, ["config_groups"]),
    ],
)
def test_configurations_that_are_refused(config, error, parts):
    with pytest.raises(error) as caught:
        quantization_format({"quantization_config": config}, "folder/config.json")
    text = str(caught.value)
    assert all(part in text for part in [*parts, "folder/config.json", "Remedy"]), text


def test_no_quantization():
    assert quantization_format({}, "config.json") is None
    assert quantization_format({"quantization_config": None}, "config.json") is None
