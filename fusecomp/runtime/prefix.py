"""Which sequences begin with blocks that others computed, and which wait for one in the making. No torch, no policy.

A block's content gets its name (`kv_cache.ContentNames`) when a step that computed it has run. Until then its *maker*,
the first of the running sequences that compute it, stands for it, so that a sequence with the same prefix can wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.sequence import SequenceState


class PrefixSharing:
    """Names the blocks of one scheduler's sequences and finds them again.

    Without `kv.prefix_caching` nothing is named, nothing found, and nobody waits.

    Attributes:
        makers: name of a block that a running sequence will have computed soon -> that sequence.
        queries: tokens of the sequences admitted for the first time.
        hits: those of them that were cached.
    """

    def __init__(self, kv: KVCacheManager) -> None:
        self._kv = kv
        self.makers: dict[bytes, SequenceState] = {}
        self.queries = 0
        self.hits = 0

    def cached(self, seq: SequenceState) -> list[int]:
        """Blocks that a waiting sequence could begin with. Its last token is computed in any case, for its logits."""
        if not self._kv.prefix_caching or not seq.takes_cached:
            return []
        most = self._most(seq)
        self._kv.names.extend(seq.names, seq.token_ids, most)
        return self._kv.find_prefix(seq.names, most)

    def waits(self, seq: SequenceState, cached: Sequence[int]) -> bool:
        """Whether the block after the cached ones is being computed by a sequence of no lower priority."""
        if not self.makers or not seq.takes_cached or len(cached) >= self._most(seq):
            return False
        maker = self.makers.get(seq.names[len(cached)])
        return maker is not None and maker.priority <= seq.priority

    def begin(self, seq: SequenceState, cached: Sequence[int]) -> None:
        """An admitted sequence takes the `cached` blocks, and makes those full ones of its known tokens that follow."""
        kv = self._kv
        kv.adopt(seq.request_id, cached)
        seq.num_named = len(cached)
        seq.num_computed_tokens = len(cached) * kv.block_size
        if not kv.prefix_caching:
            return
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed_tokens
            self.queries += len(seq.token_ids)
            self.hits += seq.num_computed_tokens
        full = len(seq.token_ids) // kv.block_size
        kv.names.extend(seq.names, seq.token_ids, full)
        for name in seq.names[len(cached) : full]:
            self.makers.setdefault(name, seq)

    def name(self, seq: SequenceState, num_tokens: int) -> None:
        """Let others find the full blocks of the first `num_tokens` tokens."""
        kv, makers = self._kv, self.makers
        full = num_tokens // kv.block_size
        if full <= seq.num_named or not kv.prefix_caching:
            return
        kv.names.extend(seq.names, seq.token_ids, full)
        for index in range(seq.num_named, full):
            name = seq.names[index]
            kv.pool.name(seq.blocks[index], name)
            if makers and makers.get(name) is seq:
                del makers[name]
        seq.num_named = full

    def leave(self, seq: SequenceState, *, forget: bool) -> None:
        """A sequence stops running: what it computed stays to be found, unless it is to be forgotten."""
        if not forget:
            self.name(seq, seq.num_computed_tokens)
        for name in seq.names[seq.num_named :]:
            if self.makers.get(name) is seq:
                del self.makers[name]

    def _most(self, seq: SequenceState) -> int:
        return (len(seq.token_ids) - 1) // self._kv.block_size
