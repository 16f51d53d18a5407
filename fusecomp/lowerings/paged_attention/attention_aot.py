"""What attention's kernels are compiled ahead for: layers with their feature sets, and what those launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.paged_attention import heuristics, pieces
from fusecomp.lowerings.paged_attention.cache_write import as_cached_kernel, cache_write_kernel
from fusecomp.lowerings.paged_attention.decode import decode_kernel
from fusecomp.lowerings.paged_attention.decode_apart import decode_apart_kernel
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, Target
from fusecomp.lowerings.paged_attention.lowering import APART_REGISTERS, codes_kind, rope_constants
from fusecomp.lowerings.paged_attention.prefill import prefill_kernel
from fusecomp.lowerings.paged_attention.rope_cache import rope_cache_kernel
from fusecomp.ops.rope import Rope


@dataclass(frozen=True)
class Case:
    """An attention layer and its feature set, as the registry names it."""

    dtype: str = "bf16"
    head_dim: int = 128
    page_size: int = 16
    group: int = 4
    kv_heads: int = 8
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    num_rows: int = 32
    max_keys: int = 2048
    aligned: bool = True  # k and v as TMA wants them
    rope: str = ""  # of `rope_attention`; the plain ops if empty
    quantized: bool = False  # an FP8 cache
    apart: tuple[int, int, int] | None = None  # keys of a warp, warps and stages of a decode whose warps are apart

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    def __str__(self) -> str:
        marks = [f"w{self.window}"] * (self.window > 0) + ["cap"] * (self.softcap > 0) + ["sinks"] * self.sinks
        marks += ["unaligned"] * (not self.aligned)
        marks += [self.rope.replace(" ", "-")] * bool(self.rope) + ["fp8"] * self.quantized
        marks += ["apart{}x{}x{}".format(*self.apart)] if self.apart else []
        return "-".join([self.dtype, f"d{self.head_dim}", f"b{self.page_size}", f"r{self.group}", *marks])


CAPACITY = 8192
FEATURES: dict[str, tuple[Any, Any]] = {"window": (0, 4096), "softcap": (0.0, 50.0), "sinks": (False, True)}
EVERY_FEATURE: dict[str, Any] = {name: values[1] for name, values in FEATURES.items()}
QWEN3 = "half:128:full rms:1e-06"
SUBSET = (
    Case(),
    Case(head_dim=80, page_size=1, **EVERY_FEATURE),
    Case(head_dim=256),
    Case(rope=QWEN3),
    Case(rope=QWEN3, group=8, kv_heads=4, num_rows=1),
    Case(head_dim=80, page_size=1, rope="interleaved:32:pairs rms+1:1e-06", **EVERY_FEATURE),
    Case(quantized=True),
    Case(head_dim=80, page_size=1, quantized=True, **EVERY_FEATURE),
    Case(rope=QWEN3, group=8, kv_heads=4, num_rows=64, quantized=True),
    Case(rope="half:128:full", num_rows=1, apart=(32, 8, 1)),
    Case("fp16", 64, 1, 1, rope="interleaved:32:pairs rms+1:1e-06", num_rows=1, apart=(16, 4, 1), **EVERY_FEATURE),
    Case(rope=QWEN3, group=8, kv_heads=4, num_rows=1, apart=(16, 8, 1)),
    Case(rope=QWEN3, group=8, kv_heads=4, num_rows=64, apart=(16, 4, 2)),
    Case(rope="interleaved:128:pairs", group=8, num_rows=4, apart=(16, 8, 2)),
)


def _tuned_cases() -> Iterator[Case]:
    """Cases that the heuristics answer with each entry of the default table, plain and with every feature."""
    table = heuristics.load_table(heuristics.DEFAULT_TABLE)
    for entry in (*table["decode"], *table["prefill"]):
        pairs = entry.get("pairs", 256)
        case = Case(
            {2: "bf16", 4: "fp32"}[entry["itemsize"]],
            entry["head_dim"],
            entry.get("page", 16),
            kv_heads=min(pairs, Case.kv_heads),
            num_rows=pairs // min(pairs, Case.kv_heads),
            max_keys=entry.get("keys", 2048),
            quantized="kv_itemsize" in entry,
        )
        yield from (case, replace(case, **EVERY_FEATURE))
        if "pairs" in entry:
            yield replace(case, rope=f"half:{case.head_dim}:full rms:1e-06")
            yield replace(case, rope=f"interleaved:{case.head_dim}:pairs", **EVERY_FEATURE)


def _full_cases() -> Iterator[Case]:
    yield from SUBSET
    yield from _tuned_cases()
    for dtype, head_dim in itertools.product(("bf16", "fp16", "fp32"), (32, 64, 80, 96, 128, 192, 256)):
        yield Case(dtype, head_dim)
    for head_dim, *chosen in itertools.product((128, 256), *FEATURES.values()):
        features: dict[str, Any] = dict(zip(FEATURES, chosen, strict=True))
        yield Case(head_dim=head_dim, **features)
        yield Case(head_dim=head_dim, page_size=1, max_keys=16384, **features)
        yield Case(head_dim=head_dim, aligned=False, **features)
    for head_dim, page_size in itertools.product((128, 256), (1, 32, 64)):
        yield Case(head_dim=head_dim, page_size=page_size)
        yield Case("fp16", head_dim, page_size, **EVERY_FEATURE)
    for head_dim, group in itertools.product((128, 256), (1, 2, 7, 32, 64)):
        yield Case(head_dim=head_dim, group=group)
    for group in (1, 16, 32):
        yield Case(group=group, kv_heads=4, num_rows=1, rope="interleaved:128:pairs", **EVERY_FEATURE)
    yield Case("fp32", 80, 1, **EVERY_FEATURE)
    for head_dim, group in itertools.product((64, 128, 256), (32, 64)):
        yield Case("fp32", head_dim, group=group, **EVERY_FEATURE)
    yield Case("bf16", 256, page_size=1, group=64, **EVERY_FEATURE)
    for dtype, head_dim in itertools.product(("bf16", "fp16", "fp32"), (32, 64, 80, 128, 256)):
        yield Case(dtype, head_dim, quantized=True)
        yield Case(dtype, head_dim, quantized=True, rope=f"half:{head_dim // 2}:full rms:1e-06", **EVERY_FEATURE)
    for page_size, group in itertools.product((1, 32, 64), (1, 7, 32)):
        yield Case(page_size=page_size, group=group, quantized=True, **EVERY_FEATURE)
    tiles = (*itertools.product((16, 32), (4, 8), (1,)), *itertools.product((16,), (4, 8), (2,)))
    for head_dim, group, apart in itertools.product((64, 128), (1, 2, 4, 7, 8, 16), tiles):
        case = Case(head_dim=head_dim, group=group, num_rows=1, apart=apart)
        yield replace(case, rope=f"half:{head_dim}:full rms:1e-06")
        yield replace(case, dtype="fp16", page_size=1, rope="half:32:pairs", **EVERY_FEATURE)
        if (group, head_dim) != (16, 128):  # at most 16 bytes a thread are spilled there
            yield replace(case, rope=f"interleaved:{head_dim}:pairs")
    yield Case(head_dim=64, window=128, sinks=True, group=8)
    yield Case(head_dim=256, window=4096, softcap=50.0, group=2)


CASES = {False: SUBSET, True: tuple(dict.fromkeys(_full_cases()))}


def specializations(case: Case, target: Target) -> Iterator[Specialization]:
    """The kernels that a layer of this case launches on `target`."""
    dp = heuristics.padded_dim(case.head_dim)
    heads = case.kv_heads * case.group
    score = pieces.plain_score
    if case.softcap:
        score = pieces.softcap_score_fp32 if case.dtype == "fp32" else pieces.softcap_score
    hooks = {
        "WINDOWED": case.window > 0,
        "SCORE": score,
        "SINK": pieces.with_sink if case.sinks else pieces.no_sink,
    }
    shape = {"D": case.head_dim, "DP": dp, "PAGE": case.page_size}
    cache = dict.fromkeys(("stride_page", "stride_v", "stride_g", "stride_slot"), "i32")
    kv_type, codes = "u8" if case.quantized else case.dtype, {"CODES": codes_kind(target, case.quantized)}
    kv = {"k": case.dtype, "v": case.dtype, "kv_cache": kv_type}
    k_strides = dict.fromkeys(("stride_kt", "stride_kg", "stride_vt", "stride_vg"), "i32")
    pdl = {"USE_PDL": target.has_pdl}
    rope, new = Rope.parse(case.rope or "none"), {"k": None, "v": None, "slots": None}
    weights = {"cos": "bf16", "sin": "bf16"} if rope.dims else {}
    weights |= {"q_norm": case.dtype, "k_norm": case.dtype} if rope.norm != "none" else {}
    constants = {**pdl, **codes, **rope_constants(rope)}
    constants |= dict.fromkeys({"cos", "sin", "q_norm", "k_norm"} - weights.keys())
    table_strides = dict.fromkeys(("stride_cos", "stride_sin"), "i32")
    if case.rope:
        block_t, block_h = heuristics.rope_cache_block(4096, case.head_dim)
        made = dict.fromkeys(("q", "q_out", "k_out", *["v_out"] * case.quantized), case.dtype)
        yield Specialization(
            f"rope_cache-{case}",
            rope_cache_kernel,
            {**kv, **weights, **made, "slots": "i64"},
            {"num_tokens": "i32", "eps": "fp32", "stride_qt": "i32", "stride_qh": "i32"}
            | {**k_strides, **cache, **table_strides},
            {**shape, **constants, "H": heads, "G": case.kv_heads, "BLOCK_T": block_t, "BLOCK_H": block_h}
            | ({} if case.quantized else {"v_out": None}),
            num_warps=4,
            num_stages=3,
        )
        new = {}
        weights |= {"k": case.dtype, "v": case.dtype, "slots": "i64"}
    else:
        yield Specialization(
            f"cache_write-{case}",
            cache_write_kernel,
            {**kv, "slots": "i64"},
            {"num_tokens": "i32", **k_strides, **cache},
            {**shape, **pdl, **codes, "BLOCK_T": heuristics.cache_write_block(4096)},
            num_warps=4,
            num_stages=3,
        )
        if case.quantized:
            yield Specialization(
                f"as_cached-{case}",
                as_cached_kernel,
                dict.fromkeys(("k", "v", "k_out", "v_out"), case.dtype),
                {"num_tokens": "i32", **k_strides},
                {**codes, "G": case.kv_heads, "D": case.head_dim, "DP": dp}
                | {"BLOCK_T": heuristics.cache_write_block(4096)},
                num_warps=4,
                num_stages=3,
            )

    sinks = {} if case.sinks else {"sinks": None}
    inputs = {"q": case.dtype, "kv_cache": kv_type, "out": case.dtype, "seq_lens": "i32", "block_tables": "i32"}
    if case.sinks:
        inputs["sinks"] = case.dtype
    scalars = {"pre": "fp32", "post": "fp32", "window": "i32", "stride_qt": "i32", "stride_qh": "i32", **cache}
    scalars["stride_table"] = "i32"
    decode = heuristics.decode_config(
        target, head_dim=case.head_dim, itemsize=case.itemsize, num_kv_heads=case.kv_heads, page_size=case.page_size,
        num_rows=case.num_rows, capacity=CAPACITY, group=case.group, quantized=case.quantized, new_key=bool(case.rope),
    )  # fmt: skip
    decode_pointers = {**inputs, **weights, "part_acc": "fp32", "part_lse": "fp32", "arrivals": "i32"}
    decode_scalars = {**scalars, **k_strides, **table_strides, "min_tiles": "i32", "eps": "fp32"}
    if case.apart:
        each, warps, stages = case.apart
        decode = DecodeConfig(each * warps, warps, stages, 32, each * warps, apart=each)
    if decode.apart:
        refusal = heuristics.apart_refusal(
            target, head_dim=case.head_dim, itemsize=case.itemsize, group=case.group, quantized=case.quantized
        )
        if not refusal:
            own = {key: value for key, value in constants.items() if key != "CODES"}
            yield Specialization(
                f"decode-{case}-s{case.num_rows}",
                decode_apart_kernel,
                decode_pointers,
                decode_scalars | {"num_pages": "i32"},
                {
                    **hooks, **sinks, **own, "LAUNCH_EARLY": True, "H": heads, "G": case.kv_heads, "D": case.head_dim,
                    "PAGE": case.page_size, "KEYS": decode.apart, "PARTS": decode.num_warps,
                    "AHEAD": decode.ahead,
                    "MAX_SPLITS": heuristics.next_power_of_2(decode.num_splits),
                },
                decode.num_warps,
                num_stages=1,
                max_registers=APART_REGISTERS,
            )  # fmt: skip
        return
    yield Specialization(
        f"decode-{case}-s{case.num_rows}",
        decode_kernel,
        decode_pointers,
        decode_scalars,
        {
            **shape, **hooks, **sinks, **new, **constants, "NEW_KEY": bool(case.rope), "LAUNCH_EARLY": True,
            "H": heads, "G": case.kv_heads,
            "BLOCK_N": decode.block_n, "BLOCK_R": heuristics.query_block(case.group),
            "MAX_SPLITS": heuristics.next_power_of_2(decode.num_splits),
            "READ_AHEAD": decode.read_ahead and bool(case.rope),
        },
        decode.num_warps,
        decode.num_stages,
    )  # fmt: skip

    if case.rope:  # the prefill kernel is that of the plain case
        return
    prefill = heuristics.prefill_config(target, head_dim=case.head_dim, itemsize=case.itemsize, max_keys=case.max_keys)
    prefill = replace(prefill, use_tma=prefill.use_tma and case.aligned)
    inputs = {**inputs, **kv, "cu_q_lens": "i32"}
    no_tiles = {} if prefill.use_tma else {"k_tiles": None, "v_tiles": None}
    if prefill.use_tma:
        inputs["k_tiles"] = inputs["v_tiles"] = f"tensordesc<{case.dtype}[{prefill.block_n}, 1, {dp}]>"
    for packed in (False, True):
        yield Specialization(
            f"prefill-{case}-k{case.max_keys}" + "-packed" * packed,
            prefill_kernel,
            inputs,
            {**scalars, **k_strides, "first_row": "i32", "num_rows": "i32"},
            {
                **shape, **hooks, **sinks, **no_tiles, **codes, "H": heads, "G": case.kv_heads, "PACKED": packed,
                "BLOCK_M": prefill.block_m, "BLOCK_N": prefill.block_n, "USE_TMA": prefill.use_tma,
            },
            prefill.num_warps,
            prefill.num_stages,
        )  # fmt: skip
