"""Streams, several completions, stop texts, log-probabilities and timings through `LLM`."""

from __future__ import annotations

import re
import threading

import pytest
import torch

from fusecomp import LLM, SamplingParams
from fusecomp.errors import ConfigError, RequestError
from fusecomp.request import RequestOutputKind
from tests.conftest import ENGINE_OPTIONS

pytestmark = pytest.mark.xdist_group("stream")
GREEDY = SamplingParams(max_tokens=12, temperature=0)
DRAWN = SamplingParams(max_tokens=8, temperature=1.5, seed=5)
PROMPTS = [[5, 6, 7], [9, 9], [33, 8, 61, 4, 19, 120]]


@pytest.fixture(scope="module")
def llm(tiny_folder):
    return LLM(tiny_folder, **ENGINE_OPTIONS)


def whole(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def idle(llm):
    now = llm.metrics
    return (now.running, now.waiting, now.kv_usage) == (0, 0, 0) and not llm._session.calls


# ---------------------------------------------------------------------- streams


def test_cumulative_stream_grows_to_the_whole(llm):
    expected = whole(llm, PROMPTS, GREEDY)
    last: dict[str, object] = {}
    order = []
    for output in llm.stream(PROMPTS, GREEDY):
        (completion,) = output.outputs
        before = last.get(output.request_id)
        if before is not None:
            assert completion.token_ids[: len(before.token_ids)] == before.token_ids
            assert len(completion.token_ids) > len(before.token_ids) and completion.text.startswith(before.text)
        last[output.request_id] = completion
        order.append(output.request_id)
        assert output.finished == (completion.finish_reason is not None)
    # News that came while the last output was looked at is one output.
    assert 12 < len(order) <= 3 * 12 and len(set(order[:3])) == 3, "requests advance together"
    for completion, output in zip(last.values(), expected, strict=True):
        assert completion == output.outputs[0]
    assert idle(llm)


def test_delta_stream_adds_up(llm):
    params = DRAWN.replace(output_kind=RequestOutputKind.DELTA, logprobs=2, n=2)
    expected = whole(llm, PROMPTS, params)
    tokens, texts, scores, ends = {}, {}, {}, {}
    for output in llm.stream(PROMPTS, params):
        for completion in output.outputs:
            key = output.request_id, completion.index
            tokens.setdefault(key, []).extend(completion.token_ids)
            texts[key] = texts.get(key, "") + completion.text
            scores.setdefault(key, []).extend(completion.logprobs)
            ends[key] = completion.finish_reason
    wanted = [completion for output in expected for completion in output.outputs]
    for key, completion in zip(sorted(tokens, key=lambda k: (int(k[0].split("-")[1]), k[1])), wanted, strict=True):
        assert (tokens[key], texts[key], ends[key]) == (completion.token_ids, completion.text, "length")
        assert [list(each) for each in scores[key]] == [list(each) for each in completion.logprobs]


def test_final_only_stream_gives_wholes(llm):
    params = GREEDY.replace(output_kind=RequestOutputKind.FINAL_ONLY, n=2)
    outputs = list(llm.stream(PROMPTS, params))
    assert len(outputs) == 3 and all(output.finished and len(output.outputs) == 2 for output in outputs)
    assert [o.outputs for o in outputs] == [o.outputs for o in whole(llm, PROMPTS, params)]


def test_closing_a_stream_aborts_what_is_left(llm):
    stream = llm.stream(PROMPTS, GREEDY.replace(max_tokens=50))
    for _ in range(5):
        next(stream)
    assert not idle(llm)
    stream.close()
    assert idle(llm)
    assert whole(llm, PROMPTS[0], GREEDY)[0].outputs[0].token_ids


def test_a_stream_is_checked_before_its_first_output(llm):
    stream = llm.stream([[5], []], GREEDY)
    with pytest.raises(RequestError, match="prompt 1: the prompt is empty"):
        next(stream)
    assert idle(llm)


def test_abort_ends_one_request_with_its_completions(llm):
    params = GREEDY.replace(max_tokens=30, n=2)
    ends = {}
    for number, output in enumerate(llm.stream(PROMPTS, params)):
        if number == 8:
            llm.abort(output.request_id)
            victim = output.request_id
        for completion in output.outputs:
            ends[output.request_id, completion.index] = completion.finish_reason, len(completion.token_ids)
    assert {end for key, (end, _) in ends.items() if key[0] == victim} == {"abort"}
    assert {end for key, end in ends.items() if key[0] != victim} == {("length", 30)}
    llm.abort("never heard of")
    assert idle(llm)


def test_other_calls_inside_a_stream_share_the_steps(llm):
    alone = [output.outputs[0].token_ids for output in whole(llm, PROMPTS, GREEDY)]
    seen = {}
    for number, output in enumerate(llm.stream(PROMPTS, GREEDY)):
        seen[output.request_id] = output.outputs[0].token_ids
        if number == 3:
            steps = llm.metrics.steps
            assert whole(llm, PROMPTS[2], GREEDY)[0].outputs[0].token_ids == alone[2]
            assert llm.metrics.steps - steps <= 13
    assert list(seen.values()) == alone


def test_streams_of_several_threads(llm):
    alone = [output.outputs[0].token_ids for output in whole(llm, PROMPTS, GREEDY)]
    results, barrier = {}, threading.Barrier(3)

    def work(number):
        barrier.wait()
        results[number] = [out.outputs[0].token_ids for out in llm.stream(PROMPTS[number], GREEDY)][-1]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(3)] == alone and idle(llm)


