"""The offline script over files: resumed after any interruption, conversations, completions, scores and metrics."""

from __future__ import annotations

import json
import re

import pytest

from fusecomp import cli
from fusecomp.api import LLM
from fusecomp.output_file import OutputFile
from fusecomp.summary import percentile
from tests.test_cli import GREEDY, expect, records, run  # noqa: F401  (fixtures)

PROMPTS = [{"id": f"line {i}", "prompt": "def read"[: i + 1], "max_tokens": 2 + i % 3} for i in range(8)]


@pytest.fixture
def files(tmp_path):
    """Prompts, and the arguments that complete them into out.jsonl."""
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    arguments = ["--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl", [*arguments, *GREEDY]


@pytest.fixture
def interrupted(monkeypatch):
    """Make the next run end by Ctrl-C after as many results."""
    serve = LLM.serve

    def after(count):
        def interrupting(self, *args, on_output, **kwargs):
            left = [count]

            def counted(index, output):
                on_output(index, output)
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

            return serve(self, *args, on_output=counted, **kwargs)

        monkeypatch.setattr(LLM, "serve", interrupting)
        return lambda: monkeypatch.setattr(LLM, "serve", serve)

    return after


def counting(monkeypatch):
    """Lists that get the prompts of every call to `serve`."""
    served, serve = [], LLM.serve

    def noting(self, prompts, *args, **kwargs):
        served.append(list(prompts))
        return serve(self, prompts, *args, **kwargs)

    monkeypatch.setattr(LLM, "serve", noting)
    return served


def test_resumed_runs_repeat_and_lose_nothing(run, files, interrupted, monkeypatch):  # noqa: F811
    _, out, arguments = files
    code, _, _ = run("generate", *arguments)
    assert code == 0
    expected = records(out)
    out.unlink()
    partial = out.with_name("out.jsonl.partial")
    for count, kept in ((3, 3), (2, 5)):
        undo = interrupted(count)
        code, _, err = run("generate", *arguments, "--resume")
        undo()
        assert code == 130 and len(records(partial)) == kept and f"{kept} of 8 results are in" in err
        assert not out.exists()
    finished = {record["prompt"] for record in records(partial)}
    served = counting(monkeypatch)
    code, _, err = run("generate", *arguments, "--resume")
    assert code == 0 and "3 of 3 prompts served" in err and "5 kept from an earlier run" in err
    assert sorted(served[0]) == sorted({line["prompt"] for line in PROMPTS} - finished)
    assert records(out) == expected and not partial.exists()
    # A run that was complete is taken as it is, without loading the model.
    code, _, err = run("generate", *arguments, "--resume", model="/absent")
    assert code == 0 and len(served) == 1 and records(out) == expected


def test_without_resume_everything_is_done_again(run, files, interrupted, monkeypatch):  # noqa: F811
    _, out, arguments = files
    undo = interrupted(3)
    run("generate", *arguments)
    undo()
    served = counting(monkeypatch)
    assert run("generate", *arguments)[0] == 0
    assert len(served[0]) == 8 and len(records(out)) == 8


def test_what_a_killed_run_left_is_taken_line_by_line(run, files, monkeypatch):  # noqa: F811
    """A cut last line, foreign and failed records, prompts that changed: only what still holds is kept."""
    source, out, arguments = files
    run("generate", *arguments)
    whole = out.read_text().splitlines(keepends=True)
    out.unlink()
    failed = json.dumps({**json.loads(whole[1]), "error": "out of luck", "text": None})
    changed = json.dumps({**json.loads(whole[2]), "prompt": "another"})
    foreign = json.dumps({"id": "nobody", "prompt": "x", "error": None})
    left = [
        whole[0],
        failed + "\n",
        changed + "\n",
        foreign + "\n",
        "{}\n",
        "[1]\n",
        "not json\n",
        whole[4],
        whole[5][:-9],
    ]
    out.with_name("out.jsonl.partial").write_text("".join(left))
    served = counting(monkeypatch)
    code, _, err = run("generate", *arguments, "--resume")
    assert code == 0 and "2 kept from an earlier run" in err
    assert served[0] == [PROMPTS[i]["prompt"] for i in (1, 2, 3, 5, 6, 7)]
    assert out.read_text().splitlines(keepends=True) == whole
    # Lines that are new in the prompts file are done, those that are gone are dropped.
    source.write_text("\n".join(map(json.dumps, [*PROMPTS[2:], {"id": 99, "prompt": "import"}])))
    code, _, err = run("generate", *arguments, "--resume")
    assert code == 0 and served[1] == ["import"] and "6 kept" in err
    assert [record["id"] for record in records(out)] == [*(line["id"] for line in PROMPTS[2:]), 99]


def test_a_resumed_run_keeps_what_it_took_when_it_fails_itself(run, files, interrupted):  # noqa: F811
    _, out, arguments = files
    undo = interrupted(3)
    run("generate", *arguments)
    undo()
    partial = out.with_name("out.jsonl.partial")
    before = partial.read_text()
    assert run("generate", *arguments, "--resume", model="/absent")[0] == 1
    assert partial.read_text() == before


def test_ids_that_repeat_cannot_be_resumed(run, files):  # noqa: F811
    source, _, arguments = files
    source.write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    code, _, err = run("generate", *arguments, "--resume")
    assert code == 2 and "ids of prompts repeat" in err


def test_records_are_on_disk_as_soon_as_they_are_added(tmp_path):
    output = OutputFile(str(tmp_path / "out"))
    output.add(3, {"id": 3})
    assert (tmp_path / "out.partial").read_text() == '{"id": 3}\n'
    output.abandon()


# ---------------------------------------------------------------------- conversations

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def chatty(tiny_copy):
    (tiny_copy / "chat_template.jinja").write_text(TEMPLATE)
    return tiny_copy


def test_conversations_take_the_tokenizers_template(run, expect, chatty, tiny_tokenizer, tmp_path):  # noqa: F811
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    lines = [
        {"messages": talk},
        {"prompt": "a"},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": []},
        {"messages": talk, "prompt": "both"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), *GREEDY]
    code, _, _ = run("generate", *arguments, model=chatty)
    first, plain, refused, *bad = records(tmp_path / "out")
    ids = tiny_tokenizer.encode("<s>user: a</s><s>assistant: b</s><s>user: c</s><s>assistant: ")
    assert code == 1 and first["prompt"] == ids and first["messages"] == talk
    assert (first["token_ids"], first["text"]) == expect(ids)
    assert plain["token_ids"] == expect("a")[0] and "messages" not in plain
    assert "no system here" in refused["error"]
    assert [("conversation" in record["error"] or "both" in record["error"]) for record in bad] == [True] * 3
    # With --chat a text is what a user says.
    code, _, _ = run("generate", "--chat", *arguments, model=chatty)
    plain = records(tmp_path / "out")[1]
    assert plain["token_ids"] == expect(tiny_tokenizer.encode("<s>user: a</s><s>assistant: "))[0]
    assert plain["messages"] == [{"role": "user", "content": "a"}]


def test_chat_without_a_template_is_refused(run):  # noqa: F811
    code, _, err = run("generate", "--chat", "--prompt", "a")
    assert code == 2 and "no chat template" in err


def test_chat_runs_resume(run, chatty, tmp_path, interrupted):  # noqa: F811
    (tmp_path / "in.txt").write_text("a\nb\nc\n")
    arguments = ["--chat", "--prompts-file", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), *GREEDY]
    undo = interrupted(2)
    run("generate", *arguments, model=chatty)
    undo()
    code, _, err = run("generate", *arguments, "--resume", model=chatty)
    assert code == 0 and "1 of 1 prompts served" in err and "2 kept" in err
    assert [record["messages"][0]["content"] for record in records(tmp_path / "out")] == ["a", "b", "c"]


