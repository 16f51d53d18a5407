"""Mixtures of experts as people write them without an experts interface, and look-alikes that must stay.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops.experts import ACTIVATIONS, Activation
from fusecomp.patterns.base import Example


@dataclass(frozen=True)
class Sizes:
    """Sizes of an example."""

    tokens: int = 7
    experts: int = 5
    top_k: int = 2
    hidden: int = 16
    inner: int = 24
    gated: bool = True
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Weights:
    """One layer's weights: router [E, C]; up [E, N, C] and down [E, C, F], or transposed; biases [E, N] and [E, C]."""

    router: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def drawn(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states [1, T, C] and the fields of `Weights`."""
    generator = torch.Generator().manual_seed(0)
    rows = sizes.inner * (2 if sizes.gated else 1)
    shapes = [(sizes.experts, rows, sizes.hidden), (sizes.experts, sizes.hidden, sizes.inner)]
    if sizes.transposed:
        shapes = [(e, b, a) for e, a, b in shapes]
    biases = [(sizes.experts, rows), (sizes.experts, sizes.hidden)] if sizes.bias else []
    every = [(1, sizes.tokens, sizes.hidden), (sizes.experts, sizes.hidden), *shapes, *biases]
    scales = [1.0, 1.0, *(max(s[1:]) ** -0.5 for s in shapes), *(0.3 for _ in biases)]
    pairs = zip(every, scales, strict=True)
    return tuple((scale * torch.randn(shape, generator=generator)).to(dtype) for shape, scale in pairs)


Activate = Callable[[Tensor], Tensor]
Form = Callable[[Tensor, Tensor, Tensor, Weights, Activate, bool], Any]


def activation(name: str, sizes: Sizes, interleaved: bool = False) -> Activate:
    """What stands between two products: a gate by halves or alternating, or an activation alone."""
    if not sizes.gated:
        return ACTIVATIONS[name]
    glu = Activation.parse(name, gated=True).glu
    if interleaved:
        return lambda h: glu(h[..., ::2], h[..., 1::2])
    return lambda h: glu(*h.chunk(2, dim=-1))


def chosen(x: Tensor, router: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chosen experts [T, K] and their weights, in fp32."""
    weights, index = F.linear(x, router).float().softmax(-1).topk(k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


def layer(form: Form, sizes: Sizes, act: Activate, choose: Callable = chosen) -> Callable:
    """A layer [1, T, C] -> [1, T, C] that computes its experts by `form`."""

    def function(hidden: Tensor, *tensors: Tensor) -> Any:
        weights = Weights(*tensors)
        x = hidden.view(-1, hidden.shape[-1])
        index, scores = choose(x, weights.router, sizes.top_k)
        out = form(x, index, scores, weights, act, sizes.transposed)
        out, more = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
        return (out.view(hidden.shape), *more)

    return function


def _in_out(weight: Tensor, transposed: bool) -> Tensor:
    return weight if transposed else weight.transpose(1, 2)


def grouped(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Sorted tokens, grouped matmuls, results put back in place and summed."""
    ids = index.flatten()
    order = ids.argsort()
    ends = torch.bincount(ids, minlength=w.up.shape[0]).cumsum(0).to(torch.int32)
    rows = x[order // index.shape[1]]
    up = F.grouped_mm(rows, _in_out(w.up, transposed), offs=ends)
    if w.up_bias is not None:
        up = up + w.up_bias[ids[order]]
    down = F.grouped_mm(act(up), _in_out(w.down, transposed), offs=ends)
    if w.down_bias is not None:
        down = down + w.down_bias[ids[order]]
    placed = torch.empty_like(down)
    placed[order] = down
    return (placed.view(*index.shape, -1) * scores[..., None]).sum(1).to(x.dtype)


def grouped_added(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Sorted tokens, grouped matmuls with ends found by bisection, results added to their tokens in place."""
    ids, order = index.view(-1).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(w.up.shape[0], device=ids.device), right=True).int()
    tokens = order.div(index.shape[1], rounding_mode="floor")
    up = torch._grouped_mm(x.index_select(0, tokens), _in_out(w.up, transposed), offs=ends)
    down = torch._grouped_mm(act(up), _in_out(w.down, transposed), offs=ends)
    out = torch.zeros_like(x)
    out.index_add_(0, tokens, down * scores.flatten()[order].to(x.dtype).unsqueeze(-1))
    return out


def batched(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Each chosen expert's weights gathered, and multiplied by bmm."""
    ids = index.reshape(-1)
    rows = x.repeat_interleave(index.shape[1], dim=0).unsqueeze(1)
    up = torch.bmm(rows, _in_out(w.up[ids], transposed))
    up = up if w.up_bias is None else up + w.up_bias[ids].unsqueeze(1)
    down = torch.bmm(act(up), _in_out(w.down[ids], transposed))
    down = down if w.down_bias is None else down + w.down_bias[ids].unsqueeze(1)
    return (down.view(*index.shape, -1) * scores.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def einsums(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Gathered weights in einsums, the sum over experts among them."""
    order = "tkio" if transposed else "tkoi"
    up = torch.einsum(f"ti,{order}->tko", x, w.up[index])
    up = up if w.up_bias is None else up + w.up_bias[index]
    down = torch.einsum(f"tki,{order}->tko", act(up), w.down[index])
    down = down if w.down_bias is None else down + w.down_bias[index]
    return torch.einsum("tko,tk->to", down, scores.to(x.dtype))


def dense(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Every expert on every token, weighted by a matrix that is zero for those not chosen."""
    spread = torch.zeros(x.shape[0], w.up.shape[0], dtype=x.dtype, device=x.device)
    spread.scatter_(1, index, scores.to(x.dtype))
    tokens = x.expand(w.up.shape[0], -1, -1)
    up = _plus(torch.bmm(tokens, _in_out(w.up, transposed)), w.up_bias)
    down = _plus(torch.matmul(act(up), _in_out(w.down, transposed)), w.down_bias)
    return (down * spread.t().unsqueeze(-1)).sum(0)


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias[:, None]


def one_hot(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Every expert on every token, in a loop over experts and their masks."""
    mask = F.one_hot(index, w.up.shape[0])
    out = torch.zeros_like(x)
    for expert in range(w.up.shape[0]):
        up, down = (t[expert] if transposed else t[expert].T for t in (w.up, w.down))
        weight = (scores * mask[..., expert]).sum(-1, keepdim=True)
        out += act(x @ up) @ down * weight.to(x.dtype)
    return out


def scaled_input(x: Tensor, index: Tensor, scores: Tensor, w: Weights, act: Activate, transposed: bool) -> Tensor:
    """Llama 4's way: every expert on every token, which is multiplied by its weight before."""
    spread = torch.full((x.shape[0], w.up.shape[0]), -torch.inf, dtype=x.dtype).scatter(1, index, scores.to(x.dtype))
    tokens = x.repeat(w.up.shape[0], 1) * spread.sigmoid().t().reshape(-1, 1)
    up = torch.bmm(tokens.view(w.up.shape[0], -1, x.shape[1]), _in_out(w.up, transposed))
    return torch.bmm(act(up), _in_out(w.down, transposed)).sum(dim=0)


FORMS: dict[str, Form] = {form.__name__: form for form in (grouped, grouped_added, batched, einsums, dense, one_hot)}
TRACED_IN_BF16 = ("grouped", "grouped_added")  # there is no other trace of a grouped matmul


def inputs(sizes: Sizes, fixed: torch.dtype | None = None) -> Callable[[torch.dtype], tuple]:
    return lambda dtype: drawn(sizes, fixed or dtype)


def raw_moe_examples() -> list[Example]:
    """Every form with what it may come with; refusals are in a module of their own."""
    from fusecomp.patterns.raw_moe_refusals import raw_moe_refusals

    plain, full = Sizes(), Sizes(bias=True, transposed=True)
    act, interleaved = activation("silu", plain), activation("gpt_oss(1.702,7.0)", full, interleaved=True)
    relu2 = replace(plain, gated=False, top_k=1)
    found = []
    for name, form in FORMS.items():
        fixed = torch.bfloat16 if name in TRACED_IN_BF16 else None
        variants = [("", plain, act)]
        if name not in ("grouped_added", "one_hot"):
            variants.append((", gpt-oss", full, interleaved))
        variants.append((", no gate", relu2, activation("relu2", relu2)))
        for label, sizes, gate in variants:
            reference = layer(batched, sizes, gate)
            found.append(Example(name + label, layer(form, sizes, gate), inputs(sizes, fixed), reference=reference))
    one = replace(plain, top_k=1)
    found.append(Example("weights on the input", layer(scaled_input, one, act), inputs(one)))
    return found + raw_moe_refusals()
