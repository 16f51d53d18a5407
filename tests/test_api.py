"""`LLM`, `explain` and the public names."""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal
import subprocess
import sys
import threading

import pytest
import torch

import fusecomp
from fusecomp import LLM, SamplingParams
from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError, RequestError
from tests.conftest import ENGINE_OPTIONS

pytestmark = pytest.mark.xdist_group("api")
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return LLM(str(tiny_folder), **ENGINE_OPTIONS)


@pytest.fixture(scope="module")
def stock(tiny_folder):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def stock_tokens(stock, ids, count=8, **kwargs):
    return stock.generate(torch.tensor([ids]), max_new_tokens=count, **kwargs)[0, len(ids) :].tolist()


def test_public_names_are_lazy():
    code = (
        "import sys, fusecomp, fusecomp.cli; fusecomp.SamplingParams, fusecomp.errors; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(fusecomp, name) is not None for name in fusecomp.__all__)
    assert set(fusecomp.__all__) <= set(dir(fusecomp))
    with pytest.raises(AttributeError, match="LLM"):
        _ = fusecomp.Llm


def test_options_are_those_of_the_engine():
    parameters = inspect.signature(LLM.__init__).parameters
    for field in dataclasses.fields(EngineConfig):
        assert parameters[field.name].default == field.default
    rest = set(parameters) - {f.name for f in dataclasses.fields(EngineConfig)}
    assert rest == {"self", "model", "tokenizer", "unknown"}


def test_texts_come_back_in_order(llm, stock):
    prompts = ["def read_file(", "import os", "with open", "return", "x", "def"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    tokenizer = llm.get_tokenizer()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer.encode(prompt)
        assert (output.prompt, output.prompt_token_ids, output.finished, output.error) == (prompt, ids, True, None)
        completion = output.outputs[0]
        assert completion.token_ids == stock_tokens(stock, ids)
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    "prompts",
    [[5, 6, 7], [[5, 6, 7]], [(5, 6, 7)], {"prompt_token_ids": [5, 6, 7]}, [{"prompt_token_ids": [5, 6, 7]}]],
)
def test_token_ids_in_every_form(llm, stock, prompts):
    (output,) = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert output.prompt is None and output.prompt_token_ids == [5, 6, 7]
    assert output.outputs[0].token_ids == stock_tokens(stock, [5, 6, 7])


def test_mixed_prompts_and_own_parameters(llm):
    outputs = llm.generate(
        ["import os", [5, 6], {"prompt": "def"}], [GREEDY.replace(max_tokens=n) for n in (1, 2, 3)], use_tqdm=False
    )
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3]
    assert outputs[2].prompt == "def"


