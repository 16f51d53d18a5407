"""Every failure a user can meet, through Python and through the command line: class, message, exit code."""

from __future__ import annotations

import json

import pytest

import fusecomp
from fusecomp import LLM, SamplingParams, cli
from fusecomp.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    FusecompError,
    RequestError,
    UnsupportedModelError,
)
from tests.conftest import ENGINE_OPTIONS

FLAGS = [
    part
    for name, value in ENGINE_OPTIONS.items()
    for part in (["--" + name.replace("_", "-")] + ([] if value is True else [str(value)]))
]


def command(folder, *arguments, prompt="import os"):
    return ["generate", str(folder), "--prompt", prompt, "--max-tokens", "4", *FLAGS, *arguments]


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (ConfigError, ValueError),
        (RequestError, ValueError),
        (CheckpointError, OSError),
        (UnsupportedModelError, NotImplementedError),
        (CapacityError, MemoryError),
    ],
)
def test_classes_are_builtins_too_and_keep_their_parts(cls, builtin):
    error = cls("it failed", where="here", why="because", remedy="do this")
    assert isinstance(error, builtin) and isinstance(error, FusecompError)
    assert str(error) == "here: it failed (because). Remedy: do this"


def break_config(folder):
    (folder / "config.json").unlink()


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_architecture(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["GhostForCausalLM"]}))


def edit(name, **changes):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def break_generation_config(folder):
    (folder / "generation_config.json").write_text("{")


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "cls", "parts"),
    [
        (break_config, CheckpointError, ["config.json", "not found", "Remedy"]),
        (break_weights, CheckpointError, ["weights not found", "Remedy"]),
        (truncate_weights, CheckpointError, ["model.safetensors", "truncated", "expected", "found", "Remedy"]),
        (change_architecture, UnsupportedModelError, ["GhostForCausalLM", "causal LMs of transformers", "Remedy"]),
        (edit("config.json", hidden_size=33), CheckpointError, ["config.json: transformers refuses", "33", "Remedy"]),
        (edit("config.json", model_type="ghost"), UnsupportedModelError, ["of model_type 'ghost'", "Remedy"]),
        (break_generation_config, CheckpointError, ["generation_config.json", "not valid JSON", "Remedy"]),
        (edit("generation_config.json", eos_token_id="x"), CheckpointError, ["eos_token_id=('x',)", "Remedy"]),
        (pickle_weights, CheckpointError, ["pickled", "pytorch_model.bin", "Remedy"]),
    ],
)
def test_checkpoints(tiny_copy, capsys, damage, cls, parts):
    damage(tiny_copy)
    with pytest.raises(cls) as caught:
        LLM(tiny_copy, **ENGINE_OPTIONS)
    assert all(part in str(caught.value) for part in parts), caught.value
    for verb in (command(tiny_copy), ["explain", str(tiny_copy), *FLAGS]):
        assert cli.main(verb) == 1
        err = capsys.readouterr().err
        assert err.startswith("fusecomp: error: ") and err.count("\n") == 1
        assert all(part in err for part in parts)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [("x" * 300, ["max_model_len", "Remedy"]), ("", ["the prompt is empty", "Remedy"])],
    ids=["too long", "empty"],
)
def test_prompts(tiny_folder, capsys, prompt, parts):
    llm = LLM(tiny_folder, **ENGINE_OPTIONS)
    with pytest.raises(RequestError) as caught:
        llm.generate(["import os", prompt], use_tqdm=False)
    assert str(caught.value).startswith("prompt 1: ")
    assert all(part in str(caught.value) for part in parts), caught.value
    assert cli.main(command(tiny_folder, "--prompt", "def", prompt=prompt)) == 1
    captured = capsys.readouterr()
    assert "=== 1: error" in captured.out and "=== 2: 4 tokens" in captured.out
    assert all(part in captured.err for part in parts) and "1 of 2 prompts served, 1 failed" in captured.err


def test_generation_config_that_cannot_sample(tiny_copy, capsys):
    edit("generation_config.json", do_sample=True, temperature=-1.0)(tiny_copy)
    assert cli.main(command(tiny_copy)) == 1
    assert "generation_config.json: temperature=-1.0. Remedy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("seed", value) for value in ("abc", None, 1.5, True)),
        *(("strict", "no"), ("enforce_eager", 1), ("gpu_memory_utilization", True), ("device", "meta"), ("device", 5)),
    ],
)
def test_engine_options(tiny_folder, name, value):
    with pytest.raises(ConfigError, match=rf"EngineConfig: {name}( is|=).*Remedy"):
        LLM(tiny_folder, **{**ENGINE_OPTIONS, name: value})


def test_unknown_options(tiny_folder, capsys):
    with pytest.raises(ConfigError, match=r"LLM: unknown option 'max_num_seq'\. Remedy: did you mean 'max_num_seqs'\?"):
        LLM(tiny_folder, max_num_seq=3)
    with pytest.raises(ConfigError, match=r"SamplingParams: unknown option 'max_token'.*did you mean 'max_tokens'"):
        SamplingParams(max_token=3)
    with pytest.raises(ConfigError, match="did you mean 'tokenizer'"):
        LLM(tiny_folder, tokeniser=3)
    with pytest.raises(ConfigError, match="did you mean 'enforce_eager'"):
        fusecomp.explain(tiny_folder, enforce_eagre=True)
    assert cli.main(command(tiny_folder, "--max-num-seq", "3")) == 2
    assert "unknown option --max-num-seq: did you mean --max-num-seqs?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("nan")), ("temperature", -1.0), ("top_p", float("nan")), ("top_p", 1.5), ("top_k", -2)],
)
def test_sampling_parameters(tiny_folder, capsys, name, value):
    with pytest.raises(ConfigError, match=f"SamplingParams: {name}={value}.*Remedy"):
        SamplingParams(**{name: value})
    assert cli.main(command(tiny_folder, f"--{name.replace('_', '-')}={value}")) == 2
    assert f"{name}={value}" in capsys.readouterr().err


def test_kv_budget_too_small_for_one_request(tiny_folder, capsys):
    """1 KiB holds a few tokens: the error is the budget's, when the engine is built or when the request comes."""
    options = {**ENGINE_OPTIONS, "kv_cache_bytes": 1024}
    with pytest.raises(CapacityError, match=r"(?i)kv.*Remedy"):
        LLM(tiny_folder, **options).generate([[5] * 20], SamplingParams(max_tokens=40), use_tqdm=False)
    arguments = command(tiny_folder, "--kv-cache-bytes", "1024", "--max-tokens", "40")
    assert cli.main(arguments) == 1
    err = capsys.readouterr().err
    assert "KV" in err and "Remedy" in err and "Traceback" not in err
