"""What the command line says about results: each as text, and all together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from fusecomp.files import PromptLine
from fusecomp.request import RequestOutput

MAX_REPORTED = 10


def print_result(line: PromptLine, result: RequestOutput) -> None:
    """One prompt with its completions, for people."""
    if result.error is not None:
        print(f"=== {line.id}: error\n{result.error}\n")
        return
    prompt = line.prompt if isinstance(line.prompt, str) else ""
    for completion in result.outputs:
        name = f"{line.id}" if len(result.outputs) == 1 else f"{line.id}, completion {completion.index + 1}"
        text = completion.text or f"token ids {completion.token_ids}"
        print(f"=== {name}: {len(completion.token_ids)} tokens, {completion.finish_reason}\n{prompt}{text}\n")


def summarize(lines: Sequence[PromptLine], results: Sequence[RequestOutput], seconds: float, resumed: int) -> int:
    """Print errors and totals to stderr; returns how many prompts failed.

    Args:
        resumed: results that an earlier run had finished, besides these.
    """
    failed = [(line, result) for line, result in zip(lines, results, strict=True) if result.error is not None]
    for line, result in failed[:MAX_REPORTED]:
        print(f"fusecomp: prompt {line.id} failed: {one_line(result.error)}", file=sys.stderr)
    if len(failed) > MAX_REPORTED:
        print(f"fusecomp: and {len(failed) - MAX_REPORTED} more", file=sys.stderr)
    served = [result for result in results if result.error is None]
    tokens_in = sum(len(result.prompt_token_ids) for result in served)
    tokens_out = sum(len(completion.token_ids) for result in served for completion in result.outputs)
    rate = max(seconds, 1e-9)
    earlier = f", {resumed} kept from an earlier run" if resumed else ""
    print(
        f"fusecomp: {len(served)} of {len(lines)} prompts served, {len(failed)} failed, in {seconds:.2f} s{earlier}: "
        f"{tokens_in} prompt tokens, {tokens_out} output tokens, {tokens_in / rate:.1f} prompt tok/s, "
        f"{tokens_out / rate:.1f} output tok/s",
        file=sys.stderr,
    )
    first = sorted(
        result.metrics.time_to_first_token
        for result in served
        if result.metrics is not None and result.metrics.time_to_first_token is not None
    )
    if first:
        shares = ", ".join(f"p{share} {percentile(first, share):.3f} s" for share in (50, 90, 99))
        print(f"fusecomp: time to first token: {shares}", file=sys.stderr)
    return len(failed)


def percentile(ordered: Sequence[float], share: int) -> float:
    """The least value that `share` percent of the values do not exceed; `ordered` ascending, not empty."""
    return ordered[max(0, -(-share * len(ordered) // 100) - 1)]


def one_line(message: Any) -> str:
    """A message without its line breaks."""
    return " ".join(str(message).split())
