"""A fused model's `generate` is stock `generate`, token by token and option by option."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

import fusecomp
from fusecomp.errors import FallbackWarning
from tests.conftest import ENGINE_OPTIONS
from tests.hf.hf_cases import PROMPTS, Recorder, batch, middle_token

pytestmark = pytest.mark.xdist_group("hf")


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


@pytest.mark.parametrize("name", ["pico-llama", "pico-moe"])
def test_trained_models_write_the_same_text(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(__file__).parents[2] / "models" / name
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["def read_file(path):", "import os", "class Node:\n    def __init__(self, value"]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    fused = fusecomp.fuse(model, **ENGINE_OPTIONS, strict=True)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=24, do_sample=False), expected)
