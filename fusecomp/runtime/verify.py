"""Receipts: the rewritten model against the original and against fp32, on the same tokens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fusecomp.errors import VerificationError
from fusecomp.report import Receipt

if TYPE_CHECKING:
    from fusecomp.runtime.engine import Engine

# Error allowed to the rewritten model, relative to that of the original in the same dtype; the floor is for fp32,
# where the original's error against itself is zero.
ALLOWED_RATIO, FLOOR = 1.5, 1e-5
LENGTHS = (1, 5, 17)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative RMS error; NaN or infinity in `actual` gives infinity."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def verify_engine(engine: Engine, model: nn.Module) -> Receipt:
    """Compare last-token logits of a few random prompts, packed in one step, and file the receipt.

    Raises:
        VerificationError: the rewritten model is further from fp32 than the contract allows.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, engine.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    fused = engine.prompt_logits(prompts)
    exact_model = copy.deepcopy(model).float()
    with torch.no_grad():
        unfused, exact = (
            torch.stack([m(torch.tensor([p], device=engine.device)).logits[0, -1] for p in prompts])
            for m in (model, exact_model)
        )
    error, reference = relative_error(fused, exact), relative_error(unfused, exact)
    receipt = Receipt("whole model", error, reference, error <= max(ALLOWED_RATIO * reference, FLOOR))
    engine.report.receipts.append(receipt)
    if not receipt.passed:
        raise VerificationError(
            f"the rewritten model's error against fp32 is {error:.2e}, the original's {reference:.2e}",
            where=engine.report.model,
            remedy="run the model with stock transformers and report this",
        )
    return receipt
