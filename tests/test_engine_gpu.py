"""The engine end to end on tiny random models: on a GPU with CUDA graphs, and the same checks eagerly on the CPU.

Every check takes a device. The exact comparisons run in fp32, where greedy tokens are those of Hugging Face; low
precision is compared with Hugging Face's logits in the same dtype, under the numerics contract.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterable
from functools import cache

import pytest
import torch
import transformers

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime.choice import Kind
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.graphs import bucket_sizes
from fusecomp.runtime.step_batch import MixedShape

BLOCK_SIZES = [1, 16, 32, 64]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
# Lengths around the block sizes; more prompts than rows, and more tokens than one step takes.
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 3]
OPTIONS = EngineConfig(max_num_seqs=5, max_num_batched_tokens=64, max_model_len=128, kv_cache_bytes=4 << 20)

MODELS = {
    "llama": lambda head_dim: transformers.LlamaConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
        pad_token_id=0,
    ),
    "qwen3-moe": lambda head_dim: transformers.Qwen3MoeConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=256, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    ),
}  # fmt: skip


def variants(names: str, quick: list[tuple], *axes: Iterable):
    """Parametrize over `device` and `names`: the whole product on a GPU, `quick` on the CPU."""
    full = [pytest.param("cuda", *values, marks=pytest.mark.gpu) for values in itertools.product(*axes)]
    return pytest.mark.parametrize(f"device, {names}", [*(("cpu", *values) for values in quick), *full], ids=str)


@cache
def stock(name: str, head_dim: int = 32) -> transformers.PreTrainedModel:
    """A random fp32 model on the CPU, with logits spread enough that the arg-max is safe."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](head_dim)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.12)
    model.lm_head.weight.normal_(0, 0.5)
    return model


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 199, (n,), generator=generator).tolist() for n in LENGTHS]


@cache
def hf_greedy(name: str, head_dim: int) -> list[list[int]]:
    """Hugging Face's greedy tokens in fp32, one prompt at a time."""
    model = stock(name, head_dim)
    kwargs = {"max_new_tokens": GREEDY.max_tokens, "do_sample": False}
    return [model.generate(torch.tensor([p]), **kwargs)[0, len(p) :].tolist() for p in prompts()]


def make_engine(name: str, device: str, dtype: torch.dtype, head_dim: int = 32, **changes) -> Engine:
    model = copy.deepcopy(stock(name, head_dim)).to(device, dtype)
    return Engine(model, OPTIONS.replace(enforce_eager=device == "cpu", **changes))


def serve(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, params)
    tokens: list[list[int]] = [[] for _ in requests]
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            tokens[int(output.request_id)] += output.new_token_ids
    return tokens


def check_clean(engine: Engine) -> None:
    """One graph, compiled once, nothing fallen back."""
    report = engine.report
    assert (report.graphs, report.graph_breaks, report.recompiles) == (1, 0, 0)
    assert report.fallbacks == {}
    if engine.device.type == "cuda":
        largest = min(5, engine.num_kv_blocks)
        assert {1, largest} <= set(report.cuda_graphs) <= set(bucket_sizes(largest))


@variants(
    "name, head_dim, block_size",
    [("llama", 32, 1), ("llama", 64, 32), ("qwen3-moe", 32, 64)],
    MODELS, [32, 64], BLOCK_SIZES,
)  # fmt: skip
def test_greedy_tokens_are_those_of_hugging_face(device, name, head_dim, block_size):
    engine = make_engine(name, device, torch.float32, head_dim, block_size=block_size)
    assert len(LENGTHS) > engine.config.max_num_seqs
    assert serve(engine, [(p, GREEDY) for p in prompts()]) == hf_greedy(name, head_dim)
    assert serve(engine, [(prompts()[4], GREEDY)]) == [hf_greedy(name, head_dim)[4]]  # alone, in the smallest bucket
    check_clean(engine)


