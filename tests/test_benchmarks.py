"""The benchmarks on the CPU: what they report, and that they refuse to report for a wrong engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.__main__ import main
from benchmarks.check import in_float32
from benchmarks.idle import Idle
from benchmarks.roofline import Workload, touched_experts
from benchmarks.shapes import SHAPES, Shape
from benchmarks.targets import RUNS, TARGETS, Place
from fusecomp.config import EngineConfig
from fusecomp.errors import RequestError
from fusecomp.quant.online.transform import quantize_model
from fusecomp.request import SamplingParams
from fusecomp.runtime.choice import Sampled
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.step import CompiledStep

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--enforce-eager", "--batches", "1,3", "--context", "20", "--steps", "4"]
QUICK += ["--prompts", "2", "--prompt-len", "33", "--requests", "5", "--lengths", "5,12"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Operations this small only wait for a thread pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.ceilings.STREAM_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr("benchmarks.ceilings.MATMUL_SIZE", {"cpu": 64})


def last_line(capsys: pytest.CaptureFixture) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_reports(shape: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["decode", "prefill", "offline", "prefix", "--shape", shape, *QUICK]) == 0
    result = last_line(capsys)
    assert {"shape", "device", "torch", "triton", "ceilings", "check", "engine", "benchmarks"} <= result.keys()
    figures = result["benchmarks"]
    one, three = figures["decode"]["batches"]
    assert (one["batch"], three["batch"]) == (1, 3)
    for row in (one, three):
        assert row["graph_ms"] is None and row["step_ms"] > 0 and row["bytes"] > 0
        assert row["step"]["samples"] == 4 and 20 < row["context"] < 40
    assert three["bytes"] > one["bytes"]
    assert ("experts_touched" in one) == (shape == "tiny-moe")
    assert figures["prefill"]["tokens_per_s"] > 0 and figures["prefill"]["share_of_matmul"] > 0
    offline = figures["offline"]
    assert offline["output_tokens"] > 0 and offline["output_tokens_per_s"] > 0
    assert sum(group["steps"] for group in offline["by_rows"]) == offline["steps"]
    assert sum(group["seconds"] for group in offline["by_rows"]) == pytest.approx(offline["wall_s"], rel=0.01)
    assert figures["prefix"]["cached_tokens"] == figures["prefix"]["prefix"] // 16 * 16 > 0
    assert figures["prefix"]["ratio"] > 0
    assert result["check"]["prefill_error"] < 1e-5 and result["check"]["decode_error"] < 1e-5
    for target in TARGETS:
        if RUNS[target.run].module == "benchmarks":
            assert has_figure(figures, target.place), target


def has_figure(value: Any, place: Place) -> bool:
    """Whether a run has what a target names, of three rows; a CPU has no graphs and no idle time to tell."""
    for key in place:
        if isinstance(key, int):
            (value,) = [entry for entry in value if entry["batch"] == 3]
        elif key not in value:
            return False
        elif (value := value[key]) is None:
            return True
    return isinstance(value, float)


@pytest.mark.parametrize(("scheme", "share"), [("fp8", 0.5), ("int4", 0.25)])
def test_quantized_models_are_held_to_their_own_codes(scheme: str, share: float, capsys: pytest.CaptureFixture) -> None:
    quick = ["decode", "--shape", "tiny-moe", *QUICK, "--dtype", "bfloat16"]
    assert main(quick) == 0 and main([*quick, "--quantize", scheme]) == 0
    plain, coded = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert coded["quantize"] == scheme and plain["quantize"] is None
    assert coded["workload"]["linear_flops"] == pytest.approx(plain["workload"]["linear_flops"], rel=0.01)
    # Scales come on top: of rows of 32 and 64 columns, or of groups of 32.
    assert share < coded["workload"]["expert_bytes"] / plain["workload"]["expert_bytes"] < 1.3 * share
    check = coded["check"]
    assert check["decode_error"] < 1.5 * check["stock_decode_error"] < 0.1


def test_the_fp32_reference_of_codes_leaves_them_alone() -> None:
    model: Any = SHAPES["tiny-moe"].build(CPU, torch.bfloat16)
    quantize_model(model, "fp8", text=[])
    ids, classes = torch.arange(1, 12)[None], [type(m) for m in model.modules()]
    codes = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    before = model(input_ids=ids).logits
    with in_float32(model):
        widened = model(input_ids=ids).logits
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == codes
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(widened, model.float()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def wrong_logits(monkeypatch: pytest.MonkeyPatch, *, decodes_only: bool) -> None:
    right = CompiledStep.__call__

    def wrong(self: CompiledStep, batch: Any) -> Tensor:
        logits = right(self, batch)
        if decodes_only and int(batch.host_meta[0]) == 0:
            return logits
        # The same error in every row, and small: the engine's own start-up check lets it pass.
        noise = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0))
        return logits * (1 + 5e-3 * noise)

    monkeypatch.setattr(CompiledStep, "__call__", wrong)


def wrong_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Engine._forward
    monkeypatch.setattr(Engine, "_forward", lambda *args: Sampled((right(*args).tokens + 1) % 512))


@pytest.mark.parametrize("fault", ["prefill", "decode", "tokens"])
def test_refuses_a_wrong_engine(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    if fault == "tokens":
        wrong_tokens(monkeypatch)
    else:
        wrong_logits(monkeypatch, decodes_only=fault == "decode")
    assert main(["decode", "--shape", "tiny", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert "VerificationError" in err and {"prefill": "prefill", "decode": "decode", "tokens": "served"}[fault] in err
    assert "tok/s" not in out and "{" not in out


def test_a_failing_benchmark_leaves_the_others(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(session: Any) -> None:
        session.add("left behind", [[1, 2, 3]], [100])
        raise RuntimeError("out of luck")

    monkeypatch.setitem(main.__globals__["BENCHMARKS"], "prefill", fail)
    assert main(["prefill", "offline", "--shape", "tiny", *QUICK]) == 1
    figures = last_line(capsys)["benchmarks"]
    assert "out of luck" in figures["prefill"]["error"] and figures["offline"]["output_tokens"] > 0
    assert figures["offline"]["steps"] < 40


def test_a_missing_checkpoint_is_named(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(SHAPES, "pico-llama", Shape("pico-llama", folder=tmp_path / "absent"))
    assert main(["decode", "--shape", "pico-llama", *QUICK]) == 1
    assert "no checkpoint in" in capsys.readouterr().err


# The weights a step at batch 1 touches, from the shapes' published sizes.
@pytest.mark.parametrize(
    ("name", "gigabytes"), [("llama-1b", {1: 2.47}), ("llama-8b", {1: 15.0}), ("qwen3-30b-a3b", {1: 6.06, 8: 25.8})]
)
def test_bytes_of_the_full_shapes(name: str, gigabytes: dict[int, float]) -> None:
    model = SHAPES[name].build(torch.device("meta"), torch.bfloat16)
    work = Workload.of(model, kv_bytes_per_token=0)
    for batch, expected in gigabytes.items():
        assert work.decode_bytes(batch, 0) / 1e9 == pytest.approx(expected, rel=0.01)


def test_fp32_reference_without_a_copy() -> None:
    model = SHAPES["tiny-moe"].build(CPU, torch.bfloat16)
    storage = {name: p.data_ptr() for name, p in model.named_parameters()}
    ids = torch.arange(1, 12)[None]
    before = model(input_ids=ids).logits
    with in_float32(model):
        widened = model(input_ids=ids).logits
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storage
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
    torch.testing.assert_close(widened, model.float()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_repeating_a_step_changes_nothing() -> None:
    model = SHAPES["tiny"].build(CPU, torch.float32)
    engine = Engine(model, EngineConfig(enforce_eager=True, max_num_seqs=2, max_model_len=64))
    with pytest.raises(RequestError, match="no step has run"):
        engine.repeat_step()
    for request in "ab":
        engine.add_request(request, [3, 1, 4, 1, 5], SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True))
    served: dict[str, list[int]] = {"a": [], "b": []}
    while engine.has_unfinished_requests():
        for out in engine.step():
            served[out.request_id] += out.new_token_ids
        assert engine.repeat_step().tolist() == [tokens[-1] for tokens in served.values()]
    ids = torch.tensor([[3, 1, 4, 1, 5, *served["a"][:-1]]])
    assert served["a"] == served["b"] == model(input_ids=ids).logits[0, 4:].argmax(-1).tolist()


def test_touched_experts_are_counted_on_the_last_tokens() -> None:
    model = SHAPES["tiny-moe"].build(CPU, torch.float32)
    assert touched_experts(model, [[1, 2, 3]]) == 2
    assert 2 <= touched_experts(model, [[1, 2, 3], [9, 8, 7, 6], [5, 5, 5]]) <= 6


def test_idle_time_is_what_no_kernel_covers() -> None:
    """Overlapping, nested, touching and separate kernels, in any order."""
    kernels = [(20.0, 30.0), (0.0, 10.0), (8.0, 12.0), (9.0, 11.0), (12.0, 13.0), (15.0, 16.0)]
    idle = Idle.of((start, end, "abcdef"[i]) for i, (start, end) in enumerate(kernels))
    assert idle.largest_gaps(2) == [(("f", "a"), (1, 4.0)), (("e", "f"), (1, 2.0))]
    assert (idle.wall, idle.busy, idle.long_gaps, idle.longest, idle.kernels) == (30.0, 24.0, 4.0, 4.0, 6)
    assert idle.share == pytest.approx(0.2) and idle.longest_at == 16.0
    with pytest.raises(ValueError, match="no kernel"):
        Idle.of([])
