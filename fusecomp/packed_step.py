"""The packed step: what Dynamo captures of a model, and how the model's `forward` is called in it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.errors import UnsupportedModelError
from fusecomp.ops import OPS


@dataclass(frozen=True)
class Signature:
    """Which names a causal LM's `forward` uses for what a packed step gives it."""

    positions: str
    own_positions: bool  # forward can do without being given any
    attention_mask: bool
    use_cache: bool
    logits_to_keep: bool

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """Read the signature.

        Raises:
            UnsupportedModelError: the forward takes no token ids, or no positions.
        """
        parameters = inspect.signature(model.forward).parameters
        where = f"{type(model).__name__}.forward"
        if "input_ids" not in parameters:
            raise UnsupportedModelError("takes no input_ids", where=where, remedy="wrap it in a causal LM")
        positions = next((n for n in ("position_ids", "positions") if n in parameters), None)
        if positions is None:
            raise UnsupportedModelError(
                "takes no position_ids",
                where=where,
                why="sequences are packed along one axis, so positions must be given",
                remedy="add a position_ids argument to forward",
            )
        own_positions = parameters[positions].default is not inspect.Parameter.empty
        return cls(
            positions, own_positions, *(n in parameters for n in ("attention_mask", "use_cache", "logits_to_keep"))
        )

    def arguments(
        self, ids: Tensor, positions: Tensor, logit_indices: Tensor, *, explicit_mask: bool
    ) -> dict[str, Any]:
        """Keyword arguments of one forward over ids, positions [1, T] that wants logits at `logit_indices`.

        `explicit_mask` passes a 2-D padding mask of ones, which keeps HF from looking for packed sequences.
        """
        kwargs: dict[str, Any] = {"input_ids": ids, self.positions: positions}
        if self.attention_mask:
            kwargs["attention_mask"] = torch.ones_like(ids) if explicit_mask else None
        if self.use_cache:
            kwargs["use_cache"] = False
        if self.logits_to_keep:
            kwargs["logits_to_keep"] = logit_indices
        return kwargs


class PackedStep(nn.Module):
    """The function that Dynamo captures: one step of many sequences packed along T (docs/architecture.md).

    `inline_masks` says that the model builds its masks itself, so that they will be evaluated in the graph.
    """

    def __init__(self, model: nn.Module, max_tokens: int, *, inline_masks: bool) -> None:
        super().__init__()
        self.model = model
        self.inline_masks = inline_masks
        self.max_tokens = max_tokens
        self.signature = Signature.of(model)

    def isolated_forward(self) -> Callable:
        """`forward` with a code object of its own.

        Dynamo keeps compiled graphs per code object: with a shared one, every engine of a process would check the
        guards of all others, and together they would reach the recompile limit.
        """
        function = types.FunctionType(
            PackedStep.forward.__code__.replace(), globals(), "packed_step", None, PackedStep.forward.__closure__
        )
        return types.MethodType(function, self)

    def forward(
        self,
        tokens: Tensor,
        logit_indices: Tensor,
        cu_q_lens: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
        host_meta: Tensor,
        kv_caches: list[Tensor],
    ) -> Tensor:
        """Logits [S, V] of the tokens at `logit_indices`; every layer's KV tensor is updated in place."""
        # The lower bound lets models reshape by -1; the upper one lets Inductor index with 32-bit integers.
        torch._check(tokens.shape[1] > 0)
        torch._check(tokens.shape[1] <= self.max_tokens)
        torch._check(logit_indices.shape[0] <= self.max_tokens)
        tokens = OPS.step_inputs(tokens, cu_q_lens, seq_lens, block_tables, host_meta, kv_caches)
        arguments = self.signature.arguments(tokens[0:1], tokens[1:2], logit_indices, explicit_mask=self.inline_masks)
        out = self.model(**arguments)
        logits = logits_of(out)
        return logits[0] if self.signature.logits_to_keep else logits[0, logit_indices]


def logits_of(out: Any) -> Tensor:
    """The logits of what a `forward` returned."""
    return out if isinstance(out, Tensor) else out.logits