@variants(
    "name, head_dim, dtype",
    [("llama", 32, torch.float16), ("qwen3-moe", 32, torch.bfloat16)],
    MODELS, [32, 64], [torch.bfloat16, torch.float16],
)  # fmt: skip
def test_low_precision(device, name, head_dim, dtype):
    """Logits obey the contract as prefill and as decode, and served tokens repeat when the same steps are taken."""
    engine = make_engine(name, device, dtype, head_dim, max_num_batched_tokens=512, enable_prefix_caching=False)
    low = copy.deepcopy(stock(name, head_dim)).to(device, dtype)
    chosen = prompts()[1:6]
    with torch.no_grad():
        exact = torch.cat([stock(name, head_dim)(torch.tensor([p])).logits[:, -1] for p in chosen]).double()
        unfused = torch.cat([low(torch.tensor([p], device=device)).logits[:, -1] for p in chosen]).double().cpu()

    def error(logits: torch.Tensor) -> float:
        return (logits.double().cpu() - exact).square().mean().sqrt().item()

    for decode_last in (False, True):
        fused = engine.prompt_logits(chosen, decode_last=decode_last)
        assert fused.isfinite().all()
        assert error(fused) <= 1.5 * error(unfused)
    first = serve(engine, [(p, GREEDY) for p in prompts()])
    assert [len(tokens) for tokens in first] == [GREEDY.max_tokens] * len(LENGTHS)
    assert serve(engine, [(p, GREEDY) for p in prompts()]) == first
    check_clean(engine)


SAMPLING = {
    "temperature": SamplingParams(temperature=1.3, max_tokens=10),
    "top-k": SamplingParams(temperature=1.3, top_k=7, max_tokens=10),
    "top-p": SamplingParams(temperature=1.3, top_p=0.8, max_tokens=10),
    "both": SamplingParams(temperature=0.9, top_k=20, top_p=0.9, max_tokens=10),
    "min-p": SamplingParams(temperature=1.3, min_p=0.05, max_tokens=10),
    "typical-p": SamplingParams(temperature=1.3, typical_p=0.7, max_tokens=10),
    "penalties": SamplingParams(
        temperature=1.3, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=10
    ),
    "bans": SamplingParams(
        temperature=1.3,
        top_p=0.9,
        logit_bias={7: 5.0, 9: 5.0, 11: 5.0},
        bad_words=((7, 9), (9, 7), (9, 11), (3,), (7, 7, 11)),
        allowed_token_ids=tuple(range(1, 60)),
        stop_token_ids=(5, 6),
        min_tokens=6,
        max_tokens=10,
    ),
}


@variants("name", [("qwen3-moe",)], MODELS)
def test_sampling_repeats_by_seed_whatever_the_batch(device, name):
    """Alone, among others, in another order, beside greedy rows: the same tokens. Other seeds: other tokens."""
    engine = make_engine(name, device, torch.float32)
    seeded = {
        kind: [(p, params.replace(seed=i)) for i, p in enumerate(prompts()[:5])] for kind, params in SAMPLING.items()
    }
    alone = {kind: [serve(engine, [request])[0] for request in requests] for kind, requests in seeded.items()}
    for kind, requests in seeded.items():
        assert serve(engine, requests) == alone[kind]
        assert serve(engine, requests[::-1]) == alone[kind][::-1]
        mixed = serve(engine, [(prompts()[7], GREEDY), *requests, (prompts()[8], GREEDY)])
        assert mixed[1:-1] == alone[kind]
        assert [mixed[0], mixed[-1]] == hf_greedy(name, 32)[7:9]
        others = [(p, params.replace(seed=params.seed + 100)) for p, params in requests]
        assert serve(engine, others) != alone[kind]
    everything = [request for requests in seeded.values() for request in requests]
    assert serve(engine, everything) == [tokens for kind in seeded for tokens in alone[kind]]
    check_clean(engine)


