"""Launches of the attention kernels, as the CUDA implementations of `cache_write` and `paged_attention`.

Inputs, layouts and semantics are those of `docs/architecture.md`. Both functions are safe under CUDA-graph capture:
scratch comes from `torch.empty`, nothing reads device data on the host, and launch shapes depend on tensor shapes
and on `host_meta` only.

Legend: T tokens, S rows, P pages per row, H query heads, G kv heads, R = H / G, D head dim, B page size, NS splits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of, uses_pdl, zeroed_counters
from fusecomp.lowerings.launch import launch
from fusecomp.lowerings.paged_attention import fp8, heuristics, pieces
from fusecomp.lowerings.paged_attention.cache_write import as_cached_kernel, cache_write_kernel
from fusecomp.lowerings.paged_attention.decode import decode_kernel
from fusecomp.lowerings.paged_attention.decode_apart import decode_apart_kernel
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, PrefillConfig, Target, cdiv
from fusecomp.lowerings.paged_attention.prefill import prefill_kernel
from fusecomp.ops.kv_cache import KVLayout, is_quantized
from fusecomp.ops.rope import PAIRS, Rope

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_GROUP = 64
APART_REGISTERS = 255  # of a thread: else the assembler spills to make room for more programs, of which there are few
TMA_ALIGNMENT = 16  # bytes, of a descriptor's base and strides
PACKED_FROM = 2  # times as many programs of a prefill as its tiles can be, from which they rather search for their row


def supports(
    *,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    scale: float = 1.0,
    window: int = 0,
    softcap: float = 0.0,
    quantized: bool = False,
) -> str | None:
    """Why these kernels cannot serve an attention of this shape, or None if they can."""
    if dtype not in DTYPES:
        return f"dtype {dtype} is none of fp32, fp16, bf16"
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        return f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads"
    if num_heads // num_kv_heads > MAX_GROUP:
        return f"{num_heads // num_kv_heads} query heads per kv head, more than {MAX_GROUP}"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head dim {head_dim} is not in 1..{MAX_HEAD_DIM}"
    if quantized and head_dim % 2:
        return f"an odd head dim {head_dim} over an FP8 cache, whose values are read two at a time"
    if page_size < 1:
        return f"page size {page_size} is below 1"
    if not scale > 0:
        return f"scale {scale} is not positive, and the running maximum is taken before scaling"
    if window < 0 or softcap < 0:
        return f"window {window} or softcap {softcap} is negative"
    return None


@cache
def _log_source(source: str) -> None:
    logger.info("attention launch configuration: %s", source)


@dataclass(frozen=True)
class NewTokens:
    """What precedes attention in a step: its keys and values before norm and rotation, and where they go.

    k, v [T, G, D]; cos, sin [T, columns] or None; q_norm, k_norm [D] or None; slots int64[T]. Last dims contiguous.
    """

    k: Tensor
    v: Tensor
    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    slots: Tensor
    rope: Rope

    ABSENT: ClassVar[tuple[None, ...]] = (None,) * 7

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernels' arguments."""
        return self.k, self.v, self.cos, self.sin, self.q_norm, self.k_norm, self.slots

    def strides(self) -> tuple[int, ...]:
        """Likewise: of k and v per token and head, of cos and sin per token."""
        tables = (0 if table is None else table.stride(0) for table in (self.cos, self.sin))
        return (*self.k.stride()[:2], *self.v.stride()[:2], *tables)


def rope_constants(rope: Rope) -> dict[str, Any]:
    """What the kernels are specialized on."""
    return {"ROT": rope.dims, "STYLE": rope.style, "PAIRS": rope.table == PAIRS, "NORM": rope.norm}


def arrivals(kv_cache: Tensor, count: int) -> Tensor:
    """int32 zeros, one per (row, kv head), which every decode launch leaves at zero.

    They are kept per KV tensor, because launches on one KV tensor are ordered already (each step writes it).
    """
    return zeroed_counters(kv_cache.device, count, least=4096, owner=kv_cache.data_ptr())


