"""The canonical op of one attention layer from its projections on: qk-norm, rotation, cache write, paged attention.

Legend: T tokens of the step, H query heads, G kv heads, N either of them, D head dim, R rotated dims.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusecomp.ops.attention import cache_write_reference, paged_attention_reference
from fusecomp.ops.library import define

HALF, INTERLEAVED, UNROTATED = "half", "interleaved", "none"
FULL, PAIRS = "full", "pairs"
RMS, RMS_PLUS_ONE, NO_NORM = "rms", "rms+1", "none"


@dataclass(frozen=True)
class Rope:
    """What happens to each query and key head before attention, with a short canonical string for op schemas.

    Attributes:
        style: "half" pairs dim j with j + R / 2, "interleaved" pairs 2 i with 2 i + 1; "none" rotates nothing.
        dims: R, even; the dims 0 .. R of a head are rotated, the rest passes through.
        table: "full" tables have a column per rotated dim; "pairs" tables have one per pair, in their first R / 2.
        norm: "rms" (times the weight) or "rms+1" (times 1 + weight) over all of D, before the rotation; or "none".
        eps: of the norm.

    `str(rope)` is "half:128:full", "none", "half:64:pairs rms:1e-06"; `Rope.parse` inverts it.

    Raises:
        ValueError: for a combination that means nothing.
    """

    style: str = UNROTATED
    dims: int = 0
    table: str = FULL
    norm: str = NO_NORM
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.style not in (HALF, INTERLEAVED, UNROTATED) or self.table not in (FULL, PAIRS):
            raise ValueError(f"rope: style {self.style!r} or table {self.table!r} is unknown")
        if self.norm not in (RMS, RMS_PLUS_ONE, NO_NORM):
            raise ValueError(f"rope: norm {self.norm!r} is unknown")
        if self.dims % 2 or (self.dims > 0) != (self.style != UNROTATED):
            raise ValueError(f"rope: {self.dims} rotated dims do not suit style {self.style!r}")

    def __str__(self) -> str:
        text = self.style if self.style == UNROTATED else f"{self.style}:{self.dims}:{self.table}"
        return text if self.norm == NO_NORM else f"{text} {self.norm}:{self.eps!r}"

    @classmethod
    def parse(cls, text: str) -> Rope:
        """The `Rope` that `text` stands for; ValueError if it is none."""
        rotation, _, norm = text.partition(" ")
        style, *rest = rotation.split(":")
        kind, _, eps = norm.partition(":")
        try:
            dims, table = (int(rest[0]), rest[1]) if rest else (0, FULL)
            rope = cls(style, dims, table, kind or NO_NORM, float(eps) if eps else 0.0)
        except (IndexError, ValueError) as error:
            raise ValueError(f"rope: cannot read {text!r}: {error}") from error
        if str(rope) != text:
            raise ValueError(f"rope: {text!r} is not canonical, {str(rope)!r} is")
        return rope

    def columns(self) -> int:
        """Columns of cos and sin that are read."""
        return self.dims // 2 if self.table == PAIRS else self.dims


def rotate_reference(x: Tensor, cos: Tensor | None, sin: Tensor | None, weight: Tensor | None, rope: Rope) -> Tensor:
    """Norm and rotation of x [T, N, D], computed in fp32 (fp64 stays) and rounded once to x's dtype.

    out_j = x_j cos_j + sign_j x_partner(j) sin_j, with sign -1 for the first of a pair
    (Su et al. 2021, arXiv 2104.09864).
    """
    y = x if x.dtype == torch.float64 else x.float()
    if rope.norm != NO_NORM:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + rope.eps)
        if weight is not None:
            y = y * (weight.to(y.dtype) + (rope.norm == RMS_PLUS_ONE))
    if rope.style == UNROTATED:
        return y.to(x.dtype)
    assert cos is not None and sin is not None
    turned, rest = y[..., : rope.dims], y[..., rope.dims :]
    cos, sin = (table[:, : rope.columns()].to(y.dtype) for table in (cos, sin))
    if rope.style == HALF:
        first, second = turned.chunk(2, -1)
        partner = torch.cat([-second, first], -1)
        widen = lambda table: torch.cat([table, table], -1)  # noqa: E731
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
        partner = torch.stack([-second, first], -1).flatten(-2)
        widen = lambda table: table.repeat_interleave(2, -1)  # noqa: E731
    if rope.table == PAIRS:
        cos, sin = widen(cos), widen(sin)
    turned = turned * cos[:, None] + partner * sin[:, None]
    return torch.cat([turned, rest], -1).to(x.dtype)


def rope_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    kv_cache: Tensor,
    slots: Tensor,
    cu_q_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    host_meta: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    rope: str,
) -> Tensor:
    """Rotate q [T, H, D] and k [T, G, D], write k and v to the cache at `slots`, attend; returns [T, H, D]."""
    parsed = Rope.parse(rope)
    q = rotate_reference(q, cos, sin, q_norm, parsed)
    k = rotate_reference(k, cos, sin, k_norm, parsed)
    cache_write_reference(k, v, kv_cache, slots)
    return paged_attention_reference(
        q, k, v, kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, scale, window, softcap, sinks
    )


# q, k, v may have any strides with a contiguous last dim: they are views of one projection's result.
define(
    "rope_attention(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? q_norm, Tensor? k_norm, "
    "Tensor(a!) kv_cache, Tensor slots, Tensor cu_q_lens, Tensor seq_lens, Tensor block_tables, Tensor host_meta, "
    "float scale, int window, float softcap, Tensor? sinks, str rope) -> Tensor",
    rope_attention_reference,
    lambda q, *_: q.new_empty(q.shape),
)
