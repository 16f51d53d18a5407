"""`FusionReport`: what a compiler did to a model, in full: matches, near misses, receipts, graphs, fallbacks."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Match:
    """One rewrite.

    Attributes:
        where: the layer or module.
        detail: the proven facts (mask, heads, scale).
        operation: the emitted op with its sizes, where a lowering has a choice of kernels for it.
    """

    pattern: str
    where: str
    detail: str
    numerics: str
    operation: str = ""


@dataclass(frozen=True)
class NearMiss:
    """A place that looked like the pattern and was refused, with the reason."""

    pattern: str
    where: str
    reason: str


@dataclass(frozen=True)
class Receipt:
    """Comparison of a rewritten graph with what it replaced: errors are relative RMS against fp32."""

    what: str
    error: float
    reference_error: float
    passed: bool


@dataclass
class FusionReport:
    """Everything that was done to one captured model.

    Attributes:
        model: class name of the model.
        layers: attention layers seen by the probe.
        matches, near_misses, receipts: in graph order.
        graph_breaks, recompiles: of capture, and of serving after warm-up.
        ops_before, ops_after: op counts of the captured graph around the passes.
        cost_bytes, cost_flops: symbolic cost of the canonical ops in T, S, ctx.
        cuda_graphs: decode batches with a graph so far; others are padded to the next one.
        mixed_cuda_graphs: shapes of steps with prefills that have one.
        fallbacks: "op: reason" -> times an eager reference ran where a kernel was expected.
        lowerings: operation -> which kernel runs it for how many tokens, and where that choice comes from.
        program: whether the compiled step was loaded from the store or compiled, and why.
        sources: pattern -> hash of the source that was applied.
        notes: decisions a user should know, such as chosen limits.
    """

    model: str = ""
    layers: int = 0
    matches: list[Match] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    graph_breaks: int = 0
    recompiles: int = 0
    graphs: int = 0
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    cost_bytes: str = ""
    cost_flops: str = ""
    cuda_graphs: list[int] = field(default_factory=list)
    mixed_cuda_graphs: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    program: str = ""
    lowerings: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        """Number of matches of `pattern`."""
        return sum(m.pattern == pattern for m in self.matches)

    def counts(self) -> dict[str, int]:
        """Matches per pattern."""
        return dict(Counter(m.pattern for m in self.matches))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self) | {"counts": self.counts()}

    def summary(self) -> str:
        """A readable account, one line per fact."""
        counts = ", ".join(f"{n} x {p}" for p, n in self.counts().items()) or "nothing"
        lines = [f"{self.model}: {self.layers} attention layers; matched {counts}"]
        lines += [f"  + {m.pattern:16} {m.where:28} {m.detail} [{m.numerics}]" for m in self.matches]
        lines += [f"  - {m.pattern:16} {m.where:28} not matched: {m.reason}" for m in self.near_misses]
        if not self.near_misses:
            lines.append("  no near misses")
        lines.append(f"  graphs {self.graphs}, graph breaks {self.graph_breaks}, recompiles {self.recompiles}")
        for operation, choices in self.lowerings.items():
            lines += [f"  {operation}:", *(f"    {choice}" for choice in choices)]
        if self.program:
            lines.append(f"  program {self.program}")
        if self.ops_before:
            before, after = sum(self.ops_before.values()), sum(self.ops_after.values())
            lines.append(f"  captured ops {before} -> {after}")
        if self.cost_bytes:
            lines.append(f"  canonical ops move {self.cost_bytes} bytes and do {self.cost_flops} FLOPs a step")
        if self.cuda_graphs:
            mixed = f", and {self.mixed_cuda_graphs} for steps with prefills" if self.mixed_cuda_graphs else ""
            lines.append(f"  CUDA graphs for batches {', '.join(map(str, self.cuda_graphs))}{mixed}")
        for receipt in self.receipts:
            verdict = "passed" if receipt.passed else "FAILED"
            lines.append(
                f"  receipt {receipt.what}: {verdict}, error {receipt.error:.2e} against fp32 "
                f"(unfused {receipt.reference_error:.2e})"
            )
        lines += [f"  fallback {what} ({times} times)" for what, times in self.fallbacks.items()]
        lines += [f"  {phase}: {seconds:.2f} s" for phase, seconds in self.seconds.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
