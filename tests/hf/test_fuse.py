"""`fuse` itself: what it takes, what it changes about a model, and what it notices later."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import fusecomp
from fusecomp.errors import ConfigError, FallbackError, UnsupportedModelError
from fusecomp.runtime import session
from tests.conftest import ENGINE_OPTIONS
from tests.hf.hf_cases import PROMPTS

pytestmark = pytest.mark.xdist_group("hf")


def test_fusing_changes_the_class_only(tiny_model):
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    config, ids = tiny_model.config, torch.tensor(PROMPTS[:1])
    logits = tiny_model(ids).logits
    fused = fusecomp.fuse(tiny_model, **ENGINE_OPTIONS)
    fused.generate(ids, max_new_tokens=2)
    assert fused is tiny_model and isinstance(fused, LlamaForCausalLM) and fused.config is config
    assert type(fused).__name__ == "LlamaForCausalLM"
    assert torch.equal(fused(ids).logits, logits)
    for name, value in fused.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert fused.fusion_report.summary()
    assert fusecomp.unfuse(fused) is tiny_model and type(tiny_model) is LlamaForCausalLM
    assert "_fusecomp" not in vars(tiny_model) and not hasattr(tiny_model, "fusion_report")
    assert fusecomp.unfuse(tiny_model) is tiny_model


def test_decorator_forms(tiny_folder):
    @fusecomp.fuse
    def bare():
        """Load."""
        return LlamaForCausalLM.from_pretrained(tiny_folder)

    @fusecomp.fuse(dtype="bfloat16", max_num_seqs=2)
    def with_options(tokenizer):
        return LlamaForCausalLM.from_pretrained(tiny_folder), tokenizer

    assert bare.__name__ == "bare" and bare.__doc__ == "Load."
    assert bare().fusion_fallbacks == {}
    model, tokenizer = with_options("tokenizer")
    assert model.dtype == torch.bfloat16 and tokenizer == "tokenizer"
    assert model.fusion_fallbacks == {}

    @fusecomp.fuse
    def wrong():
        return 3

    with pytest.raises(ConfigError, match=r"wrong\(\): returned int"):
        wrong()


def test_class_form(stock, tiny_folder, tiny_config, tmp_path):
    fused_class = fusecomp.fuse(LlamaForCausalLM, **ENGINE_OPTIONS)
    model = fused_class.from_pretrained(tiny_folder)
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(model.generate(ids, max_new_tokens=5), stock.generate(ids, max_new_tokens=5))
    assert model.fusion_fallbacks == {}
    model.save_pretrained(tmp_path)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()
    assert fused_class._from_config(tiny_config).fusion_fallbacks == {}
    assert type(fusecomp.unfuse(model)) is LlamaForCausalLM
    with pytest.raises(ConfigError, match="warmup needs weights"):
        fusecomp.fuse(LlamaForCausalLM, warmup=True)


def test_warmup_builds_at_once(tiny_model, monkeypatch):
    built = []
    real = session.engine_class()
    monkeypatch.setattr(session, "engine_class", lambda: built.append(1) or real)
    fusecomp.fuse(tiny_model, **ENGINE_OPTIONS)
    assert not built
    model = fusecomp.fuse(tiny_model, warmup=True, **ENGINE_OPTIONS)
    assert built == [1]
    model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=1)
    assert built == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_fused_and_independent(stock, fused, copied):
    fused.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=1)
    twin = copied(fused)
    assert "_fusecomp" not in vars(twin)
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(twin.generate(ids, max_new_tokens=4), stock.generate(ids, max_new_tokens=4))
    assert twin.model.norm.weight is not fused.model.norm.weight
    with pytest.raises(FallbackError):  # strict came along
        twin.generate(ids, num_beams=2)


def test_changed_weights_are_noticed(lenient):
    ids = torch.tensor(PROMPTS[:1])
    before = lenient.generate(ids, max_new_tokens=8)
    with torch.no_grad():
        lenient.lm_head.weight.copy_(lenient.lm_head.weight.flip(0))
    after = lenient.generate(ids, max_new_tokens=8)
    assert torch.equal(after, fusecomp.unfuse(lenient).generate(ids, max_new_tokens=8))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (torch.nn.Linear(2, 2), {}, "cannot fuse Linear"),
        (torch.nn.Linear, {}, "cannot fuse Linear"),
        (7, {}, "cannot fuse int"),
        (None, {"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
        (None, {"warmupp": True}, "did you mean 'warmup'"),
        (None, {"block_size": 7}, "block_size=7"),
    ],
)
def test_wrong_targets_and_options(target, options, message):
    with pytest.raises(ConfigError, match=message):
        fusecomp.fuse(target, **options)


def test_model_without_generate(tiny_config):
    from transformers import LlamaModel

    with pytest.raises(UnsupportedModelError, match="LlamaModel has no generate"):
        fusecomp.fuse(LlamaModel(tiny_config))
