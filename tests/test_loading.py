"""Loading: what is refused before transformers sees it, and that nothing is ever initialized at random."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusecomp.errors import CheckpointError, ConfigError, UnsupportedModelError
from fusecomp.runtime.loading import load_model, load_tokenizer


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, count=3):
    """Rewrite a checkpoint as `count` shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_loads_in_evaluation_mode_without_gradients(tiny_folder):
    model, tokenizer = load_model(tiny_folder, "auto", "cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("import os")) == "import os"


def test_converts_dtype(tiny_folder):
    assert load_model(str(tiny_folder), "bfloat16", "cpu")[0].dtype == torch.bfloat16


def test_loads_shards(tiny_copy, tiny_model):
    shard(tiny_copy)
    model, _ = load_model(tiny_copy, device="cpu")
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_tied_weights_are_not_missing(tmp_path, tiny_config):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny_config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer is None


@pytest.mark.parametrize(
    ("damage", "error", "parts"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, ["config.json", "not found", "Remedy"]),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, ["config.json", "not valid JSON"]),
        (lambda f: (f / "config.json").write_text("[]"), CheckpointError, ["config.json", "list", "object"]),
        (
            lambda f: edit_json(f / "config.json", architectures=["LlamaForMagic"]),
            UnsupportedModelError,
            ["LlamaForMagic", "nearest available", "LlamaForCausalLM"],
        ),
        (
            lambda f: edit_json(f / "config.json", architectures=["BertForSequenceClassification"], model_type="bert"),
            UnsupportedModelError,
            ["BertForSequenceClassification", "causal LM"],
        ),
        (
            lambda f: edit_json(f / "config.json", architectures=["X"], model_type="x", auto_map={"AutoModel": "x.X"}),
            UnsupportedModelError,
            ["X", "own Python code"],
        ),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, ["weights not found", "model.safetensors"]),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            CheckpointError,
            ["pickled", "pytorch_model.bin", "save_pretrained"],
        ),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            UnsupportedModelError,
            ["adapter", "merge_and_unload"],
        ),
        (
            lambda f: edit_json(f / "config.json", transformers_weights="../w.bin"),
            CheckpointError,
            ["weights not found", "w.bin"],
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), CheckpointError, ["truncated", "8 bytes", "3 bytes"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), CheckpointError, ["not a safetensors file"]),
        (
            lambda f: (f / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"notjson!"),
            CheckpointError,
            ["header is malformed"],
        ),
        (
            lambda f: (f / "tokenizer.json").write_text("{"),
            CheckpointError,
            ["tokenizer could not be loaded", "Remedy"],
        ),
    ],
)
def test_damage_is_named(tiny_copy, damage, error, parts):
    damage(tiny_copy)
    with pytest.raises(error) as caught:
        load_model(tiny_copy, device="cpu")
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("keep", [-1, 2000, 30])
def test_truncation_names_both_lengths(tiny_copy, keep):
    path = tiny_copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_model(tiny_copy, device="cpu")
    assert str(path) in str(caught.value)
    assert f"{len(data[:keep])} bytes found" in str(caught.value)
    assert "Remedy: copy or download the file again" in str(caught.value)
    if keep == -1:
        assert f"{len(data)} bytes expected" in str(caught.value)


def test_trailing_bytes_are_refused(tiny_copy):
    with (tiny_copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        load_model(tiny_copy, device="cpu")


def test_missing_shard_is_named(tiny_copy):
    shard(tiny_copy)
    lost = tiny_copy / "model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(CheckpointError, match="shard not found") as caught:
        load_model(tiny_copy, device="cpu")
    assert str(lost) in str(caught.value)


def test_truncated_shard_is_named(tiny_copy):
    shard(tiny_copy)
    path = tiny_copy / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        load_model(tiny_copy, device="cpu")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../model.safetensors", "shard.bin", 3])
def test_index_cannot_leave_the_folder(tiny_copy, name):
    weight_map = shard(tiny_copy)
    first = next(iter(weight_map))
    edit_json(tiny_copy / "model.safetensors.index.json", weight_map={**weight_map, first: name})
    with pytest.raises(CheckpointError, match="is mapped to"):
        load_model(tiny_copy, device="cpu")


def test_tensor_absent_from_its_shard_is_named(tiny_copy):
    weight_map = shard(tiny_copy)
    weight_map["model.ghost.weight"] = next(iter(weight_map.values()))
    edit_json(tiny_copy / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"model\.ghost\.weight"):
        load_model(tiny_copy, device="cpu")


def test_missing_tensor_is_never_random(tiny_copy):
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(tiny_copy, device="cpu")
    assert "would have been random" in str(caught.value)


def test_mismatched_shape_is_named_with_both_shapes(tiny_copy):
    path = tiny_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(checkpoint \[16\], model \[32\]\)"):
        load_model(tiny_copy, device="cpu")


def test_unused_tensors_are_logged(tiny_copy, caplog):
    path = tiny_copy / "model.safetensors"
    save_file({**load_file(path), "model.extra.weight": torch.ones(2)}, path, {"format": "pt"})
    load_model(tiny_copy, device="cpu")
    assert "model.extra.weight" in caplog.text


def test_absent_folder_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="not a local folder") as caught:
        load_model("nobody/nothing", device="cpu")
    assert "nobody/nothing" in str(caught.value) and "without a network" in str(caught.value)


def test_path_that_no_hub_name_could_be(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "absent", device="cpu")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="not a folder"):
        load_model(tmp_path / "file", device="cpu")


def test_wrong_options(tiny_folder):
    with pytest.raises(ConfigError, match="dtype='int8'"):
        load_model(tiny_folder, "int8")
    with pytest.raises(ConfigError, match="device='gpu'"):
        load_model(tiny_folder, device="gpu")


def test_folder_without_tokenizer(tiny_copy):
    shutil.rmtree(tiny_copy / "tokenizer", ignore_errors=True)
    for path in tiny_copy.glob("tokenizer*"):
        path.unlink()
    assert load_tokenizer(tiny_copy) is None
