"""Capture: probes a model for what its attention means, before Dynamo traces it as a packed step (`packed_step.py`).

Hugging Face's extension points are used where the model has them: an attention function and an experts function
named "fusecomp" emit canonical ops; a second pair, "fusecomp_probe", runs eagerly once on a few tokens and
records, per layer, the mask function the model really asked for. The model's weights are neither copied nor
changed; its configuration is switched only inside `Implementations.use` and restored after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from fusecomp._compat import dynamo_settings
from fusecomp.errors import UnsupportedModelError
from fusecomp.expert_forms import remember_experts, trace_experts, unfused_reason
from fusecomp.ops import OPS
from fusecomp.ops.attention import UNNUMBERED, UNRESOLVED, attention_reference
from fusecomp.ops.kv_cache import as_cached
from fusecomp.packed_step import PackedStep, Signature, logits_of
from fusecomp.patterns.masks import MaskSpec, classify_function, unknown

TRACE, PROBE, ROUNDED = "fusecomp", "fusecomp_probe", "fusecomp_rounded"
# Keyword arguments of HF attention functions that do not change what is computed, or that are handled by name.
HANDLED = {"dropout", "scaling", "softcap", "s_aux", "sliding_window", "is_causal"}
NEUTRAL = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch", "logits_to_keep"),
}


@dataclass
class Probe:
    """What one eager pass showed: per `layer_idx`, the proven mask, and facts that forbid a rewrite."""

    length: int
    masks: dict[int, MaskSpec] = field(default_factory=dict)
    calls: list[tuple[int, int, int]] = field(default_factory=list)  # attention calls in order: layer, kv heads, dim
    unfused_experts: dict[str, str] = field(default_factory=dict)
    specs: dict[int, tuple[Tensor, MaskSpec]] = field(default_factory=dict)  # id of mask -> (mask kept alive, spec)


_probe: Probe | None = None


def _call_reason(module: nn.Module, kwargs: dict[str, Any]) -> str:
    """Why an attention call cannot be expressed canonically; empty when it can."""
    if kwargs.get("dropout") and module.training:
        return f"dropout {kwargs['dropout']} is active"
    if kwargs.get("is_causal") is False:
        return "called with is_causal=False"
    for name, value in kwargs.items():
        if name not in HANDLED and name not in NEUTRAL and value is not None:
            return f"takes the argument {name!r}, whose effect is unknown"
    return ""


def _default_scale(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _trace_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """HF attention function: emits the canonical op; the mask is filled in from the probe by `InterfaceAttention`.

    The layer is filled in too, by the order of the calls: reading `layer_idx` here would hide whether the model does.
    """
    out = OPS.attention(
        query,
        key,
        value,
        _default_scale(query, kwargs.get("scaling")),
        UNRESOLVED,
        0,
        kwargs.get("softcap") or 0.0,
        kwargs.get("s_aux"),
        UNNUMBERED,
    )
    return out.transpose(1, 2), None


def _probe_mask(mask_function: Callable, q_length: int, kv_length: int, device: Any = None, **_: Any) -> Tensor:
    """HF mask function: classifies what the model asked for; the tensor returned only carries its identity."""
    assert _probe is not None
    token = torch.zeros(1, 1, q_length, kv_length, device=device)
    _probe.specs[id(token)] = (token, classify_function(mask_function, _probe.length))
    return token


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """HF attention function: records the layer's mask, found by the identity of the tensor that arrives."""
    assert _probe is not None
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError("attention has no layer_idx", where=type(module).__name__)
    _, spec = _probe.specs.get(id(attention_mask), (None, None))
    if reason := _call_reason(module, kwargs):
        spec = unknown(reason)
    elif attention_mask is None:
        spec = unknown("no mask reaches this layer")
    elif spec is None:
        spec = unknown("the mask is changed between its creation and the attention")
    if layer in _probe.masks and _probe.masks[layer] != spec:
        spec = unknown("the layer attends more than once with different masks")
    _probe.masks[layer] = spec
    _probe.calls.append((layer, key.shape[1], key.shape[3]))
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None


def _rounded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """HF attention function: eager attention by the layer's proven mask, over keys and values as FP8 returns them."""
    assert _masks is not None
    layer = module.layer_idx
    mask = _masks[layer]  # type: ignore[index]
    facts = (_default_scale(query, kwargs.get("scaling")), mask.kind, mask.window, kwargs.get("softcap") or 0.0)
    out = attention_reference(query, as_cached(key), as_cached(value), *facts, kwargs.get("s_aux"), layer)  # type: ignore[arg-type]
    return out.transpose(1, 2), None


_masks: Mapping[int, MaskSpec] | None = None


def rounded_logits(
    model: nn.Module, implementations: Implementations, masks: Mapping[int, MaskSpec], prompt: Sequence[int]
) -> Tensor:
    """Logits [1, N, V] of a prompt by the model's own code with keys and values rounded as an FP8 cache does.

    What a step over such a cache is to be compared with; `masks` are those that the probe proved.
    """
    global _masks  # noqa: PLW0603 - as `_probe`
    _masks = masks
    try:
        with torch.no_grad(), implementations.use(ROUNDED):
            device = next(model.parameters()).device
            ids, positions = torch.tensor([list(prompt)], device=device), torch.arange(len(prompt), device=device)
            given = Signature.of(model).arguments(ids, positions[None], positions, explicit_mask=True)
            return logits_of(model(**given))
    finally:
        _masks = None


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The forward hooks on `module` itself, without those that transformers leaves there and that do nothing here."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"]


