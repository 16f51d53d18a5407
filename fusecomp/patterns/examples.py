"""Small callables on which patterns must match, and on which they must refuse. Tests and pattern authors use them.

Each callable takes q [1, H, T, D] and k, v [1, G, T, D] (or a model's inputs) and spells attention in one way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.ops.attention import UNRESOLVED
from fusecomp.patterns.base import Example

T, H, G, D = 11, 4, 2, 32


def qkv(kv_heads: int = H) -> Callable[[torch.dtype], tuple]:
    """Inputs q, k, v of random values."""

    def make(dtype: torch.dtype) -> tuple:
        generator = torch.Generator().manual_seed(0)
        shapes = ((1, H, T, D), (1, kv_heads, T, D), (1, kv_heads, T, D))
        return tuple(torch.randn(s, generator=generator).to(dtype) for s in shapes)

    return make


def causal_mask(length: int) -> Tensor:
    """Additive causal mask [1, 1, length, length] with -inf where hidden."""
    return torch.full((length, length), float("-inf")).triu(1)[None, None]


def eager(
    mask: Callable[[Tensor], Tensor], *, dropout: float = 0.0, scale: Callable[[Tensor], Tensor] | None = None
) -> Callable:
    """softmax(mask(scale(q @ k^T))) @ v."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2))
        scores = scores / math.sqrt(D) if scale is None else scale(scores)
        weights = F.softmax(mask(scores), dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, dropout, training=dropout > 0), v)

    return function


def _add(scores: Tensor) -> Tensor:
    return scores + causal_mask(scores.shape[-1]).to(scores.dtype)


