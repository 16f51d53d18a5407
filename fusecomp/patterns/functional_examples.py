"""Small callables on which the fuse-stage patterns must match, and on which they must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.patterns.base import Example

T, K, N = 7, 48, 32


def values(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], tuple]:
    """Inputs of random values, matrices scaled so that products stay near 1."""

    def make(dtype: torch.dtype) -> tuple:
        generator = torch.Generator().manual_seed(0)
        return tuple(
            (torch.randn(s, generator=generator) / (s[-1] ** 0.5 if len(s) == 2 else 1)).to(dtype) for s in shapes
        )

    return make


X, W, W2, WIDE = (1, T, K), (N, K), (2 * N, K), (1, T, N)


def epilogue(name: str, function: Callable, *more: tuple[int, ...], weight: tuple = W, **facts: object) -> Example:
    return Example(name, function, values(X, weight, *more), **facts)  # type: ignore[arg-type]


def rms(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def gemma_rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (h * (1.0 + w.float())).to(x.dtype)


def halves(y: Tensor) -> tuple[Tensor, Tensor]:
    return y[..., :N], y[..., N:]


def swiglu(x: Tensor, w: Tensor) -> Tensor:
    gate, up = halves(F.linear(x, w))
    return F.silu(gate) * up


def geglu(approximate: str) -> Callable:
    def function(x: Tensor, w: Tensor) -> Tensor:
        gate, up = halves(F.linear(x, w))
        return F.gelu(gate, approximate=approximate) * up

    return function


def two_exits(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    return torch.cat([y, torch.relu(y)])


def self_residual(x: Tensor, w: Tensor, w2: Tensor) -> Tensor:
    """The second addend depends on the matmul: it can be no operand of it."""
    y = F.linear(x, w)
    return y + F.linear(torch.relu(y), w2)


def epilogue_examples() -> list[Example]:
    """Chains of every kind that models use, and what must be left alone."""
    return [
        epilogue("plain", F.linear),
        epilogue("bias", F.linear, (N,)),
        epilogue("silu", lambda x, w: F.silu(F.linear(x, w))),
        epilogue("gelu_erf", lambda x, w: F.gelu(F.linear(x, w))),
        epilogue("gelu_tanh_bias", lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), (N,)),
        epilogue("relu_squared", lambda x, w: torch.relu(F.linear(x, w)).square()),
        epilogue("residual", lambda x, w, r: r + F.linear(x, w), WIDE),
        epilogue("scaled_residual", lambda x, w, r: r + 0.22 * F.linear(x, w), WIDE),
        epilogue("softcap", lambda x, w: torch.tanh(F.linear(x, w) / 30.0) * 30.0),
        epilogue("clamp", lambda x, w: F.linear(x, w).clamp(-0.5, 0.5)),
        epilogue("cast", lambda x, w: F.linear(x, w).float().mul(2.0).to(x.dtype)),
        epilogue("row_scale", lambda x, w, s: F.linear(x, w) * s, (N,)),
        epilogue("token_scale", lambda x, w, s: F.linear(x, w) * torch.sigmoid(s), (1, T, 1)),
        epilogue("swiglu", swiglu, weight=W2),
        epilogue("geglu_erf", geglu("none"), weight=W2),
        epilogue("geglu_tanh", geglu("tanh"), weight=W2),
        epilogue("halves_apart", lambda x, w: halves(F.linear(x, w)), weight=W2),
        epilogue("two_exits", two_exits),
        epilogue("self_residual", self_residual, (N, N), matches=2),
        epilogue("chosen", lambda x, w, r: torch.where(F.linear(x, w) > r, F.linear(x, w), r), WIDE, matches=2),
        epilogue("counted", lambda x, w: (F.linear(x, w) > 0).float() * 0.5),
        epilogue("square", lambda x, w: x @ w.permute(0, 1), weight=(K, K), matches=0, reason="transpose of a weight"),
        epilogue("untransposed", lambda x, w: x @ w, weight=(K, N), matches=0, reason="transpose of a weight"),
        epilogue("activations", lambda x, w: x @ torch.sin(w).T, matches=0, reason="transpose of a weight"),
    ]


def rotary_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face writes it, the batch dimension apart."""
    angles = (frequencies[:, None] @ positions[None, :]).transpose(0, 1)
    both = torch.cat((angles, angles), dim=-1)
    return both.cos() * 0.5, both.sin() * 0.5


