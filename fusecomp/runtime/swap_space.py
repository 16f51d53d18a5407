"""Where preempted sequences keep their keys and values: blocks of host memory, and the choice against recompute.

Pure Python: what moves is a list of pairs, which the engine carries out before the step's kernels, first those out of
the device, then those into it. So a block that a victim gave up may be written in the step that preempted it.

A preempted sequence either moves out, all blocks of its computed tokens at once, or gives them up and is computed
again. It moves when there is room and when `worthwhile` says that moving both ways costs less. When it comes back,
blocks that are still found under their content are taken as ever, and those behind them are moved in; it goes on
where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusecomp.runtime.sequence import SequenceState

Moves = list[tuple[int, int]]


@dataclass(frozen=True)
class SwapCost:
    """What preemption by either way costs.

    Attributes:
        block_bytes: of one block in all layers.
        bytes_per_s: of a copy between device and host.
        tokens_per_s: of a prefill. That later tokens cost more, by their attention, is left out: it favours recompute.
    """

    block_bytes: int
    bytes_per_s: float
    tokens_per_s: float

    def worthwhile(self, tokens: int, blocks: int) -> bool:
        """Whether moving `blocks` out and in again takes less time than computing their `tokens` again."""
        return 2 * blocks * self.block_bytes / self.bytes_per_s < tokens / self.tokens_per_s


class SwapSpace:
    """`num_blocks` blocks of host memory and who has them.

    Attributes:
        moved_out, moved_in: blocks so far.
    """

    def __init__(self, num_blocks: int, block_size: int, worthwhile: Callable[[int, int], bool]) -> None:
        self.num_blocks, self._block_size, self._worthwhile = num_blocks, block_size, worthwhile
        self._free = list(reversed(range(num_blocks)))
        self._held: dict[str, tuple[list[int], int]] = {}  # request -> its blocks in order, tokens that they hold
        self._out: Moves = []
        self._in: Moves = []
        self.moved_out = self.moved_in = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_sequences(self) -> int:
        """Sequences that wait to be moved in."""
        return len(self._held)

    @property
    def usage(self) -> float:
        """Share of blocks in use, in [0, 1]."""
        return 1.0 - len(self._free) / self.num_blocks if self.num_blocks else 0.0

    def holds(self, request_id: str) -> tuple[list[int], int]:
        """Blocks of a request and the tokens in them; none of one that did not move."""
        return self._held.get(request_id, ([], 0))

    def move_out(self, seq: SequenceState) -> None:
        """Keep what a sequence computed, which is about to give its blocks up, if that is worthwhile and fits."""
        tokens = seq.num_computed_tokens
        count = -(-tokens // self._block_size)
        if not 0 < count <= len(self._free) or not self._worthwhile(tokens, count):
            return
        assert seq.request_id not in self._held, f"{seq.request_id!r} is out already"
        blocks = [self._free.pop() for _ in range(count)]
        self._held[seq.request_id] = blocks, tokens
        self._out += zip(seq.blocks, blocks, strict=False)
        self.moved_out += count

    def move_in(self, seq: SequenceState, allocate: Callable[[SequenceState, int], bool]) -> None:
        """Go on where a sequence was, which has just been admitted with the blocks that were found for it."""
        blocks, tokens = self._held.pop(seq.request_id, ([], 0))
        if tokens > seq.num_computed_tokens:
            found = seq.num_computed_tokens // self._block_size
            grown = allocate(seq, tokens)
            assert grown, f"{seq.request_id!r}: no blocks for a sequence that was admitted"
            self._in += zip(blocks[found:], seq.blocks[found:], strict=False)
            self.moved_in += len(blocks) - found
            seq.num_computed_tokens = tokens
        self._free += reversed(blocks)

    def drop(self, request_id: str) -> None:
        """A sequence ended."""
        blocks, _ = self._held.pop(request_id, ([], 0))
        self._free += reversed(blocks)

    def take_moves(self) -> tuple[Moves, Moves]:
        """(device block, host block) out and (host block, device block) in, since the last call."""
        moves = self._out, self._in
        self._out, self._in = [], []
        return moves
