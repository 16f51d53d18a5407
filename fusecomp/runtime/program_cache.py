"""Finds a stored step program for a model, or stores the one just compiled; says which, and why.

Nothing here is fatal: a program that cannot be described, read or written means compiling, and the report's line
`program` names the reason.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusecomp._compat import load_artifact
from fusecomp.config import EngineConfig
from fusecomp.report import FusionReport, Match, NearMiss
from fusecomp.runtime.artifacts import ArtifactStore, Stored, Unusable, enabled_by_environment
from fusecomp.runtime.identity import Undescribable, identity
from fusecomp.runtime.program import Plan, StepProgram, Unplannable

if TYPE_CHECKING:
    from fusecomp.capture import Probe

logger = logging.getLogger("fusecomp")

# What a capture writes into the report, and a warm start restores.
REPORTED = (
    *("matches", "near_misses", "graphs", "graph_breaks", "ops_before", "ops_after"),
    *("cost_bytes", "cost_flops", "sources"),
)


@dataclass
class Found:
    """A stored program, ready to run."""

    program: StepProgram
    layers: list[tuple[int, int, int]]
    proven_length: int
    notes: list[str]


class ProgramCache:
    """The stored programs as one engine sees them. `report.program` says what became of its own.

    Args:
        probe: what the model's own mask functions were proven to be: part of the identity.

    Attributes:
        parts: the identity; None for a model that is not compiled or cannot be described.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        probe: Probe,
        device: torch.device,
        dtype: torch.dtype,
        report: FusionReport,
    ) -> None:
        self._model, self._report = model, report
        self.parts: dict[str, Any] | None = None
        self._store: ArtifactStore | None = None
        self._reason = ""
        if config.enforce_eager:
            report.program = "not compiled (enforce_eager)"
            return
        if not config.compile_cache:
            report.program = "compiled; stored programs are off (compile_cache=False)"
            return
        if enabled_by_environment():
            self._store = ArtifactStore()
        else:
            report.program = "compiled; stored programs are off (FUSECOMP_COMPILE_CACHE=0)"
        try:
            self.parts = identity(model, config, probe, device, dtype)
        except Undescribable as error:
            if self._store is not None:
                report.program = f"compiled, not stored: {error}"

    def find(self) -> Found | None:
        """The stored program of this model, loaded."""
        if self.parts is None or self._store is None:
            return None
        start = time.perf_counter()
        lookup = self._store.look_up(self.parts)
        if lookup.found is None:
            self._miss(lookup.reason, warning=lookup.warning)
            return None
        try:
            found = self._load(lookup.found)
        except Exception as error:  # artefacts are unpickled and run: anything may be wrong with them
            self._miss(f"the stored program {lookup.found.key[:12]} fails to load ({type(error).__name__}: {error})")
            return None
        self._report.program = f"loaded {lookup.found.key[:12]} from {self._store.programs}"
        self._report.seconds["load program"] = time.perf_counter() - start
        logger.info("%s: %s", self._report.model, self._report.program)
        return found

    def _load(self, stored: Stored) -> Found:
        record = stored.record
        plan = Plan.from_json(record["plan"])
        pieces = {kind: load_artifact(str(stored.files[name])) for kind, name in record["pieces"].items()}
        program = StepProgram(plan, pieces, self._model)
        restore(self._report, record["report"])
        layers = [tuple(layer) for layer in record["layers"]]
        return Found(program, layers, record["proven_length"], record["report"]["notes"])

    def refuse(self, reason: str) -> None:
        """Note why the program that was found is not used after all."""
        self._miss(reason)

    def store(
        self,
        plan: Plan | Unplannable,
        artifacts: Mapping[str, Any],
        notes: list[str],
        layers: list[tuple[int, int, int]],
        proven_length: int,
    ) -> None:
        """Store what was compiled. `notes` are those that the capture made."""
        if self.parts is None or self._store is None:
            return
        try:
            if isinstance(plan, Unplannable):
                raise plan
            names = {kind: f"piece-{kind[:16]}.bin" for kind in artifacts}
            files = {names[kind]: _bytes(artifact) for kind, artifact in artifacts.items()}
            record = {
                "plan": plan.to_json(),
                "pieces": names,
                "report": snapshot(self._report) | {"notes": notes},
                "layers": layers,
                "proven_length": proven_length,
            }
            key = self._store.save(self.parts, record, files)
        except (Unplannable, Unusable) as error:
            self._report.program = f"compiled, not stored: {error}"
            if isinstance(error, Unusable):
                logger.warning("%s: %s", self._report.model, self._report.program)
        else:
            self._report.program = f"compiled ({self._reason}); stored as {key[:12]} in {self._store.programs}"
        logger.info("%s: %s", self._report.model, self._report.program)

    def _miss(self, reason: str, *, warning: bool = True) -> None:
        self._reason = reason
        self._report.program = f"compiled ({reason})"
        if warning:
            logger.warning("%s: %s", self._report.model, reason)


def _bytes(artifact: Any) -> bytes:
    """An artefact as Inductor writes it.

    Raises:
        Unplannable: Inductor cannot.
    """
    with tempfile.TemporaryDirectory(prefix="fusecomp-") as folder:
        path = Path(folder) / "piece"
        try:
            artifact.save(path=str(path))
        except Exception as error:  # pickling fails in many ways
            raise Unplannable(f"a compiled piece cannot be saved ({type(error).__name__}: {error})") from error
        return path.read_bytes()


def snapshot(report: FusionReport) -> dict[str, Any]:
    """What a capture wrote into `report`, as JSON values."""
    whole = asdict(report)
    return {name: whole[name] for name in REPORTED}


def restore(report: FusionReport, stored: Mapping[str, Any]) -> None:
    """Write a snapshot back."""
    known = {f.name for f in fields(FusionReport)}
    for name in REPORTED:
        assert name in known
        setattr(report, name, stored[name])
    report.matches = [Match(**match) for match in stored["matches"]]
    report.near_misses = [NearMiss(**miss) for miss in stored["near_misses"]]
    report.notes += stored["notes"]