@variants("name", [("llama",)], MODELS)
def test_options_that_depend_on_the_last_token(device, name):
    """Greedy, so that the reference may choose: step by step on the CPU, by the model's logits and NumPy's options.

    With overlap and CUDA graphs the host never knew the last token when it launched a step.
    """
    import numpy as np

    from tests.runtime.sampling_reference import adjusted

    engine = make_engine(name, device, torch.float32)
    engine.overlap = True
    plain = hf_greedy(name, 32)
    wishes = [
        GREEDY.replace(max_tokens=16, repetition_penalty=1.6),
        GREEDY.replace(max_tokens=16, presence_penalty=3.0, frequency_penalty=1.5, logprobs=4, prompt_logprobs=4),
        GREEDY.replace(max_tokens=16, bad_words=tuple(zip(plain[4], plain[4][1:], strict=False))),
        GREEDY.replace(
            max_tokens=16, logit_bias={9: 6.0, 10: 6.0}, repetition_penalty=1.2, allowed_token_ids=range(150)
        ),
        GREEDY.replace(max_tokens=16, min_tokens=9, stop_token_ids=tuple(plain[3])),
        GREEDY.replace(max_tokens=16),
    ]
    requests = [(prompts()[2 + i % 3], wish) for i, wish in enumerate(wishes)] * 2
    got = serve(engine, requests)
    model = stock(name)
    for (prompt, wish), ids in zip(requests, got, strict=True):
        output: list[int] = []
        while len(output) < wish.max_tokens and not (output and output[-1] in wish.stop_token_ids):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + output])).logits[0, -1]
            output.append(int(np.argmax(adjusted(logits, prompt, output, wish))))
        assert ids == output
    changed = [ids[:10] != plain[2 + i % 3] for i, ids in enumerate(got[:6])]
    assert changed == [True] * 5 + [False]
    check_clean(engine)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_the_models(name):
    """In a graph and read late: of the tokens drawn and of the most likely, and of the prompt's tokens."""
    from fusecomp.runtime.logprobs import unpack

    engine = make_engine(name, "cuda", torch.float32)
    params = SamplingParams(
        temperature=1.0, seed=3, max_tokens=12, logprobs=5, prompt_logprobs=2, frequency_penalty=0.5
    )
    chosen = prompts()[2:5]
    for i, prompt in enumerate(chosen):
        engine.add_request(str(i), prompt, params)
    ids: list[list[int]] = [[] for _ in chosen]
    rows: list[list] = [[] for _ in chosen]
    while engine.has_unfinished_requests():
        for out in engine.step():
            index = int(out.request_id)
            ids[index] += out.new_token_ids
            rows[index] += [] if out.prompt_scores is None else [(2, row.copy()) for row in out.prompt_scores]
            rows[index] += [] if out.scores is None else [(5, out.scores.copy())]
    for prompt, tokens, found in zip(chosen, ids, rows, strict=True):
        with torch.no_grad():
            lines = stock(name)(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        assert len(found) == len(prompt) + len(tokens) - 1
        for line, token, (count, row) in zip(lines, (prompt + tokens)[1:], found, strict=False):
            shown = unpack(row, count)
            assert next(iter(shown)) == token and shown[token].rank == int((line >= line[token]).sum())
            assert all(abs(value.logprob - line[i].item()) < 1e-3 for i, value in shown.items())
            assert set(line.topk(count).indices.tolist()) <= set(shown)


@variants("name, block_size", [("llama", 16)], MODELS, BLOCK_SIZES)
def test_preempted_requests_come_back_with_the_same_tokens(device, name, block_size):
    """A cache that holds two of five requests at their longest: rows lose their blocks and are computed again."""
    width = 2 * 2 * 2 * 32 * 4  # layers, K and V, kv heads, head dim, bytes
    engine = make_engine(name, device, torch.float32, block_size=block_size, kv_cache_bytes=192 * width)
    assert engine.num_kv_blocks == 192 // block_size
    requests = [(p, GREEDY.replace(max_tokens=60)) for p in prompts()[3:8]]
    tokens = serve(engine, requests)
    assert engine.metrics.preemptions > 0
    assert [t[:10] for t in tokens] == hf_greedy(name, 32)[3:8]
    check_clean(engine)
    if device == "cuda":  # on the CPU the first tokens above are enough
        roomy = make_engine(name, device, torch.float32, block_size=block_size)
        assert serve(roomy, requests) == tokens and roomy.metrics.preemptions == 0


@variants("name", [("llama",)], MODELS)
def test_steps_that_run_again_change_no_token(device, name):
    """Three more runs of the latest step after every step, queued and not waited for: none takes the next one's letter,
    continues from its own tokens, or delivers."""
    engine = make_engine(name, device, torch.float32)
    engine.overlap = True
    step, again = engine.step, []

    def step_and_repeat():
        outputs = step()
        again.append([engine.repeat_step() for _ in range(3)])
        return outputs

    engine.step = step_and_repeat
    assert serve(engine, [(p, GREEDY) for p in prompts()]) == hf_greedy(name, 32)
    assert len(again) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_strict(name):
    """A fallback would raise."""
    engine = make_engine(name, "cuda", torch.float32, strict=True)
    assert serve(engine, [(prompts()[2], GREEDY)]) == [hf_greedy(name, 32)[2]]
    assert engine.report.fallbacks == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_graphs_change_no_token(name, dtype):
    """CUDA graphs against the compiled step without them.

    In low precision only decodes, in batches that fill their bucket: a padded GEMM may round otherwise, and bf16 logits
    tie.
    """
    graphs, plain = (make_engine(name, "cuda", dtype, 64) for _ in range(2))
    plain._graphs = None
    if dtype != torch.float32:
        graphs._graphs.mixed = []
    for rows in range(1, 6) if dtype == torch.float32 else graphs.report.cuda_graphs:
        requests = [(p, GREEDY) for p in prompts()[:rows]]
        assert serve(graphs, requests) == serve(plain, requests)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_steps_with_prefills_run_in_graphs(name, kv_cache_dtype):
    """Chunks of prompts beside decodes, in captured shapes: the tokens of an engine without graphs."""
    long = [(prompts()[i % len(prompts())] * 2)[:90] for i in range(24)]
    requests = [(p, GREEDY.replace(max_tokens=5 + i % 7)) for i, p in enumerate(long)]
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "kv_cache_dtype": kv_cache_dtype}
    graphs, plain = (make_engine(name, "cuda", torch.float32, 64, **options) for _ in range(2))
    plain._graphs = None
    shapes = set()
    replay = graphs._graphs.replay
    graphs._graphs.replay = lambda shape, kind: (shapes.add(shape), replay(shape, kind))[1]
    assert [serve(graphs, requests) for _ in range(2)] == [serve(plain, requests) for _ in range(2)]
    assert len({shape for shape in shapes if isinstance(shape, MixedShape)}) >= 2
    assert graphs.report.mixed_cuda_graphs >= 2 and not graphs._graphs.full
    assert graphs.metrics.prefix_cache_hits > 0


