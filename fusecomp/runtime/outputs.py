"""What the engine gives back after a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fusecomp.request import RequestMetrics
from fusecomp.runtime.flight import Flight
from fusecomp.runtime.scheduler import SequenceState


@dataclass(slots=True)
class StepOutput:
    """What one step gave one request.

    `scores` are packed log-probabilities of the new token, `prompt_scores` those of prompt tokens, the first of them at
    index `prompt_start` (`runtime/logprobs.py`). `metrics` are the request's own object.
    """

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    scores: np.ndarray | None = None
    prompt_start: int = 0
    prompt_scores: np.ndarray | None = None
    metrics: RequestMetrics | None = None


def step_outputs(flight: Flight, advanced: Sequence[SequenceState]) -> list[StepOutput]:
    """The outputs of a step whose tokens were read: scores of prompt tokens, then what `Scheduler.update` returned."""
    outputs = []
    if flight.prompt is not None:
        found, at = flight.prompt_scores(), 0
        for request_id, first, count in flight.prompt.slices:
            outputs.append(StepOutput(request_id, prompt_start=first, prompt_scores=found[at : at + count]))
            at += count
    scores = flight.scores()
    rows = {} if scores is None else {seq.request_id: i for i, seq in enumerate(flight.step.seqs)}
    for seq in advanced:
        if seq.finish_reason == "error":
            why = "no token can be drawn: the model's logits are not finite, or every token is banned"
            outputs.append(StepOutput(seq.request_id, [], "error", why, metrics=seq.metrics))
            continue
        output = StepOutput(seq.request_id, [seq.token_ids[-1]], seq.finish_reason, metrics=seq.metrics)
        if scores is not None and seq.params.logprobs is not None:
            output.scores = scores[rows[seq.request_id]]
        outputs.append(output)
    return outputs
