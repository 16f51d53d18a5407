"""Checkpoints that `fusecomp quantize` writes: names and bytes as the format says, whole or not at all, read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusecomp.api import quantize
from fusecomp.cli import main
from fusecomp.errors import ConfigError
from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.online import export
from fusecomp.quant.online.schemes import SCHEMES
from fusecomp.runtime.loading import load_model
from models.registry import FAMILIES, build
from tests.quant import packers
from tests.quant.checkpoints import PROMPT, weights

IDS = [torch.randint(3, 90, (96,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Plain checkpoints, a dense one and one with experts, in bf16."""
    found = {}
    for family in ("llama", "qwen3-moe"):
        found[family] = tmp_path_factory.mktemp("plain") / family
        build(FAMILIES[family], torch.bfloat16).save_pretrained(found[family])
    return found


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_written_and_read(folders, tmp_path, family, name):
    out = tmp_path / "deep" / "out"
    plain = folders[family]
    record = quantize_ids(plain, out, name)
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "generation_config.json"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    wanted, _ = load_model(plain, "auto", "cpu", name, IDS, portable=True)
    got, _ = load_model(out, "auto", "cpu")
    expected = dict(weights(wanted))
    assert {weight.name for weight in record.weights} == {n.removesuffix(".weight") for n in expected}
    for key, value in weights(got):
        assert torch.equal(value, expected.pop(key)), key
    assert not expected
    with torch.no_grad():
        small, read = wanted(PROMPT).logits, got(PROMPT).logits
    if name == "int4":
        assert torch.equal(small, read)  # the others round activations of this small step when read back
    check_bytes(wanted, load_file(out / "model.safetensors"), name)
    check_config(out, name, family)


def quantize_ids(plain, out, name, **options):
    return quantize(plain, out, name, calibration=IDS, device="cpu", **options)


def check_bytes(model, tensors, name):
    """Every linear, and every expert under a name of its own, packed by the tests' own packers."""
    for key, module in model.named_modules():
        if key.endswith("_proj.codes"):
            check_weight(module, slice(None), key.removesuffix(".codes"), tensors, name)
        elif key.endswith("gate_up_proj_codes"):
            prefix, n = key.removesuffix("gate_up_proj_codes"), module.q.shape[1] // 2
            for e in range(module.q.shape[0]):
                check_weight(module, (e, slice(n)), f"{prefix}{e}.gate_proj", tensors, name)
                check_weight(module, (e, slice(n, None)), f"{prefix}{e}.up_proj", tensors, name)
        elif key.endswith("down_proj_codes"):
            for e in range(module.q.shape[0]):
                check_weight(module, e, f"{key.removesuffix('down_proj_codes')}{e}.down_proj", tensors, name)


def check_weight(held, rows, key, tensors, name):
    q, scale = held.q.detach()[rows], held.scale.detach()[rows]
    spec = WeightSpec.from_text(held.spec)
    written = tensors[f"{key}.weight_scale"]
    assert torch.equal(written.to(scale.dtype), scale) and written.dtype == torch.bfloat16
    assert f"{key}.weight" in tensors if name != "int4" else f"{key}.weight" not in tensors
    if name != "int4":
        assert torch.equal(tensors[f"{key}.weight"].view(torch.uint8), q.view(torch.uint8))
        assert tensors[f"{key}.weight"].dtype == spec.codes_dtype
        return
    codes = np.stack((q.numpy() & 15, q.numpy() >> 4), -1).reshape(q.shape[0], -1)
    assert tensors[f"{key}.weight_shape"].tolist() == list(codes.shape)
    assert np.array_equal(tensors[f"{key}.weight_packed"].numpy(), packers.words(codes, 4, 1))
    assert (held.zero is None) == (f"{key}.weight_zero_point" not in tensors)
    if held.zero is not None:
        zero = held.zero.detach()[rows].float().numpy().astype(np.int64)
        assert np.array_equal(tensors[f"{key}.weight_zero_point"].numpy(), packers.words(zero, 4, 0))


