"""Where the scales of a layer's input channels can go: the weight of the norm before, or rows of a linear before.

Dividing what makes an input by s, channel by channel, and multiplying the columns of all that read it by s changes no
result. Whether a place is such a one is not read off names: it is scaled by powers of two, which is exact in any float
type, all known readers are scaled back, and the layer must give what it gave.

Legend: N rows, K columns of a weight, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.quant.online.targets import Target

# Of the effect that scaling a source alone has, what may be left with its readers scaled back. Powers of two leave 0,
# or next to it where a norm adds 1 to its weight.
MOST_LEFT = 1e-4
Run = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm's weight [K], which multiplies its output: as it is, or with `offset` 1 added to it."""

    module: nn.Module
    offset: float

    def set(self, s: Tensor) -> Tensor:
        """Divide by s [K] fp32; gives what it was really divided by, since the weight is rounded."""
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert weight is not None
        before = weight.detach().float() + self.offset
        weight.data.copy_(before / s - self.offset)
        after = weight.detach().float() + self.offset
        if bias is not None:
            bias.data.copy_(bias.detach().float() / s)
        return torch.where((before == 0) | (after == 0), 1.0, before / torch.where(after == 0, 1.0, after))

    @property
    def exact(self) -> bool:
        """Whether nothing but the weight, whose rounding is accounted for, is rounded."""
        return self.module._parameters.get("bias") is None

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.module._parameters.values() if p is not None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a linear [N, K'], or of each expert's [E, N, K']: row `index[c]` makes input channel c."""

    target: Target
    index: Tensor
    meaning: str

    def set(self, s: Tensor) -> Tensor:
        """Divide by s [K], or [E, K]. Channels that share a row must share their scale."""
        weight = self.target.weight
        factors = self.factors(s)
        weight.mul_(factors.unsqueeze(-1).to(weight.dtype))
        bias = self.bias
        if bias is not None:
            bias.data.mul_(factors.to(bias.dtype))
        return s

    def factors(self, s: Tensor) -> Tensor:
        """What each row is multiplied by, [N] or [E, N] fp32."""
        n = self.target.weight.shape[-2]
        ones = torch.ones(*s.shape[:-1], n, device=s.device)
        return ones.scatter(-1, self.index.to(s.device).expand_as(s), 1 / s)

    def shared(self, s: Tensor) -> Tensor:
        """s [..., K] with one value, their geometric mean, for channels that share a row."""
        n = self.target.weight.shape[-2]
        index = self.index.to(s.device).expand_as(s)
        total = torch.zeros(*s.shape[:-1], n, device=s.device).scatter_add(-1, index, s.log())
        count = torch.zeros_like(total).scatter_add(-1, index, torch.ones_like(s))
        return (total / count.clamp(min=1)).exp().gather(-1, index)

    @property
    def bias(self) -> nn.Parameter | None:
        if self.target.experts:  # a bias of experts has a name of its own, and then the proof fails
            return None
        return self.target.owner._parameters.get("bias")

    @property
    def exact(self) -> bool:
        return self.bias is None

    def parameters(self) -> list[nn.Parameter]:
        return [self.target.parameter, *([] if self.bias is None else [self.bias])]


@dataclass(frozen=True, eq=False)
class Reader:
    """A parameter of two dims that is not quantized and whose last dim are the channels, such as a router's."""

    module: nn.Module
    leaf: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.leaf]  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Fold:
    """A place for the scales of an input, and all that reads it: `targets`, and `others` that stay in 16 bits."""

    source: Norm | Rows
    targets: tuple[Target, ...]
    others: tuple[Reader, ...]

    @property
    def powers_of_two(self) -> bool:
        """Whether scales must be powers of two, because something in 16 bits is multiplied by them."""
        return bool(self.others) or not self.source.exact

    @property
    def where(self) -> str:
        return (
            "the norm before"
            if isinstance(self.source, Norm)
            else f"{self.source.meaning} of {self.source.target.name}"
        )

    def channels(self) -> tuple[int, ...]:
        """Shape of its scales: [K], or [E, K] when every expert has its own."""
        weight = self.targets[0].weight
        per_expert = isinstance(self.source, Rows) and self.source.target.experts
        return (*weight.shape[:1], weight.shape[-1]) if per_expert else (weight.shape[-1],)

    def apply_to_readers(self, s: Tensor, targets: bool) -> None:
        """Multiply columns of the others, and of the targets if asked, by s."""
        for target in self.targets if targets else ():
            target.weight.mul_(s.unsqueeze(-2).to(target.weight.dtype))
        for other in self.others:
            other.parameter.data.mul_(s.to(other.parameter.dtype))


def prove(folds: Sequence[Fold], run: Run, before: Tensor) -> list[Fold]:
    """Those of `folds` that leave the layer's output as it is; all together first, then one by one.

    Args:
        run: computes the layer's output again.
        before: that output, as it is.
    """
    if not folds or _holds(folds, run, before):
        return list(folds)
    return [fold for fold in folds if _holds([fold], run, before)] if len(folds) > 1 else []


@torch.no_grad()
def _holds(folds: Sequence[Fold], run: Run, before: Tensor) -> bool:
    changed = {id(p): p for fold in folds for p in fold.source.parameters()}
    changed |= {id(t.parameter): t.parameter for fold in folds for t in fold.targets}
    changed |= {id(o.parameter): o.parameter for fold in folds for o in fold.others}
    kept = [(p, p.detach().clone()) for p in changed.values()]
    generator = torch.Generator().manual_seed(0)
    try:
        scales = []
        for fold in folds:
            shape, device = fold.channels(), fold.targets[0].weight.device
            s = torch.exp2(torch.randint(-1, 3, shape, generator=generator).float()).to(device)
            s = fold.source.shared(s).log2().round().exp2() if isinstance(fold.source, Rows) else s
            scales.append(s)
            if isinstance(fold.source, Norm) and fold.source.offset:
                weight = fold.source.module._parameters["weight"]
                assert weight is not None
                weight.data = weight.data.float()  # 16 bits would round a power of two less the offset
            fold.source.set(s)
        effect = _distance(run(), before)
        for fold, s in zip(folds, scales, strict=True):
            fold.apply_to_readers(s, targets=True)
        left = _distance(run(), before)
    except RuntimeError:  # of dtypes, where fp32 does not suit a norm: its form is another
        return False
    finally:
        for parameter, value in kept:
            if parameter.dtype == value.dtype:
                parameter.data.copy_(value)
            else:
                parameter.data = value
    return effect > 0 and left <= MOST_LEFT * effect


def _distance(output: Tensor, before: Tensor) -> float:
    return float((output.double() - before.double()).norm())


def norm_forms(module: nn.Module, x: Tensor) -> list[Norm]:
    """Norm forms of a module that wrote `x` [..., K]; which one holds is for `prove`."""
    weight = module._parameters.get("weight")
    others = set(module._parameters) - {"weight", "bias"}
    if weight is None or weight.dim() != 1 or weight.shape[0] != x.shape[-1] or others:
        return []
    return [Norm(module, 0.0), Norm(module, 1.0)]


def row_forms(source: Target, k: int, head_dims: Sequence[int]) -> list[Rows]:
    """Ways in which rows of `source` may be the K channels of a later input; which one holds is for `prove`."""
    n = source.weight.shape[-2]
    channel = torch.arange(k)
    forms = []
    if n == k:
        forms.append(Rows(source, channel, "rows"))
    if n > k:
        forms.append(Rows(source, channel + (n - k), "last rows"))
        if n == 2 * k:
            forms.append(Rows(source, 2 * channel + 1, "odd rows"))
            forms.append(Rows(source, channel, "first rows"))
    for dim in head_dims:
        for heads in sorted({h for h in range(1, k // dim) if k % dim == 0 and (k // dim) % h == 0}):
            width = heads * dim
            if k % dim == 0 and n in (width, k + 2 * width):  # values alone, or fused behind queries and keys
                row = (channel // dim) // ((k // dim) // heads) * dim + channel % dim
                forms.append(Rows(source, row + (n - width), f"rows of {heads} heads"))
    return forms
