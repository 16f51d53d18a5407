"""`fuse`: a fused model's `generate` is stock `generate`, token by token and option by option."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, MaxLengthCriteria, MinPLogitsWarper, StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria

import fusecomp
from fusecomp.errors import CapacityError, ConfigError, FallbackError, FallbackWarning, UnsupportedModelError
from fusecomp.runtime import session
from tests.conftest import ENGINE_OPTIONS

pytestmark = pytest.mark.xdist_group("hf")
PROMPTS = [[5, 17, 42, 99, 7], [33, 8], [250, 61, 61, 4, 19, 120, 11]]


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


def batch(prompts=PROMPTS, pad=0):
    """Left-padded ids [B, P] and their mask."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def middle_token(stock, prompt, position=4):
    """A token that greedy decoding of `prompt` produces in mid-text, to be taken as an end of sequence."""
    return int(stock.generate(torch.tensor([prompt]), max_new_tokens=12, eos_token_id=None)[0, len(prompt) + position])


class Recorder:
    """A streamer that keeps what it was given."""

    def __init__(self):
        self.events = []

    def put(self, value):
        self.events.append((tuple(value.shape), value.dtype, value.tolist()))

    def end(self):
        self.events.append("end")


CALLS = {
    "default": {},
    "max_new_tokens": {"max_new_tokens": 9},
    "max_length": {"max_length": 15},
    "both_lengths": {"max_new_tokens": 4, "max_length": 40},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=6, pad_token_id=3)},
    "no_eos": {"max_new_tokens": 8, "eos_token_id": None},
    "no_cache": {"max_new_tokens": 5, "use_cache": False},
    "static_cache": {"max_new_tokens": 5, "cache_implementation": "static"},
    "own_max_length": {"max_new_tokens": 9, "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(10)])},
    "empty_processors": {"max_new_tokens": 3, "logits_processor": LogitsProcessorList()},
    "unused_samplers": {"max_new_tokens": 3, "do_sample": False, "temperature": 0.5, "top_k": 3},
}


@pytest.mark.parametrize("kwargs", CALLS.values(), ids=CALLS.keys())
def test_greedy_is_stock(stock, fused, kwargs):
    inputs = batch()
    expected = stock.generate(**inputs, **copy.deepcopy(kwargs))
    actual = fused.generate(**inputs, **copy.deepcopy(kwargs))
    assert actual.dtype == expected.dtype and actual.device == expected.device
    assert torch.equal(actual, expected)


def test_single_prompt_positional(stock, fused):
    ids = torch.tensor(PROMPTS[:1])
    assert torch.equal(fused.generate(ids, max_new_tokens=10), stock.generate(ids, max_new_tokens=10))


def test_no_prompt_starts_from_bos(stock, fused):
    assert torch.equal(fused.generate(max_new_tokens=5), stock.generate(max_new_tokens=5))


def test_mask_inferred_from_padding(stock, fused):
    ids = batch()["input_ids"]
    assert torch.equal(fused.generate(ids, max_new_tokens=6), stock.generate(ids, max_new_tokens=6))


def test_eos_in_the_middle_pads_the_row(stock, fused):
    eos = middle_token(stock, PROMPTS[0])
    inputs = batch()
    kwargs = {"max_new_tokens": 12, "eos_token_id": eos, "pad_token_id": 77}
    expected = stock.generate(**inputs, **kwargs)
    assert (expected == 77).any() and (expected == eos).any()
    assert torch.equal(fused.generate(**inputs, **kwargs), expected)


def test_eos_list_and_pad_from_eos(stock, fused):
    ids = [middle_token(stock, PROMPTS[0], 3), middle_token(stock, PROMPTS[1], 6)]
    inputs = batch()
    config = GenerationConfig(max_new_tokens=12, eos_token_id=ids)  # no pad id: the first end-of-sequence id pads
    assert torch.equal(
        fused.generate(**inputs, generation_config=config), stock.generate(**inputs, generation_config=config)
    )


def test_all_rows_end_early(stock, fused):
    eos = middle_token(stock, PROMPTS[0], 2)
    ids = torch.tensor([PROMPTS[0]] * 2)
    kwargs = {"max_new_tokens": 12, "eos_token_id": eos, "attention_mask": torch.ones_like(ids)}
    expected = stock.generate(ids, **kwargs)
    assert expected.shape[1] < len(PROMPTS[0]) + 12
    assert torch.equal(fused.generate(ids, **kwargs), expected)


