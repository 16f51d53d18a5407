"""Options of `generate` that the engine takes over: greedy tokens are those of stock `generate`, to the last one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, logits_process

import fusecomp
from tests.conftest import ENGINE_OPTIONS
from tests.hf.hf_cases import PROMPTS, Recorder, batch, middle_token

pytestmark = pytest.mark.xdist_group("hf")


def greedy_ids(stock, row, count=16):
    """What stock `generate` gives for a row of `batch()` without options."""
    ids = torch.tensor([PROMPTS[row]])
    return stock.generate(ids, max_new_tokens=count, eos_token_id=None)[0, len(PROMPTS[row]) :].tolist()


def words(stock):
    """Pairs, triples and single tokens of the plain greedy outputs."""
    rows = [greedy_ids(stock, row) for row in range(3)]
    return [rows[0][:2], rows[0][4:7], rows[1][2:4], [rows[2][3]], rows[2][5:9], [PROMPTS[1][-1], rows[1][0]]]


OPTIONS = {
    "repetition": lambda stock: {"repetition_penalty": 1.7},
    "encouraged": lambda stock: {"repetition_penalty": 0.6},
    "bad_words": lambda stock: {"bad_words_ids": words(stock)},
    "bad_eos": lambda stock: {"bad_words_ids": [[2], *words(stock)[:2]], "eos_token_id": 2},
    "bias": lambda stock: {"sequence_bias": {(t,): -4.0 for t in greedy_ids(stock, 0)[:5]} | {(9,): 3.0}},
    "suppressed": lambda stock: {"suppress_tokens": greedy_ids(stock, 1)[:4]},
    "min_new_tokens": lambda stock: {"min_new_tokens": 9, "eos_token_id": greedy_ids(stock, 0)[2:6]},
    "min_length": lambda stock: {"min_length": 13, "eos_token_id": greedy_ids(stock, 2)[1:5]},
    "renormalized": lambda stock: {"repetition_penalty": 1.3, "renormalize_logits": True},
    "everything": lambda stock: {
        "sequence_bias": {(9,): 3.0, (30,): 2.0},
        "repetition_penalty": 1.4,
        "bad_words_ids": words(stock),
        "min_new_tokens": 7,
        "eos_token_id": greedy_ids(stock, 0)[2:6],
        "suppress_tokens": [11, 12],
    },
    "own_processor": lambda stock: {
        "logits_processor": LogitsProcessorList([logits_process.RepetitionPenaltyLogitsProcessor(1.5)])
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "padded"])
def test_greedy_tokens_are_stocks(stock, fused, name, rows):
    inputs = batch(PROMPTS[:rows])
    kwargs = {"max_new_tokens": 16, "pad_token_id": 0, **OPTIONS[name](stock)}
    expected = stock.generate(**inputs, **copy.deepcopy(kwargs))
    assert torch.equal(fused.generate(**inputs, **copy.deepcopy(kwargs)), expected)
    if rows == 3:
        plain = stock.generate(**inputs, max_new_tokens=16, eos_token_id=kwargs.get("eos_token_id"), pad_token_id=0)
        assert plain.shape != expected.shape or not torch.equal(plain, expected), "the option must matter"


def test_padding_counts_as_repeated_as_it_does_in_stock(stock, fused):
    """The token that pads is one that greedy decoding would choose."""
    kwargs = {"max_new_tokens": 12, "repetition_penalty": 3.0}
    other = stock.generate(**batch(), **kwargs)
    inputs = batch(pad=int(other[1, 7]))
    expected = stock.generate(**inputs, **kwargs)
    assert torch.equal(fused.generate(**inputs, **kwargs), expected)
    assert not torch.equal(expected[1, 7:], other[1, 7:])


@pytest.mark.parametrize("options", [{"min_p": 0.2}, {"typical_p": 0.4}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05}])
def test_sampled_tokens_are_among_those_that_stock_keeps(stock, fused, options):
    """Every token of many draws survives Hugging Face's own processors."""
    ids = torch.tensor([PROMPTS[0]])
    kwargs = {
        "do_sample": True,
        "temperature": 1.6,
        "repetition_penalty": 1.3,
        "top_k": 0,
        "eos_token_id": None,
        **options,
    }
    torch.manual_seed(0)
    out = fused.generate(ids, max_new_tokens=6, num_return_sequences=20, **kwargs)
    config, _ = stock._prepare_generation_config(None, **kwargs)
    processors = stock._get_logits_processor(config, input_ids_seq_length=5, device="cpu")
    for end in range(5, 11):
        with torch.no_grad():
            kept = processors(out[:, :end], stock(out[:, :end]).logits[:, -1])
        assert kept.gather(1, out[:, end, None]).isfinite().all()
    assert len({tuple(row) for row in out.tolist()}) > 5


