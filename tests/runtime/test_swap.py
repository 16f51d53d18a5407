"""Preemption by swap: copies between cache and host, who moves, and engines whose sequences go on where they were."""

from __future__ import annotations

import pytest
import torch

from fusecomp import LLM, SamplingParams
from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError
from fusecomp.ops.kv_cache import KVLayout
from fusecomp.runtime import swap
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.plan import plan_memory
from fusecomp.runtime.scheduler import Scheduler, SequenceState
from fusecomp.runtime.swap import HostBlocks
from fusecomp.runtime.swap_space import SwapCost, SwapSpace
from tests.conftest import ENGINE_OPTIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("staged", [1, 3, 100])
def test_blocks_come_back_as_they_were(device, quantized, staged, monkeypatch):
    layouts = [KVLayout(2, 16, 32, quantized), KVLayout(1, 16, 20, quantized)]
    caches = [layout.zeros(12, torch.bfloat16, device) for layout in layouts]
    for cache in caches:
        cache.view(torch.uint8).random_(0, 255)
    held = [cache.clone() for cache in caches]
    monkeypatch.setattr(swap, "STAGE_BYTES", staged * sum(layout.block_bytes(torch.bfloat16) for layout in layouts))
    host = HostBlocks(caches, 9)
    out = [(11, 4), (0, 5), (3, 6), (4, 0), (9, 8), (2, 2), (1, 1)]
    host.move(out, [])
    for cache in caches:  # at once: the copies must have been taken before
        cache.view(torch.uint8)[[block for block, _ in out]] = 255
    back = {4: 7, 5: 5, 6: 11, 0: 6, 8: 10, 2: 8, 1: 0}  # to other blocks than they came from
    host.move([(block, where) for block, where in ((7, 3), (8, 7))], [*back.items()])
    came = {where: block for block, where in out}
    for cache, before in zip(caches, held, strict=True):
        for where, block in back.items():
            assert torch.equal(cache[block].view(torch.uint8), before[came[where]].view(torch.uint8)), (where, block)
    assert host.bytes_per_s() > 0


def test_cost_decides():
    dear = SwapCost(block_bytes=2 << 20, bytes_per_s=25e9, tokens_per_s=50e3)  # 16 tokens: 168 us of copies, 320 to do
    assert dear.worthwhile(160, 10) and dear.worthwhile(16, 1)
    assert not dear.worthwhile(1, 1), "a block with one token is computed faster"
    assert not SwapCost(2 << 20, 10e9, 50e3).worthwhile(160, 10)


def scheduler(swap_space: SwapSpace, blocks: int = 6) -> Scheduler:
    return Scheduler(4, 64, 24, KVCacheManager(blocks, 4), swap_space)


def run(of: Scheduler, token: int = 9):
    step = of.schedule()
    of.update(step, [token] * len(step.seqs), ())
    return step


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_preempted_sequence_goes_on_where_it_was(room):
    space = SwapSpace(room, 4, lambda tokens, blocks: True)
    of = scheduler(space)
    old, young = (SequenceState(n, [1] * 7, SamplingParams(max_tokens=17)) for n in ("old", "young"))
    of.add(old)
    of.add(young)
    while not young.num_preemptions:
        step = run(of)
    moves = room == 40
    assert bool(step.swap_out) == moves and not step.swap_in
    known = len(young.token_ids)
    assert space.holds("young")[1] == (known - 1) * moves
    while young.row < 0:
        step = run(of)
    index = step.seqs.index(young)
    assert step.starts[index] == (known - 1) * moves and len(step.swap_in) == space.moved_out
    assert space.num_free == room and space.num_sequences == 0


def test_who_ends_while_it_is_out_gives_its_blocks_back():
    space = SwapSpace(40, 4, lambda tokens, blocks: True)
    of = scheduler(space)
    for name in ("old", "young"):
        of.add(SequenceState(name, [1] * 7, SamplingParams(max_tokens=17)))
    while not space.num_sequences:
        run(of)
    of.abort("young")
    assert (space.num_free, space.num_sequences) == (40, 0)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(SwapCost, "worthwhile", lambda self, tokens, blocks: tokens > 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("caching", [False, True])
def test_engine(tiny_folder, always, monkeypatch, device, caching):
    """Tokens are those without preemption. What was moved out is destroyed on the device, if nobody else knows it."""
    options = {**ENGINE_OPTIONS, "device": device, "enable_prefix_caching": caching, "block_size": 1}
    options |= {"dtype": "float32", "enforce_eager": device == "cpu"}
    prompts = [[7 + i] * (9 + 5 * i) for i in range(6)]
    params = [GREEDY.replace(logprobs=1), GREEDY, GREEDY.replace(temperature=1.0, seed=3), GREEDY,
              GREEDY.replace(repetition_penalty=1.3), GREEDY.replace(prompt_logprobs=0)]  # fmt: skip
    expected = LLM(tiny_folder, **options).generate(prompts, params, use_tqdm=False)
    size = LLM(tiny_folder, **options)._session.engine._step.block_bytes
    llm = LLM(tiny_folder, **{**options, "kv_cache_bytes": 60 * size, "swap_space": 200 * size / 2**30})
    engine = llm._session.engine
    move = engine._host_blocks.move

    def destroying(out, into):
        move(out, [])
        if not caching:
            for cache in engine._step.kv_caches:
                cache[[block for block, _ in out]] = float("nan")
        move([], into)

    monkeypatch.setattr(engine._host_blocks, "move", destroying)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    now = llm.metrics
    assert now.preemptions > 2 and now.swapped_in_blocks > 9 and now.swapped_out_blocks >= now.swapped_in_blocks
    assert (now.swapped, now.swap_usage) == (0, 0)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == wanted.outputs[0].token_ids
    computed = sum(len(p) + 20 - 1 for p in prompts)
    assert caching or now.computed_tokens == computed, "nothing is computed twice"
    assert any("swap space of 200 blocks" in note for note in llm.fusion_report.notes)
    text = now.prometheus("m")
    assert f'fusecomp:swapped_out_blocks_total{{engine="0",model_name="m"}} {float(now.swapped_out_blocks)}' in text
    assert 'vllm:num_requests_swapped{engine="0",model_name="m"} 0.0' in text and "vllm:cpu_cache_usage_perc" in text


def test_options(tiny_folder):
    assert EngineConfig().swap_bytes == 0
    for wrong in (-1, float("nan"), "4", True):
        with pytest.raises(ConfigError, match="swap_space"):
            EngineConfig(swap_space=wrong)
    with pytest.raises(ConfigError, match="holds no block"):
        LLM(tiny_folder, **ENGINE_OPTIONS, swap_space=1e-9)
    plan = plan_memory(tiny_folder, EngineConfig(device="cpu", swap_space=0.5))
    assert plan.swap_blocks == 2**29 // plan.block_bytes
    assert f"{plan.swap_blocks} blocks" in plan.summary()
