"""The command line: files in and out, exit codes, what goes to which stream."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from fusecomp import cli
from fusecomp.config import EngineConfig

pytestmark = pytest.mark.xdist_group("cli")
ENGINE = ["--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager", "--device", "cpu"]
ENGINE += ["--kv-cache-bytes", str(1 << 20)]
GREEDY = ["--temperature", "0", "--max-tokens", "6"]


@pytest.fixture
def run(tiny_folder, capsys):
    """Run a verb on the tiny model; gives exit code, stdout and stderr."""

    def call(verb, *arguments, model=tiny_folder, engine=ENGINE):
        code = cli.main([verb, str(model), *arguments, *engine])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def expect(tiny_folder, tiny_tokenizer):
    """Token ids and text that stock generate gives for a text or ids."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    def call(prompt, count=6):
        ids = tiny_tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=count)[0, len(ids) :].tolist()
        return tokens, tiny_tokenizer.decode(tokens, skip_special_tokens=True)

    return call


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_to_readable_text(run, expect):
    code, out, err = run("generate", "--prompt", "def read", "--prompt", "import os", *GREEDY)
    assert code == 0
    for number, prompt in enumerate(("def read", "import os"), start=1):
        assert f"=== {number}: 6 tokens, length\n{prompt}{expect(prompt)[1]}\n" in out
    assert "2 of 2 prompts served, 0 failed" in err and "12 output tokens" in err and "2/2" in err


