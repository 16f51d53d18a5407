"""An exception while one request is processed fails that request; the others get what they would get without it."""

from __future__ import annotations

import json

import pytest

from fusecomp import LLM, SamplingParams
from fusecomp.errors import ConfigError, RequestError
from fusecomp.request import RequestOutputKind
from tests.conftest import ENGINE_OPTIONS

pytestmark = pytest.mark.xdist_group("faults")
GREEDY = SamplingParams(max_tokens=8, temperature=0)
PROMPTS = [[5, 6, 7], [9, 9], [33, 8, 61, 4, 19, 120]]


class Faulty:
    """A tokenizer that raises, as libraries do what they like, for what a test names."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bad_text, self.bad_tokens = None, frozenset()

    def encode(self, text, **options):
        if text == self.bad_text:
            raise LookupError("no such piece")
        return self._tokenizer.encode(text, **options)

    def decode(self, ids, **options):
        if self.bad_tokens & set(ids):
            raise LookupError("no such id")
        return self._tokenizer.decode(ids, **options)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return LLM(tiny_folder, **ENGINE_OPTIONS)


@pytest.fixture
def llm(loaded, monkeypatch):
    monkeypatch.setattr(loaded, "_tokenizer", Faulty(loaded.get_tokenizer()))
    yield loaded
    now = loaded.metrics
    assert (now.running, now.waiting, now.kv_usage) == (0, 0, 0) and not loaded._session.calls


def only_of(llm, victim: int, params: SamplingParams) -> list:
    """What all give without a fault; then the token that `victim` alone makes cannot be decoded."""
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    made = [set(output.outputs[0].token_ids) for output in expected]
    own = made[victim].difference(*(tokens for index, tokens in enumerate(made) if index != victim))
    assert own, "the tiny model gives each prompt tokens of its own"
    llm.get_tokenizer().bad_tokens = frozenset(own)
    return expected


@pytest.mark.parametrize("params", [GREEDY, GREEDY.replace(stop=("no such text",))], ids=["at the end", "stop texts"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_text_that_cannot_be_made(llm, victim, params):
    expected = only_of(llm, victim, params)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for index, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if index == victim:
            assert output.finished and not output.outputs and "LookupError: no such id" in output.error
        else:
            assert output.error is None and output.outputs == wanted.outputs


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_stream_whose_text_cannot_be_made(llm, kind):
    expected = only_of(llm, 1, GREEDY)
    ended = {}
    for output in llm.stream(PROMPTS, GREEDY.replace(output_kind=kind, max_tokens=8)):
        if output.finished:
            assert output.request_id not in ended
            ended[output.request_id] = output
    outputs = [ended[name] for name in sorted(ended, key=lambda name: int(name.split("-")[1]))]
    assert [output.error is None for output in outputs] == [True, False, True]
    if kind is not RequestOutputKind.DELTA:
        assert [outputs[i].outputs[0].text for i in (0, 2)] == [expected[i].outputs[0].text for i in (0, 2)]


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_whose_tokens_have_no_name(llm, streamed):
    params = [GREEDY, GREEDY.replace(logprobs=3), GREEDY]
    expected = llm.generate(PROMPTS, params, use_tqdm=False)
    seen = set(expected[1].outputs[0].logprobs[4])
    texts = {token for output in expected for token in output.outputs[0].token_ids}
    llm.get_tokenizer().bad_tokens = frozenset(seen - texts)
    assert llm.get_tokenizer().bad_tokens
    if streamed:
        last = {output.request_id: output for output in llm.stream(PROMPTS, params)}
        outputs = [last[name] for name in sorted(last, key=lambda name: int(name.split("-")[1]))]
    else:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert "no name" in outputs[1].error and outputs[1].finished
    assert [outputs[i].outputs for i in (0, 2)] == [expected[i].outputs for i in (0, 2)]


def test_what_cannot_be_tokenized_is_refused_alone(llm):
    llm.get_tokenizer().bad_text = "oops"
    expected = llm.generate("fine", GREEDY, use_tqdm=False)[0]
    good, bad = llm.serve(["fine", "oops"], GREEDY)
    assert good.outputs == expected.outputs
    assert "cannot be tokenized" in bad.error and "no such piece" in bad.error
    words = [GREEDY, GREEDY.replace(bad_words=("oops",))]
    good, bad = llm.serve(["fine", "fine"], words)
    assert good.outputs == expected.outputs and "'oops' cannot be tokenized" in bad.error
    with pytest.raises(RequestError, match="prompt 1"):
        llm.generate(["fine", "oops"], GREEDY, use_tqdm=False)


def test_options_that_the_engine_refuses(llm):
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    wrong = [GREEDY, GREEDY.replace(logit_bias={10**6: 1.0}), GREEDY.replace(temperature=1.0, seed=1)]
    outputs = llm.serve([*PROMPTS, [7] * 10**4], [*wrong, GREEDY])
    assert outputs[0].outputs == expected[0].outputs
    assert "outside the vocabulary" in outputs[1].error and "max_model_len" in outputs[3].error
    assert outputs[2].error is None


def test_a_callers_callback_that_raises_ends_its_call_and_no_other(llm):
    stream = llm.stream(PROMPTS[0], GREEDY.replace(max_tokens=20))
    first = next(stream)

    def broken(index, output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.serve(PROMPTS[1:], GREEDY.replace(max_tokens=2), on_output=broken)
    rest = list(stream)
    assert first.request_id == rest[-1].request_id and rest[-1].outputs[0].finish_reason == "length"
    assert len(rest[-1].outputs[0].token_ids) == 20


def test_logits_that_are_not_finite(llm, monkeypatch):
    """One row's logits: its request ends, and the next step's other rows are untouched."""
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    engine = llm._session.engine
    choice, calls = engine._choice, []

    def spoiled(logits, batch, kind):
        calls.append(len(logits))
        if len(calls) == 3:
            logits = logits.clone()
            logits[1] = float("nan")
        return choice(logits, batch, kind)

    spoiled.kind = choice.kind
    monkeypatch.setattr(engine, "_choice", spoiled)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    longest, spoilt, *others = sorted(range(3), key=lambda i: -len(PROMPTS[i]))  # as the step's rows are
    assert "not finite" in outputs[spoilt].error
    assert [outputs[i].outputs for i in (longest, *others)] == [expected[i].outputs for i in (longest, *others)]


class _Order:
    """Which request of a call ends when: one row at a time."""

    def __init__(self, llm) -> None:
        self.llm = llm

    def of(self, priority) -> list[int]:
        order: list[int] = []
        prompts = [[3, 4, 5 + i] for i in range(9)]
        self.llm.serve(prompts, GREEDY, on_output=lambda index, _: order.append(index), priority=priority)
        return order


def test_priority_decides_who_is_served_first(tiny_folder):
    llm = LLM(tiny_folder, **{**ENGINE_OPTIONS, "max_num_seqs": 1})
    assert _Order(llm).of(0) == list(range(9))
    assert _Order(llm).of([5, 4, 4, 9, 0, -2, 4, 4, 4]) == [5, 4, 1, 2, 6, 7, 8, 0, 3]
    # A stream's request waits for one that matters more, and comes before one that matters less.
    stream = llm.stream([1, 2, 3], GREEDY, priority=1)
    assert _Order(llm).of([0] * 8 + [2]) == list(range(9))
    assert list(stream)[-1].outputs[0].finish_reason == "length"
    for wrong in ("high", [0], [0] * 8 + [1.5]):
        with pytest.raises(ConfigError, match="priorit"):
            _Order(llm).of(wrong)


def test_priority_of_a_line(tmp_path, tiny_folder, capsys):
    from fusecomp import cli

    lines = [{"id": f"{p}-{i}", "prompt": "def read", "priority": p, "max_tokens": 3} for i, p in enumerate((3, 1, 2))]
    lines.append({"id": "wrong", "prompt": "x", "priority": "high"})
    source, partial = tmp_path / "in.jsonl", []
    source.write_text("\n".join(map(json.dumps, lines)))
    from fusecomp.output_file import OutputFile

    add = OutputFile.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "add", lambda self, index, record: (partial.append(record), add(self, index, record)))
        code = cli.main(
            ["generate", str(tiny_folder), "--prompts-file", str(source), "--output", str(tmp_path / "out.jsonl"),
             "--max-num-seqs", "1", "--device", "cpu", "--enforce-eager", "--temperature", "0"]
        )  # fmt: skip
    capsys.readouterr()
    assert code == cli.FAILED
    assert [record["id"] for record in partial if record["error"] is None] == ["1-1", "2-2", "3-0"]
    assert "priority is a str" in next(record["error"] for record in partial if record["id"] == "wrong")
