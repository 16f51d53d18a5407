"""What quantizing a model did, for reports. It stays with the model, copies included."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusecomp.report import FusionReport, Match, NearMiss

ATTRIBUTE = "_fusecomp_quantization"
PATTERN = "quantize"


@dataclass(frozen=True)
class Quantized:
    """A weight held as codes, and how."""

    name: str
    detail: str


@dataclass
class QuantizationRecord:
    """Everything that was done to one model.

    Attributes:
        scheme: name of the scheme.
        calibration: what the text was, or why there was none.
        weights: those that are codes now.
        left_out: (name, reason) of the others.
        notes: what a user should know besides.
    """

    scheme: str
    calibration: str
    weights: list[Quantized] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line."""
        return f"{self.scheme}, {self.calibration}: {len(self.weights)} weights, {len(self.left_out)} left as they are"


def record_of(model: Any) -> QuantizationRecord | None:
    """What was done to `model`; None if nothing was."""
    return vars(model).get(ATTRIBUTE)


def describe(model: Any, report: FusionReport) -> None:
    """Put what was done to `model` before all else in its report."""
    record = record_of(model)
    if record is None:
        return
    report.matches[:0] = [Match(PATTERN, weight.name, weight.detail, "quantizing") for weight in record.weights]
    report.near_misses[:0] = [NearMiss(PATTERN, name, reason) for name, reason in record.left_out]
    report.notes[:0] = [f"quantized by {record.summary()}", *record.notes]