# ---------------------------------------------------------------------- several completions


def test_completions_of_a_seed_are_those_of_the_seeds_after_it(llm):
    (several,) = whole(llm, PROMPTS[0], DRAWN.replace(n=4))
    assert [completion.index for completion in several.outputs] == [0, 1, 2, 3]
    for index, completion in enumerate(several.outputs):
        (alone,) = whole(llm, PROMPTS[0], DRAWN.replace(seed=5 + index))
        assert completion.token_ids == alone.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in several.outputs}) > 1


def test_completions_without_a_seed_differ(llm):
    (several,) = whole(llm, PROMPTS[0], DRAWN.replace(n=3, seed=None))
    assert len({tuple(completion.token_ids) for completion in several.outputs}) > 1


def test_bad_prompts_beside_several_completions(llm):
    good, bad, last = llm.serve([[5, 6], [], [7]], GREEDY.replace(n=2))
    assert len(good.outputs) == len(last.outputs) == 2 and bad.outputs == [] and "empty" in bad.error


# ---------------------------------------------------------------------- stop texts


def test_stop_texts_cut_text_and_tokens(llm):
    (free,) = whole(llm, "def read", GREEDY)
    text = free.outputs[0].text
    stop = re.search(r"[ -~]{2}", text[2:])[0]  # the model is random: much of its text is no text
    at = text.find(stop)
    for include in (False, True):
        params = GREEDY.replace(stop=stop, include_stop_str_in_output=include)
        (output,) = whole(llm, "def read", params)
        completion = output.outputs[0]
        assert completion.text == text[: at + (len(stop) if include else 0)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        decode = llm.get_tokenizer().decode
        assert stop in decode(completion.token_ids) and stop not in decode(completion.token_ids[:-1])
        assert completion.token_ids == free.outputs[0].token_ids[: len(completion.token_ids)]
        streamed = [out.outputs[0] for out in llm.stream("def read", params)]
        assert streamed[-1] == completion
        assert include or not any(stop in each.text for each in streamed)
    assert idle(llm)


def test_stop_texts_are_not_looked_for_before_min_tokens(llm):
    (free,) = whole(llm, "def read", GREEDY)
    first = free.outputs[0].text[0]
    (output,) = whole(llm, "def read", GREEDY.replace(stop=[first], min_tokens=5))
    assert len(output.outputs[0].token_ids) > 5


def test_stop_ids_are_named(llm):
    (free,) = whole(llm, PROMPTS[0], GREEDY)
    stop = free.outputs[0].token_ids[4]
    (output,) = whole(llm, PROMPTS[0], GREEDY.replace(stop_token_ids=[stop]))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_texts_of_a_model_without_tokenizer_are_refused(tiny_model):
    llm = LLM(tiny_model, **ENGINE_OPTIONS)
    for params in (GREEDY.replace(stop="x"), GREEDY.replace(bad_words=["x"])):
        with pytest.raises(RequestError, match="no tokenizer"):
            whole(llm, [5], params)
    assert whole(llm, [5], GREEDY.replace(bad_words=[[5, 6]]))[0].outputs[0].text == ""


# ---------------------------------------------------------------------- options, log-probabilities, timings


def test_bad_words_as_texts_never_appear(llm):
    tokenizer = llm.get_tokenizer()
    (free,) = whole(llm, "import os", GREEDY)
    words = [tokenizer.decode(free.outputs[0].token_ids[i : i + size]).strip() for i, size in ((0, 1), (2, 2), (5, 3))]
    words = [word for word in words if word]
    (output,) = whole(llm, "import os", GREEDY.replace(bad_words=words))
    ids = output.outputs[0].token_ids
    assert ids != free.outputs[0].token_ids
    for word in words:
        banned = tokenizer.encode(word, add_special_tokens=False)
        assert not any(ids[i : i + len(banned)] == banned for i in range(len(ids)))


def test_log_probabilities_are_named_and_ranked(llm, tiny_folder):
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    (output,) = whole(llm, PROMPTS[2], DRAWN.replace(logprobs=2, prompt_logprobs=0, repetition_penalty=1.3))
    completion = output.outputs[0]
    ids = PROMPTS[2] + completion.token_ids
    with torch.no_grad():
        lines = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(PROMPTS[2])
    shown = [*output.prompt_logprobs[1:], *completion.logprobs]
    for line, token, found in zip(lines, ids[1:], shown, strict=False):
        assert next(iter(found)) == token
        for i, value in found.items():
            assert value.logprob == pytest.approx(line[i].item(), abs=1e-4)
            assert value.rank == int((line >= line[i]).sum())
            assert value.decoded_token == llm.get_tokenizer().decode([i])
    assert all(len(found) in (2, 3) for found in completion.logprobs)
    own = sum(found[token].logprob for found, token in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(own)
    (plain,) = whole(llm, PROMPTS[2], DRAWN)
    assert plain.prompt_logprobs is None and plain.outputs[0].logprobs is None


def test_timings_are_in_order(llm):
    before = llm.metrics
    outputs = whole(llm, [[i] for i in range(9)], GREEDY)
    for output in outputs:
        times = output.metrics
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time < times.last_token_time
        assert times.last_token_time <= times.finished_time
        assert times.num_generation_tokens == 12
        assert times.time_to_first_token >= times.time_in_queue >= 0
        assert times.mean_time_between_tokens * 11 == pytest.approx(times.last_token_time - times.first_token_time)
    # More requests than rows: some waited for others to end.
    assert max(o.metrics.time_in_queue for o in outputs) > min(o.metrics.mean_time_between_tokens for o in outputs) * 6
    now = llm.metrics
    first = now.histograms["time_to_first_token_seconds"]
    assert first.count - before.histograms["time_to_first_token_seconds"].count == 9
    between = now.histograms["inter_token_latency_seconds"]
    assert between.count - before.histograms["inter_token_latency_seconds"].count == 9 * 11


def test_a_request_that_cannot_be_admitted_for_its_options(llm):
    outputs = llm.serve([[5], [6]], [GREEDY.replace(logit_bias={10**6: 1.0}), GREEDY])
    assert "token id 1000000 of a sampling option" in outputs[0].error and outputs[1].error is None


def test_everything_banned_fails_that_request_only(llm):
    outputs = llm.serve([[5], [6]], [GREEDY.replace(allowed_token_ids=[4], bad_words=[[4]]), GREEDY])
    assert "every token is banned" in outputs[0].error
    assert outputs[1].outputs[0].token_ids == whole(llm, [[6]], GREEDY)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 2000},
        {"min_p": 1.5},
        {"typical_p": 0},
        {"repetition_penalty": 0},
        {"presence_penalty": float("nan")},
        {"logit_bias": {3: float("inf")}},
        {"logit_bias": {-1: 1.0}},
        {"bad_words": [[]]},
        {"bad_words": "word"},
        {"bad_words": [[-1]]},
        {"allowed_token_ids": []},
        {"min_tokens": 17},
        {"min_tokens": -1},
        {"stop": ""},
        {"stop": [3]},
        {"logprobs": -1},
        {"prompt_logprobs": 1000},
        {"output_kind": 1},
        {"skip_special_tokens": 1},
    ],
)
def test_wrong_options_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name}=.*Remedy: give"):
        SamplingParams(**options)


def test_parameters_stay_hashable_and_comparable():
    one, same, other = (
        SamplingParams(logit_bias={i: 1.0}, bad_words=[[1, 2]], stop="x", allowed_token_ids=[5]) for i in (1, 1, 2)
    )
    assert one == same != other and hash(one) == hash(same)
    assert one.sample(1) is one and one.replace(n=2, seed=4).sample(1) == one.replace(seed=5)
