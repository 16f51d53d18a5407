"""Modules that hold codes and compute with what they stand for: dequantize, then matmul, nothing hidden.

A weight's codes and scales keep their dtypes whatever the model is converted to; what they dequantize to follows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.ops import OPS
from fusecomp.ops.quant import ActivationSpec, WeightSpec
from fusecomp.quant.codes import Codes, prepared

NEVER = 1 << 40  # tokens of a step that there is not
CODES = "_codes"  # suffix of the module that holds the codes of an experts parameter


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class _FixedDtypes(nn.Module):
    """Tensors of this module change device with the model, not dtype."""

    spec: str

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            probe = fn(tensor.new_empty(0))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        spec = WeightSpec.from_text(self.spec)
        device = next((parameter.device for parameter in self.parameters(recurse=False)), None)
        to = fn(torch.empty(0, dtype=spec.torch_dtype, device=device)).dtype
        self.spec = replace(spec, dtype=str(to).removeprefix("torch.")).to_text()
        return super()._apply(keep, recurse)


class QuantizedWeight(_FixedDtypes):
    """Codes of a weight; calling it gives the weight.

    Attributes:
        q, scale, zero: as `fusecomp::dequantize` takes them, with leading dims for experts.
        spec: text of a `WeightSpec`.
        inverse: int64 [E, S, K]: where column k of each of S equal blocks of rows lies in q; None if in place.
        transposed: the weight is [..., K, N].
    """

    q: nn.Parameter
    scale: nn.Parameter
    zero: nn.Parameter | None
    inverse: nn.Parameter | None

    def __init__(self, codes: Codes, inverse: Tensor | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.spec, self.transposed = codes.spec.to_text(), transposed
        for name, tensor in (("q", codes.q), ("scale", codes.scale), ("zero", codes.zero), ("inverse", inverse)):
            self.register_parameter(name, _parameter(tensor))

    def forward(self) -> Tensor:
        """The weight [..., N, K], or [..., K, N] when transposed."""
        weight = OPS.dequantize(self.q, self.scale, self.zero, self.spec)
        if self.inverse is not None:
            blocks = weight.unflatten(-2, (self.inverse.shape[-2], -1))
            weight = blocks.gather(-1, self.inverse.unsqueeze(-2).expand_as(blocks)).flatten(-3, -2)
        return weight.transpose(-1, -2) if self.transposed else weight


class QuantizedInput(_FixedDtypes):
    """Rounds a layer's input to what its codes stand for.

    Attributes:
        quantization: text of an `ActivationSpec`.
        spec: text of the `WeightSpec` that dequantizes the codes.
        scale: [1] fp32, the static scale; None when it follows from the values.
    """

    scale: nn.Parameter | None

    def __init__(self, activation: ActivationSpec, scale: Tensor | None, dtype: str) -> None:
        super().__init__()
        self.quantization, self.spec = activation.to_text(), activation.dequantized(dtype).to_text()
        self.register_parameter("scale", _parameter(scale))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, K] as codes and back, in the spec's dtype."""
        codes, scale = OPS.quantize(x, self.scale, self.quantization)
        return OPS.dequantize(codes, scale, None, self.spec)


class RoundedInput(nn.Module):
    """Rounds a layer's input to what codes would stand for, in steps of enough tokens; in the input's dtype.

    Attributes:
        quantization: text of an `ActivationSpec` whose scale follows from the values.
    """

    def __init__(self, activation: ActivationSpec) -> None:
        super().__init__()
        self.quantization = activation.to_text()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., T, K] -> the same shape and dtype."""
        return OPS.fake_quantize(x, None, self.quantization)


@contextmanager
def as_in_step(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, inputs of `model` are rounded as in a step of `tokens` tokens, whatever it is given."""
    inputs = [module for module in model.modules() if isinstance(module, RoundedInput)]
    texts = [module.quantization for module in inputs]
    for module in inputs:
        spec = ActivationSpec.from_text(module.quantization)
        module.quantization = replace(spec, least_tokens=0 if tokens >= spec.least_tokens else NEVER).to_text()
    try:
        yield
    finally:
        for module, text in zip(inputs, texts, strict=True):
            module.quantization = text


class QuantizedLinear(nn.Module):
    """`nn.Linear` on codes.

    Attributes:
        codes: its weight [N, K], columns in the order in which q has them.
        order: int64 [K], the order of the input's columns that fits; None if as they are.
        input: what quantizes the input; None if nothing does.
    """

    bias: nn.Parameter | None
    order: nn.Parameter | None
    codes: QuantizedWeight | None
    input: QuantizedInput | RoundedInput | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        """Without codes; `fill` brings them, so that nothing but a bias is loaded by transformers."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)
        self.register_parameter("order", None)
        self.register_module("codes", None)
        self.register_module("input", None)
        self._is_hf_initialized = True

    def fill(self, codes: Codes) -> None:
        """Take over a weight of shape [out_features, in_features]."""
        self.codes, self.order = QuantizedWeight(prepared(codes)), _parameter(codes.order)
        if codes.activation is not None:
            self.input = QuantizedInput(codes.activation, codes.input_scale, codes.spec.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that an `nn.Linear` would have."""
        weight = self._stored()
        return weight if self.order is None else weight[:, self.order.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        if self.input is not None:
            x = self.input(x)
        return nn.functional.linear(x, self._stored(), self.bias)

    def _stored(self) -> Tensor:
        assert self.codes is not None
        return self.codes()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def hold_experts(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Let attribute `name` of an experts module be what `weight` gives; its forward pass stays its own."""
    module.add_module(name + CODES, weight)
    bases = type(module).__mro__
    if "_dequantized" in vars(bases[0]):  # the second weight of one module
        names = (*bases[0]._dequantized, name)  # type: ignore[attr-defined]
        module.__class__ = _experts_class(bases[1], names)
    else:
        module.__class__ = _experts_class(bases[0], (name,))


@functools.cache
def _experts_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Subclass of an experts class whose parameters `names` are dequantized whenever they are read."""
    members: dict[str, Any] = {name: property(_reader(name)) for name in names}
    return type(base.__name__, (base,), {**members, "_dequantized": names, "__module__": __name__})


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(self: nn.Module) -> Tensor:
        return self._modules[name + CODES]()  # type: ignore[misc]

    return read