def outer_examples() -> list[Example]:
    """Products with one term to a sum, and what must be left alone."""
    column, row = (T, 1), (1, K)

    def outer(name: str, function: Callable, *shapes: tuple[int, ...], **facts: object) -> Example:
        return Example(name, function, values(*shapes), **facts)  # type: ignore[arg-type]

    return [
        outer("mm", lambda a, b: a @ b, column, row),
        outer("mm_transposed", lambda a, b: (b.T @ a.T).T, column, row),
        outer("rotary_table", rotary_table, (K,), (T,)),
        outer("two_terms", lambda a, b: a @ b, (T, 2), (2, K), matches=0),
        outer("addmm", torch.addmm, (T, K), column, row, matches=0, reason="adds to the product"),
        outer("baddbmm", torch.baddbmm, (2, T, K), (2, T, 1), (2, 1, K), matches=0, reason="adds to the product"),
        outer("double", lambda a, b: a.double() @ b.double(), column, row, matches=0, reason="float64"),
    ]


def selected_rows_examples() -> list[Example]:
    """Rows that are chosen from a norm's result on the way to a linear."""
    indices = (0, 5, 5, 2, 6)  # in no order, one of them twice

    def rows(name: str, function: Callable, *, index: object = indices, weight: tuple = W, **facts: object) -> Example:
        def inputs(dtype: torch.dtype) -> tuple:
            return (*values(X, X, (K,), weight)(dtype), torch.tensor(index))

        return Example(name, function, inputs, **facts)  # type: ignore[arg-type]

    def both_outputs(x: Tensor, r: Tensor, g: Tensor, w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        h = x + r
        return h, F.linear(rms(h, g)[:, i], w)

    def normed_too(x: Tensor, r: Tensor, g: Tensor, w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = rms(x, g)
        return F.linear(y[:, i], w), y * r

    def two_choices(x: Tensor, r: Tensor, g: Tensor, w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = rms(x, g)
        return F.linear(y[:, i], w), F.linear(y[:, :3], w)

    def two_linears(x: Tensor, r: Tensor, g: Tensor, w: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = rms(x, g)[:, i]
        return F.linear(y, w), F.linear(y, w * 1.0)

    def no_norm(x: Tensor, r: Tensor, g: Tensor, w: Tensor, i: Tensor) -> Tensor:
        return F.linear((g * x / (x.abs().mean(-1, keepdim=True) + 1e-6))[:, i], w)

    return [
        rows("index", lambda x, r, g, w, i: F.linear(rms(x, g)[:, i], w)),
        rows("index_2d", lambda x, r, g, w, i: F.linear(rms(x[0], g)[i], w)),
        rows("negative_index", lambda x, r, g, w, i: F.linear(rms(x, g)[:, i], w), index=(-1, 3)),
        rows("index_select", lambda x, r, g, w, i: F.linear(rms(x, g).index_select(1, i), w)),
        rows("last_row", lambda x, r, g, w, i: F.linear(rms(x, g)[:, -1:], w)),
        rows("slice", lambda x, r, g, w, i: F.linear(F.layer_norm(x, (K,), g)[:, 1:6], w)),
        rows("residual_and_both_outputs", both_outputs),
        rows("two_linears", two_linears),
        rows("normed_rows_read_elsewhere", normed_too, matches=0, reason="also read by mul"),
        rows("two_choices", two_choices, matches=0, reason="also read by"),
        rows("no_norm", no_norm, matches=0, reason="no norm in the vocabulary"),
        rows("features", lambda x, r, g, w, i: F.linear(rms(x[0], g)[:, :N], w), weight=(N, N), matches=0,
             reason="whole rows"),
        rows("two_dimensional_index", lambda x, r, g, w, i: F.linear(rms(x, g)[:, i[None]], w), matches=0,
             reason="no list of row numbers"),
    ]  # fmt: skip


def norm_examples() -> list[Example]:
    """Norms as models spell them, each read by a linear."""
    vector = (K,)

    def norm(name: str, function: Callable, *more: tuple[int, ...], **facts: object) -> Example:
        return Example(name, lambda x, w, *v: F.linear(function(x, *v), w), values(X, W, *more), **facts)  # type: ignore[arg-type]

    def two_readers(x: Tensor, w: Tensor, r: Tensor, n: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        h = x + r
        y = rms(h, n)
        return h, F.linear(y, w), F.linear(y, w2)

    def no_norm(x: Tensor, w: Tensor) -> Tensor:
        return w * x / (x.abs().mean(-1, keepdim=True) + 1e-6)

    return [
        norm("rms", rms, vector),
        norm("rms_one_plus_w", gemma_rms, vector),
        norm("rms_unweighted", lambda x: F.rms_norm(x, (K,), eps=1e-5)),
        norm("rms_builtin", lambda x, w: F.rms_norm(x, (K,), w, 1e-6), vector),
        norm("layer", lambda x, w, b: F.layer_norm(x, (K,), w, b, 1e-5), vector, vector),
        norm("layer_no_bias", lambda x, w: F.layer_norm(x, (K,), w, None, 1e-5), vector),
        Example(
            "residual_rms_two_readers",
            two_readers,
            values(X, W, X, vector, W),
            matches=1,
        ),
        norm("mean_of_magnitudes", no_norm, vector, matches=0, reason="no norm in the vocabulary"),
    ]
