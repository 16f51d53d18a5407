"""Where the quantized weights of a checkpoint belong in a model, and their way there.

Names and mergers are transformers' own (its conversion mapping). `prepare` runs on the model without tensors, so that
no weight is allocated twice; `fill` reads one weight after the other. Legend: E experts, S weights merged along rows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.errors import UnsupportedModelError
from fusecomp.quant.codes import Codes
from fusecomp.quant.files import CODES, TensorFiles
from fusecomp.quant.formats.base import Format, Parts
from fusecomp.quant.modules import QuantizedLinear, QuantizedWeight, hold_experts


@dataclass
class Target:
    """A parameter of the model and the weights [S][E] of the checkpoint that make it; one for a linear."""

    name: str
    shape: tuple[int, ...]
    weights: list[dict[int, str]]


class Placement:
    """The quantized weights of one checkpoint on their way into one model."""

    def __init__(self, format_: Format, files: TensorFiles) -> None:
        self.format, self.files = format_, files
        self.parts: dict[str, Parts] = format_.find(files)
        self.targets: list[Target] = []
        taken = {name for parts in self.parts.values() for name in parts.values()}
        self.plain = [name for name in files.entries if name not in taken]
        if not self.parts:
            raise files.error("no tensor is quantized", f"config.json says quant_method={format_.method!r}")

    def prepare(self, model: Any) -> None:
        """Take the parameters that come as codes out of `model`, which is on the meta device.

        Raises:
            CheckpointError: a weight belongs to no parameter, or one of its experts is missing.
            UnsupportedModelError: a parameter that cannot be held as codes is quantized.
        """
        self.targets = self._find_targets(model)
        tied = getattr(model, "all_tied_weights_keys", {})
        for target in self.targets:
            where, leaf = target.name.rpartition(".")[::2]
            owner = model.get_submodule(where)
            if target.name in {*tied, *tied.values()}:
                raise self.files.error(f"{target.name!r} is quantized and tied", "tied parameters are one tensor")
            if type(owner) is nn.Linear and leaf == "weight":
                linear = QuantizedLinear(owner.in_features, owner.out_features, owner.bias)
                model.set_submodule(where, linear)
            elif len(target.shape) == 3 and hasattr(owner, "is_transposed"):
                del owner._parameters[leaf]
                owner._is_hf_initialized = True  # type: ignore[assignment]
            else:
                raise self._unsupported(target, f"it belongs to a {type(owner).__name__}")

    def fill(self, model: nn.Module, dtype: str) -> bool:
        """Read every quantized weight; they dequantize to `dtype`.

        Returns:
            Whether experts were asked to quantize what they read, which they do not.

        Raises:
            CheckpointError: a tensor does not fit.
            UnsupportedModelError: a layout is not supported.
        """
        inputs_dropped = False
        scales: dict[tuple, nn.Parameter] = {}
        for target in self.targets:
            where, leaf = target.name.rpartition(".")[::2]
            owner = model.get_submodule(where)
            if isinstance(owner, QuantizedLinear):
                n, k = target.shape
                owner.fill(self._read(target.weights[0][0], n, k, dtype))
                _share_scale(owner, where.rpartition(".")[0], scales)
                continue
            transposed = bool(owner.is_transposed)
            if self.format.names_parameters:
                codes, inverse = self._read_merged(target, transposed, dtype), None
            else:
                codes, inverse = self._merge(target, dtype)
                transposed = False
            inputs_dropped |= codes.activation is not None
            hold_experts(owner, leaf, QuantizedWeight(codes, inverse, transposed))
        return inputs_dropped

    def _read(self, weight: str, n: int, k: int, dtype: str) -> Codes:
        return self.format.read(weight, self.parts[weight], self.files, n, k, dtype)

    def _read_merged(self, target: Target, transposed: bool, dtype: str) -> Codes:
        experts, n, k = target.shape
        weight = target.weights[0][0]
        codes = self._read(weight, *((k, n) if transposed else (n, k)), dtype)
        if codes.q.shape[0] != experts:
            names = ", ".join(map(repr, self.parts[weight].values()))
            raise self.files.error(f"tensors {names} hold {codes.q.shape[0]} experts; the model has {experts}")
        return codes

    def _merge(self, target: Target, dtype: str) -> tuple[Codes, Tensor | None]:
        """Codes of all experts as one, [E, S * N, K], and where columns lie that are out of place."""
        experts, rows, k = target.shape
        n = rows // len(target.weights)
        merged: Codes | None = None
        inverse: Tensor | None = None
        for s, weights in enumerate(target.weights):
            for expert, weight in sorted(weights.items()):
                codes = self._read(weight, n, k, dtype)
                if len(target.weights) > 1:
                    codes = _own_scales(codes, n)
                if merged is None:
                    merged = _room(codes, experts, len(target.weights))
                if (codes.spec, codes.activation, codes.scale.dtype) != (
                    *(merged.spec, merged.activation),
                    merged.scale.dtype,
                ):
                    raise self._unsupported(target, f"{weight!r} is quantized in another way than its neighbours")
                if codes.zero is not None and merged.zero is None:
                    middle = 8 if codes.spec.bits == 4 else 0
                    merged.zero = torch.full_like(merged.scale, middle, dtype=torch.float32).to(codes.zero.dtype)
                if codes.order is not None and inverse is None:
                    inverse = torch.arange(k).expand(experts, len(target.weights), k).contiguous()
                height = codes.scale.shape[0]
                merged.q[expert, s * n : (s + 1) * n] = codes.q
                merged.scale[expert, s * height : (s + 1) * height] = codes.scale
                if merged.zero is not None and codes.zero is not None:
                    merged.zero[expert, s * height : (s + 1) * height] = codes.zero
                if codes.order is not None and inverse is not None:
                    inverse[expert, s] = codes.order.argsort()
        assert merged is not None
        return merged, inverse

    def _find_targets(self, model: Any) -> list[Target]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping, meta = get_model_conversion_mapping(model), model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        ignored = model._keys_to_ignore_on_load_unexpected or ()  # layers for speculation, say
        for key in self.plain:
            dtype = self.files.entries[key].dtype
            if (
                dtype in CODES
                and rename_source_key(key, renamings, converters, model.base_model_prefix, meta)[0] in meta
            ):
                raise self.files.error(
                    f"tensor {key!r} holds {dtype} codes, and no scales of {self.format.method} with it"
                )
        targets: dict[str, Target] = {}
        for weight, parts in self.parts.items():
            key = weight if self.format.names_parameters else f"{weight}.weight"
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
            if name not in meta and any(re.search(rule, key) for rule in ignored):
                continue
            if name not in meta:
                names = ", ".join(map(repr, parts.values()))
                raise self.files.error(f"tensors {names} belong to no parameter of {type(model).__name__}")
            converter = None if pattern is None else by_pattern[pattern]
            sources = 1 if converter is None else len(converter.source_patterns)
            shape = tuple(meta[name].shape)
            target = targets.setdefault(name, Target(name, shape, [{} for _ in range(sources)]))
            if converter is None or pattern is None:
                target.weights[0][0] = weight
                continue
            index = _expert(key, pattern)
            if index is None or not _merges(converter):
                raise self._unsupported(target, f"transformers converts it by {converter.operations}")
            target.weights[converter.source_patterns.index(pattern)][index] = weight
        for target in targets.values():
            self._refuse_gaps(target)
        return list(targets.values())

    def _refuse_gaps(self, target: Target) -> None:
        """Raise `CheckpointError` when an expert of a merged parameter did not come quantized."""
        merged = len(target.weights) > 1 or len(target.weights[0]) > 1 or len(target.shape) == 3
        if not merged or self.format.names_parameters:
            return
        wanted = set(range(target.shape[0]))
        for weights in target.weights:
            if weights.keys() != wanted:
                odd = sorted(wanted ^ weights.keys())[0]
                near = next(iter(weights.values()), target.name)
                what = "no quantized tensors" if odd in wanted else "tensors that the model has no place for"
                raise self.files.error(f"expert {odd} of {target.name!r} has {what}", f"a neighbour is {near!r}")

    def _unsupported(self, target: Target, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"quantized parameter {target.name!r} is not supported",
            where=str(self.files.folder),
            why=why,
            remedy="use another quantization of the model, or the model itself",
        )


def _expert(key: str, pattern: str) -> int | None:
    """The number that stands for the star of `pattern` in `key`."""
    found = re.search(r"(\d+)".join(re.escape(part) for part in pattern.rstrip("$").split("*")), key)
    return int(found[1]) if found and found.groups() else None


def _merges(converter: Any) -> bool:
    """Whether a converter stacks experts and joins their rows, and does nothing else."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = [(type(op), op.dim) for op in converter.operations if hasattr(op, "dim")]
    join = [(Concatenate, 1)] if len(converter.source_patterns) > 1 else []
    return len(operations) == len(converter.operations) and operations == [(MergeModulelist, 0), *join]


