"""What the modules of one decoder layer read and wrote while calibration text went through it.

Legend: R rows (tokens), K columns, E experts, G groups of C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecomp.quant.online.targets import Target

# Rows of a layer's input that searches look at, evenly spaced.
MOST_ROWS = 512


@dataclass
class Observed:
    """One pass through a layer. Tensors are kept, so that equal addresses mean the same values.

    Attributes:
        reads: per module that owns a weight of two or more dims: its input; the first, when it was called again.
        writes: per module that owns a weight of one dim: its output.
        order: those of `reads`, as they were called.
        experts: statistics of the inputs of experts' weights, by the weight's name.
    """

    reads: dict[nn.Module, Tensor] = field(default_factory=dict)
    writes: dict[nn.Module, Tensor] = field(default_factory=dict)
    order: list[nn.Module] = field(default_factory=list)
    experts: dict[str, ExpertInputs] = field(default_factory=dict)

    def same(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors of this pass are the same values in the same place."""
        return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]

    def readers(self, tensor: Tensor) -> list[nn.Module]:
        return [module for module in self.order if self.same(self.reads[module], tensor)]

    def writer(self, tensor: Tensor) -> nn.Module | None:
        """The last module that wrote `tensor`."""
        found = [module for module, written in self.writes.items() if self.same(written, tensor)]
        return found[-1] if found else None


class ExpertInputs:
    """Of one weight [E, N, K]: the second moments of each expert's inputs, within groups of columns.

    Attributes:
        moments: [E, G, C, C] fp32, sums over tokens.
        magnitudes: [E, K] fp32, sums of absolute values.
        tokens: [E] fp32.
        first: the order in which it was met.
    """

    def __init__(self, experts: int, k: int, cols: int, device: torch.device, first: int) -> None:
        self.cols, self.first = cols, first
        self.moments = torch.zeros(experts, k // cols, cols, cols, device=device)
        self.magnitudes = torch.zeros(experts, k, device=device)
        self.tokens = torch.zeros(experts, device=device)

    def add(self, expert: int, x: Tensor) -> None:
        """Inputs [R, K] of one expert."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        groups = rows.unflatten(-1, (-1, self.cols)).transpose(0, 1)
        self.moments[expert] += groups.transpose(1, 2) @ groups
        self.magnitudes[expert] += rows.abs().sum(0)
        self.tokens[expert] += rows.shape[0]


class _ExpertProducts(TorchFunctionMode):
    """Sees which expert's weight each product is by; how the experts' own code gets there does not matter."""

    PRODUCTS = frozenset(
        (nn.functional.linear, torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm)
    ) | {Tensor.__matmul__}

    def __init__(self, targets: Iterable[Target], observed: Observed) -> None:
        super().__init__()
        self.targets = {t.parameter.untyped_storage().data_ptr(): t for t in targets}
        self.observed = observed

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in self.PRODUCTS and len(args) >= 2:
            target = self.targets.get(args[1].untyped_storage().data_ptr())
            if target is not None:
                self._see(target, args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _see(self, target: Target, x: Tensor, part: Tensor) -> None:
        experts, n, k = target.weight.shape
        first = (part.storage_offset() - target.parameter.storage_offset()) // (n * k)
        count = part.numel() // (n * k)
        if x.shape[-1] != k or part.numel() % (n * k) or (count > 1 and (x.dim() != 3 or x.shape[0] != count)):
            return
        seen = self.observed.experts.get(target.name)
        if seen is None:
            seen = ExpertInputs(experts, k, target.scheme.group(k) or k, part.device, len(self.observed.experts))
            self.observed.experts[target.name] = seen
        for i in range(count):
            seen.add(first + i, x if count == 1 else x[i])


@contextmanager
def observing(layer: nn.Module, experts: list[Target]) -> Iterator[Observed]:
    """Within, a pass through `layer` is observed; `experts` are weights of experts whose inputs are wanted."""
    observed = Observed()

    def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()), None)
        if given is not None and module not in observed.reads:
            observed.reads[module] = given
            observed.order.append(module)

    def wrote(module: nn.Module, _: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            observed.writes[module] = output

    with ExitStack() as stack:
        for module in layer.modules():
            dims = {p.dim() for p in module._parameters.values() if p is not None}
            if any(d >= 2 for d in dims):
                stack.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
            elif 1 in dims:
                stack.callback(module.register_forward_hook(wrote).remove)
        if experts:
            stack.enter_context(_ExpertProducts(experts, observed))
        yield observed


def sample_rows(x: Tensor) -> Tensor:
    """At most `MOST_ROWS` rows [R, K] fp32 of an input [..., K], evenly spaced."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows[:: math.ceil(rows.shape[0] / MOST_ROWS)].float()