def codes_kind(target: Target, quantized: bool, *, native: bool = True) -> int:
    """CODES of the kernels: how codes are converted; `native` allows the GPU's own conversion."""
    if not quantized:
        return fp8.PLAIN
    return fp8.NATIVE_FP8 if native and target.has_fp8 else fp8.FP8


def codes_of(kv_cache: Tensor) -> int:
    """CODES for a cache. Triton's interpreter, which does not round as GPUs do, stands for those without fp8."""
    return codes_kind(target_of(kv_cache), is_quantized(kv_cache), native=kv_cache.is_cuda)


def cache_strides(kv_cache: Tensor, head_dim: int) -> tuple[int, int, int, int]:
    """Elements (bytes, of codes) between pages, from K to V of one page, between kv heads, and between slots."""
    if not is_quantized(kv_cache):
        return kv_cache.stride()[:4]  # type: ignore[return-value]
    layout = KVLayout.of(kv_cache, head_dim)
    return kv_cache.stride(0), layout.page_size * head_dim, kv_cache.stride(1), head_dim


def has_words(kv_cache: Tensor) -> bool:
    """Whether each page, head and slot begins where a word of 32 bits may: `decode_apart_kernel` reads such words."""
    size = kv_cache.element_size()
    return all(n * size % 4 == 0 for n in kv_cache.stride()[:-1]) and kv_cache.data_ptr() % 4 == 0


def launch_options(use_pdl: bool) -> dict:
    """Options of a launch that may start before the kernel before it has ended."""
    return {"launch_pdl": True} if use_pdl else {}


def launch_cache_write(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write k, v [T, G, D] into the cache at slots int64[T]; slot -1 writes nothing."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    require_unit_stride(k=k, v=v, kv_cache=kv_cache)
    block_t = heuristics.cache_write_block(num_tokens)
    pdl = uses_pdl(k)
    launch(
        cache_write_kernel, (cdiv(num_tokens, block_t), num_kv_heads),
        k, v, kv_cache, slots, num_tokens,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), *cache_strides(kv_cache, head_dim),
        D=head_dim, DP=heuristics.padded_dim(head_dim), PAGE=KVLayout.of(kv_cache, head_dim).page_size,
        BLOCK_T=block_t, USE_PDL=pdl, CODES=codes_of(kv_cache), num_warps=4, **launch_options(pdl),
    )  # fmt: skip


