"""Routers in several spellings, between given logits and the experts they choose, and what is no known router."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops import OPS
from fusecomp.patterns.base import Example

T, E, K, C, WIDTH = 7, 8, 3, 16, 12
GROUPS, CHOSEN = 4, 2


def inputs(dtype: torch.dtype) -> tuple:
    """Hidden states, logits [T, E], a bias an expert, experts' weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, C), (T, E), (E,), (E, 2 * WIDTH, C), (E, C, WIDTH))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def router(name: str, route: Callable, *, given: Callable = inputs, **facts: object) -> Example:
    """`route` gives weights and index of logits and bias, and may give further outputs."""

    def function(x: Tensor, logits: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        weights, index, *more = route(logits, bias)
        return OPS.experts(x, index, weights, up, None, down, None, "silu", True, False, False), *more

    return Example(name, function, given, **facts)  # type: ignore[arg-type]


def softmax_top_k(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = F.softmax(logits, dim=-1, dtype=torch.float).topk(K, dim=-1)
    return weights.to(logits.dtype), index


def renormalised(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = logits.float().softmax(-1).topk(K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, index


def by_hand(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    exp = (logits.float() - logits.float().amax(-1, keepdim=True)).exp()
    index = exp.argsort(dim=-1, descending=True)[:, :K]
    chosen = exp.gather(1, index)
    return (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype), index


def top_k_softmax(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = logits.topk(K, dim=-1)
    return F.softmax(weights, dim=1, dtype=weights.dtype), index


def within_groups(choice: Tensor, scores: Tensor, hidden: float) -> Tensor:
    groups = scores.topk(CHOSEN, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(scores)
    mask.scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(-1, GROUPS, E // GROUPS).reshape(-1, E)
    return choice.masked_fill(~mask.bool(), hidden)


def deepseek_v2(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(dim=-1, dtype=torch.float32)
    groups = scores.view(-1, GROUPS, E // GROUPS).max(dim=-1).values
    weights, index = within_groups(scores, groups, 0.0).topk(K, dim=-1, sorted=False)
    return weights * 16.0, index


def deepseek_v3(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().sigmoid()
    choice = scores + bias
    groups = choice.view(-1, GROUPS, E // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
    index = within_groups(choice, groups, float("-inf")).topk(K, dim=-1, sorted=False)[1]
    weights = scores.gather(1, index)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, index


def sigmoid_top_k(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = logits.float().sigmoid().topk(1, dim=-1)
    return weights, index


def ernie(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(1)
    index = (scores + bias[None].squeeze()).topk(K, dim=-1)[1]
    weights = scores.gather(-1, index)
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)).to(logits.dtype), index


def sparsemixer(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    def one(left: Tensor) -> tuple[Tensor, Tensor]:
        top, index = left.max(dim=-1, keepdim=True)
        hidden = (top - logits) / logits.abs().clamp(min=top) > 0.3
        return left.masked_fill(hidden, float("-inf")).softmax(-1).gather(-1, index), index

    first, i = one(logits)
    second, j = one(logits.scatter(-1, i, float("-inf")))
    return torch.cat((first, second), -1), torch.cat((i, j), -1)


def softcapped(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return sigmoid_top_k(10 * torch.tanh(logits.float() / 10), bias)


def from_matmul(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return top_k_softmax(F.linear(logits, torch.eye(E, dtype=logits.dtype), bias), bias)


def scores_returned(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    scores = logits.float().softmax(-1)
    return *scores.topk(K, dim=-1), scores * 2


def weights_returned(logits: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    weights, index = renormalised(logits, bias)
    return weights, index, weights + 1


def rounded(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return logits.sigmoid().to(torch.bfloat16).topk(K, dim=-1)


def root_of_softplus(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(logits.float()).sqrt().topk(K, dim=-1)


def among_tokens(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.float().softmax(-1)
    return (scores / scores.mean(0)).topk(K, dim=-1)


def cut_off(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = logits.float().softmax(-1).topk(K, dim=-1)
    return torch.where(weights > 0.02, weights, 0.0), index


def smallest(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return logits.float().softmax(-1).topk(K, dim=-1, largest=False)


def biased_weights(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (logits.float().sigmoid() + bias).topk(K, dim=-1)


def two_logits(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    index = logits.topk(K, dim=-1)[1]
    return F.linear(logits, torch.eye(E, dtype=logits.dtype)).sigmoid().gather(1, index), index


def noisy(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return (logits.float().sigmoid() + 1e-15 * torch.rand(T, E)).topk(K, dim=-1)


def by_token(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(T)[:, None] % E
    return logits.float().softmax(-1).gather(1, index), index


def router_examples() -> list[Example]:
    """Every router of the vocabulary, and what is none."""
    unknown, elsewhere = "no router in the vocabulary", "also read by"
    return [
        router("softmax_top_k", softmax_top_k),
        router("renormalised", renormalised),
        router("by_hand", by_hand),
        router("top_k_softmax", top_k_softmax),
        router("deepseek_v2", deepseek_v2),
        router("deepseek_v3", deepseek_v3),
        router("sigmoid_top_1", sigmoid_top_k),
        router("ernie", ernie),
        router("sparsemixer", sparsemixer),
        router("softcapped", softcapped),
        router("from_matmul", from_matmul),
        router("scores_returned", scores_returned, matches=0, reason=elsewhere),
        router("weights_returned", weights_returned, matches=0, reason="its weight is also read by add"),
        router("rounded", rounded, matches=0, reason="rounds to bfloat16"),
        router("root_of_softplus", root_of_softplus, matches=0, reason=unknown),
        router("among_tokens", among_tokens, matches=0, reason=unknown),
        router("cut_off", cut_off, matches=0, reason=unknown),
        router("smallest", smallest, matches=0, reason=unknown),
        router("biased_weights", biased_weights, matches=0, reason=unknown),
        router("two_logits", two_logits, matches=0, reason="does not follow from one value"),
        router("noisy", noisy, matches=0, reason=unknown),
        router("by_token", by_token, matches=0, reason=unknown),
    ]


def hidden_inputs(dtype: torch.dtype) -> tuple:
    """Hidden states [1, T, C], a norm's weight, a router's weight and bias, experts' weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, T, C), (C,), (E, C), (E,), (E, 2 * WIDTH, C), (E, C, WIDTH))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def whole(name: str, logits: Callable, before: Callable = rms, after: Callable = torch.zeros_like, **facts: object):
    """`logits` [T, E] of hidden states that `before` made of the inputs; `after` is returned of the logits too."""

    def function(x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        y = before(x, norm)
        found = logits(y, weight, bias).view(T, E)
        weights, index = renormalised(found, bias)
        out = OPS.experts(y.view(T, C), index, weights, up, None, down, None, "silu", True, False, False)
        return out.view(1, T, C) + x, after(found)

    return Example(name, function, hidden_inputs, **facts)  # type: ignore[arg-type]


def router_linear_examples() -> list[Example]:
    """Routers from hidden states on, and linears that must stay apart."""

    def plain(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(y, weight)

    return [
        whole("norm", plain),
        whole("bias", F.linear),
        whole("layer_norm", plain, lambda x, weight: F.layer_norm(x, (C,), weight)),
        whole("widened", lambda y, w, b: F.linear(y.float(), w.float())),
        whole("no_norm", plain, lambda x, weight: x.view(T, C)),
        whole("scaled", lambda y, w, b: 2 * F.linear(y, w), matches=0, reason="matmul -> mul"),
        whole("logits_returned", plain, after=lambda z: z * 1, matches=0, reason="also read by"),
    ]
