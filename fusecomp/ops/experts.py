"""The canonical experts op: every token through its top-k experts, weighted and summed.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusecomp.ops.library import define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

GPT_OSS = re.compile(r"gpt_oss\(([^,()]+),([^,()]+)\)")


def gpt_oss(alpha: float, limit: float) -> str:
    """Text of gpt-oss's clamped gate: (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit)."""
    return f"gpt_oss({alpha!r},{limit!r})"


@functools.cache
def activation(act: str) -> Callable[..., Tensor]:
    """What `act` names: a function of one tensor, or of gate and up where the text is `gpt_oss`'s.

    Raises:
        KeyError: the vocabulary has no such activation.
    """
    if not (found := GPT_OSS.fullmatch(act)):
        return ACTIVATIONS[act]
    alpha, limit = float(found[1]), float(found[2])

    def clamped(gate: Tensor, up: Tensor) -> Tensor:
        gate = gate.clamp(max=limit)
        return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * alpha))

    return clamped


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    weight = weight.transpose(-1, -2) if transposed else weight
    return F.linear(x, weight, bias)


def _activate(up: Tensor, act: str, gated: bool, interleaved: bool) -> Tensor:
    function = activation(act)
    if not gated:
        return function(up)
    gate, up = (up[..., ::2], up[..., 1::2]) if interleaved else up.chunk(2, dim=-1)
    return function(gate, up) if GPT_OSS.fullmatch(act) else function(gate) * up


def experts_reference(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    act: str,
    gated: bool,
    interleaved: bool,
    transposed: bool,
) -> Tensor:
    """Sum over k of weight[t, k] * expert_{index[t, k]}(x[t]); x [T, C] -> [T, C] in x's dtype.

    up [E, F or 2F, C] (gate and up rows when `gated`), down [E, C, F]; with `transposed` both are stored [E, in, out].
    An index equal to E is a sentinel (an expert of another rank) and adds nothing.
    """
    T, K = top_k_index.shape
    flat, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(flat, minlength=up.shape[0] + 1)[: up.shape[0]].tolist()
    # The combine runs in fp32 over k in routing order, so the result does not depend on the order of experts.
    parts = torch.zeros(T * K, x.shape[1], dtype=torch.float32, device=x.device)
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            rows = order[begin : begin + count]
            hidden = _expert_linear(x[rows // K], up[expert], None if up_bias is None else up_bias[expert], transposed)
            hidden = _activate(hidden, act, gated, interleaved)
            bias = None if down_bias is None else down_bias[expert]
            parts[rows] = _expert_linear(hidden, down[expert], bias, transposed).float()
        begin += count
    weighted = parts.view(T, K, -1) * top_k_weights.float()[..., None]
    return weighted.sum(1).to(x.dtype)


define(
    "experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, str act, bool gated, bool interleaved, bool transposed) -> Tensor",
    experts_reference,
    lambda x, *_: x.new_empty(x.shape),
)
