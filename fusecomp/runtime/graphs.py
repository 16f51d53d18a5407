"""CUDA graphs per decode bucket: capture, check once, replay.

A graph is keyed by (bucket, variant of the sampler): those, with the model and the KV capacity, are every Python value
that reaches a kernel. Batches are padded up to the next bucket. All graphs share one memory pool and are captured
largest first, so that smaller ones reuse its blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from fusecomp.errors import VerificationError
from fusecomp.runtime.batch import StepBatch
from fusecomp.runtime.choice import Kind, Sampled

# Share of a row's standard deviation within which two logits count as tied.
TIE_SHARE = 0.05


def bucket_sizes(largest: int) -> list[int]:
    """Decode batch sizes to capture: 1, 2, 4, 8, 16, then steps that waste at most a fifth of a step's rows."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256]
    sizes += list(range(320, 1025, 64))
    kept = [size for size in sizes if size < largest]
    return [*kept, largest]


class GraphRunner:
    """Captured decode steps.

    Args:
        run: `(batch, kind) -> sampled token ids [S] and their scores`, made only of capturable work on the current
            stream.
        sizes: buckets, ascending.
    """

    def __init__(self, run: Callable[[StepBatch, Kind], Sampled], sizes: list[int]) -> None:
        self._run = run
        self.sizes = sizes
        self._graphs: dict[tuple[int, Kind], tuple[torch.cuda.CUDAGraph, Sampled]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def bucket(self, rows: int) -> int | None:
        """The smallest captured size that holds `rows`, or None."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else None

    def capture(self, batch: StepBatch, kind: Kind, *, ran: bool = False) -> None:
        """Capture the step for the batch's size, from a batch that announces the longest possible context.

        Unless this very batch `ran` before, the step runs once, so that lazy initialisation stays out of the graph.
        """
        size = batch.seq_lens.shape[0]
        if not ran:
            self._run(batch, kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            sampled = self._run(batch, kind)
        self._graphs[(size, kind)] = (graph, sampled)
        if kind.tables:  # graphs of an earlier version read tables that were replaced; a capture has waited for them
            for key in [key for key in self._graphs if key[1].tables not in (0, kind.tables)]:
                del self._graphs[key]

    def captured(self, size: int, kind: Kind) -> bool:
        """Whether `replay` has a graph for this key."""
        return (size, kind) in self._graphs

    def replay(self, size: int, kind: Kind) -> Sampled:
        """Run the captured step on the batch now in the static buffers; returns its token buffer [size] and scores."""
        graph, sampled = self._graphs[(size, kind)]
        graph.replay()
        return sampled

    def check(self, batch: StepBatch, kind: Kind, logits: Tensor) -> None:
        """Compare one replay with the same greedy step run without a graph.

        Args:
            logits: [S, V] of that step. A library may choose another algorithm while capturing, so a token may differ
                where its logit is within a small share of the row's spread of the best one.

        Raises:
            VerificationError: they disagree.
        """
        size = batch.seq_lens.shape[0]
        tokens = self.replay(size, kind).tokens
        rows = logits.float()
        gap = rows.amax(1) - rows.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
        wrong = ((tokens < 0) | ~(gap <= TIE_SHARE * rows.std(1))).nonzero()[:, 0].tolist()
        if wrong:
            raise VerificationError(
                f"the CUDA graph for batch {size} samples other tokens than the step it captured",
                where=f"rows {wrong[:8]}",
                remedy="run with enforce_eager=True and report this",
            )
