"""What looks like a mixture of experts and must stay: `RawExperts` refuses each, with a reason.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.patterns.base import Example
from fusecomp.patterns.raw_moe_examples import (
    Activate,
    Sizes,
    Weights,
    activation,
    batched,
    inputs,
    layer,
    scaled_input,
)

CAPACITY = 3


def _gathered(x: Tensor, index: Tensor, w: Weights, act: Activate) -> tuple[Tensor, Tensor]:
    """What experts hold between their products, and their results [T, K, C]."""
    hidden = act(torch.einsum("ti,tkoi->tko", x, w.up[index]))
    return hidden, torch.einsum("tki,tkoi->tko", hidden, w.down[index])


def _unsparse(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    everywhere = F.linear(x, w.router).softmax(-1)
    up = torch.einsum("ti,eoi->teo", x, w.up)
    return torch.einsum("teo,te->to", torch.einsum("tei,eoi->teo", act(up), w.down), everywhere)


def _hidden_returned(
    x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool
) -> tuple[Tensor, Tensor]:
    hidden, parts = _gathered(x, index, w, act)
    return (parts * scores[..., None].to(x.dtype)).sum(1), hidden.amax()


def _largest(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    return (_gathered(x, index, w, act)[1] * scores[..., None].to(x.dtype)).amax(1)


def _last_counts_twice(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    parts = _gathered(x, index, w, act)[1] * scores[..., None].to(x.dtype)
    return parts.sum(1) + parts[:, -1]


def _places(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Each choice as a one-hot row [T, K, E], and how many came to its expert before [T, K]."""
    chosen = F.one_hot(index.flatten(), experts)
    return chosen.view(*index.shape, -1), ((chosen.cumsum(0) - 1) * chosen).sum(-1).view(index.shape)


def _dropped_by_weight(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Choices beyond an expert's capacity weigh nothing: mixed experts all the same."""
    kept = torch.where(_places(index, w.up.shape[0])[1] < CAPACITY, scores, torch.zeros_like(scores))
    return (_gathered(x, index, w, act)[1] * kept[..., None].to(x.dtype)).sum(1)


def _capacity(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """GShard's buffers of `CAPACITY` tokens an expert: what does not fit is dropped."""
    chosen, place = _places(index, w.up.shape[0])
    slots = F.one_hot(place.clamp(max=CAPACITY), CAPACITY + 1)[..., :CAPACITY]
    sent = torch.einsum("tke,tkp->tkep", chosen, slots).to(x.dtype)
    buffer = torch.einsum("tkep,ti->epi", sent, x)
    parts = torch.bmm(act(torch.bmm(buffer, w.up.transpose(1, 2))), w.down.transpose(1, 2))
    return torch.einsum("tkep,epi,tk->ti", sent, parts, scores.to(x.dtype))


def _written_between(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    first = torch.einsum("ti,tkoi->tko", x, w.up[index])
    x.mul_(2)
    rest = torch.einsum("ti,tkoi->tko", x, w.up[index])
    parts = torch.einsum("tki,tkoi->tko", act(first + rest), w.down[index])
    return (parts * scores[..., None].to(x.dtype)).sum(1)


def _with_all(x: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chosen experts, and weights that give what is not chosen a share too."""
    scores = F.linear(x, router).float()
    return scores.topk(k, dim=-1).indices, scores


def _spread_over_all(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    weights = scores.scatter(1, index, 1.0).to(x.dtype)
    up = torch.einsum("ti,eoi->teo", x, w.up)
    return torch.einsum("teo,te->to", torch.einsum("tei,eoi->teo", act(up), w.down), weights)


def _two_weights(hidden: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As in gpt-fast: gate and up projections apart."""
    x = hidden.view(-1, hidden.shape[-1])
    scores, index = F.linear(x, router).softmax(-1).topk(2, dim=-1)
    first = F.silu(torch.einsum("ti,taoi->tao", x, gate[index]))
    parts = torch.einsum("tao,taio->tai", first * torch.einsum("ti,taoi->tao", x, up[index]), down[index])
    return torch.einsum("tai,ta->ti", parts, scores).view(hidden.shape)


def _two_weights_inputs(dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 7, 16), (5, 16), (5, 24, 16), (5, 24, 16), (5, 16, 24))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def _mixed(hidden: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """DBRX's storage: up [E, F, C] and down [E, F, C]."""
    form = layer(batched, Sizes(gated=False), F.silu)
    return form(hidden, router, up, down.transpose(1, 2))[0]


def _mixed_inputs(dtype: torch.dtype) -> tuple:
    hidden, router, up, _, down = _two_weights_inputs(dtype)
    return hidden, router, up, down.transpose(1, 2).contiguous()


def _second_half(h: Tensor) -> Tensor:
    up, gate = h.chunk(2, dim=-1)
    return up * F.silu(gate)


def raw_moe_refusals() -> list[Example]:
    """Look-alikes, each with a part of the reason why it is none; and one that is one."""
    plain, two = Sizes(), Sizes(gated=False)
    act = activation("silu", plain)
    none = "no mixture of experts in the vocabulary"

    def refused(name: str, form: Callable, reason: str, act: Activate = act, sizes: Sizes = plain) -> Example:
        return Example(name, layer(form, sizes, act), inputs(sizes), 0, reason)

    def clamped(h: Tensor) -> Tensor:
        return act(h.clamp(max=100.0))

    return [
        Example("dropped by weight", layer(_dropped_by_weight, plain, act), inputs(plain)),
        refused("softmax over all", _unsparse, "none is chosen"),
        refused("hidden values returned", _hidden_returned, "is also read by amax"),
        refused("largest instead of sum", _largest, none),
        refused("one part twice", _last_counts_twice, none),
        refused("capacity", _capacity, "choose experts unevenly"),
        refused("written in between", _written_between, "changed in place by mul_"),
        refused("clamped", batched, "on large values", clamped),
        refused("mish", batched, none, F.mish, two),
        refused("gate in the second half", batched, none, _second_half),
        refused("weights on the inputs of two", scaled_input, "weights multiply what experts read"),
        Example(
            "a share for all",
            layer(_spread_over_all, plain, act, _with_all),
            inputs(plain),
            0,
            "not known to be",
        ),
        Example("gate and up apart", _two_weights, _two_weights_inputs, 0, "two weights"),
        Example("stored differently", _mixed, _mixed_inputs, 0, "is stored [experts, in, out], the other"),
    ]