def launch_as_cached(k: Tensor, v: Tensor, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [T, G, D] as the cache returns them, contiguous; a plain cache returns them as they are."""
    if not is_quantized(kv_cache):
        return k, v
    num_tokens, num_kv_heads, head_dim = k.shape
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    block_t = heuristics.cache_write_block(num_tokens)
    launch(
        as_cached_kernel, (cdiv(num_tokens, block_t), num_kv_heads),
        k, v, k_out, v_out, num_tokens, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        G=num_kv_heads, D=head_dim, DP=heuristics.padded_dim(head_dim), BLOCK_T=block_t, CODES=codes_of(kv_cache),
        num_warps=4,
    )  # fmt: skip
    return k_out, v_out


def launch_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    *,
    as_cached: bool = False,
) -> Tensor:
    """Attention [T, H, D] of a packed step: decode rows from pages, prefill rows from pages and k, v.

    Args:
        as_cached: k and v are already what the cache returns.

    Raises:
        ValueError: for a shape, dtype or stride that `supports` or the contract excludes.
    """
    require_support(q, kv_cache, scale, window, softcap)
    if q.stride(-1) != 1:
        q = q.contiguous()
    require_unit_stride(k=k, v=v, kv_cache=kv_cache)
    num_decodes, max_q_len, max_seq_len, num_rows = host_meta.tolist()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_decodes > 0:
        decode = decode_config(q, kv_cache, block_tables, num_decodes)
        run_decode(decode, q, kv_cache, out, seq_lens, block_tables, num_decodes, scale, window, softcap, sinks)
    if num_rows > num_decodes:
        max_keys = min(window, max_seq_len) if window > 0 else max_seq_len
        prefill = heuristics.prefill_config(
            target_of(q), head_dim=q.shape[2], itemsize=q.element_size(), max_keys=max_keys
        )
        if not as_cached:
            k, v = launch_as_cached(k, v, kv_cache)
        run_prefill(
            prefill, q, k, v, kv_cache, out, cu_q_lens, seq_lens, block_tables,
            num_decodes, num_rows, max_q_len, scale, window, softcap, sinks,
        )  # fmt: skip
    return out


def require_support(q: Tensor, kv_cache: Tensor, scale: float, window: int, softcap: float) -> None:
    """ValueError where `supports` refuses q [T, H, D] over this cache."""
    layout = KVLayout.of(kv_cache, q.shape[2])
    reason = supports(
        dtype=q.dtype, num_heads=q.shape[1], num_kv_heads=layout.heads, head_dim=q.shape[2],
        page_size=layout.page_size, scale=scale, window=window, softcap=softcap, quantized=layout.quantized,
    )  # fmt: skip
    if reason:
        raise ValueError(f"paged_attention: {reason}")


def decode_config(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, num_decodes: int, *, new_key: bool = False
) -> DecodeConfig:
    """The heuristics' choice for the decodes of a step with queries q [T, H, D]; `new_key` as theirs."""
    layout = KVLayout.of(kv_cache, q.shape[2])
    return heuristics.decode_config(
        target_of(q), head_dim=layout.head_dim, itemsize=q.element_size(), num_kv_heads=layout.heads,
        page_size=layout.page_size, num_rows=num_decodes, capacity=block_tables.shape[1] * layout.page_size,
        group=q.shape[1] // layout.heads, quantized=layout.quantized, new_key=new_key,
    )  # fmt: skip


def run_decode(
    config: DecodeConfig,
    q: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    num_decodes: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    new: NewTokens | None = None,
    use_pdl: bool | None = None,
) -> None:
    """Decode rows 0 .. num_decodes of the step into out[0 .. num_decodes].

    With `new`, q is not rotated yet and the cache lacks the rows' last keys: the kernel does both.

    Raises:
        ValueError: a configuration whose warps are apart, without `new` or for what `apart_refusal` excludes.
    """
    _log_source(config.source)
    if use_pdl is None:
        use_pdl = uses_pdl(q)
    layout = KVLayout.of(kv_cache, q.shape[2])
    num_kv_heads, page_size, head_dim = layout.heads, layout.page_size, layout.head_dim
    num_heads = q.shape[1]
    group = num_heads // num_kv_heads
    kernel: Any = decode_kernel
    own: dict[str, Any] = {
        "DP": heuristics.padded_dim(head_dim), "BLOCK_R": heuristics.query_block(group), "BLOCK_N": config.block_n,
        "NEW_KEY": new is not None, "READ_AHEAD": config.read_ahead and new is not None, "CODES": codes_of(kv_cache),
    }  # fmt: skip
    if config.apart:
        reason = heuristics.apart_refusal(
            target_of(q), head_dim=head_dim, itemsize=q.element_size(), group=group, quantized=layout.quantized
        )
        if reason or new is None:
            raise ValueError(f"paged_attention: warps cannot be apart: {reason or 'the keys are all in the cache'}")
        if not has_words(kv_cache):
            raise ValueError(
                f"paged_attention: warps cannot be apart: strides {kv_cache.stride()} are no words of 32 bits"
            )
        kernel, own = decode_apart_kernel, {"KEYS": config.apart, "PARTS": config.num_warps, "AHEAD": config.ahead}
        own["num_pages"] = block_tables.shape[1]
        own["maxnreg"] = APART_REGISTERS
    pre, post = pieces.score_factors(scale, softcap)
    splits = config.num_splits
    partials = num_decodes * num_heads * splits if splits > 1 else 0
    part_acc = torch.empty(partials * head_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(partials, dtype=torch.float32, device=q.device)
    launch(
        kernel, (num_decodes * num_kv_heads, splits),
        q, kv_cache, out, part_acc, part_lse, arrivals(kv_cache, num_decodes * num_kv_heads), seq_lens, block_tables,
        sinks, *(new.tensors() if new else NewTokens.ABSENT), pre, post, new.rope.eps if new else 0.0, window,
        config.min_tiles(), q.stride(0), q.stride(1), *(new.strides() if new else (0,) * 6),
        *cache_strides(kv_cache, head_dim), block_tables.stride(0),
        H=num_heads, G=num_kv_heads, D=head_dim, PAGE=page_size, MAX_SPLITS=heuristics.next_power_of_2(splits),
        num_warps=config.num_warps, num_stages=1 if config.apart else config.num_stages,
        **rope_constants(new.rope if new else Rope()), **own, **hooks(q.dtype, window, softcap, sinks),
        USE_PDL=use_pdl, LAUNCH_EARLY=heuristics.launches_early(num_decodes, num_kv_heads),
        **launch_options(use_pdl),
    )  # fmt: skip


def run_prefill(
    config: PrefillConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    first_row: int,
    num_rows: int,
    max_q_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """Prefill rows first_row .. num_rows of the step into their tokens of out; k and v are what the cache returns."""
    _log_source(config.source)
    layout = KVLayout.of(kv_cache, q.shape[2])
    num_kv_heads, page_size, head_dim = layout.heads, layout.page_size, layout.head_dim
    num_heads = q.shape[1]
    dp = heuristics.padded_dim(head_dim)
    pre, post = pieces.score_factors(scale, softcap)
    use_tma = config.use_tma and _tma_can_read(k) and _tma_can_read(v)
    block = [config.block_n, 1, dp]
    k_tiles, v_tiles = (TensorDescriptor(x, x.shape, x.stride(), block) if use_tma else None for x in (k, v))
    rows = num_rows - first_row
    # No more tiles than so many whole ones of all tokens, and one for the end of each row.
    longest, most = cdiv(max_q_len, config.block_m), q.shape[0] // config.block_m + rows
    packed = rows * longest > PACKED_FROM * most
    launch(
        prefill_kernel, (most * num_heads,) if packed else (rows * num_heads, longest),
        q, k, v, k_tiles, v_tiles, kv_cache, out, cu_q_lens, seq_lens, block_tables, sinks, first_row, num_rows,
        pre, post, window,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *cache_strides(kv_cache, head_dim), block_tables.stride(0),
        H=num_heads, G=num_kv_heads, D=head_dim, DP=dp, PAGE=page_size,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, USE_TMA=use_tma, CODES=codes_of(kv_cache),
        PACKED=packed, num_warps=config.num_warps, num_stages=config.num_stages,
        **hooks(q.dtype, window, softcap, sinks),
    )  # fmt: skip


def hooks(dtype: torch.dtype, window: int, softcap: float, sinks: Tensor | None) -> dict:
    score = pieces.plain_score
    if softcap > 0:
        score = pieces.softcap_score_fp32 if dtype == torch.float32 else pieces.softcap_score
    sink = pieces.no_sink if sinks is None else pieces.with_sink
    return {"WINDOWED": window > 0, "SCORE": score, "SINK": sink}


def _tma_can_read(tensor: Tensor) -> bool:
    size = tensor.element_size()
    steps = tensor.stride()[:-1]
    return tensor.data_ptr() % TMA_ALIGNMENT == 0 and all(s > 0 and s * size % TMA_ALIGNMENT == 0 for s in steps)


def require_unit_stride(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last dimension has stride {tensor.stride(-1)}, the kernels read it as 1")
