"""The schemes of a compressed-tensors configuration, and which one a weight has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusecomp.ops.quant import ActivationSpec

if TYPE_CHECKING:
    from fusecomp.quant.formats.base import Format


@dataclass(frozen=True)
class Scheme:
    """How weights, and the inputs of their layers, are quantized.

    Attributes:
        kind, bits: "int" with 4 or 8, or "fp8" with 8.
        strategy: "tensor", "channel", "group" or "block": what shares a scale.
        sizes: rows and columns of a block; (1, columns of a group) for "group".
        symmetric: there are no zero points.
        activation: of inputs; None when they are not quantized.
    """

    kind: str
    bits: int
    strategy: str
    sizes: tuple[int, int]
    symmetric: bool
    activation: ActivationSpec | None

    def block(self, k: int) -> tuple[int, int]:
        """Rows and columns that share a scale in a weight of `k` columns; 0 for all."""
        rows, cols = {"tensor": (0, 0), "channel": (1, 0)}.get(self.strategy, self.sizes)
        return rows, 0 if self.strategy == "group" and cols >= k else cols


class Schemes:
    """Which scheme each weight has."""

    def __init__(self, owner: Format) -> None:
        """Parse `config_groups` of `owner.config`.

        Raises:
            CheckpointError: the configuration is malformed.
            UnsupportedModelError: a scheme is not supported.
        """
        self._owner = owner
        groups = owner.config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise owner.malformed("quantization_config has no config_groups")
        self._groups = [(self._targets(name, group), self._scheme(name, group)) for name, group in groups.items()]

    def of(self, weight: str) -> Scheme:
        """The scheme of a weight: names and patterns go before classes.

        Raises:
            CheckpointError: no group targets it.
        """
        for by_class in (False, True):
            for targets, scheme in self._groups:
                for target in targets:
                    if (target == "Linear") if by_class else self._matches(target, weight):
                        return scheme
        raise self._owner.malformed(f"no group of quantization_config.config_groups targets {weight!r}")

    def _matches(self, target: str, weight: str) -> bool:
        if not target.startswith("re:"):
            return target == weight
        try:
            return re.match(target.removeprefix("re:"), weight) is not None
        except re.error as error:
            raise self._owner.malformed(f"quantization_config: target {target!r}: {error}") from error

    def _targets(self, name: str, group: Any) -> list[str]:
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise self._owner.malformed(f"quantization_config.config_groups.{name} has no list of targets")
        return targets

    def _scheme(self, name: str, group: dict[str, Any]) -> Scheme:
        where, owner = f"quantization_config.config_groups.{name}", self._owner
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise owner.malformed(f"{where} says nothing about weights")
        if group.get("output_activations"):
            raise owner.unsupported(f"{where} quantizes outputs")
        kind = self._kind(weights, f"{where}.weights")
        strategy, size = self._strategy(weights)
        if strategy == "block":
            block = weights.get("block_structure")
            if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)):
                raise owner.malformed(f"{where}.weights.block_structure is {block!r}, not two sizes")
            sizes = (block[0], block[1])
        elif strategy == "group":
            if not isinstance(size, int) or size <= 0:
                raise owner.malformed(f"{where}.weights.group_size is {size!r}")
            sizes = (1, size)
        elif strategy in ("tensor", "channel"):
            sizes = (0, 0)
        else:
            raise owner.unsupported(f"{where}.weights with strategy={strategy!r}")
        if strategy == "block" and not weights.get("symmetric", True):
            raise owner.unsupported(f"{where}.weights: blocks with zero points")
        given = group.get("input_activations")
        activation = self._activation(given, f"{where}.input_activations") if given else None
        return Scheme(kind, weights["num_bits"], strategy, sizes, bool(weights.get("symmetric", True)), activation)

    def _kind(self, args: dict[str, Any], where: str) -> str:
        bits, kind = args.get("num_bits"), args.get("type", "int")
        if (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            raise self._owner.unsupported(f"{where} with {bits!r} bits of type {kind!r}; supported: int 4, 8, float 8")
        if kind == "float" and not args.get("symmetric", True):
            raise self._owner.unsupported(f"{where}: floats with zero points")
        return "int" if kind == "int" else "fp8"

    def _strategy(self, args: dict[str, Any]) -> tuple[Any, Any]:
        """Strategy and group size; an absent strategy follows from the size."""
        size, strategy = args.get("group_size"), args.get("strategy")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        return strategy, size

    def _activation(self, args: Any, where: str) -> ActivationSpec:
        if not isinstance(args, dict):
            raise self._owner.malformed(f"{where} is a {type(args).__name__}, not an object")
        kind, dynamic = self._kind(args, where), args.get("dynamic", False)
        strategy, size = self._strategy(args)
        granularity = {"tensor": "tensor", "token": "token", "group": "block", "channel": "token"}.get(strategy)
        supported = args["num_bits"] == 8 and args.get("symmetric", True) and isinstance(dynamic, bool)
        if granularity is None or not supported or not (dynamic or granularity == "tensor"):
            raise self._owner.unsupported(
                f"{where} with num_bits={args['num_bits']}, symmetric={args.get('symmetric', True)}, "
                f"strategy={strategy!r}, dynamic={dynamic!r}"
            )
        block = size if granularity == "block" and isinstance(size, int) else 0
        if granularity == "block" and block <= 0:
            raise self._owner.malformed(f"{where}.group_size is {size!r}")
        return ActivationSpec(kind, 8, granularity, block, dynamic)