# ---------------------------------------------------------------------- stopping criteria


class StopAfter(StoppingCriteria):
    """Row i is done at i + `first` new tokens, or when it holds `token`; keeps what it was shown."""

    def __init__(self, prompt, first=2, token=None):
        self.prompt, self.first, self.token, self.seen = prompt, first, token, []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        self.seen.append(input_ids.clone())
        rows = torch.arange(len(input_ids))
        done = input_ids.shape[1] - self.prompt >= self.first + rows
        if self.token is not None:
            done = done | (input_ids[:, self.prompt :] == self.token).any(1)
        return done


@pytest.mark.parametrize("eos", [False, True], ids=["no eos", "eos"])
@pytest.mark.parametrize("rows", [1, 3])
def test_own_criteria_see_and_stop_what_they_do_in_stock(stock, fused, rows, eos):
    inputs = batch(PROMPTS[:rows])
    kwargs = {
        "max_new_tokens": 12,
        "eos_token_id": middle_token(stock, PROMPTS[0], 3) if eos else None,
        "pad_token_id": 7,
    }
    seen, outputs, streams = [], [], []
    for model in (stock, fused):
        criterion, streamer = StopAfter(inputs["input_ids"].shape[1]), Recorder()
        given = StoppingCriteriaList([criterion])
        outputs.append(model.generate(**inputs, **kwargs, stopping_criteria=given, streamer=streamer))
        seen.append(criterion.seen)
        streams.append(streamer.events)
    assert torch.equal(*outputs) and streams[0] == streams[1]
    assert len(seen[0]) == len(seen[1]) and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert outputs[0].shape[1] - inputs["input_ids"].shape[1] < 12


def test_criteria_that_never_stop_and_time_limits(stock, fused):
    inputs = batch()
    never = StoppingCriteriaList([StopAfter(0, first=1000)])
    expected = stock.generate(**inputs, max_new_tokens=9)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=9, stopping_criteria=never), expected)
    assert torch.equal(fused.generate(**inputs, max_new_tokens=9, max_time=1000.0), expected)
    assert fused.generate(**inputs, max_new_tokens=9, max_time=1e-9).shape[1] == inputs["input_ids"].shape[1] + 1


def test_a_failing_criterion_leaves_the_engine_usable(stock, fused):
    class Failing(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise OSError("no verdict")

    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(OSError, match="no verdict"):
        fused.generate(ids, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Failing()]))
    assert torch.equal(fused.generate(ids, max_new_tokens=5), stock.generate(ids, max_new_tokens=5))


# ---------------------------------------------------------------------- the trained models


@pytest.fixture(scope="module", params=["pico-llama", "pico-moe"])
def pico(request):
    folder = Path(__file__).parents[2] / "models" / request.param
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    stock, fused = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    texts = ["def read_file(path):", "import os", "class Node:\n    def __init__(self, value"]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    return stock, fusecomp.fuse(fused, **ENGINE_OPTIONS, strict=True), inputs, tokenizer


PICO = {
    "repetition": {"repetition_penalty": 1.2},
    "everything": {
        "repetition_penalty": 1.1,
        "bad_words": ["return", "self.", "import"],
        "min_new_tokens": 10,
        "suppress_tokens": [300, 301, 302],
        "sequence_bias": {(198,): 1.5},
    },
}


@pytest.mark.parametrize("options", PICO.values(), ids=PICO)
def test_trained_models_write_the_same_text_under_options(pico, options):
    stock, fused, inputs, tokenizer = pico
    options = dict(options)
    if words := options.pop("bad_words", None):
        options["bad_words_ids"] = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    kwargs = {"max_new_tokens": 24, "do_sample": False, **options}
    expected = stock.generate(**inputs, **copy.deepcopy(kwargs))
    assert torch.equal(fused.generate(**inputs, **copy.deepcopy(kwargs)), expected)
    assert not torch.equal(expected, stock.generate(**inputs, max_new_tokens=24, do_sample=False))


def test_stop_strings_end_rows_where_stock_ends_them(pico):
    stock, fused, inputs, tokenizer = pico
    kwargs = {
        "max_new_tokens": 24,
        "do_sample": False,
        "stop_strings": ["):", "\n\n", "import"],
        "tokenizer": tokenizer,
    }
    expected = stock.generate(**inputs, **kwargs)
    assert torch.equal(fused.generate(**inputs, **kwargs), expected)
    free = stock.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert expected.shape != free.shape or not torch.equal(expected, free)
    as_dict = fused.generate(**inputs, **kwargs, return_dict_in_generate=True)
    assert torch.equal(as_dict.sequences, expected)
