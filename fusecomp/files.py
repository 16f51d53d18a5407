"""Prompt files in, records of their results out.

A bad line never loses the others: it becomes a `PromptLine` that carries its error. Nothing here imports torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusecomp.config import check_keys, is_int
from fusecomp.errors import ConfigError, FusecompError, RequestError
from fusecomp.request import Logprob, RequestOutput, SamplingParams

FORMATS = ("text", "jsonl")
LEAST_LOGPROB = -1e30  # JSON has no infinity
GIVEN = ("prompt", "prompt_token_ids", "messages")
RESERVED = ("id", "priority", *GIVEN)


@dataclass
class PromptLine:
    """One prompt with what its line says besides. `id` is the line's own, or its number from 1.

    `messages` is a conversation, which a tokenizer's chat template makes the prompt of. `priority`: a lower one goes
    first.
    """

    id: Any
    prompt: str | list[int] | None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    error: FusecompError | None = None
    priority: int = 0

    def params(self, base: SamplingParams) -> SamplingParams | FusecompError:
        """`base` with this line's own sampling options, or the error of the line."""
        if self.error is not None:
            return self.error
        try:
            return base.replace(**self.options)
        except ConfigError as error:
            return error


def read_prompts(path: str, file_format: str | None = None) -> list[PromptLine]:
    """The prompts of a file, one a line; `-` is standard input.

    Args:
        path: `.jsonl` holds objects with "prompt", "prompt_token_ids" or "messages", optional "id", "priority" and
            sampling options; any other file holds one prompt a line. Standard input counts as JSONL when its first line
            is a JSON object.
        file_format: "text" or "jsonl" overrides that.

    Raises:
        ConfigError: the file cannot be read or holds no line.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError("cannot be read", where=path, why=error.strerror or str(error), remedy="check it") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    if not lines:
        where = "standard input" if path == "-" else path
        raise ConfigError("holds no prompts", where=where, remedy="give one prompt a line")
    if file_format is None:
        file_format = "jsonl" if path.endswith(".jsonl") or (path == "-" and _is_object(lines[0])) else "text"
    parse = _parse_json if file_format == "jsonl" else _parse_text
    return [parse(number, line) for number, line in enumerate(lines, start=1)]


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def encodable(text: str) -> bool:
    """Whether a text can be written in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse_text(number: int, line: bytes) -> PromptLine:
    try:
        return PromptLine(number, line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _refused(number, number, "not UTF-8", str(error), "write the file in UTF-8")


def _parse_json(number: int, line: bytes) -> PromptLine:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _refused(number, number, "invalid JSON", str(error), "write one JSON object a line")
    if not isinstance(record, dict):
        return _refused(number, number, f"a JSON {type(record).__name__}, not an object", "", "write one object a line")
    line_id = record.get("id", number)
    given = [key for key in GIVEN if key in record]
    if len(given) != 1:
        what = f"both {' and '.join(given)}" if given else f"neither {', '.join(GIVEN[:-1])} nor {GIVEN[-1]}"
        return _refused(number, line_id, what, "", "give one of them")
    prompt = record[given[0]]
    if not isinstance(prompt, str if given[0] == "prompt" else list):
        return _refused(number, line_id, f"{given[0]} is a {type(prompt).__name__}", "", "give a text or a list")
    if not encodable(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)):
        return _refused(number, line_id, f"the {given[0]} holds half of a surrogate pair", "", "write valid Unicode")
    messages: Any = prompt if given[0] == "messages" else None
    if messages is not None and not (messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        return _refused(number, line_id, "messages are no conversation", "", 'give objects with "role" and "content"')
    options = {key: value for key, value in record.items() if key not in RESERVED}
    try:
        check_keys(SamplingParams, options, f"line {number}", also=RESERVED)
    except ConfigError as error:
        return PromptLine(line_id, None, error=error)
    if "output_kind" in options:
        return _refused(number, line_id, "output_kind is for streams", "", "leave it out")
    priority = record.get("priority", 0)
    if not is_int(priority):
        return _refused(number, line_id, f"priority is a {type(priority).__name__}", "", "give an integer")
    return PromptLine(line_id, None if messages is not None else prompt, options, messages, priority=priority)


def _refused(number: int, line_id: Any, what: str, why: str, remedy: str) -> PromptLine:
    return PromptLine(line_id, None, error=RequestError(what, where=f"line {number}", why=why, remedy=remedy))


def as_conversations(lines: list[PromptLine]) -> None:
    """Make each text a conversation of one message by the user, in place (`--chat`)."""
    for line in lines:
        if isinstance(line.prompt, str):
            line.messages, line.prompt = [{"role": "user", "content": line.prompt}], None


def apply_chat_template(lines: list[PromptLine], tokenizer: Any) -> None:
    """Make prompts of conversations, in place; a line whose conversation the template refuses carries the error.

    Raises:
        ConfigError: there is no template.
    """
    chats = [line for line in lines if line.messages is not None and line.error is None]
    if chats and getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("the tokenizer has no chat template", where="messages", remedy="give prompts, or --tokenizer")
    for line in chats:
        try:
            ids = tokenizer.apply_chat_template(
                line.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:  # templates raise what they like
            line.error = RequestError(
                "the chat template refuses the messages", why=str(error), remedy="see the template"
            )
        else:
            line.prompt = list(ids)


def record_of(line: PromptLine, output: RequestOutput) -> dict[str, Any]:
    """One line of an output file. A line with `n` above 1 has all its completions under "outputs"."""
    completion = output.outputs[0] if output.outputs else None
    record = {
        "id": line.id,
        "prompt": line.prompt if isinstance(line.prompt, str) else output.prompt_token_ids or line.prompt,
        "text": completion.text if completion else None,
        "token_ids": completion.token_ids if completion else None,
        "finish_reason": completion.finish_reason if completion else "error",
        "error": output.error,
    }
    if line.messages is not None:
        record["messages"] = line.messages
    if len(output.outputs) > 1:
        record["outputs"] = [
            {"text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in output.outputs
        ]
    if completion is not None and completion.logprobs is not None:
        record["logprobs"] = [_logprobs_record(found) for found in completion.logprobs]
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if p is None else _logprobs_record(p) for p in output.prompt_logprobs]
    return record


def _logprobs_record(found: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"id": token, "token": value.decoded_token, "logprob": max(value.logprob, LEAST_LOGPROB), "rank": value.rank}
        for token, value in found.items()
    ]
