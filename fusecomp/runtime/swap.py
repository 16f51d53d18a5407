"""The host's blocks of keys and values, and the copies between them and the KV cache; who moves: `swap_space.py`.

A host block is one row: the block of every layer, one after the other, so that it moves in one copy. On a GPU the rows
are pinned. Blocks are gathered into a staging buffer by the step's own stream, at the memory's speed, and leave it by a
stream of their own: the step that needs their place does not wait for the bus, unless more moves than two buffers hold.
Blocks that come in are waited for by the step that reads them, on the device. The host waits for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError
from fusecomp.runtime.swap_space import Moves, SwapCost, SwapSpace

STAGE_BYTES = 32 << 20  # of each of two buffers, at least one block
TRIAL_BYTES = 64 << 20  # that are moved to measure the bus
WORD = 8


class HostBlocks:
    """`num_blocks` blocks of host memory for one engine's KV tensors.

    Args:
        kv_caches: contiguous, blocks first.
    """

    def __init__(self, kv_caches: Sequence[Tensor], num_blocks: int) -> None:
        device = kv_caches[0].device
        self._cuda = device.type == "cuda"
        rows = [cache.view(len(cache), -1).view(torch.uint8) for cache in kv_caches]
        if all(row.shape[1] % WORD == 0 for row in rows):  # fewer elements to gather
            rows = [row.view(torch.int64) for row in rows]
        self._layers = rows
        width, dtype = sum(row.shape[1] for row in rows), rows[0].dtype
        self._host = torch.empty(num_blocks, width, dtype=dtype, pin_memory=self._cuda)
        self._staged = max(1, STAGE_BYTES // (width * dtype.itemsize))
        count = 2 if self._cuda else 1
        self._stages = [torch.empty(self._staged, width, dtype=dtype, device=device) for _ in range(count)]
        self._turn = 0
        if self._cuda:
            self._copies = torch.cuda.Stream(device)
            self._done = [torch.cuda.Event() for _ in range(count)]  # the latest use of each buffer

    def move(self, out: Moves, into: Moves) -> None:
        """Carry out a step's moves; to be called before its kernels are launched, on their stream."""
        for pairs in self._parts(out):
            blocks, hosts = (list(side) for side in zip(*pairs, strict=True))
            stage = self._next_stage(len(pairs))
            self._gather(blocks, stage)
            with self._copying():
                for first, last, at in _runs(hosts):
                    self._host[at : at + last - first].copy_(stage[first:last], non_blocking=True)
            self._used(self._copies if self._cuda else None)
        for pairs in self._parts(into):
            hosts, blocks = (list(side) for side in zip(*pairs, strict=True))
            stage = self._next_stage(len(pairs))
            with self._copying():
                for first, last, at in _runs(hosts):
                    stage[first:last].copy_(self._host[at : at + last - first], non_blocking=True)
            if self._cuda:
                torch.cuda.current_stream().wait_stream(self._copies)
            self._scatter(stage, blocks)
            self._used(torch.cuda.current_stream() if self._cuda else None)

    def bytes_per_s(self) -> float:
        """Measured rate of copies out of the device, and of rows that hold nothing yet."""
        count = max(1, min(len(self._host), self._staged, TRIAL_BYTES // (self._host.shape[1] * self._host.itemsize)))
        moved = count * self._host.shape[1] * self._host.itemsize
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._host[:count].copy_(self._stages[0][:count])
            times.append(time.perf_counter() - start)
        return moved / max(min(times), 1e-9)

    def _parts(self, pairs: Moves) -> Iterator[Moves]:
        for first in range(0, len(pairs), self._staged):
            yield pairs[first : first + self._staged]

    def _next_stage(self, count: int) -> Tensor:
        """A buffer that both streams may use from here on."""
        self._turn = (self._turn + 1) % len(self._stages)
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._done[self._turn])
        return self._stages[self._turn][:count]

    def _copying(self) -> AbstractContextManager:
        """The copies' stream, behind what the current one was given."""
        if not self._cuda:
            return nullcontext()
        self._copies.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._copies)

    def _used(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None:
            self._done[self._turn].record(stream)

    def _ids(self, blocks: list[int]) -> Tensor:
        ids = torch.tensor(blocks, dtype=torch.int64, pin_memory=self._cuda)
        return ids.to(self._stages[0].device, non_blocking=True)

    def _gather(self, blocks: list[int], stage: Tensor) -> None:
        ids, at = self._ids(blocks), 0
        for layer in self._layers:
            stage[:, at : at + layer.shape[1]] = layer[ids]
            at += layer.shape[1]

    def _scatter(self, stage: Tensor, blocks: list[int]) -> None:
        ids, at = self._ids(blocks), 0
        for layer in self._layers:
            layer[ids] = stage[:, at : at + layer.shape[1]]
            at += layer.shape[1]


def _runs(hosts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first, last + 1, row) of pieces of `hosts` that lie one behind the other from `row` on."""
    first = 0
    for i in range(1, len(hosts) + 1):
        if i == len(hosts) or hosts[i] != hosts[i - 1] + 1:
            yield first, i, hosts[first]
            first = i


def open_swap_space(
    config: EngineConfig, kv_caches: Sequence[Tensor], block_bytes: int, tokens_per_s: float
) -> tuple[HostBlocks, SwapSpace, str]:
    """Host memory of `config.swap_space` GiB, who has it, and what the report should say of it.

    Args:
        block_bytes: of one block in all layers.
        tokens_per_s: of a prefill, against which the rate of copies, measured here, is weighed.

    Raises:
        ConfigError: not one block fits.
    """
    count = config.swap_bytes // block_bytes
    if count == 0:
        raise ConfigError(
            f"swap_space={config.swap_space} GiB holds no block of {block_bytes} bytes",
            where="EngineConfig",
            remedy="give more, or 0 for none",
        )
    blocks = HostBlocks(kv_caches, count)
    cost = SwapCost(block_bytes, blocks.bytes_per_s(), tokens_per_s)
    rates = f"copies {cost.bytes_per_s / 1e9:.3g} GB/s, prefills {cost.tokens_per_s:.3g} tokens/s"
    choice = "moved" if cost.worthwhile(config.block_size, 1) else "computed again"
    note = f"swap space of {count} blocks: {rates}; preempted sequences are {choice}"
    return blocks, SwapSpace(count, config.block_size, cost.worthwhile), note
