"""What a batch is gathered from: on the host, one line per running sequence, with its blocks and what is sampled by.

A line is `SequenceState.row`. Lines are brought up to date by comparing admission numbers and block counts, so nothing
depends on having seen every step.

Legend: S lines, P pages of a sequence, B page size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusecomp.runtime.sequence import SequenceState
from fusecomp.runtime.step_batch import needs_of

# Parameters beyond these mean what these mean: a uniform draw, and all tokens.
_FLOAT32_MAX, _INT32_MAX = float(np.finfo(np.float32).max), int(np.iinfo(np.int32).max)
SAMPLING = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seeds": np.int64}


class Lines:
    """The lines of the sequences that run.

    Args:
        count: S.
        max_blocks_per_seq: P.
        block_size: B.
        seed: engine seed. A request without a seed draws from this and its order of arrival.
        on_enter: called with each newly admitted sequence.

    Attributes:
        blocks: [S, P] int32.
        sampling: the lists of `SAMPLING`, [S] each.
        needs: [S] int64, `needs_of` each.
        logprobs: [S] int64: how many are wanted, -1 for none.
    """

    def __init__(
        self,
        count: int,
        max_blocks_per_seq: int,
        block_size: int,
        seed: int,
        on_enter: Callable[[SequenceState], None] | None,
    ) -> None:
        self._max_blocks, self._block_size = max_blocks_per_seq, block_size
        self._seed, self._on_enter = seed, on_enter
        self.blocks = np.zeros((count, max_blocks_per_seq), np.int32)
        self._blocks_flat = self.blocks.reshape(-1)
        self._admission = [-1] * count
        self._num_blocks = [0] * count
        self.sampling = {name: np.zeros(count, dtype) for name, dtype in SAMPLING.items()}
        self.needs = np.zeros(count, np.int64)
        self.logprobs = np.full(count, -1, np.int64)

    def update(self, seq: SequenceState, count: int) -> int:
        """Bring a sequence of `count` blocks up to date; how many of them its line had before."""
        row = seq.row
        if self._admission[row] != seq.admission:
            self._enter(seq)
        known = self._num_blocks[row]
        if known != count:
            assert count <= self._max_blocks, f"{seq.request_id!r} holds {count} blocks"
            self.blocks[row, known:count] = seq.blocks[known:]
            self._num_blocks[row] = count
        return known

    def slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """KV slots of tokens at `positions` of the sequences in `rows`; int64."""
        pages, offsets = np.divmod(positions, self._block_size)
        return self._blocks_flat[rows * self._max_blocks + pages].astype(np.int64) * self._block_size + offsets

    def _enter(self, seq: SequenceState) -> None:
        """Start the line of a newly admitted sequence."""
        row, params = seq.row, seq.params
        self._admission[row] = seq.admission
        self._num_blocks[row] = 0
        self.sampling["temperature"][row] = min(params.temperature, _FLOAT32_MAX)
        self.sampling["top_k"][row] = min(max(params.top_k, 0), _INT32_MAX)
        self.sampling["top_p"][row] = params.top_p
        self.sampling["seeds"][row] = self._request_seed(seq)
        self.needs[row] = needs_of(params)
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if self._on_enter is not None:
            self._on_enter(seq)

    def _request_seed(self, seq: SequenceState) -> int:
        """The request's own seed, or one per arrival, wrapped to int64. The sampler does the mixing."""
        seed = seq.params.seed
        if seed is None:
            seed = self._seed * 0x9E3779B97F4A7C15 + seq.arrival + 1
        return (seed + 2**63) % 2**64 - 2**63