def check_config(out, name, family):
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", FORMATS[name])
    groups = list(settings["config_groups"].values())
    weights_ = {"num_bits": SCHEMES[name].bits, "type": "float" if name == "fp8" else "int"}
    for group in groups:
        assert weights_.items() <= group["weights"].items()
        assert group["weights"]["strategy"] == ("group" if name == "int4" else "channel")
        inputs = group["input_activations"]
        assert inputs is None if name == "int4" else (inputs["strategy"], inputs["dynamic"]) == ("token", True)
    if name != "int4":
        assert [group["targets"] for group in groups] == [["Linear"]]
    elif family == "qwen3-moe":  # other engines know one group size for all weights of experts, and no zero points
        experts = [g for g in groups if any("experts" in target for target in g["targets"])]
        assert len(experts) == 1 and experts[0]["weights"]["symmetric"]
        assert all(target.startswith("re:") for target in experts[0]["targets"])
    assert "lm_head" in settings["ignore"]
    assert ("model.layers.0.mlp.gate" in settings["ignore"]) == (family == "qwen3-moe")


def test_shards(folders, tmp_path):
    model, _ = load_model(folders["qwen3-moe"], "auto", "cpu", "int4", (), portable=True)
    export.export(model, folders["qwen3-moe"], tmp_path / "whole")
    export.export(model, folders["qwen3-moe"], tmp_path / "parts", shard_bytes=40_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 60_000 for path in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = {key: value for path in files for key, value in load_file(path).items()}
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert torch.equal(*(load_model(tmp_path / n, "auto", "cpu")[0](PROMPT).logits for n in ("whole", "parts")))


def test_only_what_is_whole_appears(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize_ids(folders["llama"], out, "fp8")
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="not empty"):
        quantize_ids(folders["llama"], out, "int4")
    with pytest.raises(ConfigError, match="is a file"):
        quantize_ids(folders["llama"], out / "config.json", "int4")

    def fail(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", fail)
        for place in (out, tmp_path / "other"):
            with pytest.raises(OSError, match="no space"):
                quantize_ids(folders["llama"], place, "int4", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kept == {path.name: path.read_bytes() for path in out.iterdir()}
    quantize_ids(folders["llama"], out, "int4", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "pack-quantized" in (out / "config.json").read_text()


def test_what_has_no_form_on_disk_is_left_out(tmp_path):
    build(FAMILIES["gpt-oss"], torch.bfloat16).save_pretrained(tmp_path / "plain")
    record = quantize_ids(tmp_path / "plain", tmp_path / "out", "fp8")
    reasons = dict(record.left_out)
    assert "checkpoints" in reasons["model.layers.0.mlp.experts.down_proj"]
    assert {"model.layers.0.self_attn.q_proj"} <= {weight.name for weight in record.weights}
    with torch.no_grad():
        assert torch.isfinite(load_model(tmp_path / "out", "auto", "cpu")[0](PROMPT).logits).all()


def test_quantized_checkpoints_are_not_quantized_again(folders, tmp_path):
    quantize_ids(folders["llama"], tmp_path / "out", "fp8")
    with pytest.raises(ConfigError, match="quantized already, by compressed-tensors"):
        quantize_ids(tmp_path / "out", tmp_path / "twice", "int8")


def test_command_line(tiny_folder, tmp_path, capsys):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("def read_file(path):\n    return path\n" * 20)
    arguments = ["quantize", str(tiny_folder), str(out), "--scheme", "int4", "--device", "cpu"]
    assert main([*arguments, "--calibration", str(text)]) == 0
    shown = capsys.readouterr()
    assert "+ model.layers.0.mlp.up_proj: int4" in shown.out and "- lm_head: " in shown.out
    assert "text.txt" in shown.err and (out / "tokenizer.json").exists()
    assert main(arguments) == 2 and "not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--no-calibration"]) == 0
    assert "without calibration" in capsys.readouterr().err
    assert main(["quantize", str(tiny_folder), str(out), "--scheme", "int3"]) == 2
    assert "fp8" in capsys.readouterr().err
    assert main(["quantize", str(tiny_folder), str(tmp_path / "x"), "--scheme", "int4", "--calibration", "no"]) == 2
    assert not (tmp_path / "x").exists()