def test_more_rows_than_the_engine_runs_at_once(stock, fused):
    prompts = [[7 + i, 20, 3 * i + 5][: 1 + i % 3] for i in range(9)]
    inputs = batch(prompts)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=5), stock.generate(**inputs, max_new_tokens=5))


def test_dictionary_output(stock, fused):
    inputs = batch()
    expected = stock.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    actual = fused.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert type(actual) is type(expected)
    assert torch.equal(actual.sequences, expected.sequences)
    assert actual.past_key_values is None


@pytest.mark.parametrize("rows", [1, 3])
def test_streamer_events(stock, fused, rows):
    inputs = batch(PROMPTS[:rows])
    kwargs = {"max_new_tokens": 12, "eos_token_id": middle_token(stock, PROMPTS[0])}
    expected, actual = Recorder(), Recorder()
    stock.generate(**inputs, **kwargs, streamer=expected)
    fused.generate(**inputs, **kwargs, streamer=actual)
    assert actual.events == expected.events
    assert actual.events[0][2] == inputs["input_ids"].tolist() and actual.events[-1] == "end"


def test_text_iterator_streamer_from_a_thread(stock, fused, tiny_tokenizer):
    texts = []
    for model in (stock, fused):
        streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
        ids = torch.tensor(PROMPTS[:1])
        thread = threading.Thread(
            target=model.generate, args=(ids,), kwargs={"max_new_tokens": 8, "streamer": streamer}
        )
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


def test_pipeline(stock, fused, tiny_tokenizer):
    from transformers import pipeline

    texts = [
        pipeline("text-generation", model=model, tokenizer=tiny_tokenizer, device="cpu")(
            ["def read_file", "import"], max_new_tokens=6, do_sample=False, batch_size=2
        )
        for model in (stock, fused)
    ]
    assert texts[0] == texts[1]


def test_sampling_follows_torch_seed(fused):
    inputs = batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(fused.generate(**inputs, max_new_tokens=10, do_sample=True, temperature=0.9, top_k=20, top_p=0.9))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_top_k_1_sampling_is_greedy(stock, fused):
    inputs = batch()
    sampled = fused.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=1)
    assert torch.equal(sampled, stock.generate(**inputs, max_new_tokens=6))


def test_num_return_sequences(fused):
    inputs = batch()
    torch.manual_seed(0)
    out = fused.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0, num_return_sequences=3)
    prompt = inputs["input_ids"].repeat_interleave(3, dim=0)
    assert torch.equal(out[:, : prompt.shape[1]], prompt)
    assert not torch.equal(out[0], out[1])


def test_stock_errors_are_kept(fused):
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(ValueError, match="not used by the model"):
        fused.generate(ids, max_new_tokenz=3)
    with pytest.raises(ValueError, match="max_length"):
        fused.generate(ids, max_length=2)
    with pytest.raises(ValueError, match="temperature"):
        fused.generate(ids, do_sample=True, temperature=float("nan"))


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


def test_too_little_kv_falls_back(stock, tiny_model):
    model = fusecomp.fuse(tiny_model, **{**ENGINE_OPTIONS, "max_model_len": 128, "kv_cache_bytes": 16 * 512})
    ids = torch.tensor(PROMPTS[:1])
    try:
        with pytest.warns(FallbackWarning, match="KV"):
            actual = model.generate(ids, max_new_tokens=60)
    except CapacityError:  # a budget may also be refused when the engine is built
        return
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


def test_infinite_temperature_is_stock(lenient):
    ids = torch.tensor(PROMPTS[:1])
    with pytest.warns(FallbackWarning, match="temperature=inf"):
        assert lenient.generate(ids, do_sample=True, temperature=float("inf"), max_new_tokens=3).shape[1] <= 8


def test_failing_streamer_leaves_the_engine_usable(stock, fused):
    class Failing(Recorder):
        def put(self, value):
            super().put(value)
            if len(self.events) == 3:
                raise OSError("the client left")

    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(OSError, match="the client left"):
        fused.generate(ids, max_new_tokens=10, streamer=Failing())
    assert torch.equal(fused.generate(ids, max_new_tokens=5), stock.generate(ids, max_new_tokens=5))


def test_served_calls_do_not_warn(fused):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fused.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2)


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


@pytest.mark.parametrize("name", ["pico-llama", "pico-moe"])
def test_trained_models_write_the_same_text(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parents[1] / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["def read_file(path):", "import os", "class Node:\n    def __init__(self, value"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    fused = fusecomp.fuse(model, **ENGINE_OPTIONS, strict=True)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=24, do_sample=False), expected)
