"""What benchmarks share: options, one model, one engine, the measured ceilings, and the gate before any figure."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.check import CheckResult, check_engine
from benchmarks.idle import WARM_UP_CALLS
from benchmarks.roofline import Workload
from benchmarks.shapes import SHAPES
from fusecomp.config import EngineConfig
from fusecomp.quant.online.transform import quantize_model
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine

_START = time.perf_counter()
# Longest sequence of the gate.
PREFIX_TAIL = 32  # `prefix`: tokens of its own that follow a request's prefix
CHECK_LEN = 160
PROFILED_STEPS = 24  # of a decode run, for the time in which the GPU is idle


@dataclass(frozen=True)
class Options:
    """One run of benchmarks; `__main__` documents each on the command line."""

    benchmarks: tuple[str, ...]
    shape: str = "tiny"
    device: str = "cpu"
    dtype: str = "auto"
    layers: int | None = None
    batches: tuple[int, ...] = (1, 8, 64, 256)
    context: int = 200
    steps: int = 50
    replays: int = 30
    repeat: int = 1
    prompts: int = 8
    prompt_len: int = 2048
    requests: int = 256
    lengths: tuple[int, int] = (100, 1024)
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    enforce_eager: bool = False
    strict: bool = False
    fuse: str = "auto"
    disabled_patterns: tuple[str, ...] = ()
    quantize: str | None = None
    compare_hf: bool = False
    hf_batches: tuple[int, ...] = (1,)
    profile: bool = False
    out: str | None = None
    seed: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        name = self.dtype if self.dtype != "auto" else "bfloat16" if self.device == "cuda" else "float32"
        return getattr(torch, name)

    @property
    def settle_steps(self) -> int:
        """Decode steps besides the timed ones, at most: until every sequence decodes, and to warm up."""
        return 16 + 2 * -(-max(self.batches) * self.context // self.max_num_batched_tokens)

    def engine_config(self) -> EngineConfig:
        """The smallest engine that can run all chosen benchmarks."""
        rows, length = [8], [CHECK_LEN]
        if {"decode", "startup", "patterns"} & set(self.benchmarks):
            rows += self.batches
            steps = self.repeat * self.steps + self.settle_steps + PROFILED_STEPS + WARM_UP_CALLS
            length.append(self.context + steps)
        if "prefill" in self.benchmarks:
            rows.append(self.prompts)
            length.append(self.prompt_len + 1)
        if "prefix" in self.benchmarks:
            rows.append(1)
            length.append(self.prompt_len + PREFIX_TAIL + 1)
        if "offline" in self.benchmarks:
            rows.append(min(self.requests, 256))
            length.append(2 * self.lengths[1])
        seqs = self.max_num_seqs or max(rows)
        return EngineConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=max(self.max_num_batched_tokens, seqs),
            max_model_len=self.max_model_len or -(-max(length) // 64) * 64,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_dtype=self.kv_cache_dtype,
            deterministic=self.deterministic,
            enforce_eager=self.enforce_eager,
            strict=self.strict,
            fuse=self.fuse,
            disabled_patterns=self.disabled_patterns,
            seed=self.seed,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Options:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
        return cls(**values)


def progress(message: str) -> None:
    """One line on stderr with the seconds since the program began."""
    print(f"[{time.perf_counter() - _START:7.1f} s] {message}", file=sys.stderr, flush=True)


def versions(device: torch.device) -> dict[str, str]:
    """What the figures were measured with."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }


@dataclass
class Session:
    """Builds the model and the engine once, when first needed; `engine` has passed the gate.

    Attributes:
        seconds: what the session's own phases took.
    """

    options: Options
    seconds: dict[str, float] = field(default_factory=dict)
    _added: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.options.torch_device

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once, before model and engine take the memory."""
        return self._phase("ceilings", lambda: measure_ceilings(self.device))

    @cached_property
    def model(self) -> Any:
        """The stock HF model; quantized if asked for, without calibration, which random weights do not need."""
        o = self.options
        model: Any = self._phase(
            "weights", lambda: SHAPES[o.shape].build(self.device, o.torch_dtype, layers=o.layers, seed=o.seed)
        )
        if o.quantize:
            scheme = o.quantize
            record = self._phase("quantization", lambda: quantize_model(model, scheme, text=[]))
            progress(f"note: {record.summary()}")
        return model

    @cached_property
    def _built(self) -> tuple[Engine, CheckResult]:
        _ = self.ceilings
        model = self.model
        engine = self._phase("engine", lambda: Engine(model, self.options.engine_config()))
        for note in engine.report.notes:
            progress(f"note: {note}")
        return engine, self._phase("check", lambda: check_engine(engine, model, self.options.seed))

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            VerificationError: its numbers are wrong.
        """
        return self._built[0]

    @property
    def check(self) -> CheckResult:
        """What the gate found."""
        return self._built[1]

    @cached_property
    def workload(self) -> Workload:
        """Bytes and FLOPs of the model's steps."""
        return Workload.of(self.model, self.engine.kv_bytes_per_token)

    def prompts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Random prompts, different for every seed, so that nothing can be found in a prefix cache."""
        draw = random.Random(f"{self.options.seed} {seed}")
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return [[draw.randrange(vocabulary) for _ in range(n)] for n in lengths]

    def add(self, name: str, prompts: list[list[int]], new_tokens: Sequence[int]) -> list[str]:
        """Queue greedy requests that end by length; returns their ids."""
        ids = [f"{name} {i}" for i in range(len(prompts))]
        for request, prompt, count in zip(ids, prompts, new_tokens, strict=True):
            self.engine.add_request(request, prompt, SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))
        self._added += ids
        return ids

    def clear(self) -> None:
        """Abort whatever a benchmark left behind when it failed."""
        for request in self._added:
            self.engine.abort_request(request)
        self._added.clear()

    def release_engine(self) -> None:
        """Drop the engine and give its memory back; the model stays."""
        self.__dict__.pop("_built", None)
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _phase(self, name: str, run: Any) -> Any:
        progress(f"{name} ...")
        start = time.perf_counter()
        result = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        progress(f"{name}: {self.seconds[name]:.1f} s")
        return result


@dataclass(frozen=True)
class Result:
    """What a benchmark gives: `figures` goes into the JSON line, `text` is printed."""

    figures: dict[str, Any]
    text: str


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Right-aligned columns."""
    cells = [[str(h) for h in headers], *[[_cell(x) for x in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in cells)


def kernel_table(kernels: list[dict[str, Any]]) -> str:
    """What `timing.kernel_times` found."""
    return table(["us", "launches", "kernel"], [[k["us"], k["launches"], k["kernel"]] for k in kernels])


def _cell(x: Any) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"
    return f"{x:,}" if isinstance(x, int) else str(x)