def _own_scales(codes: Codes, n: int) -> Codes:
    """The same codes with scales that end where the weight [N, K] does, so that others can follow below."""
    rows = codes.spec.rows or n
    shared = math.gcd(rows, n)
    if rows == shared:
        return replace(codes, spec=replace(codes.spec, rows=rows))

    def repeat(values: Tensor) -> Tensor:
        return values.repeat_interleave(rows // shared, 0)[: n // shared]

    zero = None if codes.zero is None else repeat(codes.zero)
    return replace(codes, scale=repeat(codes.scale), zero=zero, spec=replace(codes.spec, rows=shared))


def _room(codes: Codes, experts: int, merged: int) -> Codes:
    """Uninitialized codes for `merged` such weights of each expert."""

    def room(tensor: Tensor) -> Tensor:
        return tensor.new_empty((experts, merged * tensor.shape[0], tensor.shape[1]))

    return replace(codes, q=room(codes.q), scale=room(codes.scale), zero=None, order=None, input_scale=None)


def _share_scale(linear: QuantizedLinear, parent: str, scales: dict[tuple, nn.Parameter]) -> None:
    """Let linears of one parent whose static input scales are equal hold one parameter.

    That their inputs are rounded alike can then be seen in a graph, and is part of a stored program's identity.

    Args:
        scales: those met so far, by parent, activations and value.
    """
    if linear.input is not None and isinstance(scale := getattr(linear.input, "scale", None), nn.Parameter):
        key = (parent, linear.input.quantization, scale.device, *scale.tolist())
        linear.input.scale = scales.setdefault(key, scale)
