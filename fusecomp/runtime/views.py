"""Every step's device tensors as views, at offset 0, of one set of buffers.

A bucket's tensors have the same addresses at every step, which is what a captured CUDA graph replays.

Legend: T tokens, S rows (padding included).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusecomp.runtime.step_batch import MixedShape

Views = dict[str, Tensor]


class BatchViews:
    """Those of `buffers`, by the names of `StepBatch`; kept for the buckets, which come again.

    Args:
        buffers: of most rows and tokens.
        max_rows: most rows.
    """

    def __init__(self, buffers: Views, max_rows: int) -> None:
        self._buffers = buffers
        device = buffers["tokens"].device
        # In a step of decodes row s owns token s, whatever the bucket.
        self._identity = torch.arange(max_rows, dtype=torch.int64, device=device)
        self._identity_cu = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._decodes: dict[int, Views] = {}
        self._buckets: dict[MixedShape, Views] = {}

    def mixed(self, S: int, T: int) -> Views:
        """Of a step of any rows."""
        views = {name: buffer[:S] for name, buffer in self._buffers.items()}
        views["tokens"] = self._buffers["tokens"][: 3 * T].view(3, T)
        views["cu_q_lens"] = self._buffers["cu_q_lens"][: S + 1]
        return views

    def bucket(self, shape: MixedShape) -> Views:
        """Of a mixed step that is padded to a shape."""
        views = self._buckets.get(shape)
        if views is None:
            views = self._buckets[shape] = self.mixed(shape.rows, shape.tokens)
        return views

    def decodes(self, S: int) -> Views:
        """Of a step of decodes."""
        views = self._decodes.get(S)
        if views is None:
            views = self.mixed(S, S)
            views["logit_indices"], views["cu_q_lens"] = self._identity[:S], self._identity_cu[: S + 1]
            self._decodes[S] = views
        return views