# ---------------------------------------------------------------------- completions, scores, options, metrics


def test_completions_and_scores_are_in_the_records(run, tmp_path):  # noqa: F811
    options = ["--n", "3", "--temperature", "1.5", "--max-tokens", "4", "--logprobs", "2", "--prompt-logprobs", "1"]
    code, _, err = run("generate", "--prompt", "import os", "--output", str(tmp_path / "out"), *options)
    (record,) = records(tmp_path / "out")
    assert code == 0 and "12 output tokens" in err
    assert len(record["outputs"]) == 3 and record["outputs"][0]["token_ids"] == record["token_ids"]
    assert len({tuple(each["token_ids"]) for each in record["outputs"]}) > 1
    assert [row[0]["id"] for row in record["logprobs"]] == record["token_ids"]
    assert record["prompt_logprobs"][0] is None and all(len(row) in (1, 2) for row in record["prompt_logprobs"][1:])
    assert all(row[0]["logprob"] <= 0 and row[0]["rank"] >= 1 for row in record["logprobs"])


def test_several_completions_are_printed(run):  # noqa: F811
    _, out, _ = run("generate", "--prompt", "import os", "--n", "2", "--temperature", "1.5", "--max-tokens", "3")
    assert "=== 1, completion 1: 3 tokens" in out and "=== 1, completion 2: 3 tokens" in out


def test_options_reach_the_request(run, expect):  # noqa: F811
    _, text = expect("import os")
    first = re.search(r"[ -~]", text)[0]
    _, out, _ = run("generate", "--prompt", "import os", "--stop", first, "--stop", "zzz", *GREEDY)
    assert f", stop\nimport os{text[: text.index(first)]}" in out
    _, out, _ = run("generate", "--prompt", "import os", "--repetition-penalty", "30", *GREEDY)
    assert f"import os{text}\n" not in out


def test_summary_tells_rates_and_times(run):  # noqa: F811
    _, _, err = run("generate", "--prompt", "import os", "--prompt", "def", *GREEDY)
    assert re.search(r"[\d.]+ prompt tok/s, [\d.]+ output tok/s", err)
    assert re.search(r"time to first token: p50 [\d.]+ s, p90 [\d.]+ s, p99 [\d.]+ s", err)


def test_percentiles():
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (1, 50, 90, 99)] == [1, 50, 90, 99]
    assert [percentile([4.0], share) for share in (50, 99)] == [4.0, 4.0]


def test_metrics_are_written_also_after_an_interruption(run, tmp_path, interrupted):  # noqa: F811
    target = tmp_path / "metrics.prom"
    assert run("generate", "--prompt", "import os", "--metrics-file", str(target), *GREEDY)[0] == 0
    assert re.search(r'^vllm:generation_tokens_total\{engine="0",model_name=".*"\} 6.0$', target.read_text(), re.M)
    target.unlink()
    undo = interrupted(1)
    assert run("generate", "--prompt", "a", "--metrics-file", str(target), *GREEDY)[0] == 130
    undo()
    assert "vllm:request_success_total" in target.read_text()
    assert cli.main(["generate", "m", "--prompt", "a", "--metrics-fil", "x"]) == 2
