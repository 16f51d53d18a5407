"""Expert layers for tests, and what they compute by two naive ways.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops.experts import ACTIVATIONS

# What low-precision GEMMs may add to an unfused computation in the same precision, as for every kernel.
CONTRACT = 1.5
GPT_OSS = "gpt_oss(1.702,0.75)"  # the limit is low, so that it is met


@dataclass(frozen=True)
class Layer:
    """The arguments of the op, in its order."""

    x: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    act: str
    gated: bool
    interleaved: bool
    transposed: bool
    residual: Tensor | None = None

    def run(self, function) -> Tensor:
        return function(*(getattr(self, f.name) for f in fields(self)))

    def map(self, change) -> Layer:
        """With `change` applied to each floating-point tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: change(v) for k, v in tensors.items() if isinstance(v, Tensor) and v.is_floating_point()}
        )


def make_layer(
    T=7, K=2, E=4, C=16, width=24, *, act="silu", gated=True, interleaved=False, transposed=False, bias=False,
    residual=False, index=None, dtype=torch.float32, device="cpu", seed=0,
) -> Layer:  # fmt: skip
    """Distinct experts per token, positive weights that sum to 1. Made on the CPU: the same values on every device."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = 2 * width if gated else width
    up, down = randn(E, rows, C) / C**0.5, randn(E, C, width) / width**0.5
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    chosen = torch.rand(T, E, generator=g).argsort(1)[:, :K] if index is None else index
    layer = Layer(
        randn(T, C), chosen.to(device), torch.rand(T, K, generator=g, dtype=torch.float64).softmax(1), up,
        randn(E, rows) / 4 if bias else None, down, randn(E, C) / 4 if bias else None,
        act, gated, interleaved, transposed, randn(T, C) if residual else None,
    )  # fmt: skip
    return layer.map(lambda t: t.to(device, dtype))


def glu(act: str, gate: Tensor, up: Tensor) -> Tensor:
    """The gated activation, gpt-oss's as its model writes it."""
    if act != GPT_OSS:
        return ACTIVATIONS[act](gate) * up
    gate, up = gate.clamp(min=None, max=0.75), up.clamp(min=-0.75, max=0.75)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def naive(layer: Layer, dtype: torch.dtype = torch.float64) -> Tensor:
    """One token and one expert at a time, every operation in `dtype`, straight from the definition."""
    wide = layer.map(lambda t: t.to(dtype))
    experts = len(wide.up)
    out = torch.zeros_like(wide.x) if wide.residual is None else wide.residual.clone()
    for t, token in enumerate(wide.x):
        for k, e in enumerate(wide.top_k_index[t].tolist()):
            if e == experts:
                continue
            up, down = (w.mT if wide.transposed else w for w in (wide.up[e], wide.down[e]))
            hidden = up @ token + (0 if wide.up_bias is None else wide.up_bias[e])
            if wide.gated:
                half = len(hidden) // 2
                halves = (hidden[0::2], hidden[1::2]) if wide.interleaved else (hidden[:half], hidden[half:])
                hidden = glu(wide.act, *halves)
            else:
                hidden = ACTIVATIONS[wide.act](hidden)
            result = down @ hidden + (0 if wide.down_bias is None else wide.down_bias[e])
            out[t] += wide.top_k_weights[t, k] * result
    return out


def hf_style(layer: Layer) -> Tensor:
    """As Hugging Face's eager experts: per expert in the model's dtype, accumulated by index_add in that dtype."""
    out = torch.zeros_like(layer.x)
    for e in range(len(layer.up)):
        token, k = torch.where(layer.top_k_index == e)
        up, down = (w.mT if layer.transposed else w for w in (layer.up[e], layer.down[e]))
        hidden = F.linear(layer.x[token], up, None if layer.up_bias is None else layer.up_bias[e])
        if layer.gated:
            halves = (hidden[:, ::2], hidden[:, 1::2]) if layer.interleaved else hidden.chunk(2, -1)
            hidden = glu(layer.act, *halves)
        else:
            hidden = ACTIVATIONS[layer.act](hidden)
        result = F.linear(hidden, down, None if layer.down_bias is None else layer.down_bias[e])
        out.index_add_(0, token, result * layer.top_k_weights[token, k, None])
    return out if layer.residual is None else layer.residual + out


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    exact_square = exact.square().mean().clamp(min=torch.finfo(torch.double).tiny)  # relu2 may give zeros alone
    return ((actual.double() - exact).square().mean() / exact_square).sqrt().item()


def check_contract(layer: Layer, function, contract: float = CONTRACT) -> None:
    exact = naive(layer.map(lambda t: t.cpu()) if layer.x.is_cuda else layer).to(layer.x.device)
    out = layer.run(function)
    assert out.dtype == layer.x.dtype and out.shape == layer.x.shape
    # An output of few values may be exact by luck: a rounding to nearest leaves eps / 4 on average.
    unfused = max(relative_rms(hf_style(layer), exact), torch.finfo(out.dtype).eps / 4)
    assert relative_rms(out, exact) <= contract * unfused


def routings(T: int, K: int, E: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    return {
        "random": random,
        "sentinels": torch.where(torch.rand(T, K, generator=generator) < 0.5, E, random),
        "only sentinels": torch.full((T, K), E),
        "one expert": torch.arange(K).expand(T, K).contiguous(),  # the others get nothing
        "last experts": torch.arange(E - K, E).expand(T, K).contiguous(),
    }


ROUTINGS = list(routings(1, 2, 4))
FORMS = {
    "plain": {},
    "not gated": {"gated": False, "act": "relu2"},
    "interleaved": {"interleaved": True, "act": "gelu"},
    "transposed": {"transposed": True, "act": "gelu_tanh"},
    "biases": {"bias": True, "act": "relu"},
    "residual": {"residual": True},
    "gpt-oss": {"act": GPT_OSS, "bias": True, "interleaved": True, "transposed": True},
}
