"""Where the rows of a model's weights lie in its checkpoints.

transformers' conversion mapping says it, run backwards: numbers of rows go through it in the weight's place, and where
each number ends up says which tensor of the checkpoint holds that row. Legend: E experts, N rows of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A weight `name` of the checkpoint: n rows from `start` of an expert, or of a linear, of the model."""

    name: str
    expert: int | None
    start: int
    n: int


def places(model: Any, name: str, shape: tuple[int, ...]) -> list[Place] | str:
    """The weights of a checkpoint that are parameter `name` of the model, whose rows are `shape` [N] or [E, N].

    Returns:
        Or why they are none that codes could be written for.
    """
    numbers = torch.arange(torch.Size(shape).numel()).reshape(*shape, 1).expand(*shape, 2)
    try:
        found = reverted(model, {name: numbers})
    except Exception as error:  # operations of the mapping that are not for columns of numbers
        return f"its conversion cannot be followed: {type(error).__name__}: {error}"
    n, result = shape[-1], []
    for key, rows in found.items():
        if rows.dim() != 2 or rows.shape[1] != 2 or not key.endswith(".weight"):
            return f"checkpoints keep it as {key!r} {list(rows.shape[:-1])}, no linear's weight"
        first = int(rows[0, 0])
        ordered = torch.equal(rows[:, 0], torch.arange(first, first + rows.shape[0]))
        if not ordered or first % n + rows.shape[0] > n:
            return f"checkpoints keep rows of it in another order, in {key!r}"
        expert = first // n if len(shape) == 2 else None
        result.append(Place(key.removesuffix(".weight"), expert, first % n, rows.shape[0]))
    if sum(place.n for place in result) != numbers.shape[:-1].numel():
        return "checkpoints keep a part of it only"
    return result


def reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model as its checkpoints have them."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)