def test_no_prompts(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_stop_token_ends_the_request_and_stays_out_of_the_text(llm, stock):
    stop = stock_tokens(stock, [5, 6, 7])[3]
    expected = stock_tokens(stock, [5, 6, 7], eos_token_id=stop)
    (output,) = llm.generate([5, 6, 7], GREEDY.replace(stop_token_ids=[stop]), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.finish_reason == "stop" and completion.token_ids == expected
    assert completion.text == llm.get_tokenizer().decode(expected[:-1], skip_special_tokens=True)


def test_seeded_sampling_repeats_whatever_the_batch(llm):
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=3)
    (alone,) = llm.generate([5, 6, 7], params, use_tqdm=False)
    together = llm.generate([[9, 9], [5, 6, 7], [1, 2, 3, 4]], params, use_tqdm=False)
    assert together[1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_default_parameters_are_vllms(llm, tiny_copy):
    assert llm.get_default_sampling_params() == SamplingParams()
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 2}
    (tiny_copy / "generation_config.json").write_text(json.dumps(config))
    defaults = LLM(tiny_copy, **ENGINE_OPTIONS).get_default_sampling_params()
    assert defaults == SamplingParams(max_tokens=16, temperature=0.6, top_k=20, top_p=0.95)


def test_default_penalties_and_filters_are_the_checkpoints(tiny_copy):
    config = {"do_sample": True, "repetition_penalty": 1.2, "min_p": 0.05, "typical_p": 0.9}
    (tiny_copy / "generation_config.json").write_text(json.dumps(config))
    defaults = LLM(tiny_copy, **ENGINE_OPTIONS).get_default_sampling_params()
    assert (defaults.repetition_penalty, defaults.min_p, defaults.typical_p) == (1.2, 0.05, 0.9)


def test_module_in_memory(tiny_model, stock, tiny_folder):
    tiny_model.train()
    llm = LLM(tiny_model, tokenizer=tiny_folder, **ENGINE_OPTIONS)
    assert not tiny_model.training
    ids = llm.get_tokenizer().encode("import os")
    assert llm.generate("import os", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == stock_tokens(stock, ids)


def test_module_without_tokenizer(tiny_model):
    llm = LLM(tiny_model, **ENGINE_OPTIONS)
    assert llm.get_tokenizer() is None
    assert llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("text", GREEDY, use_tqdm=False)


def test_bad_prompt_raises_before_anything_runs(llm):
    before = llm.metrics.generation_tokens
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        llm.generate([[5], [], [6]], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"prompt 2: .*max_model_len"):
        llm.generate([[5], [6], [7] * 64], GREEDY, use_tqdm=False)
    assert llm.metrics.generation_tokens == before
    assert len(llm.generate([5], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_bad_prompts_do_not_lose_the_others(llm, stock):
    seen = {}
    outputs = llm.serve(
        [[5, 6, 7], "", [7] * 64, [-1], [10**6], [True], 3, {"text": "x"}, "import"],
        [GREEDY] * 8 + [ConfigError("temperature=nan", where="SamplingParams")],
        on_output=lambda index, output: seen.update({index: output}),
    )
    assert outputs[0].error is None and outputs[0].outputs[0].token_ids == stock_tokens(stock, [5, 6, 7])
    parts = [
        "empty",
        "max_model_len",
        "token id -1",
        "token id 1000000",
        "type list",
        "type int",
        "keys ['text']",
        "nan",
    ]
    for output, part in zip(outputs[1:], parts, strict=True):
        assert part in output.error and output.outputs == [] and output.finished
    assert [seen[index] for index in range(9)] == outputs


def test_wrong_calls(llm):
    with pytest.raises(ConfigError, match="2 sampling_params for 1 prompts"):
        llm.generate([[5]], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(RequestError, match="prompts is a int"):
        llm.generate(5, GREEDY, use_tqdm=False)
    with pytest.raises(ConfigError, match="errors='ignore'"):
        llm.serve([[5]], GREEDY, errors="ignore")
    with pytest.raises(ConfigError, match="model is a int"):
        LLM(5)


def test_interrupt_aborts_and_leaves_the_engine_usable(llm, stock):
    """The first Ctrl-C takes effect between steps; nothing of the interrupted call stays behind."""

    def interrupt(index, output):
        signal.raise_signal(signal.SIGINT)

    params = [GREEDY.replace(max_tokens=1), GREEDY.replace(max_tokens=50)]
    with pytest.raises(KeyboardInterrupt):
        llm.serve([[5, 6], [7, 8]], params, on_output=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == stock_tokens(stock, [5, 6, 7])


def test_threads_share_an_llm(llm, stock):
    results = {}

    def work(start):
        results[start] = llm.generate([[start, 6], [start, 7]], GREEDY, use_tqdm=False)

    threads = [threading.Thread(target=work, args=(start,)) for start in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, (first, second) in results.items():
        assert first.outputs[0].token_ids == stock_tokens(stock, [start, 6])
        assert second.outputs[0].token_ids == stock_tokens(stock, [start, 7])
    assert len(results) == 3


def test_progress_bar_is_on_stderr(llm, capsys):
    llm.generate([[5], [6]], GREEDY)
    captured = capsys.readouterr()
    assert captured.out == "" and "2/2" in captured.err


def test_report_and_metrics(llm, tiny_model):
    assert llm.fusion_report.summary() and json.dumps(llm.fusion_report.to_dict())
    llm.generate([[1, 2]], fusecomp.SamplingParams(max_tokens=2), use_tqdm=False)
    assert llm.metrics.generation_tokens > 0
    assert fusecomp.explain(tiny_model, **ENGINE_OPTIONS).summary()
    fused = fusecomp.fuse(tiny_model, **ENGINE_OPTIONS)
    assert fusecomp.explain(fused) is fused.fusion_report


@pytest.mark.parametrize("params", ["x", 5, {"max_tokens": 3}, [{"max_tokens": 3}], [None]])
def test_parameters_of_another_type_are_refused(llm, params):
    with pytest.raises(ConfigError, match=r"sampling_params( of type|\b).*Remedy: give"):
        llm.generate(["a"], params, use_tqdm=False)


@pytest.mark.parametrize("prompts", [b"bytes", {"prompt_token_ids": "text"}])
def test_prompts_of_another_type_are_refused(llm, prompts):
    with pytest.raises(RequestError, match="Remedy: give"):
        llm.generate(prompts, GREEDY, use_tqdm=False)


def test_tokenizer_of_another_type_is_refused(tiny_folder):
    with pytest.raises(ConfigError, match="tokenizer is a int"):
        LLM(tiny_folder, tokenizer=5, **ENGINE_OPTIONS)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 2), (2, 2), (2, 5)])
def test_steps_of_few_tokens(tiny_folder, stock, rows, tokens):
    """The first, trial step respects the limit on a step's tokens too."""
    llm = LLM(tiny_folder, **{**ENGINE_OPTIONS, "max_num_seqs": rows}, max_num_batched_tokens=tokens)
    prompts = [[5, 17, 42, 99], [33, 8]]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [stock_tokens(stock, p) for p in prompts]


def test_engines_built_by_several_threads(tiny_folder, stock):
    tokens = {}

    def build(index):
        output = LLM(tiny_folder, **ENGINE_OPTIONS).generate([[5, 17, 42]], GREEDY, use_tqdm=False)[0]
        tokens[index] = output.outputs[0].token_ids

    threads = [threading.Thread(target=build, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tokens == dict.fromkeys(range(3), stock_tokens(stock, [5, 17, 42]))