@pytest.mark.gpu
def test_captures_that_find_no_memory():
    """A limit below what the next graph needs: what is captured serves on, the report says so, no token changes."""
    engine = make_engine("llama", "cuda", torch.float32)
    requests = [(p, GREEDY) for p in prompts()]
    expected = serve(engine, requests)
    engine._graphs._graphs.clear()
    engine._graphs.seconds.clear()
    engine._graphs.sizes = []
    engine._graphs._budget = 1 << 40  # what other processes take meanwhile looks like the graphs' own
    engine._capture(engine._graphs, 5, Kind())
    assert not engine._graphs.full
    run = engine._graphs._run
    held = []

    def hungry(batch, shape, kind):
        """A step that needs 64 MiB more than there is, while it is captured."""
        if torch.cuda.is_current_stream_capturing():
            held.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
        return run(batch, shape, kind)

    engine._graphs._run = hungry
    used = torch.cuda.memory_reserved() + (32 << 20)
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.get_device_properties(0).total_memory)
    try:
        engine.capture_graphs([4])
        assert engine._graphs.full and engine.report.cuda_graphs == [5] and not held
        assert "there is no memory for that of 4" in engine.report.notes[-1] and "5 stay" in engine.report.notes[-1]
        assert serve(engine, requests) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_no_kernel_is_left_to_its_first_launch(monkeypatch, tmp_path):
    import triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = []
    monkeypatch.setattr(
        triton.knobs.compilation,
        "listener",
        lambda *, src, **_: compiled.append((src.name, threading.current_thread().name)),
    )
    make_engine("llama", "cuda", torch.bfloat16, head_dim=40)  # no other test's: their kernels are there already
    own = [(name, thread) for name, thread in compiled if not name.startswith("triton_")]
    assert any(name == "decode_kernel" for name, _ in own)
    assert not [name for name, thread in own if not thread.startswith("compile-ahead")]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_stored_program_serves_the_same_tokens(monkeypatch, tmp_path, name):
    monkeypatch.setenv("FUSECOMP_COMPILE_CACHE", "1")
    monkeypatch.setenv("FUSECOMP_CACHE_DIR", str(tmp_path))
    requests = [(prompt, GREEDY) for prompt in prompts()]
    for word in ("compiled", "loaded"):
        engine = make_engine(name, "cuda", torch.float32)
        assert engine.report.program.startswith(word)
        assert serve(engine, requests) == hf_greedy(name, 32)
