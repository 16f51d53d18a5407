"""A model without weights for testing the runtime: the next token is a hash of all tokens so far.

It keeps a paged cache of its own and reads the tokens back through the block tables, so a token that was never written,
was overwritten, or belongs to another sequence changes the output or fails an assertion. As in a transformer, what is
kept of a token depends on all tokens before it: the same tokens after another prefix are something else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

from fusecomp.request import SamplingParams
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.scheduler import KNOWN, ScheduledStep, Scheduler, SequenceState
from fusecomp.runtime.sequence import UNKNOWN_TOKEN

VOCAB = 13
EOS = frozenset({5})


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def alone(prompt: Sequence[int], params: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """Output and finish reason by the definition of the stop rules."""
    tokens = list(prompt)
    while True:
        token = next_token(tokens)
        tokens.append(token)
        count = len(tokens) - len(prompt)
        if token in params.stop_token_ids or (token in EOS and not params.ignore_eos):
            return tokens[len(prompt) :], "stop"
        if count == params.max_tokens or len(tokens) == max_model_len:
            return tokens[len(prompt) :], "length"


class PagedModel:
    """Runs a `ScheduledStep` on the sequences' own block lists."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[int, tuple[int, int]] = {}  # slot -> token, hash of all tokens up to it
        self.host: dict[int, list[tuple[int, int] | None]] = {}  # host block -> what its slots hold

    def __call__(self, step: ScheduledStep, continues: tuple[Sequence[int], Sequence[int]] | None = None) -> list[int]:
        """Run `step`; one that was scheduled ahead takes its tokens from those sampled before, as the engine does."""
        self.move(step)
        written: set[int] = set()
        for row, (seq, size, start, _) in enumerate(step.entries):
            slots = [self.slot(seq.blocks, at) for at in range(start, start + size)]
            assert written.isdisjoint(slots), "two rows write one slot"
            written.update(slots)
            sampled, rows = continues or ((), [])
            continuing = row < len(rows) and rows[row] != KNOWN
            tokens = [max(sampled[rows[row]], 0)] if continuing else seq.token_ids[start : start + size]
            assert UNKNOWN_TOKEN not in tokens
            for at, token in zip(range(start, start + size), tokens, strict=True):
                self.write(seq.blocks, at, token)
        for seq, _, start, _ in step.entries:
            # A kernel may read earlier keys before the step's own are written.
            assert written.isdisjoint(self.slot(seq.blocks, at) for at in range(start)), "a step reads what it writes"
        return [self.read(seq.blocks, start + size) for seq, size, start, _ in step.entries]

    def move(self, step: ScheduledStep) -> None:
        size = self.block_size
        for block, host in step.swap_out:
            assert host not in self.host, "a host block is taken twice"
            self.host[host] = [self.cache.get(block * size + at) for at in range(size)]
        for host, block in step.swap_in:
            for at, held in enumerate(self.host[host]):
                self.cache.pop(block * size + at, None)
                if held is not None:
                    self.cache[block * size + at] = held

    def write(self, blocks: Sequence[int], at: int, token: int) -> None:
        before = self.cache[self.slot(blocks, at - 1)][1] if at else 0
        self.cache[self.slot(blocks, at)] = token, zlib.crc32(bytes([token]), before)

    def slot(self, blocks: Sequence[int], at: int) -> int:
        return blocks[at // self.block_size] * self.block_size + at % self.block_size

    def read(self, blocks: Sequence[int], length: int) -> int:
        tokens, state = [], 0
        for at in range(length):
            token, kept = self.cache[self.slot(blocks, at)]
            state = zlib.crc32(bytes([token]), state)
            assert kept == state, f"token {at} was computed after another prefix"
            tokens.append(token)
        return next_token(tokens)


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams
    arrives: int
    aborted: int | None
    priority: int = 0


@dataclass(frozen=True)
class Scenario:
    """Requests with the step before which each arrives and is aborted, and an engine that each fits into alone."""

    requests: list[Request]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    prefix_caching: bool = False

    def scheduler(self) -> Scheduler:
        kv = KVCacheManager(self.num_blocks, self.block_size, prefix_caching=self.prefix_caching)
        return Scheduler(self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len, kv)

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)


@st.composite
def continued(draw: st.DrawFn, requests: Sequence[Request]) -> list[int]:
    """A prompt that begins as an earlier one did, or goes on with what it generates."""
    earlier = draw(st.sampled_from(requests)).prompt
    tokens = list(earlier)
    while len(tokens) < 30:
        tokens.append(next_token(tokens))
    return tokens[: draw(st.integers(1, 30))]


@st.composite
def scenarios(draw: st.DrawFn, aborts: bool = False) -> Scenario:
    max_model_len = 40
    requests: list[Request] = []
    prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
    prefix_caching = draw(st.booleans())
    for _ in range(draw(st.sampled_from([1, 2, 4, 5, 6, 8]))):
        params = SamplingParams(
            max_tokens=draw(st.sampled_from([None, 1, 2, 7, 12, 16, 20])),
            ignore_eos=draw(st.sampled_from([True, True, False])),
            stop_token_ids=draw(st.sampled_from([(), (), (3,)])),
            temperature=draw(st.sampled_from([0.0, 0.5, 1.0])),
            top_k=draw(st.sampled_from([-1, 0, 1, 4])),
            top_p=draw(st.sampled_from([0.5, 1.0])),
            seed=draw(st.none() | st.integers(-(2**63), 2**65)),
        )
        requests.append(
            Request(
                draw(prompts) if not requests or draw(st.booleans()) else draw(continued(requests)),
                params,
                draw(st.sampled_from([0, 0, 0, 1, 2, 5, 12])),
                draw(st.none() | st.integers(0, 30)) if aborts else None,
                draw(st.sampled_from([0, 0, 0, -1, 1])),
            )
        )
    max_num_seqs = draw(st.sampled_from([1, 2, 3, 4, 5]))
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    tightest = max(
        -(-(min(max_model_len, len(r.prompt) + (r.params.max_tokens or max_model_len)) - 1) // block_size)
        for r in requests
    )
    return Scenario(
        requests=requests,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 40)),
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=tightest + draw(st.sampled_from([0, 1, 2, 3, 60])),  # mostly so few that sequences preempt
        prefix_caching=prefix_caching,
    )


def simulate(
    scenario: Scenario,
    scheduler: Scheduler,
    on_step: Callable[[ScheduledStep], None],
    model: Callable[[ScheduledStep], Sequence[int]],
    eos_ids: Container[int] = EOS,
) -> list[SequenceState]:
    """Run the scenario to its end; the sequences in the order of its requests. Fails if it takes too many steps."""
    seqs = [SequenceState(str(i), r.prompt, r.params, r.priority) for i, r in enumerate(scenario.requests)]
    # Each step advances the first sequence in rank or one that runs beside it.
    bound = 50 + scenario.max_model_len * len(seqs) * (len(seqs) + 1)
    for number in range(bound):
        for seq, request in zip(seqs, scenario.requests, strict=True):
            if request.arrives == number:
                scheduler.add(seq)
        for seq, request in zip(seqs, scenario.requests, strict=True):
            if request.aborted == number:
                scheduler.abort(seq.request_id)
        step = scheduler.schedule()
        if step is None:
            if number > max(r.arrives for r in scenario.requests):
                return seqs
            continue
        on_step(step)
        scheduler.update(step, model(step), eos_ids)
    raise AssertionError(f"not done after {bound} steps")