def _where(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return torch.where(at[None] <= at[:, None], scores, torch.finfo(scores.dtype).min)


def _sliding(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    hidden = (at[None] > at[:, None]) | (at[None] <= at[:, None] - 3)
    return scores.masked_fill(hidden, float("-inf"))


def _chunked(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return scores.masked_fill((at[None] > at[:, None]) | (at[None] // 4 != at[:, None] // 4), float("-inf"))


def _strided(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return scores.masked_fill((at[None] > at[:, None]) | ((at[None] - at[:, None]) % 2 == 1), float("-inf"))


def _alibi(scores: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1])
    return _add(scores) - 0.1 * (at[:, None] - at[None])


def _written_in_place(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[-2:])
    mask[:, 3:] = float("-inf")
    return _add(scores) + mask.to(scores.dtype)


def _data_dependent(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores < scores.mean(), float("-inf"))


def _second_user(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = _add(torch.matmul(q, k.transpose(-1, -2)))
    return torch.matmul(scores.softmax(-1), v), scores


def _second_user_of_probabilities(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = _add(torch.matmul(q, k.transpose(-1, -2))).softmax(-1)
    return torch.matmul(weights, v), weights


def _repeat_kv(x: Tensor) -> Tensor:
    b, heads, length, dim = x.shape
    return x[:, :, None, :, :].expand(b, heads, H // heads, length, dim).reshape(b, H, length, dim)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return eager(_add)(q, _repeat_kv(k), _repeat_kv(v))


def _softcapped(scores: Tensor) -> Tensor:
    return 20 * torch.tanh(scores / math.sqrt(D) / 20)


def softmax_examples() -> list[Example]:
    """Eager attention in many spellings, and look-alikes that must stay."""
    return [
        Example("additive mask", eager(_add), qkv()),
        Example("torch.where mask", eager(_where), qkv()),
        Example("sliding window by masked_fill", eager(_sliding), qkv()),
        Example("repeated kv heads", _grouped, qkv(G)),
        Example("softcap", eager(_add, scale=_softcapped), qkv()),
        Example("no mask", eager(lambda scores: scores), qkv()),
        Example("chunked mask", eager(_chunked), qkv(), 0, "chunked"),
        Example("strided mask", eager(_strided), qkv(), 0, "neither causal nor a sliding window"),
        Example("ALiBi", eager(_alibi), qkv(), 0, "bias is added"),
        Example("mask written in place", eager(_written_in_place), qkv(), 0, "changed in place"),
        Example("mask computed from the scores", eager(_data_dependent), qkv(), 0, "unknown"),
        Example("active dropout", eager(_add, dropout=0.5), qkv(), 0, "dropout"),
        Example("second user of the scores", _second_user, qkv(), 0, "second user"),
        Example("second user of the probabilities", _second_user_of_probabilities, qkv(), 0, "second user"),
        Example("not attention", lambda q, k, v: (q * k).softmax(-1) + v, qkv(), 0),
    ]


def _sdpa(**options: object) -> Callable:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


def _sdpa_mask(make: Callable[[int], Tensor]) -> Callable:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=make(q.shape[2]).to(q.dtype))


def _prefix(length: int) -> Tensor:
    mask = causal_mask(length)
    return torch.where(torch.arange(length) < 3, torch.zeros(()), mask)


def _input_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _with_input_mask(dtype: torch.dtype) -> tuple:
    return (*qkv()(dtype), causal_mask(T).to(dtype))


def sdpa_examples() -> list[Example]:
    """SDPA calls whose mask is provable, and some whose mask is not."""
    return [
        Example("is_causal", _sdpa(is_causal=True), qkv()),
        Example("is_causal, own scale", _sdpa(is_causal=True, scale=0.3), qkv()),
        Example("causal tensor", _sdpa_mask(causal_mask), qkv()),
        Example("grouped heads", _sdpa(is_causal=True, enable_gqa=True), qkv(G)),
        Example("no mask", _sdpa(), qkv()),
        Example("prefix mask", _sdpa_mask(_prefix), qkv(), 0, "unknown"),
        Example("mask from an input", _input_mask, _with_input_mask, 0, "depends on the input"),
        Example("active dropout", _sdpa(is_causal=True, dropout_p=0.5), qkv(), 0, "dropout"),
    ]


def _dense(mask: str, window: int = 0) -> Callable:
    """The canonical op itself, run eagerly."""
    return lambda q, k, v, *_: OPS.attention(q, k, v, 0.25, mask, window, 0.0, None, 0)


def _interface(layer: int) -> Callable:
    return lambda q, k, v: OPS.attention(q, k, v, 0.25, UNRESOLVED, 0, 0.0, None, layer)


def interface_examples() -> list[Example]:
    """Layer 0 is proven causal by the test's context, layer 1 is unknown, layer 2 was never probed."""
    return [
        Example("proven layer", _interface(0), qkv(G), reference=_dense("causal")),
        Example("unknown mask", _interface(1), qkv(G), 0, "unknown"),
        Example("layer that was not probed", _interface(2), qkv(G), 0, "no attention call"),
    ]


def _canonical(mask: str, window: int = 0) -> Callable:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tokens: Tensor,
        cu: Tensor,
        lens: Tensor,
        table: Tensor,
        meta: Tensor,
        kv_cache: Tensor,
    ) -> Tensor:
        tokens = OPS.step_inputs(tokens, cu, lens, table, meta, [kv_cache])
        return OPS.attention(q, k, v, 0.25, mask, window, 0.0, None, 0) + 0 * tokens.amax()

    return function


def _step(dtype: torch.dtype) -> tuple:
    """One row of T new tokens, the KV tensor's single page NaN until written."""
    tokens = torch.stack([torch.arange(T)] * 3)
    cu, lens, table, meta = (torch.tensor(x, dtype=torch.int32) for x in ([0, T], [T], [[0]], [0, T, T, 1]))
    return (*qkv(G)(dtype), tokens, cu, lens, table, meta, torch.full((1, 2, G, 16, D), torch.nan).to(dtype))


def paged_examples() -> list[Example]:
    """Canonical attention in a packed step, and what a KV cache cannot serve."""
    return [
        Example("causal", _canonical("causal"), _step, reference=_dense("causal")),
        Example("sliding window", _canonical("causal", 5), _step, reference=_dense("causal", 5)),
        Example("bidirectional", _canonical("bidirectional"), _step, 0, "bidirectional"),
        Example(
            "no paged inputs",
            lambda q, k, v: OPS.attention(q, k, v, 0.25, "causal", 0, 0.0, None, 0),
            qkv(G),
            0,
            "no paged inputs",
        ),
    ]


def _experts(act: str, inner: int) -> Callable:
    def function(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return OPS.experts(x, index, weights, up, None, down[:, :, :inner], None, act, True, False, False)

    return function


def _experts_inputs(dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 2, generator=generator)
    shapes = ((5, 16), (4, 24, 16), (4, 16, 12))
    x, up, down = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, torch.tensor([[0, 3]] * 5), weights.to(dtype), up, down


def experts_examples() -> list[Example]:
    """Experts whose weights fit together and whose activation is known, and the contrary."""
    return [
        Example("gated silu", _experts("silu", 12), _experts_inputs),
        Example("unknown activation", _experts("mish", 12), _experts_inputs, 0, "is none of"),
        Example("shapes that do not fit", _experts("silu", 8), _experts_inputs, 0, "do not fit"),
    ]
