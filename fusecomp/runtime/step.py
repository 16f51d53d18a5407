"""The compiled step: a model, its KV tensors, and the one function `logits = step(batch)` that runs both.

Order: probe (eager, a few tokens) -> a stored program, when there is one for this very model and probe -> otherwise KV
layout, then Dynamo + passes + Inductor on a first batch, then storing. After `seal()`, anything that would compile
again is an error that names the guard that failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp._compat import compiler_prepared, counters, dynamo_settings, mark_unbacked, recompiles_are_errors
from fusecomp.backend import CANONICALIZE, MERGE, StepBackend, enabled, run_passes
from fusecomp.capture import (
    TRACE,
    Implementations,
    kv_layout,
    refuse_hooks,
    rounded_logits,
    run_probe,
    stock_logits,
    trial_tokens,
)
from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError, FallbackError, UnsupportedModelError
from fusecomp.fusion import FUSE
from fusecomp.ops.kv_cache import FP8, KVLayout
from fusecomp.ops.mode import batch_invariance
from fusecomp.packed_step import PackedStep
from fusecomp.patterns.attention import attention_calls
from fusecomp.patterns.base import PassContext, fake_value
from fusecomp.patterns.invariance import BatchInvariance
from fusecomp.patterns.masks import UNKNOWN
from fusecomp.report import FusionReport
from fusecomp.runtime.alone import each_token_alone
from fusecomp.runtime.compile_errors import capture_errors, recompile_error
from fusecomp.runtime.depth import Outline, extend, extend_report, outline, reads_layer_index, shortened
from fusecomp.runtime.program import Plan, StepProgram, Unplannable, merged_reference, plan_of, references
from fusecomp.runtime.program_cache import ProgramCache, restore, snapshot
from fusecomp.runtime.step_batch import StepBatch

# Masks written inline in a model are evaluated as [T, T] matrices: this bounds T, and with it max_model_len.
INLINE_PROOF_LENGTH = 4096


def _step_tensors(batch: StepBatch) -> tuple[Tensor, ...]:
    """What the packed step takes before its KV tensors, in the order of `PackedStep.forward`."""
    return (
        batch.tokens,
        batch.logit_indices,
        batch.cu_q_lens,
        batch.seq_lens,
        batch.block_tables,
        batch.host_meta,
    )


class CompiledStep:
    """One model compiled as a packed step.

    Args:
        model: a causal LM in eval mode; neither its weights nor its configuration is changed.
        config: with `max_model_len` resolved.

    Attributes:
        layers: (layer, kv heads, head dim) per attention call site, in the order of the calls and of the KV tensors.
        kv_caches: the layers' KV tensors (`ops/kv_cache.py`), set by `allocate`.
        proven_length: longest context the masks are proven for.
        num_logits: V, known after `warm_up`.

    Raises:
        UnsupportedModelError: some attention cannot be proven safe to rewrite.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        assert config.max_model_len is not None
        if model.training:
            raise UnsupportedModelError("the model is in training mode", where=type(model).__name__, remedy=".eval()")
        refuse_hooks(model)
        self.device, self.dtype, self.block_size = device, dtype, config.block_size
        self.report = FusionReport(model=type(model).__name__)
        self._implementations = Implementations(model)
        self._sealed = False
        self.num_logits = 0
        self.kv_caches: list[Tensor] = []
        start = time.perf_counter()
        with nullcontext() if config.enforce_eager else compiler_prepared():
            probe = run_probe(model, self._implementations, config.max_model_len)
        self._config, self._probe = config, probe
        self._context = self._new_context(self.report, len(probe.calls))
        # The bound is at least the length of the trial captures.
        self._module = PackedStep(model, max(config.max_num_batched_tokens, 6), inline_masks=not probe.calls)
        self.report.seconds["probe"] = time.perf_counter() - start
        self._cache = ProgramCache(model, config, probe, device, dtype, self.report)
        self._capture_notes: list[str] = []  # what the capture noted, which is stored with its program
        self._program = self._find_program()
        if self._program is not None:
            pass
        elif probe.calls:
            self.layers = probe.calls
            self.proven_length = config.max_model_len
        else:
            self.layers = self._layout_from_graph()
            self.proven_length = self._context.proof_length
        self.report.layers = len(self.layers)
        for name, reason in probe.unfused_experts.items():
            self.report.notes.append(f"{name} runs unfused: {reason}")
        self._backend = self._new_backend(config, self._context)
        self._function = torch.compile(self._module.isolated_forward(), backend=self._backend, fullgraph=True)
        self._outline = self._new_outline(model)
        self._unstored: tuple[Plan | Unplannable, dict[str, Any], list[str]] | None = None

    def _find_program(self) -> StepProgram | None:
        if (found := self._cache.find()) is None:
            return None
        self.layers, self.proven_length, self._capture_notes = found.layers, found.proven_length, found.notes
        return found.program

    def _new_outline(self, model: nn.Module) -> Outline | None:
        """Which layers to trace for all; None to trace them all."""
        parts, probe = self._cache.parts, self._probe
        if parts is None or not probe.calls or self._program is not None:
            return None
        found = outline(model, parts)
        if isinstance(found, str):
            if found:
                self._note(f"all layers are traced: {found}")
            return None
        return found

    def _note(self, note: str) -> None:
        self._capture_notes.append(note)
        self.report.notes.append(note)

    def _new_context(self, report: FusionReport, calls: int) -> PassContext:
        """For a trace that makes the first `calls` of the probe's attention calls."""
        probe, length = self._probe, min(self._config.max_model_len or 0, INLINE_PROOF_LENGTH)
        layers = [layer for layer, _, _ in probe.calls[:calls]]
        return PassContext(report, dict(probe.masks), calls=layers, proof_length=length)

    def _new_backend(self, config: EngineConfig, context: PassContext) -> StepBackend:
        names = [p.name for p in (*MERGE, *FUSE)]
        for name in config.disabled_patterns:
            if name not in names:
                raise ConfigError(
                    f"unknown pattern {name!r}", where="disabled_patterns", remedy=f"patterns are {', '.join(names)}"
                )
        checks = (BatchInvariance(),) if config.deterministic and self.device.type != "cpu" else ()
        fuses = config.fuse == "always" or (config.fuse == "auto" and self.device.type == "cuda")
        return StepBackend(
            context,
            inductor=not config.enforce_eager,
            merge=enabled(MERGE, config.disabled_patterns) if config.fuse != "never" else (),
            fuse=(*(enabled(FUSE, config.disabled_patterns) if fuses else ()), *checks),
            artifacts=self._cache.parts is not None,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(layout.block_bytes(self.dtype) for layout in self.kv_layouts)

    @property
    def kv_layouts(self) -> list[KVLayout]:
        """Of each layer's KV tensor."""
        quantized = self._config.kv_cache_dtype == FP8
        return [KVLayout(heads, self.block_size, dim, quantized) for _, heads, dim in self.layers]

    def allocate(self, num_blocks: int) -> None:
        """Make (or replace) the KV tensors. Zeros, so that a block's unwritten slots are finite.

        There are at least two blocks, though one may be all that is used: graphs for any number do not serve size 1.
        """
        self.kv_caches = []
        num_blocks = max(2, num_blocks)
        for layout in self.kv_layouts:
            cache = layout.zeros(num_blocks, self.dtype, self.device)
            torch._dynamo.mark_dynamic(cache, 0)
            self.kv_caches.append(cache)

    def warm_up(self, batch: StepBatch) -> Tensor:
        """First call: capture and compile for every T, S and number of blocks, unless a stored program was found."""
        start = time.perf_counter()
        compiles = self._program is None
        if compiles:
            for tensor, dim in (
                (batch.tokens, 1),
                (batch.logit_indices, 0),
                (batch.cu_q_lens, 0),
                (batch.seq_lens, 0),
                (batch.block_tables, 0),
            ):
                mark_unbacked(tensor, dim)
            if self._outline is not None:
                self._program = self._program_from_prefix(self._outline, batch)
        try:
            logits = self._capture(batch) if self._program is None else self._launch(batch)
        except FallbackError:
            self._require_invariance()  # names every op of the kind that has just been met
            raise
        self._require_invariance()
        self.num_logits = logits.shape[1]
        if compiles:
            self.report.seconds["capture and compile"] = time.perf_counter() - start
        return logits

    def _capture(self, batch: StepBatch) -> Tensor:
        """Trace the whole model; the function that Dynamo makes runs it."""
        breaks, notes = sum(counters["graph_break"].values()), len(self.report.notes)
        with capture_errors(self.report.model):
            logits = self._launch(batch)
        self.report.graph_breaks = sum(counters["graph_break"].values()) - breaks
        if (pieces := self._backend.pieces) is not None:
            plan = self._plan(self._backend, batch, self.kv_caches)
            self._capture_notes += self.report.notes[notes:]
            self._unstored = plan, pieces.artifacts, self._capture_notes
        return logits

    def _program_from_prefix(self, whole: Outline, batch: StepBatch) -> StepProgram | None:
        """Trace as many layers as show all there are, and make the program of the whole model from them."""
        report, breaks = FusionReport(), sum(counters["graph_break"].values())
        model, caches = self._module.model, self.kv_caches[: whole.prefix]
        backend = self._new_backend(self._config, self._new_context(report, whole.prefix))
        module = PackedStep(shortened(model, whole.path, whole.prefix), self._module.max_tokens, inline_masks=False)
        function = torch.compile(module.isolated_forward(), backend=backend, fullgraph=True)
        try:
            with torch.no_grad(), self._implementations.use(TRACE), dynamo_settings(), capture_errors(report.model):
                function(*_step_tensors(batch), caches)
            graph, pieces, plan = backend.graphs[-1].graph, backend.pieces, self._plan(backend, batch, caches)
            assert pieces is not None
            if isinstance(plan, Unplannable):
                raise plan
            if reads_layer_index(backend.read):
                raise Unplannable("the model's code reads its layer_idx")
            plan = extend(plan, whole)
            program = StepProgram(plan, pieces.artifacts, model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever is wrong: tracing all layers works, or says it better
            what = str(error) if isinstance(error, Unplannable) else f"{type(error).__name__}: {str(error)[:200]}"
            self._note(f"all layers are traced: {what}")
            return None
        extend_report(report, whole, backend.ops_by_place, graph)
        report.graph_breaks = sum(counters["graph_break"].values()) - breaks
        report.notes.append(f"traced {whole.prefix} layers, which stand for {len(whole.kinds)}")
        restore(self.report, snapshot(report) | {"notes": report.notes})
        self.report.seconds |= report.seconds
        self._capture_notes = report.notes
        self._unstored = plan, pieces.artifacts, report.notes
        return program

    def _plan(self, backend: StepBackend, batch: StepBatch, kv_caches: list[Tensor]) -> Plan | Unplannable:
        """The plan of what `backend` has just compiled, or why there is none. Lets go of the capture's inputs."""
        pieces, inputs, model = backend.pieces, backend.inputs, self._module.model
        backend.pieces, backend.inputs = None, []
        assert pieces is not None
        try:
            refs = references(model, _step_tensors(batch), kv_caches)
            for merged in backend.context.merged:
                refs[id(merged.tensor)] = merged_reference(merged.tensor, model)
            return plan_of(pieces, backend.graphs[-1].graph, inputs, refs)
        except Unplannable as error:
            return error

    def trial(self) -> tuple[list[int], Tensor | None] | None:
        """A prompt and the model's own logits [6, V] after each of its tokens, to `confirm` a program by."""
        if self._program is None:
            return None
        prompt = trial_tokens(self._module.model)
        if self._config.kv_cache_dtype != FP8:
            return prompt, stock_logits(self._module.model)
        logits = self.original_rounded(prompt)
        return prompt, None if logits is None else logits[0]

    def original_rounded(self, prompt: list[int]) -> Tensor | None:
        """Logits [1, N, V] of the model itself, its keys and values rounded as an FP8 cache does.

        None for a model whose attention is not called through Hugging Face's interface.
        """
        if not self._probe.calls:
            return None
        return rounded_logits(self._module.model, self._implementations, self._probe.masks, prompt)

    def confirm(self, difference: str | None) -> bool:
        """Keep the program, and store it if it is new; or, when something differs, go back to tracing everything.

        Args:
            difference: between its logits and the model's; None when there is none to be had: then a program that was
                stored is kept, since it was confirmed before, and a new one is not.

        Returns: whether the step is ready; otherwise it must be warmed up again.
        """
        if difference is None:
            difference = "" if self._unstored is None else "they cannot be compared"
        if difference and self._program is not None:
            reason = f"the program's logits are not the model's: {difference}"
            self._cache.refuse(reason)
            restore(self.report, snapshot(FusionReport()) | {"notes": []})
            self.report.notes = [note for note in self.report.notes if note not in self._capture_notes]
            self._capture_notes = []
            self._note(f"all layers are traced: {reason}")
            self._program = self._outline = self._unstored = None
            return False
        if self._unstored is not None:
            self._cache.store(*self._unstored, self.layers, self.proven_length)
            self._unstored = None
        return True

    def _require_invariance(self) -> None:
        """Refuse a model of which some op has no batch-invariant kernel; on the CPU tokens are computed alone."""
        if not self._config.deterministic or self.device.type == "cpu":
            return
        misses = [miss for miss in self.report.near_misses if miss.pattern == BatchInvariance.name]
        if misses or self._config.enforce_eager:
            reasons = "; ".join(dict.fromkeys(f"{miss.where}: {miss.reason}" for miss in misses))
            raise UnsupportedModelError(
                "some ops have no batch-invariant kernel",
                where=self.report.model,
                why=reasons or "enforce_eager runs the libraries' kernels",
                remedy="use deterministic=False" + ("" if misses else ", or enforce_eager=False"),
            )

    def seal(self) -> None:
        """From here on a recompile is an error."""
        self._sealed = True

    def __call__(self, batch: StepBatch) -> Tensor:
        """Logits [S, V] of one step; KV tensors are updated in place.

        Raises:
            RecompileError: the step would be compiled again after `seal`.
        """
        if self._config.deterministic and self.device.type == "cpu":
            return each_token_alone(self._launch, batch, self.num_logits)
        return self._launch(batch)

    def _launch(self, batch: StepBatch) -> Tensor:
        with batch_invariance(self._config.deterministic):
            return self._run(batch)

    def _run(self, batch: StepBatch) -> Tensor:
        if self._program is not None:
            return self._run_program(self._program, batch)
        with torch.no_grad(), self._implementations.use(TRACE), dynamo_settings(), self._guarded():
            return self._function(*_step_tensors(batch), self.kv_caches)

    def _run_program(self, program: StepProgram, batch: StepBatch) -> Tensor:
        if self._sealed and (name := program.changed()):
            self.report.recompiles += 1
            raise recompile_error(self.report.model, f"{name} is not what it was when the engine started")
        with torch.no_grad():
            return program(_step_tensors(batch), self.kv_caches)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        if not self._sealed:
            yield
            return
        try:
            with recompiles_are_errors():
                yield
        except torch._dynamo.exc.RecompileError as error:
            self.report.recompiles += 1
            guard = " ".join(str(error).split("- User stack trace")[0].split("\n    - ")[-1].split())
            raise recompile_error(self.report.model, guard) from error

    def _layout_from_graph(self) -> list[tuple[int, int, int]]:
        """KV layout of a model without HF's attention interface, from one uncompiled capture."""
        tokens = torch.stack([torch.arange(6, device=self.device)] * 3)
        rows = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in ([0, 6], [6], [[0]])]
        meta = torch.tensor([0, 6, 6, 1], dtype=torch.int32)
        mark_unbacked(tokens, 1)
        context = self._new_context(FusionReport(), 0)

        def canonicalize(gm: torch.fx.GraphModule) -> list[tuple[int, int, int]]:
            run_passes(gm, CANONICALIZE, context)
            keys = [(call.layer, fake_value(call.k)) for call in attention_calls(gm.graph)]
            return [(layer, k.shape[1], k.shape[3]) for layer, k in keys]

        inputs = (tokens, torch.tensor([5], device=self.device), *rows, meta, [])
        with capture_errors(self.report.model):
            layers = kv_layout(self._module, self._implementations, inputs, canonicalize)
        misses = [f"{m.where}: {m.reason}" for m in context.report.near_misses]
        unknown = [f"layer {i}: {m.reason}" for i, m in context.masks.items() if m.kind == UNKNOWN]
        if not layers or misses or unknown:
            raise UnsupportedModelError(
                "no attention can be rewritten to the paged kernel" if not layers else "some attention is refused",
                where=self.report.model,
                why="; ".join(misses + unknown) or "the graph has neither SDPA nor softmax attention",
                remedy="use stock transformers for this model",
            )
        return layers
