"""Layers, shapes and inputs of the attention benchmarks, and the checks that precede any timing.

Legend: H query heads, G kv heads, D head dim, B page size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from benchmarks.timing import time_chain
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.paged_attention import heuristics, lowering
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, PrefillConfig
from fusecomp.lowerings.paged_attention.lowering import NewTokens
from fusecomp.lowerings.paged_attention.rope import launch_rope_attention
from fusecomp.ops.kv_cache import PAIR_BYTES, KVLayout, fill_random
from fusecomp.ops.rope import Rope
from tests.lowerings.steps import check_attention, check_rope_attention, make_rope, make_step

L2_BYTES = 256 * 2**20  # cycle through at least this much KV
DTYPE = torch.bfloat16
SERVED = 8192  # configurations are those of an engine that serves at least this context


@dataclass(frozen=True)
class Layer:
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    norm: bool = False  # of queries and keys, in the fused shapes

    def kv_layout(self, quantized: bool) -> KVLayout:
        return KVLayout(self.kv_heads, self.page_size, self.head_dim, quantized)

    def token_bytes(self, quantized: bool) -> int:
        """Bytes of a token's key and value, of one kv head."""
        return 2 * self.head_dim + PAIR_BYTES if quantized else 2 * self.head_dim * DTYPE.itemsize


@dataclass(frozen=True)
class DecodeShape:
    layer: Layer
    batch: int
    context: int
    ragged: bool = False  # lengths spread evenly over shortest .. context
    quantized: bool = False  # an FP8 cache
    shortest: int = 1

    @property
    def lengths(self) -> torch.Tensor:
        if self.ragged:
            return torch.linspace(self.shortest, self.context, self.batch).int()
        return torch.full((self.batch,), self.context, dtype=torch.int32)

    @property
    def kv_bytes(self) -> int:
        return int(self.lengths.sum()) * self.layer.kv_heads * self.layer.token_bytes(self.quantized)


@dataclass(frozen=True)
class PrefillShape:
    layer: Layer
    rows: int
    new: int
    cached: int = 0
    window: int = 0
    quantized: bool = False  # an FP8 cache; the new keys are given as it returns them

    @property
    def max_keys(self) -> int:
        return min(self.window or 2**30, self.cached + self.new)

    @property
    def flops(self) -> int:
        keys = self.new * self.cached + self.new * (self.new + 1) // 2
        if self.window:
            keys = sum(min(self.cached + i + 1, self.window) for i in range(self.new))
        return 4 * self.layer.heads * self.layer.head_dim * self.rows * keys


def random_cache(layer: Layer, blocks: int, quantized: bool = False) -> torch.Tensor:
    cache = layer.kv_layout(quantized).zeros(blocks, DTYPE, "cuda")
    fill_random(cache, layer.head_dim)
    return cache


