"""Quantizes a loaded model in place, layer by layer: a weight is freed as soon as its codes exist.

With calibration, text goes through the model once, by its own eager forward pass: every layer is observed, quantized
when its (unrounded) output is known, and left behind. Layers come to `device` one at a time, so no more than one of
them lies there in 16 bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.errors import ConfigError, UnsupportedModelError
from fusecomp.quant.loading import refuse_saving
from fusecomp.quant.modules import QuantizedLinear, QuantizedWeight, RoundedInput, hold_experts
from fusecomp.quant.online.calibration import Calibration, Given, calibration
from fusecomp.quant.online.observe import observing
from fusecomp.quant.online.plan import Planner, Rounding
from fusecomp.quant.online.record import ATTRIBUTE, QuantizationRecord, Quantized, record_of
from fusecomp.quant.online.rounding import make_codes
from fusecomp.quant.online.schemes import Scheme, scheme
from fusecomp.quant.online.targets import Layer, LeftOut, Target, find_layers, find_targets, outside, shared_parameters

logger = logging.getLogger("fusecomp")
PLAIN = (torch.bfloat16, torch.float16, torch.float32)


class _Enough(Exception):
    """Every layer has been met: the rest of the forward pass is not needed."""


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    given: str | Scheme,
    *,
    text: Given = None,
    tokenizer: Callable[[], Any] = lambda: None,
    device: torch.device | None = None,
    portable: bool = False,
) -> QuantizationRecord:
    """Hold the linears and experts of `model`'s decoder layers as codes. An exception in the middle leaves it unusable.

    Args:
        given: name of a scheme, or a scheme.
        text: calibration text, see `calibration`; an empty list does without.
        tokenizer: gives the model's tokenizer, if text needs it.
        device: where the model is wanted; None leaves it where it is.
        portable: quantize only what a checkpoint for other engines can hold.

    Raises:
        ConfigError: the scheme or the calibration is none, or the model is quantized already.
        UnsupportedModelError: nothing in it can be quantized.
    """
    chosen = scheme(given)
    refuse_quantized(model)
    layers, shared = find_layers(model), shared_parameters(model)
    fed = None
    if chosen.calibrated:
        fed = calibration(text, tokenizer, _longest(model), _vocabulary(model))
    source = fed.source if fed else "without calibration" if chosen.calibrated else "no calibration needed"
    record = QuantizationRecord(chosen.name, source)
    if text and not chosen.calibrated:
        record.notes.append(f"the calibration text was not used: {chosen.name} needs none")
    work = _Work(model, chosen, layers, shared, device, portable, record)
    training = model.training
    model.eval()
    if device is not None:
        _move_rest(model, layers, device)
    if fed is not None:
        work.feed(fed)
    for layer in layers:
        work.plain(layer)
    if not record.weights:
        first = f"; the first: {record.left_out[0][0]}: {record.left_out[0][1]}" if record.left_out else ""
        raise UnsupportedModelError(
            f"no weight of {type(model).__name__} can be quantized to {chosen.name}",
            where="quantize",
            why=f"{len(record.left_out)} weights were looked at{first}",
            remedy="drop quantize=",
        )
    record.left_out += [(left.name, left.reason) for left in outside(model, layers)]
    model.train(training)
    object.__setattr__(model, ATTRIBUTE, record)
    refuse_saving(model)
    logger.info("quantized %s: %s", type(model).__name__, record.summary())
    return record


def refuse_quantized(model: nn.Module) -> None:
    """Raise `ConfigError` when a model is quantized already."""
    held = any(isinstance(module, QuantizedLinear | QuantizedWeight) for module in model.modules())
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if held or settings is not None or record_of(model) is not None or getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            f"{type(model).__name__} is quantized already",
            where="quantize",
            remedy="drop quantize=, or give the model in 16 or 32 bits",
        )


class _Work:
    """One model on its way."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Scheme,
        layers: list[Layer],
        shared: set[int],
        device: torch.device | None,
        portable: bool,
        record: QuantizationRecord,
    ) -> None:
        self.model, self.scheme, self.layers, self.shared = model, chosen, layers, shared
        self.device, self.portable, self.record = device, portable, record
        self.planner = Planner(chosen, _head_dims(model), portable)
        self.waiting = {layer.name: layer for layer in layers}

    def feed(self, fed: Calibration) -> None:
        """Send calibration ids through the model; every layer that they reach is quantized."""
        device = self.device or next(self.model.parameters()).device
        options = {"use_cache": False} if hasattr(self.model, "config") else {}
        with ExitStack() as stack:
            stack.enter_context(_eager_experts(self.model))
            for layer in self.layers:
                stack.enter_context(_forwarding(layer.module, self._through(layer)))
            with suppress(_Enough):
                self.model(fed.ids.to(device), **options)
        if self.waiting:
            names = ", ".join(list(self.waiting)[:3])
            self.record.notes.append(f"calibration text did not reach {len(self.waiting)} layers: {names}")

    def plain(self, layer: Layer) -> None:
        """Quantize a layer without calibration, if it still waits."""
        if self.waiting.pop(layer.name, None) is None:
            return
        self._bring(layer)
        targets = self._targets(layer)
        self._round(targets, self.planner.plain(targets))

    def _through(self, layer: Layer) -> Callable[..., Any]:
        forward = layer.module.forward

        def through(*args: Any, **kwargs: Any) -> Any:
            if layer.name not in self.waiting:
                return forward(*args, **kwargs)
            del self.waiting[layer.name]
            self._bring(layer)
            targets = self._targets(layer)
            # Only int4 rounds experts' weights so coarsely that their inputs matter.
            experts = [t for t in targets if t.experts] if self.scheme.grouped else []
            with observing(layer.module, experts) as observed:
                output = forward(*args, **kwargs)
            before = _tensor_of(output)
            plan = self.planner.calibrated(
                layer.name, targets, observed, lambda: _tensor_of(forward(*args, **kwargs)), before
            )
            del observed
            self._round(targets, plan)
            if not self.waiting:
                raise _Enough
            return output

        return through

    def _bring(self, layer: Layer) -> None:
        if self.device is not None:
            layer.module.to(self.device)

    def _targets(self, layer: Layer) -> list[Target]:
        targets, left = find_targets(layer, self.scheme, self.shared, self.model if self.portable else None)
        odd = [LeftOut(t.name, f"it is {t.parameter.dtype}") for t in targets if t.parameter.dtype not in PLAIN]
        self.record.left_out += [(item.name, item.reason) for item in (*left, *odd)]
        targets = [t for t in targets if t.parameter.dtype in PLAIN]
        for target in targets:
            if not bool(torch.isfinite(target.parameter).all()):
                raise UnsupportedModelError(
                    f"weight {target.name!r} holds NaN or infinity",
                    where="quantize",
                    remedy="restore the checkpoint",
                )
        return targets

    def _round(self, targets: Sequence[Target], plan: dict[Target, Rounding]) -> None:
        for target in targets:
            rounding = plan.pop(target)
            dtype, (n, k) = target.parameter.dtype, target.weight.shape[-2:]
            codes = make_codes(
                target.weight,
                target.scheme,
                dtype,
                symmetric=rounding.symmetric,
                clip=rounding.clip,
                prepare=rounding.prepared,
            )
            details = [codes.spec.describe() + (", with zero points" if codes.zero is not None else "")]
            del target.owner._parameters[target.leaf]
            if target.experts:
                target.owner._is_hf_initialized = True  # type: ignore[assignment]
                hold_experts(target.owner, target.leaf, QuantizedWeight(codes, None, target.transposed))
            else:
                linear = QuantizedLinear(k, n, target.owner._parameters.get("bias"))
                linear.fill(codes)
                if self.scheme.activation is not None:
                    linear.input = RoundedInput(self.scheme.activation)
                    details.append(f"inputs {self.scheme.activation.describe()}")
                self.model.set_submodule(target.name, linear.eval())
            details += [rounding.note] if rounding.note else []
            self.record.weights.append(Quantized(target.name, "; ".join(details)))


