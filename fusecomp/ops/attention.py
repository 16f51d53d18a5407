"""Canonical attention ops and their eager references.

Legend: B batch, T tokens of the step, H query heads, G kv heads, D head dim, S rows (sequences),
P pages per row, b page size, L length of a row. Layouts are specified in docs/architecture.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.ops.kv_cache import KVLayout, dequantize_heads, is_quantized, quantize_heads
from fusecomp.ops.library import define

# Queries of one row are scored in chunks, so that a long prompt needs [H, CHUNK, L] scores and not [H, L, L].
QUERY_CHUNK = 512

UNRESOLVED, CAUSAL, BIDIRECTIONAL = "unresolved", "causal", "bidirectional"
UNNUMBERED = -1  # the layer of a call that came through HF's interface, until `number_calls`


def _masked_softmax_av(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Softmax attention in fp32. q [..., G, M, D], k, v [..., G, L, D], allowed broadcastable to [..., G, M, L].

    `sinks` [..., G, M] are extra logits in the denominator. A query that may see nothing gives zeros.
    """
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.float()[..., None])
    top = top.clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    denominator = weights.sum(-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + torch.exp(sinks.float()[..., None] - top)
    # A row that sees nothing has an all-zero numerator: dividing by 1 keeps it at zero.
    denominator = torch.where(denominator > 0, denominator, torch.ones_like(denominator))
    # 0 * NaN is NaN: values outside the mask (unused page slots) must not reach the product.
    seen = allowed.any(-2, keepdim=True).transpose(-1, -2)
    v = torch.where(seen, v.float(), torch.zeros((), device=v.device))
    return torch.matmul(weights, v) / denominator


def _allowed(q_pos: Tensor, k_pos: Tensor, window: int) -> Tensor:
    """Query p sees key j when j <= p and, for window > 0, j > p - window."""
    allowed = k_pos <= q_pos
    return allowed & (k_pos > q_pos - window) if window > 0 else allowed


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: str,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    """Stateless attention of q [B, H, T, D] over k [B, G, T, D], v [B, G, T, Dv]; returns [B, H, T, Dv] in q's dtype.

    `mask` is "causal" (with `window`) or "bidirectional"; `layer` only identifies the call site.
    """
    if mask == UNRESOLVED:
        raise RuntimeError(f"attention of layer {layer} ran before its mask was classified")
    B, H, T, D = q.shape
    G = k.shape[1]
    positions = torch.arange(T, device=q.device)
    grouped = q.reshape(B, G, H // G * T, D)
    if mask == CAUSAL:
        allowed = _allowed(positions[:, None], positions[None, :], window).repeat(H // G, 1)
    else:
        allowed = torch.ones(H // G * T, T, dtype=torch.bool, device=q.device)
    row_sinks = None if sinks is None else sinks.view(1, G, H // G, 1).expand(B, G, H // G, T).reshape(B, G, -1)
    out = _masked_softmax_av(grouped, k, v, allowed, scale, softcap, row_sinks)
    return out.reshape(B, H, T, v.shape[3]).to(q.dtype)


def cache_write_reference(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write k, v [T, G, D] into kv_cache (see `ops/kv_cache.py`) at `slots` [T]; slot -1 is skipped."""
    if is_quantized(kv_cache):
        _write_codes(k, v, kv_cache, slots)
        return
    b = kv_cache.shape[3]
    if len(slots) == 1:  # the step of a single sequence: views cost a fraction of indexing
        slot = int(slots[0])
        if slot >= 0:
            kv_cache[slot // b, 0, :, slot % b] = k[0]
            kv_cache[slot // b, 1, :, slot % b] = v[0]
        return
    keep = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[keep] // b, slots[keep] % b
    kv_cache[block, 0, :, offset] = k[keep]
    kv_cache[block, 1, :, offset] = v[keep]


def _write_codes(k: Tensor, v: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    layout = KVLayout.of(kv_cache, k.shape[2])
    codes, scales = layout.codes(kv_cache), layout.scales(kv_cache)
    keep = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[keep] // layout.page_size, slots[keep] % layout.page_size
    for part, heads in enumerate((k, v)):
        own_codes, own_scales = quantize_heads(heads[keep])
        codes[:, :, part][block, :, offset] = own_codes
        scales[..., part][block, :, offset] = own_scales.to(torch.bfloat16)


def paged_attention_reference(
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
) -> Tensor:
    """Attention of the step's queries over their rows' pages: decodes in one batch, prefill rows one by one."""
    num_decodes = int(host_meta[0])
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if num_decodes:
        out[:num_decodes] = _decode_rows(
            q[:num_decodes], kv_cache, seq_lens[:num_decodes], block_tables[:num_decodes], scale, window, softcap, sinks
        )
    starts, lengths = cu_q_lens.tolist(), seq_lens.tolist()
    for row in range(num_decodes, len(lengths)):
        begin, end = starts[row], starts[row + 1]
        if end > begin:
            out[begin:end] = _prefill_row(
                q[begin:end], kv_cache, lengths[row], block_tables[row], scale, window, softcap, sinks
            )
    return out


def _pages(kv_cache: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Gather pages: table [..., P] -> K, V [..., G, P*b, D], contiguous, each page head copied once; fp32 of codes."""
    if is_quantized(kv_cache):
        layout = KVLayout.of(kv_cache, head_dim)
        pages = kv_cache.index_select(0, table.reshape(-1).long())
        values = dequantize_heads(layout.codes(pages), layout.scales(pages).movedim(-1, 2))  # [N, G, 2, b, D]
        values = values.view(*table.shape, *values.shape[1:]).movedim(-3, 0).transpose(-4, -3)
        k, v = values.reshape(2, *table.shape[:-1], layout.heads, -1, head_dim).contiguous()
        return k, v
    G, b, D = kv_cache.shape[2:]
    part = torch.arange(2 * G, device=table.device).view(2, *[1] * (table.dim() - 1), G, 1)
    rows = table.long().unsqueeze(-2) * (2 * G) + part
    gathered = kv_cache.reshape(-1, b * D).index_select(0, rows.view(-1))
    k, v = gathered.view(2, *table.shape[:-1], G, table.shape[-1] * b, D)
    return k, v


def _decode_rows(
    q: Tensor,
    kv_cache: Tensor,
    seq_lens: Tensor,
    tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    n, H, D = q.shape
    layout = KVLayout.of(kv_cache, D)
    G, b = layout.heads, layout.page_size
    longest = int(seq_lens.max())
    pages = (longest + b - 1) // b
    if pages == 0:
        return torch.zeros_like(q)
    if n == 1 and softcap == 0 and sinks is None:  # every key that is read is seen: no mask
        k, v = _pages(kv_cache, tables[0, :pages], D)
        seen = slice(max(0, longest - window) if window > 0 else 0, longest)
        scores = torch.bmm(q[0].float().reshape(G, H // G, D), k[:, seen].float().transpose(1, 2))
        weights = torch.softmax(scores.mul_(scale), -1)
        return torch.bmm(weights, v[:, seen].float()).view(1, H, D).to(q.dtype)
    k_pos = torch.arange(pages * b, device=q.device)
    live = k_pos < seq_lens[:, None]
    k, v = _pages(kv_cache, tables[:, :pages].masked_fill(~live[:, ::b], 0), D)
    # 0 * NaN is NaN: slots that hold nothing must not reach a product.
    k, v = (x.masked_fill_(~live[:, None, :, None], 0.0).float().view(n * G, pages * b, D) for x in (k, v))
    grouped = q.float().reshape(n * G, H // G, D)
    scores = torch.bmm(grouped, k.transpose(1, 2)).view(n, H, -1).mul_(scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = live & (k_pos >= (seq_lens - window)[:, None]) if window > 0 else live
    scores.masked_fill_(~allowed[:, None], float("-inf"))
    if sinks is None:
        weights = torch.softmax(scores, -1)
    else:
        extra = sinks.float()[None, :, None].expand(n, H, 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1].contiguous()
    out = torch.bmm(weights.view(n * G, H // G, -1), v).view(n, H, D)
    return out.masked_fill_((seq_lens == 0)[:, None, None], 0.0).to(q.dtype)


def _prefill_row(
    q: Tensor,
    kv_cache: Tensor,
    length: int,
    table: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    T, H, D = q.shape
    layout = KVLayout.of(kv_cache, D)
    G, b = layout.heads, layout.page_size
    k, v = _pages(kv_cache, table[: (length + b - 1) // b], D)
    k, v = k[:, :length], v[:, :length]
    positions = torch.arange(length, device=q.device)
    out = torch.empty(T, H, D, dtype=q.dtype, device=q.device)
    for begin in range(0, T, QUERY_CHUNK):
        chunk = q[begin : begin + QUERY_CHUNK]
        M = chunk.shape[0]
        q_pos = positions[length - T + begin :][:M]
        grouped = chunk.view(M, G, H // G, D).permute(1, 2, 0, 3).reshape(G, H // G * M, D)
        allowed = _allowed(q_pos[:, None], positions[None, :], window).repeat(H // G, 1)
        row_sinks = None if sinks is None else sinks.view(G, H // G, 1).expand(G, H // G, M).reshape(G, -1)
        scored = _masked_softmax_av(grouped, k, v, allowed, scale, softcap, row_sinks)
        out[begin : begin + M] = scored.view(G, H // G, M, D).permute(2, 0, 1, 3).reshape(M, H, D).to(q.dtype)
    return out


def _step_inputs_reference(tokens: Tensor, *_: object) -> Tensor:
    raise RuntimeError("the step_inputs marker must be removed by the paging pass before the graph runs")


define(
    "attention(Tensor q, Tensor k, Tensor v, float scale, str mask, int window, float softcap, Tensor? sinks, "
    "int layer) -> Tensor",
    attention_reference,
    lambda q, k, v, *_: q.new_empty(*q.shape[:3], v.shape[3]),
)
define(
    "cache_write(Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor slots) -> ()",
    cache_write_reference,
    lambda k, v, kv_cache, slots: None,
)
define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor kv_cache, Tensor cu_q_lens, Tensor seq_lens, "
    "Tensor block_tables, Tensor host_meta, float scale, int window, float softcap, Tensor? sinks) -> Tensor",
    paged_attention_reference,
    lambda q, *_: q.new_empty(q.shape),
)
# Marks where a step's paged inputs enter the graph. The paging pass reads its arguments and removes it.
define(
    "step_inputs(Tensor tokens, Tensor cu_q_lens, Tensor seq_lens, Tensor block_tables, Tensor host_meta, "
    "Tensor[] kv_caches) -> Tensor",
    _step_inputs_reference,
    lambda tokens, *_: torch.empty_like(tokens),
)
