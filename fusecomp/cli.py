"""The command line: `fusecomp generate MODEL`, `fusecomp explain MODEL` and `fusecomp quantize MODEL OUT`.

Exit codes: 0 all served; 1 a model could not be loaded or some prompts failed; 2 wrong usage; 130 interrupted.
Errors are one line on stderr (`--debug` adds the traceback). Results go to stdout or `--output`, all else to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fusecomp import __version__
from fusecomp.config import DTYPES, FUSE_MODES, QUANTIZE_SCHEMES, VERIFY_MODES, EngineConfig
from fusecomp.errors import ConfigError, FusecompError
from fusecomp.files import FORMATS, PromptLine, apply_chat_template, as_conversations, read_prompts, record_of
from fusecomp.imports import fast_imports
from fusecomp.output_file import OutputFile
from fusecomp.request import RequestOutput, SamplingParams
from fusecomp.summary import one_line, print_result, summarize

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Flag -> field of SamplingParams; `--seed` is an engine option (the seed of requests that bring none).
SAMPLING_FLAGS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": int, "help": "most tokens to generate (default 16)"},
    "temperature": {"type": float, "help": "0 is greedy (default: generation_config.json when it samples, else 1)"},
    "top_k": {"type": int, "help": "keep the k most likely tokens; 0 keeps all"},
    "top_p": {"type": float, "help": "keep the smallest set of this probability; 1 keeps all"},
    "min_p": {"type": float, "help": "keep tokens with this share of the greatest probability; 0 keeps all"},
    "typical_p": {"type": float, "help": "keep the most typical tokens of this probability; 1 keeps all"},
    "repetition_penalty": {"type": float, "help": "divide logits of tokens that occurred; 1 is none"},
    "presence_penalty": {"type": float, "help": "subtract from logits of tokens of the output; 0 is none"},
    "frequency_penalty": {"type": float, "help": "the same, for each time they occur; 0 is none"},
    "n": {"type": int, "help": "completions of each prompt (default 1)"},
    "min_tokens": {"type": int, "help": "fewest tokens to generate (default 0)"},
    "logprobs": {"type": int, "metavar": "K", "help": "log-probabilities of each token and of the K most likely"},
    "prompt_logprobs": {"type": int, "metavar": "K", "help": "the same for the prompt's tokens"},
    "ignore_eos": {"action": "store_true", "default": None, "help": "do not stop at end-of-sequence ids"},
}


class UsageError(Exception):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="fusecomp", description="LLM inference of unmodified Hugging Face models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fusecomp {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)

    generate = verbs.add_parser("generate", help="complete prompts", allow_abbrev=False)
    generate.set_defaults(run=run_generate, parser=generate)
    _add_common(generate)
    generate.add_argument("--tokenizer", metavar="FOLDER", help="default: the model's")
    prompts = generate.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    prompts.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, or JSONL; - is standard input")
    files = generate.add_argument_group("files")
    files.add_argument("--format", choices=FORMATS, help="of the prompts file (default: by its name or first line)")
    files.add_argument("--output", metavar="FILE", help="write JSONL here instead of text to stdout")
    files.add_argument("--resume", action="store_true", help="keep what an interrupted run for --output has finished")
    files.add_argument("--chat", action="store_true", help="texts are messages of a user, for the chat template")
    files.add_argument("--metrics-file", metavar="FILE", help="write Prometheus metrics here at the end")
    sampling = generate.add_argument_group("sampling")
    for name, settings in SAMPLING_FLAGS.items():
        sampling.add_argument(_flag(name), **settings)
    sampling.add_argument(
        "--stop-token-id", type=int, action="append", dest="stop_token_ids", metavar="ID", help="may be repeated"
    )
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends an output; may be repeated")
    _add_engine_options(generate)

    explain = verbs.add_parser("explain", help="show what is fused in a model, what is not and why", allow_abbrev=False)
    explain.set_defaults(run=run_explain, parser=explain)
    _add_common(explain)
    explain.add_argument("--json", action="store_true", help="print the whole report as JSON")
    explain.add_argument("--memory", action="store_true", help="instead, plan the memory; nothing is loaded")
    explain.add_argument("--gpu-memory", type=int, metavar="BYTES", help="of the card to plan for (default: this one)")
    _add_engine_options(explain)

    quantize = verbs.add_parser("quantize", help="write a checkpoint of codes", allow_abbrev=False)
    quantize.set_defaults(run=run_quantize, parser=quantize)
    _add_common(quantize)
    quantize.add_argument("out", metavar="OUT", help="the folder to make; it appears when it is whole")
    quantize.add_argument("--scheme", required=True, choices=QUANTIZE_SCHEMES, help="what weights become")
    text = quantize.add_mutually_exclusive_group()
    text.add_argument("--calibration", metavar="FILE", help="text for int8 and int4 (default: the package's own)")
    text.add_argument("--no-calibration", action="store_true", help="round to nearest: faster, less accurate")
    quantize.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    quantize.add_argument("--device", metavar="NAME", default="auto", help="where it is computed (default auto)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        options = _parse(arguments)
        return options.run(options)
    except (UsageError, ConfigError) as error:
        return _fail(error, USAGE, debug)
    except KeyboardInterrupt:
        print("fusecomp: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (FusecompError, OSError) as error:
        return _fail(error, FAILED, debug)
    except Exception as error:  # a bug, or a library's: still one line
        return _fail(f"{type(error).__name__}: {error} (--debug shows the traceback)", FAILED, debug)


def run_generate(options: argparse.Namespace) -> int:
    """`fusecomp generate`."""
    engine_options = _engine_options(options)
    given = {name: getattr(options, name) for name in (*SAMPLING_FLAGS, "stop_token_ids", "stop")}
    sampling = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**sampling)  # refuses wrong values before minutes of loading
    if options.prompt is not None:
        if options.format is not None:
            raise UsageError("--format is for --prompts-file")
        lines = [PromptLine(number, text) for number, text in enumerate(options.prompt, start=1)]
    else:
        lines = read_prompts(options.prompts_file, options.format)
    if options.resume and options.output is None:
        raise UsageError("--resume is for --output")
    if options.chat:
        as_conversations(lines)
    output = OutputFile(options.output) if options.output is not None else None
    try:
        todo = output.resume(lines) if output is not None and options.resume else list(range(len(lines)))
        results, seconds = _serve(options, engine_options, sampling, lines, todo, output) if todo else ([], 0.0)
        if output is not None:
            output.commit()
    except BaseException:
        if output is not None and (kept := output.abandon()):
            print(f"fusecomp: {kept} of {len(lines)} results are in {output.partial}", file=sys.stderr)
        raise
    served = [lines[index] for index in todo]
    if output is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        for line, result in zip(served, results, strict=True):
            print_result(line, result)
        sys.stdout.flush()
    return FAILED if summarize(served, results, seconds, output.resumed if output is not None else 0) else 0


def run_explain(options: argparse.Namespace) -> int:
    """`fusecomp explain`."""
    engine_options = _engine_options(options)
    if options.gpu_memory is not None and not options.memory:
        raise UsageError("--gpu-memory is for --memory")
    if options.memory:
        return _explain_memory(options, EngineConfig(**engine_options))
    with _keeping_interrupts(), fast_imports(own_process=True):
        from fusecomp.api import explain

    report = explain(options.model, **engine_options)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.summary())
    return 0


def run_quantize(options: argparse.Namespace) -> int:
    """`fusecomp quantize`."""
    with _keeping_interrupts(), fast_imports(own_process=True):
        from fusecomp.api import quantize

    record = quantize(
        options.model,
        options.out,
        options.scheme,
        calibration=() if options.no_calibration else options.calibration,
        overwrite=options.overwrite,
        device=options.device,
    )
    for weight in record.weights:
        print(f"+ {weight.name}: {weight.detail}")
    for name, reason in record.left_out:
        print(f"- {name}: {reason}")
    for note in record.notes:
        print(f"note: {note}")
    print(f"fusecomp: {options.out}: {record.summary()}", file=sys.stderr)
    return 0


def _explain_memory(options: argparse.Namespace, config: EngineConfig) -> int:
    if options.gpu_memory is not None and options.gpu_memory < 1:
        raise UsageError(f"--gpu-memory {options.gpu_memory}: give the bytes of a card")
    with _keeping_interrupts(), fast_imports(own_process=True):
        from fusecomp.runtime.plan import plan_memory

    plan = plan_memory(options.model, config, options.gpu_memory)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else plan.summary())
    return 0


def _serve(
    options: argparse.Namespace,
    engine_options: dict[str, Any],
    sampling: dict[str, Any],
    lines: list[PromptLine],
    todo: list[int],
    output: OutputFile | None,
) -> tuple[list[RequestOutput], float]:
    """The results of the lines at `todo`, and the seconds they took."""
    with _keeping_interrupts(), fast_imports(own_process=True):
        from fusecomp.api import LLM

    llm = LLM(options.model, tokenizer=options.tokenizer, **engine_options)
    base = llm.get_default_sampling_params().replace(**sampling)
    chosen = [lines[index] for index in todo]
    apply_chat_template(chosen, llm.get_tokenizer())
    start = time.perf_counter()

    def keep(position: int, result: RequestOutput) -> None:
        if output is not None:
            output.add(todo[position], record_of(chosen[position], result))

    try:
        results = llm.serve(
            [line.prompt if line.prompt is not None else "" for line in chosen],
            [line.params(base) for line in chosen],
            errors="return",
            use_tqdm=True,
            on_output=keep,
            priority=[line.priority for line in chosen],
        )
    finally:
        if options.metrics_file is not None:
            Path(options.metrics_file).write_text(llm.metrics.prometheus(str(options.model)), encoding="utf-8")
    return results, time.perf_counter() - start


@contextmanager
def _keeping_interrupts() -> Iterator[None]:
    """Raise a Ctrl-C of this block at its end when something in it caught that, as imports of libraries do."""
    seen: list[int] = []

    def interrupt(signum: int, frame: Any) -> NoReturn:
        seen.append(signum)
        raise KeyboardInterrupt

    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt


def _parse(arguments: list[str]) -> argparse.Namespace:
    options, extras = build_parser().parse_known_args(arguments)
    if extras:
        unknown = next((extra for extra in extras if extra.startswith("--")), extras[0]).split("=")[0]
        flags = [flag for action in options.parser._actions for flag in action.option_strings if flag.startswith("--")]
        near = difflib.get_close_matches(unknown, flags, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see fusecomp {options.verb} --help"
        kind = "option" if unknown.startswith("-") else "argument"
        raise UsageError(f"unknown {kind} {unknown}: {hint}")
    return options


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `EngineConfig`, with the field's own documentation."""
    group = parser.add_argument_group("engine")
    documentation = re.sub(r"\s+", " ", (EngineConfig.__doc__ or "").split("Attributes:")[-1])
    names = [f.name for f in dataclasses.fields(EngineConfig)]
    starts = {name: documentation.index(f" {name}: ") for name in names}
    kinds = typing.get_type_hints(EngineConfig)
    choices = {"dtype": DTYPES, "verify": VERIFY_MODES, "fuse": FUSE_MODES, "quantize": QUANTIZE_SCHEMES}
    for f in dataclasses.fields(EngineConfig):
        end = min((start for start in starts.values() if start > starts[f.name]), default=None)
        text = documentation[starts[f.name] :][: None if end is None else end - starts[f.name]]
        text = text.split(": ", 1)[1].strip().rstrip(".").replace("%", "%%")
        settings: dict[str, Any] = {"default": None, "help": f"{text} (default {f.default})"}
        if kinds[f.name] == tuple[str, ...]:
            settings |= {"type": _names, "metavar": "NAME,NAME"}
        elif kinds[f.name] is bool and f.default:
            settings["action"] = argparse.BooleanOptionalAction
        elif kinds[f.name] is bool:
            settings["action"] = "store_true"
        else:
            kind = next(k for k in (typing.get_args(kinds[f.name]) or (kinds[f.name],)) if k is not type(None))
            settings |= {"type": kind, "choices": choices.get(f.name)}
            if f.name not in choices:
                settings["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(_flag(f.name), **settings)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """The engine options given, checked before the model is loaded."""
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(EngineConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    EngineConfig(**given)
    return given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _fail(error: Any, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fusecomp: error: {one_line(error)}", file=sys.stderr)
    return code
