"""What a Hugging Face experts module computes between its two matmuls, proven on numbers, and the op it becomes.

How a module writes its gate does not matter: it is evaluated in fp64 and compared with the canonical op's activations.
Alpha and limit of a clamped gate are looked for among the module's own numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers.integrations.moe import batched_mm_experts_forward

from fusecomp._compat import real_tensors
from fusecomp.ops import OPS
from fusecomp.ops.experts import ACTIVATIONS, _activate, gpt_oss

WIDTH, ROWS, AGREEMENT = 16, 64, 1e-9


# By identity: torch 2.11 passes no module to a function whose result is a constant.
_known: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def remember_experts(model: nn.Module) -> None:
    """Let `trace_experts` find the experts modules of `model`."""
    _known.update({id(module): module for module in model.modules() if hasattr(module, "_apply_gate")})


@torch.compiler.assume_constant_result
def _form_of(identity: int) -> tuple[str, bool]:
    """`expert_form`, called while Dynamo traces; the answer is a constant of the graph."""
    return expert_form(_known[identity])


def expert_form(module: Any) -> tuple[str, bool]:
    """Canonical activation of an experts module and whether its gate and up rows alternate; ("", False) if unknown."""
    numbers = sorted({float(v) for v in vars(module).values() if type(v) in (int, float) and 0 < v < math.inf})
    function = module._apply_gate if module.has_gate else module.act_fn
    generator = torch.Generator().manual_seed(0)
    with real_tensors(), torch.no_grad():
        draws = []
        # Up to what fp16 holds, and beyond every number of the module: what it clamps at must show.
        for scale in (1.0, 20.0, 1e3, 3e4, *(3 * number for number in numbers)):
            x = scale * torch.randn(ROWS, 2 * WIDTH, generator=generator, dtype=torch.float64)
            try:
                draws.append((x, function(x)))
            except Exception:  # foreign code may fail in any way; then nothing is proven
                return "", False
        for act, interleaved in _forms(module.has_gate, numbers):
            if all(_agrees(y, _activate(x, act, module.has_gate, interleaved)) for x, y in draws):
                return act, interleaved
    return "", False


def _forms(gated: bool, numbers: list[float]) -> Iterator[tuple[str, bool]]:
    acts = [*ACTIVATIONS, *(gpt_oss(alpha, limit) for alpha, limit in permutations(numbers, 2) if gated)]
    for interleaved in (False, True) if gated else (False,):
        for act in acts:
            yield act, interleaved


def _agrees(got: Any, wanted: Tensor) -> bool:
    if not isinstance(got, Tensor) or got.shape != wanted.shape:
        return False
    return bool(((got - wanted).abs() <= AGREEMENT * wanted.abs().max()).all())


def unfused_reason(module: Any) -> str:
    """Why an experts module cannot become the canonical op; empty when it can."""
    if expert_form(module)[0]:
        return ""
    act = type(getattr(module, "act_fn", None)).__name__
    return f"its {'gate' if module.has_gate else 'activation'} ({act}) is none in the vocabulary"


def trace_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """HF experts function: one canonical op, or HF's own traceable form when the module cannot be expressed.

    The module must be one that `remember_experts` has seen.
    """
    act, interleaved = _form_of(id(module))
    if not act:
        return batched_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return OPS.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        getattr(module, up),
        getattr(module, f"{up}_bias") if module.has_bias else None,
        module.down_proj,
        module.down_proj_bias if module.has_bias else None,
        act,
        module.has_gate,
        interleaved,
        module.is_transposed,
    )