def refuse_hooks(model: nn.Module) -> None:
    """Raise for a model with forward hooks: they expect a batch, and would see the packed tokens of all."""
    for name, module in model.named_modules():
        if hooks := forward_hooks(module):
            what = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
            raise UnsupportedModelError(
                f"a forward hook is registered ({what})",
                where=name or type(model).__name__,
                why="it would see the packed tokens of all requests instead of a batch",
                remedy="remove the hook, or use stock transformers",
            )


def _probe_experts(module: Any, *args: Tensor) -> Tensor:
    """HF experts function: notes which modules stay unfused, then computes."""
    assert _probe is not None
    if reason := unfused_reason(module):
        _probe.unfused_experts[type(module).__name__] = reason
    return trace_experts(module, *args)


def _register() -> None:
    AttentionInterface.register(TRACE, _trace_attention)
    AttentionInterface.register(PROBE, _probe_attention)
    AttentionInterface.register(ROUNDED, _rounded_attention)
    AttentionMaskInterface.register(PROBE, _probe_mask)
    ExpertsInterface.register(TRACE, trace_experts)
    ExpertsInterface.register(PROBE, _probe_experts)
    ExpertsInterface.register(ROUNDED, trace_experts)


class Implementations:
    """Routes a model's attention and experts through functions registered with HF, and back.

    Config objects are found once; switching touches only them. A submodule whose class does not support an
    interface keeps its own implementation.
    """

    def __init__(self, model: nn.Module) -> None:
        _register()
        remember_experts(model)
        self._slots: list[tuple[Any, str]] = []
        seen = set()
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
                seen.add(id(module.config))
                if module._can_set_attn_implementation():
                    self._slots.append((module.config, "_attn_implementation_internal"))
                if module._can_set_experts_implementation():
                    self._slots.append((module.config, "_experts_implementation_internal"))

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Inside, HF dispatches to the functions registered as `name`; the configuration is restored after."""
        saved = [getattr(config, attribute, None) for config, attribute in self._slots]
        for config, attribute in self._slots:
            setattr(config, attribute, name)
        try:
            yield
        finally:
            for (config, attribute), value in zip(self._slots, saved, strict=True):
                setattr(config, attribute, value)


def run_probe(model: nn.Module, implementations: Implementations, length: int) -> Probe:
    """One eager pass over a few tokens that proves each layer's mask for contexts up to `length`.

    A model without HF's attention interface yields an empty probe: its attention is matched in the graph.
    """
    global _probe  # noqa: PLW0603 - HF's registered functions have no other way to find the probe
    signature = Signature.of(model)
    kwargs = _trial_arguments(model, signature)
    _probe = probe = Probe(length)
    try:
        with torch.no_grad(), implementations.use(PROBE):
            given = logits_of(model(**kwargs))
            if signature.own_positions:
                del kwargs[signature.positions]
                probe.calls.clear()
                _require_equal_positions(model, given, logits_of(model(**kwargs)))
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign code can fail in any way
        raise UnsupportedModelError(
            "the model fails on a trial of six tokens",
            where=type(model).__name__,
            why=f"{type(error).__name__}: {error}",
            remedy="check that it runs with stock transformers; if it does, use that",
        ) from error
    finally:
        _probe = None
    probe.specs.clear()
    return probe


def _trial_arguments(model: nn.Module, signature: Signature) -> dict[str, Any]:
    device = next(model.parameters()).device
    ids, positions = torch.tensor([trial_tokens(model)], device=device), torch.arange(6, device=device)
    return signature.arguments(ids, positions[None], positions, explicit_mask=True)


def trial_tokens(model: nn.Module) -> list[int]:
    """Six tokens to try a model on. None is padding: some models do not count that."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return [i for i in range(7) if i != padding][:6]


def stock_logits(model: nn.Module) -> Tensor | None:
    """Logits [6, V] after each of `trial_tokens` as the model itself computes them; None when it cannot."""
    try:
        with torch.no_grad():
            return logits_of(model(**_trial_arguments(model, Signature.of(model))))[0]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # stock implementations may need packages that ours does not
        return None


def _require_equal_positions(model: nn.Module, given: Tensor, own: Tensor) -> None:
    """Refuse a model that counts otherwise than 0, 1, 2 when left alone, as RoBERTa does: its tokens would differ."""
    scale = float(own.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(given, own, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
        raise UnsupportedModelError(
            "the model's own positions are not 0, 1, 2, ...",
            where=type(model).__name__,
            why="its logits with these positions differ from those it computes when it is given none",
            remedy="use stock transformers for this model",
        )


def kv_layout(step: PackedStep, implementations: Implementations, inputs: tuple, canonicalize: Callable) -> list:
    """(layer, kv heads, head dim) of a model whose attention is only visible in its graph: one capture, not compiled.

    Args:
        inputs: arguments of `step` with no KV tensors.
        canonicalize: called with the graph; returns the layout.
    """
    found: list = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> Callable:
        found.extend(canonicalize(gm))
        logits = next(iter(gm.graph.find_nodes(op="output"))).args[0][0].meta["example_value"]
        return lambda *_: (torch.zeros(inputs[1].shape[0], logits.shape[-1]),)

    with torch.no_grad(), implementations.use(TRACE), dynamo_settings():
        torch.compile(step.isolated_forward(), backend=backend, fullgraph=True)(*inputs)
    return found
