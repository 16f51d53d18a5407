"""What is claimed about one family of models, and how a tiny model of it is configured."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fusecomp._compat import decomposes_outer_products

_HEAD_FUSED = {"linear": 1, "selected_rows": 1, "norm": 1, "hoisted_rows": 1}
# The rotary table, where Inductor has not made a multiplication of it before the fuse stage sees it.
_TABLE_FUSED = {} if decomposes_outer_products() else {"outer_product": 1}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: how tests and docs call it.
        architecture: class of transformers that is built, unmodified.
        config: keyword arguments of its configuration class; a tiny model.
        expected_matches: per pattern, matches in one decoder layer. A capture of the model must report exactly
            `layers * count` of each; a pattern that is not named must not match.
        dtypes: in which the family is tested.
        fused_matches: per pattern, further matches of the fuse stage in one decoder layer; `expected_total` adds those
            outside of the layers.
        fused_between: per pattern, matches of the fuse stage that reach from one decoder layer into the next.
        windows: sliding window of each layer, 0 for plain causal attention: what the mask proof must find.
        tolerance: why the numerics contract needs care here; empty when it holds as it stands.
        exclusions: configurations of the family that are not covered, with the reason.
        near_misses: per pattern, part of the reason for which the fuse stage refuses one place in every layer.
        wide_router: the router multiplies in fp32 whatever the model's dtype is: in another one the casts of its weight
            keep its linear from being fused.
        core: tested compiled and in every variant at each change; the others are served eagerly in fp32 then, and in
            bf16 and compiled among the slow tests.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    expected_matches: Mapping[str, int]
    fused_matches: Mapping[str, int]
    windows: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    tolerance: str = ""
    exclusions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    near_misses: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    fused_between: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    wide_router: bool = False
    core: bool = True

    @property
    def layers(self) -> int:
        return len(self.windows)

    def refusals(self, dtype: torch.dtype) -> dict[str, str]:
        """Per pattern, part of the reason for which the fuse stage refuses one place in every layer."""
        cast = {"linear": "transpose of a weight"} if self.wide_router and dtype != torch.float32 else {}
        return {**self.near_misses, **cast}

    def expected_total(self, fused: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, int]:
        """Matches in the whole model, with those of the fuse stage if it runs."""
        per_layer = {**self.expected_matches, **(self.fused_matches if fused else {})}
        if fused and self.wide_router and dtype != torch.float32:
            per_layer["linear"] -= 1
        total = {pattern: count * self.layers for pattern, count in per_layer.items()}
        between = {pattern: count * (self.layers - 1) for pattern, count in self.fused_between.items()}
        once = {**_HEAD_FUSED, **_TABLE_FUSED, **between} if fused else {}
        return total | {pattern: total.get(pattern, 0) + count for pattern, count in once.items()}

    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.architecture)

    def make_config(self) -> transformers.PreTrainedConfig:
        return self.model_class().config_class(num_hidden_layers=self.layers, **self.config)
