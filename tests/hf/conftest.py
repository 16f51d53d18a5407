"""A stock model and fused ones, with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import fusecomp
from tests.conftest import ENGINE_OPTIONS


@pytest.fixture(scope="module")
def stock(tiny_folder):
    return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def fused(tiny_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return fusecomp.fuse(model, **ENGINE_OPTIONS, strict=True)


@pytest.fixture
def lenient(tiny_model):
    """Not strict, and its own: for tests that change it."""
    return fusecomp.fuse(tiny_model, **ENGINE_OPTIONS)


@pytest.fixture(scope="module")
def shared_lenient(tiny_folder):
    return fusecomp.fuse(LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), **ENGINE_OPTIONS)
