"""`deterministic=True` on the card, through CUDA graphs: bits of tokens and log-probabilities alone and in company.

The bundled checkpoints are served with prompts in one batch, in small steps, on so few blocks that sequences are
preempted, and with a warm prefix cache; then one after the other. Kernels are tried by themselves at the sizes of an 8B
model, where rows of one step meet those of another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from fusecomp.config import EngineConfig
from fusecomp.errors import UnsupportedModelError
from fusecomp.quant.online.transform import quantize_model
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.loading import load_model
from models.registry import build
from tests.serving import tokens

pytestmark = pytest.mark.gpu
PICO = Path(__file__).parents[1] / "models"
LENGTHS = (1, 17, 40, 16, 130, 5, 64, 33, 250, 3, 90, 1, 2, 31, 200, 12)
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=24, logprobs=5, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=16, logprobs=0, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, seed=5, max_tokens=20, logprobs=2, ignore_eos=True, top_p=0.9),
    SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, prompt_logprobs=2, ignore_eos=True),
)


@dataclass
class Outcome:
    token_ids: list[int] = field(default_factory=list)
    scores: list[bytes] = field(default_factory=list)
    prompt_scores: dict[int, bytes] = field(default_factory=dict)  # by index in the prompt


def meaning(row, count: int) -> bytes:
    """What was asked for of packed scores, whose width follows what others asked for."""
    half, own = (len(row) - 1) // 2, count + 1
    return row[:own].tobytes() + row[half : half + own].tobytes() + row[-1:].tobytes()


def serve(engine: Engine, requests: list[tuple[list[int], SamplingParams]]) -> list[Outcome]:
    outcomes = [Outcome() for _ in requests]
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(str(index), prompt, params)
    while engine.has_unfinished_requests():
        for out in engine.step():
            assert out.error is None
            outcome, params = outcomes[int(out.request_id)], requests[int(out.request_id)][1]
            outcome.token_ids += out.new_token_ids
            if out.prompt_scores is not None:
                rows = [meaning(row, params.prompt_logprobs) for row in out.prompt_scores]
                outcome.prompt_scores |= enumerate(rows, out.prompt_start)
            if out.scores is not None:
                outcome.scores.append(meaning(out.scores, params.logprobs))
    return outcomes


@cache
def make(name: str, dtype: str, max_num_seqs: int, max_num_batched_tokens: int, kv_cache_bytes: int, cached: bool):
    model, _ = load_model(PICO / name, dtype, "cuda", None, None)
    config = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, kv_cache_bytes=kv_cache_bytes,
        max_model_len=320, enable_prefix_caching=cached, deterministic=True, strict=True,
    )  # fmt: skip
    return Engine(model, config)


@pytest.mark.parametrize(
    ("name", "dtype"), [("pico-llama", "bfloat16"), ("pico-moe", "bfloat16"), ("pico-moe", "float32")]
)
def test_company_does_not_matter(name, dtype):
    plenty = 1 << 28
    reference = make(name, dtype, 1, 512, plenty, False)
    requests = [(tokens(reference.vocab_size, n, seed % 3), PARAMS[seed % 4]) for seed, n in enumerate(LENGTHS)]
    alone = [serve(reference, [request])[0] for request in requests]
    # Room for two of the longest: of sixteen, most give their blocks up on the way.
    few = 2 * 320 * reference.kv_bytes_per_token
    for options in ((16, 2048, plenty, False), (5, 24, plenty, True), (16, 48, few, False)):
        engine = make(name, dtype, *options)
        for _ in range(2):  # the second time, with the prefixes of the first
            together = serve(engine, requests)
            wrong = [n for n, a, b in zip(LENGTHS, alone, together, strict=True) if a != b]
            assert not wrong, f"prompts of {wrong} tokens differ with {options}"
        assert engine.report.fallbacks == {}
    assert engine.metrics.preemptions > 0


SHAPES = [(6144, 4096, 1), (4096, 14336, 1), (14336, 4096, 2), (2048, 8192, 1), (1000, 1001, 1)]
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    # fp32 has no matrix units here, and takes long on the larger shapes.
    [*((dtype, shape) for dtype in HALVES for shape in SHAPES), *((torch.float32, shape) for shape in SHAPES[3:])],
)
def test_linear_rows(shape, dtype):
    from fusecomp.lowerings.device import target_of
    from fusecomp.lowerings.linear.invariant import invariant_config, run_invariant
    from tests.lowerings.linear_cases import Linear

    n, k, groups = shape
    layer = Linear.random(700, n, k, epilogue="swiglu" if groups == 2 else "residual", dtype=dtype, device="cuda")
    config = invariant_config(target_of(layer.x), n=n, k=k, groups=groups, itemsize=layer.x.element_size())

    def run(rows: slice) -> torch.Tensor:
        x, args = layer.x[rows], tuple(a[rows] for a in layer.args)
        out = torch.empty(len(x), n, dtype=dtype, device="cuda")
        run_invariant(config, x, layer.weight, out, layer.epilogue.kernel, args, layer.strides, groups, True)
        return out

    whole = run(slice(0, 700))
    layer.assert_accurate(whole)
    for first, count in ((0, 1), (3, 8), (7, 17), (9, 33), (100, 64), (100, 65), (5, 128), (1, 256), (699, 1)):
        assert torch.equal(run(slice(first, first + count)), whole[first : first + count]), count


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("head_dim", "group", "window"), [(128, 4, 0), (64, 4, 0), (128, 8, 600), (256, 1, 0)])
def test_attention_rows(head_dim, group, window, quantized):
    from fusecomp.lowerings.paged_attention import lowering
    from fusecomp.lowerings.paged_attention.invariant_launch import launch_invariant_attention
    from tests.lowerings.steps import check_attention, make_step

    rows = [(1500, 1), (3, 1), (700, 300), (0, 513)]
    step = make_step(
        rows, heads=2 * group, kv_heads=2, head_dim=head_dim, page_size=16, dtype=torch.bfloat16, device="cuda",
        quantized=quantized,
    )  # fmt: skip
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    q, _, _, *rest = step.attention_inputs()
    mode = (head_dim**-0.5, window, 0.0, None)
    whole = launch_invariant_attention(q, *rest, *mode)
    check_attention(step, whole, *mode)
    cu, lengths = step.cu_q_lens.tolist(), step.seq_lens.tolist()
    places = [(row, token) for row in range(len(lengths)) for token in range(cu[row], cu[row + 1])]
    ends = torch.tensor([lengths[row] - (cu[row + 1] - 1 - t) for row, t in places], dtype=torch.int32, device="cuda")
    tables = step.block_tables[torch.tensor([row for row, _ in places], device="cuda")]
    for chosen in ([0], [1, 400], list(range(2, 40)), list(range(len(places)))):
        some = torch.tensor(chosen, device="cuda")
        count = len(chosen)
        meta = torch.tensor([count, 1, int(ends[some].max()), count], dtype=torch.int32)
        cu_q = torch.arange(count + 1, dtype=torch.int32, device="cuda")
        alone = launch_invariant_attention(
            q[some], step.kv_cache, cu_q, ends[some], tables[some].contiguous(), meta, *mode
        )  # fmt: skip
        assert torch.equal(alone, whole[some]), count


def test_what_has_no_kernel_is_refused():
    config = EngineConfig(max_model_len=64, max_num_seqs=2, kv_cache_bytes=4 << 20, deterministic=True)
    codes = build("llama", torch.bfloat16).cuda()
    quantize_model(codes, "int8", text=[])
    with pytest.raises(UnsupportedModelError, match="quant_linear"):
        Engine(codes, config)
    with pytest.raises(UnsupportedModelError, match="mm sums in an order"):
        Engine(build("llama", torch.bfloat16).cuda(), config.replace(disabled_patterns=("linear",)))
    with pytest.raises(UnsupportedModelError, match="enforce_eager"):
        Engine(build("llama", torch.bfloat16).cuda(), config.replace(enforce_eager=True))
