"""What of a model is quantized: linears and experts of its decoder layers, and why the rest is left as it is.

What a module computes is found by computing it, not by its class.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fusecomp.errors import UnsupportedModelError
from fusecomp.quant.online.names import places
from fusecomp.quant.online.schemes import Scheme

# Narrower outputs are gates of a few numbers: nothing to save, and everything behind them feels an error.
FEWEST_OUTPUTS = 32
LAYERS = "decoder layers are looked for in the model's lists of modules"


@dataclass(frozen=True)
class Layer:
    """A decoder layer and its full name."""

    name: str
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that is quantized.

    Attributes:
        name: of the module for a linear, of the parameter for experts.
        owner, leaf: the module and the name of its parameter.
        transposed: the parameter is [..., K, N].
        experts: it has three dims.
        scheme: by which it is quantized.
    """

    name: str
    owner: nn.Module
    leaf: str
    transposed: bool
    experts: bool
    scheme: Scheme

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """[N, K], or [E, N, K] of experts: a view."""
        weight = self.parameter.detach()
        return weight.transpose(-1, -2) if self.transposed else weight


@dataclass(frozen=True)
class LeftOut:
    """A weight that stays as it is, and why."""

    name: str
    reason: str


def find_layers(model: nn.Module) -> list[Layer]:
    """The elements of the outermost lists of modules, in the order of their names.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    lists: list[str] = []
    found: list[Layer] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{n}.") for n in lists):
            lists.append(name)
            found += [Layer(f"{name}.{i}" if name else str(i), layer) for i, layer in enumerate(module)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of layers", where="quantize", why=LAYERS, remedy="drop quantize="
        )
    return found


def find_targets(
    layer: Layer, scheme: Scheme, shared: set[int], portable: nn.Module | None = None
) -> tuple[list[Target], list[LeftOut]]:
    """Weights of a layer that are quantized, in the order of their names, and those that are not.

    Args:
        shared: ids of parameters that two modules hold.
        portable: the model, to quantize only what checkpoints of it can hold.
    """
    targets: list[Target] = []
    left: list[LeftOut] = []
    crowds = _expert_counts(layer.module)
    for path, module in layer.module.named_modules():
        name = f"{layer.name}.{path}" if path else layer.name
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
                continue
            full = name if leaf == "weight" and parameter.dim() == 2 else f"{name}.{leaf}"
            transposed = _orientation(module, leaf, parameter)
            if isinstance(transposed, str):
                left.append(LeftOut(full, transposed))
                continue
            target = Target(full, module, leaf, transposed, parameter.dim() == 3, scheme)
            reason = _refusal(target, crowds, shared, portable)
            if reason is None:
                targets.append(target)
            else:
                left.append(LeftOut(full, reason))
    return [_portable(t, targets) for t in targets] if portable is not None else targets, left


def _portable(target: Target, targets: list[Target]) -> Target:
    """The target with groups of the size that all weights of its experts can have: other engines know one for all."""
    ks = [t.weight.shape[-1] for t in targets if t.owner is target.owner]
    size = target.scheme.group(*ks)
    return target if not size else replace(target, scheme=replace(target.scheme, sizes=(size,)))


def outside(model: nn.Module, layers: list[Layer]) -> Iterator[LeftOut]:
    """Weights that belong to no layer."""
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if id(module) not in inside and parameter is not None and parameter.dim() >= 2:
                full = name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")
                yield LeftOut(full, "it belongs to no decoder layer: every token's accuracy hangs on it")


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one place of the model holds, the same module under two names included."""
    counts = Counter(
        id(parameter)
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {key for key, count in counts.items() if count > 1}


def _expert_counts(layer: nn.Module) -> set[int]:
    """Numbers of experts in a layer."""
    merged = [m for m in layer.modules() if not isinstance(m, nn.Conv1d)]
    counts = {p.shape[0] for m in merged for p in m._parameters.values() if p is not None and p.dim() == 3}
    return counts | {len(m) for m in layer.modules() if isinstance(m, nn.ModuleList)}


def _refusal(target: Target, crowds: set[int], shared: set[int], portable: nn.Module | None) -> str | None:
    n, k = target.weight.shape[-2:]
    if id(target.parameter) in shared:
        return "another module holds the same parameter"
    if not target.experts and n in crowds:
        return f"it chooses among {n} experts: an error there is wrong by a whole expert"
    if n < FEWEST_OUTPUTS:
        return f"it has {n} outputs, too few to matter"
    if target.scheme.group(k) is None:
        return f"no group size that kernels read divides its {k} columns"
    if portable is None:
        return None
    if target.transposed or (not target.experts and type(target.owner) is not nn.Linear):
        return f"checkpoints of this format have no {type(target.owner).__name__}"
    name = target.name if target.experts else f"{target.name}.weight"
    found = places(portable, name, tuple(target.weight.shape[:-1]))
    return found if isinstance(found, str) else None


def _orientation(module: nn.Module, leaf: str, parameter: nn.Parameter) -> bool | str:
    """Whether a parameter is a weight [..., K, N] rather than [..., N, K]; or why it is neither."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "its module has hooks"
    if parameter.dim() == 3:
        if not hasattr(module, "is_transposed"):
            return f"{type(module).__name__} is not on Hugging Face's experts interface, which says how weights lie"
        return bool(module.is_transposed)
    if leaf != "weight" or parameter.dim() != 2 or set(module._parameters) - {"weight", "bias"}:
        return f"it is a parameter of {type(module).__name__}, which is no linear"
    if type(module) is nn.Linear and "forward" not in vars(module):
        return False
    return _evaluated(module)


@torch.no_grad()
def _evaluated(module: nn.Module) -> bool | str:
    """Whether a module multiplies by its weight [K, N] rather than [N, K], by its results in fp32; or why neither."""
    no = f"{type(module).__name__} computes something else than a linear"
    exact = copy.deepcopy(module).float()
    weight, bias = exact._parameters["weight"], exact._parameters.get("bias")
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    for transposed in (False, True):
        matrix = weight.t() if transposed else weight
        x = torch.randn(1, 3, matrix.shape[1], generator=generator).to(weight.device)
        try:
            found = exact(x)
        except Exception:  # a module of another kind takes other inputs, and says so in many ways
            continue
        wanted = nn.functional.linear(x, matrix, bias)
        if isinstance(found, Tensor) and found.shape == wanted.shape:
            error = (found.double() - wanted.double()).norm()
            if bool(error <= 1e-5 * wanted.double().norm()):
                return transposed
    return no
