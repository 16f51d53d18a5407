"""Attention layers on which the rope pattern must match, in the spellings that models use, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.patterns.base import Example

T, H, G, D, PAGE = 7, 4, 2, 16, 4
EPS = 1e-6


def inputs(columns: int, *, heads: int = H, kv_heads: int = G, head_dim: int = D, tokens: int = T) -> Callable:
    """qkv [1, T, N], cos and sin [1, T, columns], two norm weights [D], an empty cache and a step of one prompt."""

    def make(dtype: torch.dtype) -> tuple:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        pages = -(-tokens // PAGE)
        angles = torch.randn(1, tokens, columns, generator=generator) * 3
        return (
            random(1, tokens, (heads + 2 * kv_heads) * head_dim),
            angles.cos().to(dtype),
            angles.sin().to(dtype),
            random(head_dim),
            random(head_dim),
            torch.zeros(pages, 2, kv_heads, PAGE, head_dim, dtype=dtype),
            torch.arange(tokens),
            torch.tensor([0, tokens], dtype=torch.int32),
            torch.tensor([tokens], dtype=torch.int32),
            torch.arange(pages, dtype=torch.int32)[None],
            torch.tensor([0, tokens, tokens, 1], dtype=torch.int32),
        )

    return make


def layer(rotate: Callable, *, heads: int = H, kv_heads: int = G, head_dim: int = D) -> Callable:
    """An attention layer; `rotate(x, cos, sin, weight)` makes queries and keys from [1, N, T, D]."""

    def function(
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        cu_q_lens: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        host_meta: Tensor,
    ) -> Tensor:
        wide, narrow = heads * head_dim, kv_heads * head_dim
        q, k, v = (x.view(1, x.shape[1], -1, head_dim).transpose(1, 2) for x in qkv.split([wide, narrow, narrow], -1))
        q, k = rotate(q, cos, sin, q_norm), rotate(k, cos, sin, k_norm)
        q, k, v = (x.select(0, 0).transpose(0, 1) for x in (q, k, v))
        OPS.cache_write.default(k, v, kv_cache, slots)
        out = OPS.paged_attention.default(
            q, k, v, kv_cache, cu_q_lens, seq_lens, block_tables, host_meta, head_dim**-0.5, 0, 0.0, None
        )
        return out.reshape(1, out.shape[0], -1)

    return function


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def llama(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def gemma_rms(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).to(x.dtype)


def partial(rotation: Callable, columns: int) -> Callable:
    """`rotation` of the first `columns` dims."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rotation(x[..., :columns], cos, sin, weight), x[..., columns:]], -1)

    return rotate


def every_two(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + every_two(x) * sin.unsqueeze(1)


def glm(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """Tables of two equal halves, of which the first is repeated pair by pair."""
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, -1).unsqueeze(1) for t in (cos, sin))
    return x * cos + every_two(x) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """gpt-oss: tables of one column a pair."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def twisted(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    """The other direction: a rotation by the negative angle is not in the vocabulary."""
    return x * cos.unsqueeze(1) - rotate_half(x) * sin.unsqueeze(1)


def scaled(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor) -> Tensor:
    return llama(x, cos, sin, weight) * 0.5


def rope_examples() -> list[Example]:
    """Rotations of every style, and near misses."""

    def match(name: str, rotate: Callable, columns: int = D, **facts: object) -> Example:
        return Example(name, layer(rotate), inputs(columns), **facts)  # type: ignore[arg-type]

    return [
        match("half", llama),
        match("half_partial", partial(llama, 6), 6),
        match("half_of_pairs", halves, D // 2),
        match("interleaved", interleaved),
        match("interleaved_partial", partial(interleaved, 8), 8),
        match("interleaved_repeated", glm),
        match("qk_norm", lambda x, c, s, w: llama(rms(x, w), c, s, w)),
        match("qk_norm_one_plus_w", lambda x, c, s, w: llama(gemma_rms(x, w), c, s, w)),
        match("norm_alone", lambda x, c, s, w: rms(x, w)),
        match("nothing", lambda x, c, s, w: x),
        Example("one_head", layer(llama, heads=1, kv_heads=1), inputs(D, heads=1, kv_heads=1)),
        Example("one_token", layer(llama), inputs(D, tokens=1)),
        match("rotation_then_norm", lambda x, c, s, w: rms(llama(x, c, s, w), w)),
        match("negative_angle", twisted, matches=0, reason="no norm and rotation in the vocabulary"),
        match("scaled", scaled, matches=0, reason="no norm and rotation in the vocabulary"),
    ]
