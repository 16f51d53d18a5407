"""The check behind `deterministic=True`: what it lets through, and what it names."""

from __future__ import annotations

import pytest
import torch

from fusecomp.config import EngineConfig
from fusecomp.fusion import FUSE
from fusecomp.patterns.base import PassContext
from fusecomp.patterns.invariance import BatchInvariance
from fusecomp.quant.online.transform import quantize_model
from fusecomp.runtime import step
from fusecomp.runtime.engine import Engine
from fusecomp.testing.patterns import check_fused, new_context
from models.registry import FAMILIES, build

CONFIG = EngineConfig(
    max_model_len=48, max_num_seqs=3, max_num_batched_tokens=32, kv_cache_bytes=2 << 20, fuse="always",
    compile_cache=False,
)  # fmt: skip

# Llama 4's router is its own: a choice by a library, which breaks ties as the number of rows has it.
REFUSED = {"llama4": {"topk", "scatter"}}


class Checked(Exception):
    """The check is done; compiling what was checked would show nothing more."""


def refusals(family: str, monkeypatch: pytest.MonkeyPatch, scheme: str = "", **changes) -> list[str]:
    """As on a GPU: the fuse stage with the check behind it."""
    found: list[str] = []

    class Check(BatchInvariance):
        def apply(self, gm: torch.fx.GraphModule, context: PassContext) -> int:
            super().apply(gm, context)
            found.extend(miss.reason for miss in context.report.near_misses if miss.pattern == self.name)
            raise Checked

    monkeypatch.setattr(step, "FUSE", (*FUSE, Check()))
    model = build(family, torch.bfloat16)
    if scheme:
        quantize_model(model, scheme, text=[])
    with pytest.raises(Exception) as raised:  # Inductor wraps it
        Engine(model, CONFIG.replace(**changes))
    chain = [raised.value]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    if not any(isinstance(error, Checked) for error in chain):
        raise raised.value
    return found


@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=() if f.core else pytest.mark.slow) for n, f in FAMILIES.items()]
)
def test_fused_models_pass(family, monkeypatch):
    named = {reason.split()[0] for reason in refusals(family, monkeypatch)}
    assert named == REFUSED.get(family, set())


def test_a_product_that_no_pattern_took_is_named(monkeypatch):
    found = refusals("llama", monkeypatch, disabled_patterns=("linear",))
    assert found and set(found) == {"mm sums in an order that follows the number of rows"}


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4"])
def test_products_of_codes_are_named(scheme, monkeypatch):
    found = refusals("llama", monkeypatch, scheme)
    assert set(found) & {"quant_linear has no batch-invariant kernel"}


@pytest.mark.parametrize("example", BatchInvariance().examples(), ids=lambda e: e.name)
def test_examples(example):
    check_fused(BatchInvariance(), example, new_context(), torch.float32)
