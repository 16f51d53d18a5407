"""The state of one sequence, and the rows of one step: what scheduler, batch builder and engine hand to each other."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fusecomp.request import RequestMetrics, SamplingParams

# The sampler's answer for a row whose logits are not finite.
INVALID_TOKEN = -1
# Stands in `token_ids` for the token that a step in flight samples.
UNKNOWN_TOKEN = -2


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence from arrival to end. The caller gives the first five fields; the scheduler owns the rest.

    Attributes:
        priority: a lower number goes first.
        takes_cached: whether it may begin with blocks that others computed. Not when logits of its prompt are wanted.
        token_ids: prompt and output, in one list.
        num_computed_tokens: leading tokens whose keys and values are in the cache.
        finish_reason: "stop", "length", "abort", "error" (logits not finite), or None while it lives.
        arrival: order of `Scheduler.add`, from 0.
        rank: (priority, arrival).
        row: while running, a number below `max_num_seqs` that no other running sequence has.
        admission: number of the latest move to running. Within one admission `row` is fixed and `blocks` only grows.
        blocks: the block manager's live list while running; read only.
        num_slots: tokens that fit into `blocks`.
        max_total_tokens: prompt and output length at which the sequence ends with "length".
        num_preemptions: times it lost its blocks.
        num_cached_tokens: leading tokens that it did not have to compute when it was first admitted.
        names: of its first full blocks, as far as they were asked for.
        num_named: leading blocks that the block manager knows by content, or knows another block for.
        metrics: when things happened to it; the engine's.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0
    takes_cached: bool = True
    token_ids: list[int] = field(default_factory=list, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    status: Status = field(default=Status.WAITING, init=False)
    finish_reason: str | None = field(default=None, init=False)
    arrival: int = field(default=-1, init=False)
    rank: tuple[int, int] = field(default=(0, -1), init=False)
    row: int = field(default=-1, init=False)
    admission: int = field(default=-1, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    num_slots: int = field(default=0, init=False)
    max_total_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    names: list[bytes] = field(default_factory=list, init=False)
    num_named: int = field(default=0, init=False)
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(0.0), init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """A copy of the generated ids, an end-of-sequence or stop token included."""
        return self.token_ids[len(self.prompt_ids) :]


class ScheduledEntry(NamedTuple):
    """One row of a step: tokens `start .. start + num_new_tokens` of `seq`; `samples` if they reach its last one."""

    seq: SequenceState
    num_new_tokens: int
    start: int
    samples: bool


@dataclass(slots=True)
class ScheduledStep:
    """The rows of one step, decodes first, the longest before others. Parallel lists, one item a row, because the
    batch builder reads columns.

    Attributes:
        seqs: the sequence of each row.
        starts: position of each row's first new token (tokens already cached).
        num_new_tokens: new tokens of each row; 1 for the first `num_decodes` rows.
        samples: whether the token sampled for the row counts.
        num_decodes: rows that decode.
        num_tokens: sum of `num_new_tokens`.
        num_preempted: sequences that lost their blocks to this step.
        swap_out, swap_in: (device block, host block) and (host block, device block) to be copied before it, in this
            order.
    """

    seqs: list[SequenceState]
    starts: list[int]
    num_new_tokens: list[int]
    samples: list[bool]
    num_decodes: int
    num_tokens: int
    num_preempted: int
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    swap_in: list[tuple[int, int]] = field(default_factory=list)

    @property
    def decode_only(self) -> bool:
        return self.num_decodes == len(self.seqs)

    @property
    def entries(self) -> Iterator[ScheduledEntry]:
        return map(ScheduledEntry, self.seqs, self.num_new_tokens, self.starts, self.samples)