class DecodeCase:
    """Inputs of one decode shape: several disjoint batches over one cache of shuffled pages."""

    new_key = False

    def __init__(self, shape: DecodeShape) -> None:
        self.shape, layer = shape, shape.layer
        pages = -(-shape.context // layer.page_size)
        self.batches = max(1, math.ceil(L2_BYTES / shape.kv_bytes))
        order = torch.randperm(self.batches * shape.batch * pages, device="cuda", dtype=torch.int32)
        self.kv_cache = random_cache(layer, len(order), shape.quantized)
        self.tables = order.view(self.batches, shape.batch, pages)
        self.q = torch.randn(layer.heads, shape.batch, layer.head_dim, dtype=DTYPE, device="cuda").transpose(0, 1)
        self.out = torch.empty(shape.batch, layer.heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.seq_lens = shape.lengths.sort(descending=True).values.cuda()  # as the scheduler has them

    def default(self) -> DecodeConfig:
        layer = self.shape.layer
        return heuristics.decode_config(
            device_target(0), head_dim=layer.head_dim, itemsize=DTYPE.itemsize, num_kv_heads=layer.kv_heads,
            page_size=layer.page_size, num_rows=self.shape.batch, capacity=max(self.shape.context, SERVED),
            group=layer.heads // layer.kv_heads, quantized=self.shape.quantized, new_key=self.new_key,
        )  # fmt: skip

    def launch(self, config: DecodeConfig, i: int = 0) -> None:
        lowering.run_decode(
            config, self.q, self.kv_cache, self.out, self.seq_lens, self.tables[i % self.batches], self.shape.batch,
            self.shape.layer.head_dim**-0.5, 0, 0.0, None,
        )  # fmt: skip

    def seconds(self, config: DecodeConfig) -> float:
        launches = max(4, min(200, int(4e-3 * 4e12 / (self.shape.kv_bytes + 4e6))))
        return time_chain(lambda i: self.launch(config, i), launches)


class FusedCase(DecodeCase):
    """The same with what precedes attention in a step: norm, rotation, the write of each row's last key and value."""

    new_key = True

    def __init__(self, shape: DecodeShape) -> None:
        super().__init__(shape)
        layer, page_size = shape.layer, shape.layer.page_size
        self.q, k, v = projected(shape.batch, layer)
        cos, sin = torch.randn(2, shape.batch, layer.head_dim, dtype=DTYPE, device="cuda")
        last = self.seq_lens.long() - 1
        pages = self.tables.long().gather(2, (last // page_size).expand(self.batches, -1)[..., None])[..., 0]
        slots = pages * page_size + last % page_size
        rope, norms = Rope("half", layer.head_dim), (None, None)
        if layer.norm:
            rope = replace(rope, norm="rms", eps=1e-6)
            norms = tuple(torch.randn(2, layer.head_dim, dtype=DTYPE, device="cuda"))
        self.new = [NewTokens(k, v, cos, sin, *norms, own, rope) for own in slots]

    def launch(self, config: DecodeConfig, i: int = 0) -> None:
        lowering.run_decode(
            config, self.q, self.kv_cache, self.out, self.seq_lens, self.tables[i % self.batches], self.shape.batch,
            self.shape.layer.head_dim**-0.5, 0, 0.0, None, new=self.new[i % self.batches],
        )  # fmt: skip


def projected(tokens: int, layer: Layer) -> tuple[torch.Tensor, ...]:
    """q, k, v [tokens, heads, D] as views of one projection's result."""
    heads = layer.heads + 2 * layer.kv_heads
    qkv = torch.randn(tokens, heads, layer.head_dim, dtype=DTYPE, device="cuda")
    return qkv.split([layer.heads, layer.kv_heads, layer.kv_heads], 1)


class PrefillCase:
    """Inputs of one prefill shape."""

    def __init__(self, shape: PrefillShape) -> None:
        self.shape, layer = shape, shape.layer
        tokens, length = shape.rows * shape.new, shape.cached + shape.new
        pages = -(-length // layer.page_size)
        order = torch.randperm(shape.rows * pages, device="cuda", dtype=torch.int32)
        self.kv_cache = random_cache(layer, len(order), shape.quantized)
        self.table = order.view(shape.rows, pages)
        self.q = torch.randn(layer.heads, tokens, layer.head_dim, dtype=DTYPE, device="cuda").transpose(0, 1)
        kv = torch.randn(tokens, 2 * layer.kv_heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.k, self.v = kv.split(layer.kv_heads, 1)
        self.out = torch.empty(tokens, layer.heads, layer.head_dim, dtype=DTYPE, device="cuda")
        self.cu = torch.arange(shape.rows + 1, dtype=torch.int32, device="cuda") * shape.new
        self.seq_lens = torch.full((shape.rows,), length, dtype=torch.int32, device="cuda")

    def default(self) -> PrefillConfig:
        return heuristics.prefill_config(
            device_target(0), head_dim=self.shape.layer.head_dim, itemsize=DTYPE.itemsize,
            max_keys=self.shape.max_keys,
        )  # fmt: skip

    def launch(self, config: PrefillConfig) -> None:
        lowering.run_prefill(
            config, self.q, self.k, self.v, self.kv_cache, self.out, self.cu, self.seq_lens, self.table,
            0, self.shape.rows, self.shape.new, self.shape.layer.head_dim**-0.5, self.shape.window, 0.0, None,
        )  # fmt: skip

    def seconds(self, config: PrefillConfig) -> float:
        return time_chain(lambda _: self.launch(config), 4, replays=5)


CHECKS: list[tuple[list[tuple[int, int]], dict, dict]] = [
    ([(200, 1)], {}, {}),
    ([(4095, 1), (0, 1), (1, 1), (777, 1), (2048, 1)], {"padding": 2}, {}),
    ([(1500, 1), (63, 1), (1000, 700), (0, 1111), (5, 2)], {}, {}),
    ([(1500, 1), (1000, 700), (0, 1111)], {"page_size": 1, "head_dim": 80}, {"softcap": 20.0}),
    ([(1500, 1), (1000, 700), (0, 1111)], {"page_size": 64, "head_dim": 64}, {"window": 300, "sinks": True}),
    ([(900, 1), (300, 200), (0, 411)], {"page_size": 32, "head_dim": 256}, {"window": 128, "softcap": 30.0}),
    ([(300, 1), (100, 120)], {"dtype": torch.float32, "head_dim": 96}, {"softcap": 5.0}),
    ([(300, 1), (100, 120)], {"dtype": torch.float16}, {}),
    ([(4095, 1), (0, 1), (1, 1), (777, 1), (2048, 1)], {"padding": 2, "quantized": True}, {}),
    ([(1500, 1), (63, 1), (1000, 700), (0, 1111), (5, 2)], {"quantized": True}, {}),
    ([(1500, 1), (1000, 700), (0, 1111)], {"page_size": 1, "head_dim": 80, "quantized": True}, {"softcap": 20.0}),
    ([(1500, 1), (1000, 700)], {"page_size": 64, "head_dim": 64, "quantized": True}, {"window": 300, "sinks": True}),
    ([(900, 1), (300, 200), (0, 411)], {"page_size": 32, "head_dim": 256, "quantized": True}, {"window": 128}),
    ([(300, 1), (100, 120)], {"dtype": torch.float32, "head_dim": 96, "quantized": True}, {"softcap": 5.0}),
    ([(300, 1), (100, 120)], {"dtype": torch.float16, "quantized": True}, {}),
]


def check_correctness(case: int) -> None:
    """One step of real size against fp64, repeated to catch races; raises AssertionError."""
    rows, shape, options = CHECKS[case]
    layer = {"heads": 8, "kv_heads": 2, "head_dim": 128, "page_size": 16, "dtype": DTYPE, **shape}
    step = make_step(rows, **layer, device="cuda", seed=case)
    sinks = torch.randn(8, device="cuda") if options.get("sinks") else None
    mode = (layer["head_dim"] ** -0.5, options.get("window", 0), options.get("softcap", 0.0), sinks)
    fused = replace(step, kv_cache=step.kv_cache.clone())
    given = make_rope(step, Rope("half", layer["head_dim"], norm="rms", eps=1e-6), table_dtype=torch.float32)
    out = launch_rope_attention(*given.arguments(fused, mode))
    check_rope_attention(step, fused, given, out, mode)
    lowering.launch_cache_write(step.k, step.v, step.kv_cache, step.slots)
    first = lowering.launch_paged_attention(*step.attention_inputs(), *mode)
    check_attention(step, first, *mode)
    for _ in range(20):
        again = lowering.launch_paged_attention(*step.attention_inputs(), *mode)
        assert torch.equal(first, again), f"check {case}: a second launch differs, so there is a race"


def label(shape: DecodeShape | PrefillShape) -> str:
    layer = shape.layer
    head = f"D{layer.head_dim} H{layer.heads}/{layer.kv_heads} B{layer.page_size}{' fp8' * shape.quantized}"
    if isinstance(shape, DecodeShape):
        return f"decode  {head} batch {shape.batch} context {f'{shape.shortest} to ' * shape.ragged}{shape.context}"
    extra = f" cached {shape.cached}" * bool(shape.cached) + f" window {shape.window}" * bool(shape.window)
    return f"prefill {head} {shape.rows} x {shape.new}{extra}"


def row(case: DecodeCase | PrefillCase, seconds: float, bandwidth: float, matrix_rate: float) -> dict:
    """One line of the report: time, rate and share of the measured limit."""
    shape = case.shape
    decode = isinstance(shape, DecodeShape)
    rate = (shape.kv_bytes if decode else shape.flops) / seconds
    return {
        "label": label(shape), "us": round(seconds * 1e6, 2), "rate": round(rate / 1e12, 3),
        "unit": "TB/s" if decode else "TFLOP/s", "share": round(rate / (bandwidth if decode else matrix_rate), 3),
    }  # fmt: skip
