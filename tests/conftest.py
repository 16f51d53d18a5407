"""Hypothesis profiles, what the interface tests share (a tiny random Llama on disk), and engines without Inductor.

One hypothesis profile for CI (the same examples at every run, no deadline) and a longer one by hand:
`pytest --hypothesis-profile=long`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True, suppress_health_check=_SLOW_IS_FINE)
settings.register_profile("long", max_examples=3000, deadline=None, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile("ci")

CORPUS = [
    "def read_file(path):",
    "    with open(path) as file:",
    "        return file.read()",
    "import os, sys, json",
] * 8
# Small enough for the CPU, and the same everywhere so that an engine fits them all.
ENGINE_OPTIONS = {
    "max_model_len": 64,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "device": "cpu",
    "kv_cache_bytes": 1 << 20,
}


# Tests of stored programs turn them on; all others compile, whatever a user's own cache holds.
os.environ["FUSECOMP_COMPILE_CACHE"] = "0"
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
# A shell has what it starts in the background ignore it, and Python keeps that: tests of interrupts would meet none.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


@pytest.fixture(scope="session")
def tiny_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,  # spreads the logits: greedy tokens then vary along the text
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_config, tiny_tokenizer) -> Path:
    """A checkpoint as users have them. Tests that change files copy it first."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_folder, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


@pytest.fixture
def tiny_model(tiny_folder):
    """A fresh stock model in float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def without_codegen(monkeypatch):
    """The fuse stage's graphs run as they are: matching does not depend on what Inductor makes of them."""
    from fusecomp import fusion
    from fusecomp._compat import functional_backend

    def compile_graph(gm, example_inputs, patches):
        stage = patches["post_grad_custom_pre_pass"]
        return functional_backend(gm, example_inputs, lambda graph: stage(graph.graph))

    monkeypatch.setattr(fusion, "inductor_artifact", compile_graph)
