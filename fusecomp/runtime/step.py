"""The compiled step: a model, its KV tensors, and the one function `logits = step(batch)` that runs both.

Capture order: probe (eager, a few tokens) -> KV layout -> Dynamo + passes + Inductor on a first batch. After
`seal()`, anything that would compile again is an error that names the guard that failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fusecomp._compat import counters, dynamo_settings, mark_unbacked, recompiles_are_errors
from fusecomp.backend import CANONICALIZE, MERGE, StepBackend, enabled, run_passes
from fusecomp.capture import TRACE, Implementations, PackedStep, kv_layout, refuse_hooks, run_probe
from fusecomp.config import EngineConfig
from fusecomp.errors import ConfigError, RecompileError, UnsupportedModelError
from fusecomp.fusion import FUSE
from fusecomp.patterns.attention import attention_calls
from fusecomp.patterns.base import PassContext, fake_value
from fusecomp.patterns.masks import UNKNOWN
from fusecomp.report import FusionReport
from fusecomp.runtime.batch import StepBatch

# Masks written inline in a model are evaluated as [T, T] matrices: this bounds T, and with it max_model_len.
INLINE_PROOF_LENGTH = 4096


def _place(message: str) -> str:
    """What Dynamo could not capture, and the innermost line of the model's code that it names."""
    what = " ".join(message.split("\n\n", 1)[0].split())
    frames = message.partition("from user code:")[2].strip().split("\n\n")[0].split("File ")
    return f"{what} At {' '.join(frames[-1].split())}" if len(frames) > 1 else what


@contextmanager
def capture_errors(model: str) -> Iterator[None]:
    """Turn Dynamo's failures to capture one full graph into `UnsupportedModelError`."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, UnsupportedModelError):
            raise error.inner_exception from error
        raise
    except (
        torch._dynamo.exc.Unsupported,
        torch._dynamo.exc.UserError,
        torch._dynamo.exc.TorchRuntimeError,
        torch._dynamo.exc.InternalTorchDynamoError,
    ) as error:
        raise UnsupportedModelError(
            "the model cannot be captured as one graph for every number of tokens",
            where=model,
            why=_place(str(error)),
            remedy="use stock transformers for this model, or rewrite the place named above",
        ) from error


class CompiledStep:
    """One model compiled as a packed step.

    Args:
        model: a causal LM in eval mode; neither its weights nor its configuration is changed.
        config: with `max_model_len` resolved.

    Attributes:
        layers: (layer, kv heads, head dim) per attention call site, in the order of the calls and of the KV tensors.
        kv_caches: KV tensors [num_blocks, 2, G, block_size, D], set by `allocate`.
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
        probe = run_probe(model, self._implementations, config.max_model_len)
        self._context = PassContext(self.report, probe.masks, min(config.max_model_len, INLINE_PROOF_LENGTH))
        # The bound is at least the length of the trial captures.
        self._module = PackedStep(model, max(config.max_num_batched_tokens, 6), inline_masks=not probe.calls)
        if probe.calls:
            self.layers = probe.calls
            self.proven_length = config.max_model_len
        else:
            self.layers = self._layout_from_graph()
            self.proven_length = self._context.proof_length
        self.report.layers = len(self.layers)
        for name, reason in probe.unfused_experts.items():
            self.report.notes.append(f"{name} runs unfused: {reason}")
        self.report.seconds["probe"] = time.perf_counter() - start
        self._function = torch.compile(
            self._module.isolated_forward(),
            backend=self._backend(config),
            fullgraph=True,
        )

    def _backend(self, config: EngineConfig) -> StepBackend:
        names = [p.name for p in (*MERGE, *FUSE)]
        for name in config.disabled_patterns:
            if name not in names:
                raise ConfigError(
                    f"unknown pattern {name!r}", where="disabled_patterns", remedy=f"patterns are {', '.join(names)}"
                )
        fuses = config.fuse == "always" or (config.fuse == "auto" and self.device.type == "cuda")
        return StepBackend(
            self._context,
            inductor=not config.enforce_eager,
            merge=enabled(MERGE, config.disabled_patterns) if config.fuse != "never" else (),
            fuse=enabled(FUSE, config.disabled_patterns) if fuses else (),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        width = torch.empty((), dtype=self.dtype).element_size()
        return sum(2 * heads * self.block_size * dim * width for _, heads, dim in self.layers)

    def allocate(self, num_blocks: int) -> None:
        """Make (or replace) the KV tensors. Zeros, so that a block's unwritten slots are finite.

        There are at least two blocks, though one may be all that is used: graphs for any number do not serve size 1.
        """
        self.kv_caches = []
        num_blocks = max(2, num_blocks)
        for _, heads, dim in self.layers:
            shape = (num_blocks, 2, heads, self.block_size, dim)
            cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
            torch._dynamo.mark_dynamic(cache, 0)
            self.kv_caches.append(cache)

    def warm_up(self, batch: StepBatch) -> Tensor:
        """First call: capture and compile for every T, S and number of blocks."""
        for tensor, dim in (
            (batch.tokens, 1),
            (batch.logit_indices, 0),
            (batch.cu_q_lens, 0),
            (batch.seq_lens, 0),
            (batch.block_tables, 0),
        ):
            mark_unbacked(tensor, dim)
        breaks = sum(counters["graph_break"].values())
        start = time.perf_counter()
        with capture_errors(self.report.model):
            logits = self(batch)
        self.num_logits = logits.shape[1]
        self.report.seconds["capture and compile"] = time.perf_counter() - start
        self.report.graph_breaks = sum(counters["graph_break"].values()) - breaks
        return logits

    def seal(self) -> None:
        """From here on a recompile is an error."""
        self._sealed = True

    def __call__(self, batch: StepBatch) -> Tensor:
        """Logits [S, V] of one step; KV tensors are updated in place.

        Raises:
            RecompileError: the step would be compiled again after `seal`.
        """
        with torch.no_grad(), self._implementations.use(TRACE), dynamo_settings(), self._guarded():
            return self._function(
                batch.tokens,
                batch.logit_indices,
                batch.cu_q_lens,
                batch.seq_lens,
                batch.block_tables,
                batch.host_meta,
                self.kv_caches,
            )

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
            raise RecompileError(
                "the step would be compiled again while serving",
                where=self.report.model,
                why=" ".join(str(error).split("- User stack trace")[0].split("\n    - ")[-1].split()),
                remedy="do not change the model while its engine lives",
            ) from error

    def _layout_from_graph(self) -> list[tuple[int, int, int]]:
        """KV layout of a model without HF's attention interface, from one uncompiled capture."""
        tokens = torch.stack([torch.arange(6, device=self.device)] * 3)
        rows = [torch.tensor(x, dtype=torch.int32, device=self.device) for x in ([0, 6], [6], [[0]])]
        meta = torch.tensor([0, 6, 6, 1], dtype=torch.int32)
        mark_unbacked(tokens, 1)
        context = PassContext(FusionReport(), dict(self._context.masks), self._context.proof_length)

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
