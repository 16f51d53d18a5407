"""The fuse stage: patterns on Inductor's functional ATen graph, run as its custom post-grad pass.

Inductor keeps compiled graphs by a key in which this pass takes part by the hash of its sources and settings; when it
finds one, it does not run the pass. What the pass did is therefore kept beside Inductor's own cache, under the same
facts, and a compiled graph without such a record is compiled again: a report is never guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fusecomp._compat import CustomGraphPass, inductor_artifact, inductor_cache_dir, inductor_compile
from fusecomp.patterns.base import PassContext, Pattern, own_graph
from fusecomp.patterns.epilogue import LinearEpilogue
from fusecomp.patterns.experts_linear import ExpertsLinear
from fusecomp.patterns.experts_residual import ExpertsResidual
from fusecomp.patterns.hoisted_rows import HoistedRows
from fusecomp.patterns.linear_experts import LinearExperts, QuantLinearExperts
from fusecomp.patterns.linear_pair import LinearPair, QuantLinearPair
from fusecomp.patterns.norm import Norm
from fusecomp.patterns.outer import OuterProduct
from fusecomp.patterns.quant import QuantExperts, QuantLinear
from fusecomp.patterns.quant_activations import FakeQuantize, NormQuantize, QuantizeRoundTrip, ScaledLinear
from fusecomp.patterns.rope import RopeAttention
from fusecomp.patterns.routed_experts import RoutedExperts, RoutedQuantExperts
from fusecomp.patterns.router import Router
from fusecomp.patterns.router_linear import RouterLinear
from fusecomp.patterns.rows import SelectedRows
from fusecomp.report import FusionReport, Match, NearMiss

FUSE: tuple[Pattern, ...] = (
    OuterProduct(),
    QuantizeRoundTrip(),
    FakeQuantize(),  # after the pairs that cancel, and before norms, which look through it
    Router(),  # before linears, which would take a sigmoid of the logits in
    LinearEpilogue(),
    ExpertsResidual(),  # after linears, which take the experts in where both meet in one sum
    SelectedRows(),
    Norm(),
    RouterLinear(),  # after the norms that it takes in
    RopeAttention(),
    QuantLinear(),  # after all that a linear takes in, whatever its weight
    QuantExperts(),
    RoutedExperts(),  # after quantized experts, which need ids
    RoutedQuantExperts(),
    ExpertsLinear(),
    ScaledLinear(),  # after the weights: both sides are codes by then
    NormQuantize(),
    HoistedRows(),  # over whatever the last layer has become
    LinearPair(),  # of linears that have taken in all that they will
    QuantLinearPair(),
    LinearExperts(),  # likewise
    QuantLinearExperts(),
)


class FusePass(CustomGraphPass):
    """Runs `patterns` on each graph that Inductor compiles, recording into `context`'s report.

    Attributes:
        ran: whether the pass was called.
        nonce: set to keep Inductor from taking the result from its caches.
    """

    def __init__(self, patterns: Sequence[Pattern], context: PassContext, structure: str = "") -> None:
        self.patterns, self.context, self.structure = tuple(patterns), context, structure
        self.ran, self.nonce = False, ""

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran = True
        for pattern in self.patterns:
            pattern.apply(graph.owning_module, self.context)  # type: ignore[arg-type]

    def key(self) -> str:
        """Hash of every pattern's sources, in order."""
        return hashlib.sha256(";".join(f"{p.name}={p.key()}" for p in self.patterns).encode()).hexdigest()

    def uuid(self) -> str:
        """Part of Inductor's cache key, which names symbols but leaves out the ranges that code asserts."""
        return self.key() + self.structure + self.nonce

    def __getstate__(self) -> dict[str, Any]:
        # Inductor may hash its configuration by pickling it; the report is no part of what compilation depends on.
        return {"patterns": [p.name for p in self.patterns], "key": self.uuid()}


def compile_fused(
    gm: GraphModule, inputs: list[Any], patterns: Sequence[Pattern], structure: str, *, artifact: bool = False
) -> tuple[Callable, FusionReport]:
    """Compile one piece with the fuse stage.

    Args:
        structure: hash of everything about `gm` that compilation depends on.
        artifact: compile to what can be saved to a file.

    Returns: the compiled piece and what was done to it.
    """
    compile_graph = inductor_artifact if artifact else inductor_compile
    context = PassContext(FusionReport())
    stage = FusePass(patterns, context, structure)
    record = inductor_cache_dir() / "fusecomp" / f"{structure}-{stage.key()[:32]}.json"
    compiled = compile_graph(own_graph(gm), inputs, {"post_grad_custom_pre_pass": stage})
    if not patterns:
        return compiled, context.report
    if stage.ran:
        _write_record(record, context.report)
        return compiled, context.report
    known = _read_record(record)
    if known is None:
        stage.nonce = uuid.uuid4().hex
        compiled = compile_graph(own_graph(gm), inputs, {"post_grad_custom_pre_pass": stage})
        assert stage.ran, "a graph with a new key was taken from a cache"
        _write_record(record, context.report)
        return compiled, context.report
    return compiled, known


def _write_record(path: Path, report: FusionReport) -> None:
    facts = {"matches": [asdict(m) for m in report.matches], "near_misses": [asdict(m) for m in report.near_misses]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(facts, file)
    os.replace(file.name, path)


def _read_record(path: Path) -> FusionReport | None:
    try:
        facts = json.loads(path.read_text())
        return FusionReport(
            matches=[Match(**m) for m in facts["matches"]], near_misses=[NearMiss(**m) for m in facts["near_misses"]]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
