"""Who owns which page of the KV cache. Pure Python: the tensors belong to the engine.

Units: a *block* (page) holds `block_size` token slots; token `t` of a request lives in slot `t % block_size` of the
request's block number `t // block_size`.

Invariants, checked by `tests/properties/test_kv_cache.py`:
    - A block is in the free list exactly when its reference count is 0.
    - A block with several owners is full: nothing is written to it any more. Sharing a prefix, whether by `fork` or by
      content (which only has to find full blocks and `share` them before a request's first `allocate`), keeps this.
    - While a request lives its block list only grows at the end; freeing it returns every block.
"""

from __future__ import annotations

from collections import deque


class BlockPool:
    """`num_blocks` reference-counted blocks, ids `0 .. num_blocks - 1`. Every operation is O(1).

    Misuse (freeing a free block, allocating from an empty pool) is a bug of the caller and fails an assertion.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        # Oldest freed first: a freed block's content survives as long as possible, which reuse by content needs.
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def allocate(self) -> int:
        """Take a free block; its count becomes 1."""
        assert self._free, "allocate from an empty pool"
        block = self._free.popleft()
        assert self._refs[block] == 0, f"free block {block} has {self._refs[block]} owners"
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add an owner to a block in use."""
        assert self._refs[block] > 0, f"block {block} is free"
        self._refs[block] += 1

    def free(self, block: int) -> None:
        """Remove an owner; the last one returns the block."""
        assert self._refs[block] > 0, f"block {block} is already free"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free.append(block)


class KVCacheManager:
    """Block lists of live requests.

    A request is known from its first `allocate` (or `fork`) until `free`.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        block_bytes: bytes of one block over all layers, for messages; 0 when unknown.
    """

    def __init__(self, num_blocks: int, block_size: int, block_bytes: int = 0) -> None:
        assert block_size >= 1, block_size
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.pool = BlockPool(num_blocks)
        self._blocks: dict[str, list[int]] = {}
        self._num_tokens: dict[str, int] = {}

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self.pool.num_free

    @property
    def usage(self) -> float:
        """Share of blocks in use, in [0, 1]."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps partly."""
        return -(-num_tokens // self.block_size)

    def slots_needed(self, request_id: str, up_to_tokens: int) -> int:
        """Slots missing for the first `up_to_tokens` tokens, beyond the blocks the request holds (0 if none)."""
        return max(0, up_to_tokens - len(self._blocks.get(request_id, ())) * self.block_size)

    def can_allocate(self, request_id: str, up_to_tokens: int) -> bool:
        """Whether `allocate` with the same arguments would succeed."""
        return self.blocks_for(self.slots_needed(request_id, up_to_tokens)) <= self.pool.num_free

    def allocate(self, request_id: str, up_to_tokens: int) -> bool:
        """Grow the request so that its first `up_to_tokens` tokens have slots. All or nothing: False if out of blocks.

        Declares that tokens up to there are about to be written. It never shrinks a request.
        """
        missing = self.blocks_for(self.slots_needed(request_id, up_to_tokens))
        if missing > self.pool.num_free:
            return False
        blocks = self._blocks.setdefault(request_id, [])
        for _ in range(missing):
            blocks.append(self.pool.allocate())
        self._num_tokens[request_id] = max(up_to_tokens, self._num_tokens.get(request_id, 0))
        return True

    def block_ids(self, request_id: str) -> list[int]:
        """The request's blocks in token order. The live list: it grows with `allocate`; callers only read it."""
        return self._blocks[request_id]

    def fork(self, parent: str, child: str) -> list[tuple[int, int]] | None:
        """Make `child` a request with the same tokens as `parent`.

        Full blocks are shared. A partly filled last block would be written by both, so the child gets its own.

        Returns: the `(source, destination)` blocks the engine has to copy before the next step (at most one), or None,
            with nothing changed, when there is no free block for the copy.
        """
        assert child not in self._blocks, f"request {child!r} exists"
        blocks = self._blocks[parent]
        num_tokens = self._num_tokens[parent]
        num_full = num_tokens // self.block_size
        partial = num_tokens % self.block_size != 0
        if partial and not self.pool.num_free:
            return None
        mine = blocks[:num_full]
        for block in mine:
            self.pool.share(block)
        copies = []
        if partial:
            mine.append(self.pool.allocate())
            copies.append((blocks[num_full], mine[num_full]))
        self._blocks[child] = mine
        self._num_tokens[child] = num_tokens
        return copies

    def free(self, request_id: str) -> None:
        """Give up the request's blocks, last first: later tokens are the least likely to be wanted again."""
        del self._num_tokens[request_id]
        for block in reversed(self._blocks.pop(request_id)):
            self.pool.free(block)
