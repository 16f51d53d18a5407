"""What a fused model's `generate` leaves to stock `generate`: with one warning, or refused if it is strict."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria

import fusecomp
from fusecomp.errors import FallbackError, FallbackWarning, UnsupportedModelError
from fusecomp.runtime import session
from tests.conftest import ENGINE_OPTIONS
from tests.hf.hf_cases import PROMPTS, Recorder

pytestmark = pytest.mark.xdist_group("hf")


class Confident(ConfidenceCriteria):
    """Stock `generate` passes no scores either unless they are asked for."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


FALLBACKS = {
    "beams": ({"num_beams": 2}, "num_beams=2"),
    "sequence_bias": ({"sequence_bias": [[[5, 6], 2.0]]}, "sequence_bias of several tokens"),
    "order": ({"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.5)])}, "MinPLogitsWarper is not covered"),
    "epsilon": ({"epsilon_cutoff": 0.1, "do_sample": True, "top_k": 1}, "EpsilonLogitsWarper"),
    "ngrams": ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
    "bad_words": ({"bad_words_ids": [[*PROMPTS[0], 3]]}, "the prompt is the beginning of one of bad_words_ids"),
    "long_word": ({"bad_words_ids": [[3] * 40]}, "bad words of several tokens"),
    "confidence": ({"stopping_criteria": StoppingCriteriaList([Confident(0.0)])}, "Confident needs scores"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
    "hidden": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted generation"),
    "positions": ({"position_ids": torch.arange(5)[None]}, "position_ids"),
    "prefix": ({"prefix_allowed_tokens_fn": lambda batch_id, ids: [5, 6]}, "PrefixConstrained"),
    "too_long": ({"max_new_tokens": 100}, "max_model_len=64"),
    "right_padding": ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "not left padding"),
}


@pytest.mark.parametrize(("kwargs", "cause"), FALLBACKS.values(), ids=FALLBACKS.keys())
def test_falls_back_with_one_warning_or_raises(stock, shared_lenient, fused, kwargs, cause):
    shared_lenient._fusecomp.fallbacks.clear()
    kwargs = {"max_new_tokens": 6, **kwargs}
    ids = torch.tensor(PROMPTS[:1])
    expected = stock.generate(ids, **copy.deepcopy(kwargs))
    with pytest.warns(FallbackWarning, match=cause) as caught:
        actual = shared_lenient.generate(ids, **copy.deepcopy(kwargs))
        shared_lenient.generate(ids, **copy.deepcopy(kwargs))
    assert len([w for w in caught if w.category is FallbackWarning]) == 1
    assert list(shared_lenient.fusion_fallbacks.values()) == [2]
    (named,) = shared_lenient.fusion_fallbacks
    assert shared_lenient.fusion_report.fallbacks[f"generate: {named}"] == 2
    sequences = [getattr(output, "sequences", output) for output in (actual, expected)]
    assert torch.equal(*sequences)
    with pytest.raises(FallbackError, match=cause):
        fused.generate(ids, **copy.deepcopy(kwargs))


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static", "quantized", "paged"])
def test_caches_that_are_a_wish_of_their_own(fused, cache):
    with pytest.raises(FallbackError, match=f"cache_implementation='{cache}'"):
        fused.generate(torch.tensor(PROMPTS[:1]), cache_implementation=cache)


def test_fallback_inside_keeps_streaming(stock, shared_lenient):
    shared_lenient._fusecomp.fallbacks.clear()
    expected, actual = Recorder(), Recorder()
    ids = torch.tensor(PROMPTS[:1])
    stock.generate(ids, max_new_tokens=5, no_repeat_ngram_size=2, streamer=expected)
    with pytest.warns(FallbackWarning):
        shared_lenient.generate(ids, max_new_tokens=5, no_repeat_ngram_size=2, streamer=actual)
    assert actual.events == expected.events


def test_training_mode_falls_back(lenient):
    lenient.train()
    with pytest.warns(FallbackWarning, match=r"model\.eval"):
        lenient.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2)
    assert len(lenient.fusion_fallbacks) == 1


def test_too_little_kv_falls_back(stock, tiny_model):
    model = fusecomp.fuse(tiny_model, **{**ENGINE_OPTIONS, "max_model_len": 128, "kv_cache_bytes": 16 * 512})
    ids = torch.tensor(PROMPTS[:1])
    with pytest.warns(FallbackWarning, match="KV"):
        actual = model.generate(ids, max_new_tokens=60)
    assert torch.equal(actual, stock.generate(ids, max_new_tokens=60))


def test_refused_capture_falls_back_once(stock, lenient, monkeypatch):
    attempts = []

    class Refusing:
        def __init__(self, *args, **kwargs):
            attempts.append(1)
            raise UnsupportedModelError("layer 3 has an unknown mask")

    monkeypatch.setattr(session, "engine_class", lambda: Refusing)
    ids = torch.tensor(PROMPTS[:1])
    with pytest.warns(FallbackWarning, match="unknown mask"):
        actual = lenient.generate(ids, max_new_tokens=3)
        lenient.generate(ids, max_new_tokens=3)
    assert torch.equal(actual, stock.generate(ids, max_new_tokens=3))
    assert len(attempts) == 1
    with pytest.raises(UnsupportedModelError):
        _ = lenient.fusion_report


def test_forward_hooks_send_calls_to_stock_generate(lenient):
    """A hook expects a batch of rows: the packed step would show it something else, or, once compiled, nothing."""
    ids = torch.tensor(PROMPTS[:1])
    before = lenient.generate(ids, max_new_tokens=8)
    assert not lenient.fusion_fallbacks
    hook = lenient.lm_head.register_forward_hook(lambda module, args, output: -output)
    with pytest.warns(FallbackWarning, match="forward hook"):
        after = lenient.generate(ids, max_new_tokens=8)
    hook.remove()
    assert not torch.equal(before, after)
    assert torch.equal(before, lenient.generate(ids, max_new_tokens=8)) and len(lenient.fusion_fallbacks) == 1


def test_hooks_of_transformers_itself_do_not_count(lenient):
    ids = torch.tensor(PROMPTS[:1])
    lenient(ids, output_hidden_states=True)
    lenient.generate(ids, max_new_tokens=2)
    assert not lenient.fusion_fallbacks


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"no_repeat_ngram_size": 2}], ids=["early", "late"])
def test_fallback_warnings_point_at_the_call(lenient, options):
    with pytest.warns(FallbackWarning) as caught:
        lenient.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, **options)
    assert [w.filename for w in caught if w.category is FallbackWarning] == [__file__]


def test_served_calls_do_not_warn(lenient):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lenient.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2)
    assert not lenient.fusion_fallbacks
    assert [w for w in caught if issubclass(w.category, FallbackWarning)] == []
