"""Linear layers of the models that benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.lowerings.linear_epilogues import EPILOGUES

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Layer:
    """One linear layer: its epilogue says how many groups and operands it has."""

    n: int
    k: int
    epilogue: str = "identity"

    @property
    def groups(self) -> int:
        return EPILOGUES[self.epilogue][1]

    @property
    def kind(self) -> str:
        return EPILOGUES[self.epilogue][3]

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.groups * self.n * self.k

    def __str__(self) -> str:
        return f"{self.groups} x {self.n} x {self.k} {self.epilogue}"


@dataclass(frozen=True)
class Model:
    hidden: int
    qkv: int
    attention: int  # width of the attention's output
    feed_forward: int
    vocabulary: int
    layers: int

    def parts(self) -> tuple[Layer, Layer, Layer, Layer]:
        return (
            Layer(self.qkv, self.hidden),
            Layer(self.hidden, self.attention, "residual"),
            Layer(self.feed_forward, self.hidden, "swiglu"),
            Layer(self.hidden, self.feed_forward, "residual"),
        )

    def head(self) -> Layer:
        return Layer(self.vocabulary, self.hidden)


MODELS = {
    "llama-8b": Model(4096, 6144, 4096, 14336, 128256, 32),
    "llama-1b": Model(2048, 3072, 2048, 8192, 128256, 16),
}

LAYERS = {name: (*model.parts(), model.head()) for name, model in MODELS.items()}
LAYERS["qwen3-30b-a3b"] = (Layer(5120, 2048), Layer(2048, 4096, "residual"), Layer(128, 2048))


def random_pool(size: int, fan_in: int = 4096) -> Tensor:
    return torch.empty(size, dtype=DTYPE, device="cuda").normal_(std=fan_in**-0.5)
