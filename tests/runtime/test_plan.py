"""The plan made without loading anything against what a loaded model and its engine really take."""

import json
from dataclasses import replace

import pytest
import torch

from fusecomp import cli
from fusecomp.capture import Implementations, run_probe
from fusecomp.config import EngineConfig
from fusecomp.errors import CapacityError, CheckpointError
from fusecomp.runtime import memory
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.loading import load_model
from fusecomp.runtime.plan import Planner, plan_memory
from models.registry import FAMILIES, build
from tests.quant import packers
from tests.quant.checkpoints import make

TINY = EngineConfig(max_model_len=64, max_num_seqs=4, enforce_eager=True, device="cpu", kv_cache_bytes=1 << 20)


def held(model) -> int:
    """Bytes of all parameters and of the codes of quantized ones, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_and_cache_of_every_family_are_exact(name, tmp_path):
    model = build(name, FAMILIES[name].dtypes[-1])
    model.save_pretrained(tmp_path)
    planner = Planner(tmp_path, "auto")
    loaded, _ = load_model(tmp_path, device="cpu")
    assert planner.dtype == loaded.dtype
    assert planner.weights == sum(p.numel() * p.element_size() for p in loaded.parameters())
    calls = run_probe(loaded, Implementations(loaded), 64).calls
    assert planner.layers == tuple((heads, dim) for _, heads, dim in calls)
    assert all(p.is_meta for p in planner.model.parameters()), "nothing was loaded"


@pytest.mark.parametrize("changes", [{}, {"block_size": 1}, {"kv_cache_bytes": None}, {"dtype": "bfloat16"}], ids=str)
def test_an_engine_allocates_what_was_planned(tiny_folder, changes):
    config = TINY.replace(**changes)
    plan = plan_memory(tiny_folder, config)
    model, _ = load_model(tiny_folder, config.dtype, "cpu")
    engine = Engine(model, config)
    caches = engine._step.kv_caches
    assert plan.num_blocks == engine.num_kv_blocks == len(caches[0])
    assert plan.kv_bytes == sum(cache.nbytes for cache in caches)
    assert plan.block_bytes == engine._step.block_bytes
    assert plan.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert plan.fits
    assert plan.weights_exact
    assert (plan.max_model_len, plan.workspace) == (64, 0)


def test_the_refusal_names_limits_that_fit_and_no_larger_ones(tiny_folder):
    config = TINY.replace(kv_cache_bytes=3 * 2 * 2 * 2 * 16 * 16 * 4)  # three blocks
    with pytest.raises(CapacityError, match=r"max_model_len=64 needs .* room for 24576 .*fits is max_model_len=49$"):
        plan_memory(tiny_folder, config)
    assert plan_memory(tiny_folder, config.replace(max_model_len=49)).num_blocks == 3
    with pytest.raises(CapacityError, match="max_model_len=50 needs"):
        plan_memory(tiny_folder, config.replace(max_model_len=50))
    with pytest.raises(CapacityError, match="raise kv_cache_bytes: one block takes 8192"):
        plan_memory(tiny_folder, config.replace(kv_cache_bytes=100))


def test_an_engine_whose_cache_is_shorter_than_the_context_says_so(tiny_model):
    report = Engine(tiny_model, TINY.replace(kv_cache_bytes=3 * 8192)).report
    assert "the KV cache has 3 blocks: requests have at most 49 tokens, not max_model_len=64" in report.notes
    assert not any("KV cache" in note for note in Engine(tiny_model, TINY.replace(max_model_len=49)).report.notes)


def test_a_card_that_fewer_sequences_would_fit(tiny_folder):
    """Logits of 4,096 sequences are what is too much; with fewer of them, or a shorter context, there is room."""
    config = EngineConfig(max_num_seqs=4096, max_model_len=128, gpu_memory_utilization=1.0)
    plan = Planner(tiny_folder, "auto").plan(config, memory.RESERVE_BYTES + (40 << 20))
    card = memory.RESERVE_BYTES + plan.weights + plan.workspace + 5 * plan.block_bytes
    with pytest.raises(CapacityError, match=r"fits is max_model_len=(\d+) or max_num_seqs=(\d+)$") as caught:
        plan_memory(tiny_folder, config, card)
    shorter, fewer = (int(part.split("=")[1]) for part in caught.value.remedy.split("fits is ")[1].split(" or "))
    assert shorter == 5 * 16 + 1
    assert 4000 < fewer < 4096
    for fits in ({"max_model_len": shorter}, {"max_num_seqs": fewer}):
        assert plan_memory(tiny_folder, config.replace(**fits), card).fits
        above = {name: value + 1 for name, value in fits.items()}
        with pytest.raises(CapacityError):
            plan_memory(tiny_folder, config.replace(**above), card)


def test_what_is_left_of_a_card_goes_to_the_cache(tiny_folder):
    config = EngineConfig(max_num_seqs=100_000, max_num_batched_tokens=100_000, max_model_len=128)
    plan = plan_memory(tiny_folder, config, 16 << 30)
    assert plan.capacity == int((16 << 30) * 0.9)
    rest = plan.capacity - plan.weights - plan.workspace - memory.RESERVE_BYTES
    graphs = plan.workspace * 16384 // 100_000 * 5 // 4
    assert plan.reserve - memory.RESERVE_BYTES == graphs < rest / 16, "of graphs of long steps"
    rest -= plan.reserve - memory.RESERVE_BYTES
    assert plan.kv_budget == rest
    assert plan.num_blocks == min(rest // plan.block_bytes, 100_000 * 8)
    explicit = plan_memory(tiny_folder, config.replace(kv_cache_bytes=1 << 20), 16 << 30)
    assert explicit.kv_bytes == 1 << 20
    assert any("other processes" in note for note in explicit.notes)
    with pytest.raises(CapacityError, match="larger card"):
        plan_memory(tiny_folder, config, 1 << 30)


def test_long_steps_get_memory_for_graphs_where_little_is_asked_for():
    config, workspace = EngineConfig(max_model_len=64), 4 << 20
    assert memory.long_graphs_bytes(8 << 20, 80 << 20, config.replace(max_num_batched_tokens=32768)) == 5 << 20
    assert memory.long_graphs_bytes(workspace, 80 << 20, config) == 5 << 20
    assert memory.long_graphs_bytes(workspace, 79 << 20, config) == 0
    given = config.replace(kv_cache_bytes=70 << 20)
    assert [memory.long_graphs_bytes(workspace, size << 20, given) for size in (74, 75)] == [0, 5 << 20]
    for none in ({"enforce_eager": True}, {"deterministic": True}):
        assert memory.long_graphs_bytes(workspace, 80 << 20, config.replace(**none)) == 0


def test_a_quantized_checkpoint_is_estimated_from_its_headers(tmp_path):
    sizes = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2}
    options = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    checkpoint = make(tmp_path, "llama", lambda w: packers.gptq(w, size=64), options, **sizes)
    plan = plan_memory(checkpoint.folder, TINY.replace(dtype="bfloat16"))
    assert not plan.weights_exact
    assert "estimated" in plan.summary()
    loaded = held(checkpoint.load("bfloat16"))
    assert plan.weights == pytest.approx(loaded, rel=0.1)
    plain = plan_memory(checkpoint.plain, TINY.replace(dtype="bfloat16"))
    assert plan.weights < 0.8 * plain.weights


def test_a_model_without_the_attention_interface_is_taken_layer_by_layer_or_refused(tiny_folder, monkeypatch):
    planner = Planner(tiny_folder, "auto")
    seen = [(2, 16)]
    planner._assume_equal_layers(seen, "a reason")
    assert seen == [(2, 16)] * 2
    assert planner.notes == ["all 2 layers are taken to cache what the first 1 do (a reason)"]
    seen = [(2, 16), (1, 32)]
    planner._assume_equal_layers(seen, "a reason")
    assert seen == [], "layers that differ are not guessed at"


def test_the_command(tiny_folder, capsys):
    options = ["--kv-cache-bytes", str(1 << 20), "--max-model-len", "64", "--max-num-seqs", "4"]
    assert cli.main(["explain", str(tiny_folder), "--memory", "--device", "cpu", *options]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM in float32 on the CPU" in out
    assert "16 blocks of 16 tokens, 8192 bytes each (2 x 2 heads of 16)" in out
    assert cli.main(["explain", str(tiny_folder), "--memory", "--gpu-memory", str(8 << 30), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["reserve"] == memory.RESERVE_BYTES + plan["workspace"] * 5 // 4
    assert cli.main(["explain", str(tiny_folder), "--memory", "--gpu-memory", "1000000"]) == 1
    assert "larger card" in capsys.readouterr().err
    assert cli.main(["explain", str(tiny_folder), "--gpu-memory", "1000000"]) == 2
    assert "--gpu-memory is for --memory" in capsys.readouterr().err
    assert cli.main(["explain", str(tiny_folder), "--memory", "--gpu-memory", "0"]) == 2


def test_a_broken_checkpoint_is_refused_as_when_it_is_loaded(tiny_copy):
    (tiny_copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="truncated"):
        plan_memory(tiny_copy, TINY)


def test_the_dtype_of_a_checkpoint_that_declares_none(tiny_copy):
    path = tiny_copy / "config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(settings))
    plan = plan_memory(tiny_copy, replace(TINY, dtype="auto"))
    assert plan.dtype == str(load_model(tiny_copy, device="cpu")[0].dtype).removeprefix("torch.")
    assert torch.float32 == getattr(torch, plan.dtype)