def test_text_file_to_jsonl(run, expect, tmp_path):
    prompts = ["def read", "import os", "naïve — 語"]
    (tmp_path / "in.txt").write_text("\r\n".join(prompts) + "\r\n", encoding="utf-8-sig")
    code, out, _ = run(
        "generate", "--prompts-file", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.jsonl"), *GREEDY
    )
    assert code == 0 and out == ""
    for number, (prompt, record) in enumerate(zip(prompts, records(tmp_path / "out.jsonl"), strict=True), start=1):
        tokens, text = expect(prompt)
        assert record == {
            "id": number,
            "prompt": prompt,
            "text": text,
            "token_ids": tokens,
            "finish_reason": "length",
            "error": None,
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_jsonl_with_ids_token_ids_and_options(run, expect, tmp_path):
    lines = [
        {"id": "a", "prompt": "def read", "max_tokens": 2},
        {"id": {"row": 7}, "prompt_token_ids": [5, 6, 7]},
        {"prompt": "import", "temperature": 1.0, "seed": 4, "top_k": 1},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, _, _ = run(
        "generate", "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), *GREEDY
    )
    first, second, third = records(tmp_path / "out")
    assert code == 0
    assert first["id"] == "a" and first["token_ids"] == expect("def read", 2)[0]
    assert second["id"] == {"row": 7} and second["prompt"] == [5, 6, 7] and second["token_ids"] == expect([5, 6, 7])[0]
    assert third["id"] == 3 and third["token_ids"] == expect("import")[0]


BAD_LINES = [
    (b"not json", "line 2: invalid JSON"),
    (b"[1]", "line 3: a JSON list, not an object"),
    (b'{"prompt": ""}', "the prompt is empty"),
    (b"", "line 5: invalid JSON"),
    (b'{"id": "x"}', "line 6: neither prompt, prompt_token_ids nor messages"),
    (b'{"prompt": "a", "prompt_token_ids": [1]}', "line 7: both prompt and prompt_token_ids"),
    (b'{"prompt": 5}', "line 8: prompt is a int"),
    (b'{"prompt": "a", "max_token": 5}', "line 9: unknown option 'max_token'. Remedy: did you mean 'max_tokens'?"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature=nan"),
    (b'{"prompt": "a", "top_p": Infinity}', "top_p=inf"),
    (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature=1000"),
    (b'{"prompt": "a", "seed": 1.5}', "seed=1.5"),
    (b'{"prompt_token_ids": []}', "the prompt is empty"),
    (b'{"prompt_token_ids": [1, 999999]}', "token id 999999 is outside the vocabulary"),
    (b'{"prompt_token_ids": ["a"]}', "type list"),
    (json.dumps({"prompt_token_ids": [5] * 64}).encode(), "max_model_len"),
    (b'{"prompt": "\\ud800"}', "line 18: the prompt holds half of a surrogate pair"),
    (b'{"prompt": "\xff"}', "line 19: invalid JSON"),
    (b"[" * 100_000, "line 20: "),
]


def test_bad_lines_carry_their_error_and_lose_no_other(run, expect, tmp_path):
    lines = [b'{"prompt": "def read"}', *(line for line, _ in BAD_LINES), b'{"prompt": "import os"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    code, _, err = run(
        "generate", "--prompts-file", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out"), *GREEDY
    )
    assert code == 1
    first, *bad, last = records(tmp_path / "out")
    assert first["token_ids"] == expect("def read")[0] and last["token_ids"] == expect("import os")[0]
    for record, (line, message) in zip(bad, BAD_LINES, strict=True):
        assert message in record["error"], line[:60]
        assert record["text"] is None and record["finish_reason"] == "error"
    assert f"2 of {len(lines)} prompts served, {len(BAD_LINES)} failed" in err
    assert "prompt 2 failed: line 2: invalid JSON" in err and f"and {len(BAD_LINES) - 10} more" in err


def test_extreme_but_valid_lines_are_served(run, tmp_path):
    """Values beyond the engine's number types mean what the largest ones do; an id that is no JSON is still told."""
    lines = ['{"prompt": "import os", "temperature": 1e300}', '{"prompt": "a", "temperature": 1, "top_k": 1' + "0" * 30]
    lines = [lines[0], lines[1] + "}", '{"prompt": "b", "id": NaN}', '{"prompt": "b", "stop_token_ids": [1' + "0" * 30]
    lines[3] += '], "seed": -1' + "0" * 30 + "}"
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = ["--output", str(tmp_path / "out")]
    code, _, err = run("generate", "--prompts-file", str(tmp_path / "in.jsonl"), *output, "--max-tokens", "6")
    assert code == 0, err
    assert [len(record["token_ids"]) for record in records(tmp_path / "out")] == [6, 6, 6, 6]
    assert records(tmp_path / "out")[2]["id"] == "NaN"


def test_a_pipe_is_not_replaced(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run("generate", "--prompt", "a", "--output", str(tmp_path / "pipe"))
    assert code == 2 and "pipe: is not a regular file" in err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_link_is_written_through(run, tmp_path):
    (tmp_path / "target").write_text("earlier")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert run("generate", "--prompt", "a", "--output", str(tmp_path / "link"), *GREEDY)[0] == 0
    assert (tmp_path / "link").is_symlink() and len(records(tmp_path / "target")) == 1


def test_a_failed_run_keeps_what_an_earlier_one_left(run, tmp_path):
    (tmp_path / "out.partial").write_text("earlier\n")
    output = ["--output", str(tmp_path / "out")]
    assert run("generate", "--prompt", "a", *output, model=tmp_path / "absent")[0] == 1
    assert (tmp_path / "out.partial").read_text() == "earlier\n"
    assert run("generate", "--prompt", "a", *output, *GREEDY)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(records(tmp_path / "out")) == 1


def test_too_long_is_told_without_internal_names(run):
    code, out, err = run("generate", "--prompt", "x" * 300, *GREEDY)
    assert code == 1 and "=== 1: error\nthe prompt has " in out and "request-" not in out + err


def test_the_module_runs_the_command_line():
    call = [sys.executable, "-m", "fusecomp", "--version"]
    assert subprocess.run(call, check=True, capture_output=True, text=True).stdout.startswith("fusecomp ")


def test_bad_lines_of_a_text_file(run, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"import os\n\n\xff\xfe\n" + b"x" * 300 + b"\n")
    code, out, err = run("generate", "--prompts-file", str(tmp_path / "in.txt"), *GREEDY)
    assert code == 1
    assert "=== 1: 6 tokens" in out and "=== 2: error" in out and "=== 3: error" in out and "=== 4: error" in out
    assert "the prompt is empty" in err and "line 3: not UTF-8" in err and "max_model_len" in err
    assert "1 of 4 prompts served, 3 failed" in err


@pytest.mark.parametrize(
    "case",
    [
        (b'{"prompt": "import os"}\n', [], ["import os"]),
        (b"import os\n{x\n", [], ["import os", "{x"]),
        (b'{"prompt": "a"}\n', ["--format", "text"], ['{"prompt": "a"}']),
    ],
)
def test_standard_input(run, monkeypatch, tmp_path, case):
    data, arguments, prompts = case
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, _, _ = run("generate", "--prompts-file", "-", "--output", str(tmp_path / "out"), *arguments, *GREEDY)
    assert code == 0
    assert [record["prompt"] for record in records(tmp_path / "out")] == prompts


def test_stop_token_and_ignore_eos_reach_the_request(run, expect):
    tokens, _ = expect("import os")
    stop = next(token for token in tokens[1:] if token not in tokens[:1])
    code, out, _ = run("generate", "--prompt", "import os", "--stop-token-id", str(stop), "--ignore-eos", *GREEDY)
    assert code == 0 and f"=== 1: {tokens.index(stop) + 1} tokens, stop" in out


def test_seed_is_the_engines(run, capsys):
    def sample(seed):
        return run("generate", "--prompt", "import os", "--temperature", "2", "--seed", seed)[1]

    assert sample("1") == sample("1") != sample("2")


def test_output_is_not_replaced_before_it_is_whole(run, tmp_path, monkeypatch):
    """An interrupted run leaves an earlier output alone and what it finished in a partial file, and says so."""
    from fusecomp.api import LLM

    target = tmp_path / "out.jsonl"
    target.write_text("earlier\n")
    serve = LLM.serve

    def interrupted(self, *args, on_output, **kwargs):
        def once(index, output):
            on_output(index, output)
            raise KeyboardInterrupt

        return serve(self, *args, on_output=once, **kwargs)

    monkeypatch.setattr(LLM, "serve", interrupted)
    code, _, err = run("generate", "--prompt", "a", "--prompt", "b", "--output", str(target), *GREEDY)
    assert code == 130
    assert target.read_text() == "earlier\n"
    assert len(records(tmp_path / "out.jsonl.partial")) == 1
    assert f"1 of 2 results are in {target}.partial" in err and "interrupted" in err


def test_an_interrupt_that_a_library_catches_is_not_lost():
    with pytest.raises(KeyboardInterrupt), cli._keeping_interrupts(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failure_before_any_result_leaves_no_file(run, tmp_path):
    code, _, _ = run("generate", "--prompt", "a", "--output", str(tmp_path / "out"), model=tmp_path / "absent")
    assert code == 1 and list(tmp_path.iterdir()) == []


def test_explain(run):
    code, out, err = run("explain")
    assert code == 0 and "attention" in out and "error" not in err
    code, out, _ = run("explain", "--json")
    assert code == 0 and isinstance(json.loads(out), dict)


def test_every_engine_field_has_a_documented_flag(capsys):
    for verb in ("generate", "explain"):
        with pytest.raises(SystemExit) as caught:
            cli.main([verb, "--help"])
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for field in dataclasses.fields(EngineConfig):
            assert "--" + field.name.replace("_", "-") in text
            assert f"(default {field.default})" in text
    parser = cli.build_parser()
    options = parser.parse_args(["explain", "m", "--gpu-memory-utilization", "0.5", "--max-model-len", "9", "--strict"])
    assert (options.gpu_memory_utilization, options.max_model_len, options.strict) == (0.5, 9, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "m", "--prompt", "a", "--max-token", "3"],
            "unknown option --max-token: did you mean --max-tokens?",
        ),
        (["generate", "m", "--prompt", "a", "--zzz"], "unknown option --zzz: see fusecomp generate --help"),
        (["generate", "m", "--prompt", "a", "--block-sizes=16"], "did you mean --block-size?"),
        (["generate", "m", "extra", "--prompt", "a"], "unknown argument extra"),
        (["generate", "m"], "one of the arguments --prompt --prompts-file is required"),
        (["generate", "m", "--prompt", "a", "--prompts-file", "f"], "not allowed with"),
        (["generate", "m", "--prompt", "a", "--format", "text"], "--format is for --prompts-file"),
        (["generate", "m", "--prompt", "a", "--resume"], "--resume is for --output"),
        (["generate", "m", "--prompt", "a", "--min-p", "2"], "min_p=2.0"),
        (["generate", "--prompt", "a"], "MODEL"),
        (["generat", "m"], "generat"),
        ([], "VERB"),
        (["generate", "m", "--prompt", "a", "--temperature", "nan"], "temperature=nan"),
        (["generate", "m", "--prompt", "a", "--top-p", "0"], "top_p=0"),
        (["generate", "m", "--prompt", "a", "--max-tokens", "0"], "max_tokens=0"),
        (["generate", "m", "--prompt", "a", "--max-tokens", "many"], "--max-tokens: invalid int value"),
        (["generate", "m", "--prompt", "a", "--block-size", "7"], "block_size=7"),
        (["generate", "m", "--prompt", "a", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "m", "--prompts-file", "absent.txt"], "absent.txt: cannot be read"),
        (["generate", "m", "--prompts-file", "/dev/null"], "holds no prompts"),
        (["generate", "m", "--prompt", "a", "--output", "/absent/out"], "/absent/out.partial: cannot be written"),
        (["generate", "m", "--prompt", "a", "--output", "/tmp"], "/tmp: is a folder"),
        (["generate", "m", "--prompt", "a", "--output", ""], "is a folder"),
        (["generate", "m", "--prompt", "a", "--tokenizer", "/absent"], "'/absent': no tokenizer files found"),
        (["generate", "m", "--prompt", "a", "--device", "meta"], "device='meta'"),
        (["explain", "m", "--gpu-memory-utilization", "2"], "gpu_memory_utilization is 2.0"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(capsys, arguments, message):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusecomp: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["explain", "m", "--debug", "--block-size", "7"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("fusecomp: error: ")


def test_a_bug_is_still_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_engine_options", lambda options: 1 / 0)
    assert cli.main(["explain", "m"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "ZeroDivisionError" in err and "--debug" in err
