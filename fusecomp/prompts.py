"""Prompts and words as users give them, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusecomp.errors import RequestError
from fusecomp.request import SamplingParams


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts of a call, one or several in any of the forms that `LLM.generate` takes."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}", where="LLM.generate", remedy="give texts or token ids"
        )
    if prompts and all(isinstance(item, int) and not isinstance(item, bool) for item in prompts):
        return [list(prompts)]
    return list(prompts)


def prompt_token_ids(item: Any, tokenizer: Any, vocab_size: int | None) -> list[int]:
    """The token ids of one prompt: a text, ids, or vLLM's dictionary of either.

    Raises:
        RequestError: it cannot be served.
    """
    if isinstance(item, Mapping):
        keys = set(item) & {"prompt", "prompt_token_ids"}
        if not keys or set(item) - keys:
            raise RequestError(f"a prompt with keys {sorted(item)}", remedy='give "prompt" or "prompt_token_ids"')
        if "prompt_token_ids" in keys and isinstance(item["prompt_token_ids"], str):
            raise RequestError("prompt_token_ids is a text", remedy='give token ids, or a text as "prompt"')
        item = item["prompt_token_ids"] if "prompt_token_ids" in keys else item["prompt"]
    if isinstance(item, str):
        if not item:
            raise RequestError("the prompt is empty", remedy="give at least one character")
        if tokenizer is None:
            raise RequestError(
                "a text prompt, but the model has no tokenizer", remedy="give token ids, or LLM(tokenizer=...)"
            )
        try:
            item = tokenizer.encode(item)
        except Exception as error:  # text that is not Unicode, such as half a surrogate pair; tokenizers differ
            raise RequestError("the prompt cannot be tokenized", why=str(error), remedy="give valid text") from error
    if not isinstance(item, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in item):
        raise RequestError(f"a prompt of type {type(item).__name__}", remedy="give a text or a list of token ids")
    if not item:
        raise RequestError("the prompt is empty", remedy="give at least one token")
    outside = [i for i in item if i < 0 or (vocab_size is not None and i >= vocab_size)]
    if outside:
        raise RequestError(
            f"token id {outside[0]} is outside the vocabulary of {vocab_size}",
            remedy="use the tokenizer of this model",
        )
    return list(item)


def with_token_ids(params: SamplingParams, tokenizer: Any) -> SamplingParams:
    """`params` with bad words as token ids.

    As in vLLM a text is banned as it is tokenized, and as it is after a space when that is as many other tokens.

    Raises:
        RequestError: there is no tokenizer, for bad words or stop texts, or it refuses a word.
    """
    texts = [word for word in params.bad_words if isinstance(word, str)]
    if tokenizer is None and (texts or params.stop):
        raise RequestError(
            "bad_words or stop texts, but the model has no tokenizer", remedy="give token ids, or LLM(tokenizer=...)"
        )
    if not texts:
        return params
    words: list[tuple[int, ...]] = [word for word in params.bad_words if not isinstance(word, str)]
    for text in texts:
        try:
            plain, spaced = (
                tuple(tokenizer.encode(space + text.lstrip(), add_special_tokens=False)) for space in ("", " ")
            )
        except Exception as error:
            raise RequestError(f"the bad word {text!r} cannot be tokenized", why=str(error)) from error
        words += [plain] if plain else []
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            words.append(spaced)
    return params.replace(bad_words=tuple(words))
