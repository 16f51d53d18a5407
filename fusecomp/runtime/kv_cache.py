"""Who owns which page of the KV cache, and what full pages hold. Pure Python: the tensors belong to the engine.

Units: a *block* (page) holds `block_size` token slots; token `t` of a request lives in slot `t % block_size` of the
request's block number `t // block_size`.

Sharing: the keys and values of a full block are a function of its tokens and of all tokens before them, and nothing
else (docs/architecture.md says why). A block's *content* is a name of exactly these (`ContentNames`). A request begins
with the blocks found under the names of its prompt; no other way leads to a second owner.

Invariants, checked by `tests/properties/test_kv_cache.py`:
    - A block is free exactly when its reference count is 0. A free block keeps its content until it is taken anew:
      blocks without content are taken first, then the least recently used.
    - A block with a content, and so every shared one, is full, and nobody writes to it: there is nothing to copy on
      write. What follows a shared prefix starts in a block of its own, and is computed again if it was cached there.
    - At most one block is known by a content.
    - While a request lives its block list only grows at the end; freeing it returns every block.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict, deque
from collections.abc import Container, Sequence
from hashlib import blake2b
from itertools import islice
from struct import Struct


class ContentNames:
    """Names of full blocks: 128 bits of a hash over the name of the block before and the block's token ids.

    Ids are not stored to be compared: among 10^9 blocks two names are equal with a probability below 10^-20, and to
    make two equal ones on purpose takes 2^64 hashes with a secret that is drawn per engine and never leaves it. The
    secret also keeps engines apart whose settings give other values.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._root = secrets.token_bytes(16)
        self._bytes = Struct(f"16s{block_size}q").pack

    def extend(self, names: list[bytes], token_ids: Sequence[int], num_blocks: int) -> None:
        """Append the names of a sequence's next blocks until there are `num_blocks`; their tokens must be known."""
        size = self._block_size
        assert num_blocks * size <= len(token_ids), f"block {num_blocks - 1} is not full"
        name = names[-1] if names else self._root
        for start in range(len(names) * size, num_blocks * size, size):
            name = blake2b(self._bytes(name, *token_ids[start : start + size])).digest()[:16]
            names.append(name)


class BlockPool:
    """`num_blocks` reference-counted blocks, ids `0 .. num_blocks - 1`. Every operation is O(1).

    Misuse (freeing a free block, allocating from an empty pool) is a bug of the caller and fails an assertion.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._contents: list[bytes | None] = [None] * num_blocks
        self._by_content: dict[bytes, int] = {}
        # Free blocks: those without content, and those with, least recently used first.
        self._blank = deque(range(num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._kept)

    @property
    def num_known(self) -> int:
        """Blocks that can be found by content, in use or free."""
        return len(self._by_content)

    def ref_count(self, block: int) -> int:
        return self._refs[block]

    def allocate(self) -> int:
        """Take a free block, which loses its content; its count becomes 1."""
        if self._blank:
            block = self._blank.popleft()
        else:
            assert self._kept, "allocate from an empty pool"
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        assert self._refs[block] == 0, f"free block {block} has {self._refs[block]} owners"
        self._refs[block] = 1
        return block

    def find(self, content: bytes) -> int | None:
        """The block with this content."""
        return self._by_content.get(content)

    def find_content(self, block: int) -> bytes | None:
        """The content that a block is found by."""
        return self._contents[block]

    def name(self, block: int, content: bytes) -> None:
        """Say what a full block in use holds. Nothing changes when another block is known by it already."""
        assert self._refs[block] > 0, f"block {block} is free"
        if content not in self._by_content:
            assert self._contents[block] is None, f"block {block} changed its content"
            self._contents[block] = content
            self._by_content[content] = block

    def share(self, block: int) -> None:
        """Add an owner to a block in use, or to a free one that was found by its content."""
        if self._refs[block] == 0:
            assert block in self._kept, f"block {block} is free"
            del self._kept[block]
        self._refs[block] += 1

    def free(self, block: int) -> None:
        """Remove an owner; the last one returns the block."""
        assert self._refs[block] > 0, f"block {block} is already free"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._contents[block] is None:
                self._blank.append(block)
            else:
                self._kept[block] = None

    def forget(self, block: int) -> None:
        """Let no further request find the block; owners keep it."""
        self._forget(block)
        if block in self._kept:
            del self._kept[block]
            self._blank.append(block)

    def forget_all(self) -> None:
        """Let no request find any block that was written so far."""
        for block in list(self._by_content.values()):
            self.forget(block)

    def _forget(self, block: int) -> None:
        content, self._contents[block] = self._contents[block], None
        if content is not None:
            del self._by_content[content]


class KVCacheManager:
    """Block lists of live requests.

    A request is known from its first `adopt` or `allocate` until `free`.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens per block.
        block_bytes: bytes of one block over all layers, for messages; 0 when unknown.
        prefix_caching: share blocks by content. Without it every block has one owner and is blank when free.
    """

    def __init__(self, num_blocks: int, block_size: int, block_bytes: int = 0, *, prefix_caching: bool = False) -> None:
        assert block_size >= 1, block_size
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.prefix_caching = prefix_caching
        self.names = ContentNames(block_size)
        self.pool = BlockPool(num_blocks)
        self._blocks: dict[str, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks, those included that still hold what they held."""
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

    def find_prefix(self, names: Sequence[bytes], most: int) -> list[int]:
        """The blocks that hold the first tokens of a sequence, as many as are known, at most `most`."""
        blocks: list[int] = []
        find = self.pool.find
        for name in islice(names, most):
            if (block := find(name)) is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks`, found by content, are free: to adopt them takes so many free ones."""
        return sum(self.pool.ref_count(block) == 0 for block in blocks)

    def num_private(self, request_id: str, but: Container[int] = ()) -> int:
        """Blocks not in `but` that become free when the request gives its blocks up."""
        return sum(self.pool.ref_count(block) == 1 and block not in but for block in self._blocks[request_id])

    def adopt(self, request_id: str, blocks: Sequence[int]) -> None:
        """Begin a request with `blocks`, just found for it: it becomes one of their owners."""
        assert request_id not in self._blocks, f"request {request_id!r} exists"
        for block in blocks:
            self.pool.share(block)
        self._blocks[request_id] = list(blocks)

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
        return True

    def append_block(self, blocks: list[int]) -> bool:
        """`allocate` of one more block for a request, given its live list. Called for many decodes a step."""
        if not self.pool.num_free:
            return False
        blocks.append(self.pool.allocate())
        return True

    def block_ids(self, request_id: str) -> list[int]:
        """The request's blocks in token order. The live list: it grows with `allocate`; callers only read it."""
        return self._blocks[request_id]

    def free(self, request_id: str, *, forget: bool = False) -> None:
        """Give up the request's blocks, last first: later tokens are the least likely to be wanted again.

        With `forget`, what the request holds is not to be trusted, and no block of it is found any more.
        """
        for block in reversed(self._blocks.pop(request_id)):
            if forget:
                self.pool.forget(block)
            self.pool.free(block)
