"""What every format offers, and the reading of its configuration.

A weight is quantized if and only if its tensors are: lists of exceptions in a configuration are not needed to know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from fusecomp.errors import CheckpointError, UnsupportedModelError
from fusecomp.quant.codes import Codes
from fusecomp.quant.files import TensorFiles

Parts = dict[str, str]  # part of a weight -> name of its tensor


class Format(ABC):
    """A format with the settings of one checkpoint.

    Attributes:
        method: its name in `quant_method`.
        names_parameters: weights are called as the parameter ("experts.down_proj"), not as its module.
    """

    method: str
    names_parameters = False

    def __init__(self, config: dict[str, Any], where: str) -> None:
        """`config`: the `quantization_config`; `where`: its file, for errors.

        Raises:
            CheckpointError: a setting is malformed.
            UnsupportedModelError: a setting is not supported.
        """
        self.config, self.where = config, where

    @abstractmethod
    def find(self, files: TensorFiles) -> dict[str, Parts]:
        """Every quantized weight of the checkpoint and its tensors.

        Raises:
            CheckpointError: one of them is missing.
        """

    @abstractmethod
    def read(self, weight: str, parts: Parts, files: TensorFiles, n: int, k: int, dtype: str) -> Codes:
        """The weight [N, K] (for `names_parameters`: [E, N, K]) that dequantizes to `dtype`.

        Raises:
            CheckpointError: a tensor has another shape or dtype than the model and the configuration say.
            UnsupportedModelError: its layout is not supported.
        """

    def unsupported(self, what: str, why: str = "", where: str = "") -> UnsupportedModelError:
        return UnsupportedModelError(
            what,
            where=where or self.where,
            why=why or f"fusecomp does not read this variant of {self.method}",
            remedy="use another quantization of the model, or the model itself",
        )

    def malformed(self, what: str) -> CheckpointError:
        return CheckpointError(what, where=self.where, remedy="restore the file")

    def integer(self, key: str, default: int | None = None) -> int:
        """Setting `key`, an integer."""
        value = self.config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.malformed(f"quantization_config.{key} is {value!r}, not a number")
        return value


def collect(files: TensorFiles, required: Iterable[str], optional: Iterable[str], sep: str = ".") -> dict[str, Parts]:
    """Weights whose tensors are called `<weight><sep><part>`; all of `required` must be there."""
    required = tuple(required)
    weights: dict[str, Parts] = {}
    for name in files.entries:
        for part in (*required, *optional):
            if name.endswith(sep + part):
                weights.setdefault(name.removesuffix(sep + part), {})[part] = name
    for weight, parts in weights.items():
        need(files, weight, parts, required, sep)
    return weights


def need(files: TensorFiles, weight: str, parts: Parts, required: Iterable[str], sep: str = ".") -> None:
    """Raise `CheckpointError` when one of `required` is not among the tensors of `weight`."""
    for part in required:
        if part not in parts:
            raise files.error(f"tensor {weight + sep + part!r} is missing", f"{', '.join(parts.values())} need it")