@contextmanager
def _forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, calls of `module` go to `forward`."""
    kept = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if kept is not None:
            module.forward = kept  # type: ignore[method-assign]


@contextmanager
def _eager_experts(model: Any) -> Iterator[None]:
    """Within, experts run one by one, so that it can be seen what each of them reads."""
    kept = [
        (config, config._experts_implementation_internal)
        for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
        if getattr(config, "_experts_implementation_internal", None) is not None
    ]
    for config, _ in kept:
        config._experts_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, implementation in kept:
            config._experts_implementation_internal = implementation


def _move_rest(model: nn.Module, layers: list[Layer], device: torch.device) -> None:
    """Move all but the layers."""
    places = {layer.name.rpartition(".")[0] for layer in layers}
    lists = [(model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]) for place in sorted(places)]
    kept = [(parent, name, parent._modules[name]) for parent, name in lists]
    for parent, name, _ in kept:
        parent._modules[name] = nn.ModuleList()
    try:
        model.to(device)
    finally:
        for parent, name, module in kept:
            parent._modules[name] = module


def _tensor_of(output: Any) -> Tensor:
    """The first tensor of what a layer returned."""
    found = output if isinstance(output, Tensor) else next((o for o in output if isinstance(o, Tensor)), None)
    if found is None:
        raise UnsupportedModelError(
            f"a layer returns a {type(output).__name__} without tensors",
            where="quantize",
            remedy="quantize without calibration (calibration=[])",
        )
    return found


def _head_dims(model: Any) -> tuple[int, ...]:
    """Dims of a head that any configuration of the model names or implies; what they are worth is for proofs."""
    found = set()
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
        found |= {getattr(config, name, None) for name in ("head_dim", "v_head_dim")}
        if isinstance(heads, int) and isinstance(hidden, int) and heads:
            found.add(hidden // heads)
    return tuple(sorted(dim for dim in found if isinstance(dim, int) and dim > 0))


def _longest(model: Any) -> int:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 512


def _vocabulary(model: Any) -> int | None:
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None
