"""The engine: schedule -> fill the batch -> run the step (a bucket's graph, or the compiled function) -> tokens.

One thread owns an engine. Lifecycle: resolve limits -> compile the step -> size the KV cache -> capture graphs ->
`add_request` / `step` until nothing is left.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fusecomp.config import EngineConfig
from fusecomp.errors import FallbackError, RequestError
from fusecomp.ops import take_fallbacks
from fusecomp.ops.kv_cache import fill_random
from fusecomp.quant.online.record import describe as describe_quantization
from fusecomp.report import FusionReport
from fusecomp.request import RequestMetrics, SamplingParams
from fusecomp.runtime import memory
from fusecomp.runtime.adjust import RowTables
from fusecomp.runtime.batch import BatchBuilder
from fusecomp.runtime.choice import Kind, Sampled, TokenChoice
from fusecomp.runtime.explain import explain_lowerings
from fusecomp.runtime.flight import Flight, Runway
from fusecomp.runtime.graphs import BUDGET_BYTES, CudaRecorder, GraphRunner, Recorder, Shape, bucket_sizes, is_long
from fusecomp.runtime.kv_cache import KVCacheManager
from fusecomp.runtime.logprobs import prompt_tokens, with_prompt
from fusecomp.runtime.mailbox import Mailbox
from fusecomp.runtime.metrics import Metrics, MetricsSnapshot
from fusecomp.runtime.outputs import StepOutput, step_outputs
from fusecomp.runtime.packing import MOST_BLOCKS, check_invariance, check_packing
from fusecomp.runtime.scheduler import ScheduledStep, Scheduler, SequenceState, Status
from fusecomp.runtime.stand_in import StandIns
from fusecomp.runtime.start_up import compile_and_size, confirm_program, limit_to_proof, mixed_shapes_of
from fusecomp.runtime.step import CompiledStep
from fusecomp.runtime.step_batch import MOST_PREFILLS, MixedShape, StepBatch
from fusecomp.runtime.swap import open_swap_space


class Engine:
    """Serves one model with continuous batching.

    Args:
        model: an unmodified causal LM in eval mode, already on its device.
        config: limits and budgets.
        eos_token_ids: ids that end a request unless it ignores them.

    Raises:
        UnsupportedModelError: the model cannot be captured and rewritten safely; the message says why.
        CapacityError: not even one block of KV cache fits the budget.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        begin = time.perf_counter()
        parameter = next(model.parameters())
        self.device = parameter.device
        self.vocab_size = memory.vocabulary(model)
        self.config = config = memory.resolve_limits(model, config)
        self._step = CompiledStep(model, config, self.device, parameter.dtype)
        self.report: FusionReport = self._step.report
        self.config = config = limit_to_proof(self._step, config)
        self._eos = frozenset(eos_token_ids)
        self._tables = RowTables(config.max_num_seqs, self.device, eos_token_ids)
        self._choice = TokenChoice(self._tables, self.device, deterministic=config.deterministic)
        self._mailbox = Mailbox(config.max_num_seqs + MOST_PREFILLS, self.device)
        self._builder = self._new_builder(config)
        self._stand_ins = StandIns(self._step, self._builder, config)
        self._sized = compile_and_size(self._step, self._builder, self._stand_ins, config)
        num_blocks = self._sized.num_blocks
        self._step.allocate(num_blocks)
        assert config.max_model_len is not None
        longest = num_blocks * config.block_size + 1  # the last token is never cached
        if longest < config.max_model_len:
            limit = f"requests have at most {longest} tokens, not max_model_len={config.max_model_len}"
            self.report.notes.append(f"the KV cache has {num_blocks} blocks: {limit}")
        caching = config.enable_prefix_caching
        kv = KVCacheManager(num_blocks, config.block_size, self._step.block_bytes, prefix_caching=caching)
        limits = config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len
        self._host_blocks, swap = None, None
        if config.swap_bytes:
            opened = open_swap_space(config, self._step.kv_caches, self._step.block_bytes, self._sized.tokens_per_s)
            self._host_blocks, swap, note = opened
            self.report.notes.append(note)
        self._scheduler = Scheduler(*limits, kv, swap)
        self._metrics = Metrics()
        self._choice.set_vocabulary(self._step.num_logits)
        self._graphs: GraphRunner | None = None
        self.overlap = self.device.type == "cuda"
        self._flight: Flight | None = None
        self._launch_seconds = 0.0
        self._runway = Runway(self._mailbox, self.device)
        self._latest: tuple[StepBatch, Shape | None] | None = None
        confirm_program(self._step, self._stand_ins, self.prompt_logits)
        self._step.seal()
        self._check_packing()
        if self.device.type == "cuda" and not config.enforce_eager:
            self._capture_graphs(min(config.max_num_seqs, num_blocks))
        if config.verify == "first":
            from fusecomp.runtime.verify import verify_engine

            verify_engine(self, model)
        self._note_fallbacks()
        describe_quantization(model, self.report)
        self.report.seconds["start-up"] = time.perf_counter() - begin

    # ------------------------------------------------------------------ requests

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, priority: int = 0
    ) -> None:
        """Queue a request; those of a lower `priority` go first, those of the same in the order of their arrival.

        Raises:
            RequestError: the prompt is empty, too long, or has an id outside the vocabulary; a sampling option has; or
                the request id lives.
            CapacityError: the request would not fit the KV cache even alone, or its sampling options the memory.
        """
        if prompt_token_ids and not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.vocab_size:
            bad = next(t for t in prompt_token_ids if not 0 <= t < self.vocab_size)
            raise RequestError(
                f"token id {bad} is outside the vocabulary of {self.vocab_size}",
                where=f"request {request_id!r}",
                remedy="tokenize with the model's own tokenizer",
            )
        self._tables.reserve(params, f"request {request_id!r}")
        # Logits of a prompt's tokens are there only if they are computed.
        takes_cached = params.prompt_logprobs is None
        seq = SequenceState(request_id, prompt_token_ids, params, priority, takes_cached)
        seq.metrics.arrival_time = time.monotonic()
        self._scheduler.add(seq)
        self._metrics.on_add(seq)

    def abort_request(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, since it may just have finished."""
        self.end_request(request_id, "abort")

    def end_request(self, request_id: str, reason: str) -> RequestMetrics | None:
        """`abort_request` for another reason, such as a stop string found in the text; its timings, if it lived."""
        seq = self._scheduler.abort(request_id)
        if seq is None:
            return None
        self._metrics.on_abort(seq, reason, time.monotonic())
        return seq.metrics

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has work."""
        return self._scheduler.has_work

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return self._step.block_bytes // self.config.block_size

    @property
    def num_kv_blocks(self) -> int:
        """Size of the KV cache in blocks of `config.block_size` tokens."""
        return self._scheduler.kv.num_blocks

    @property
    def metrics(self) -> MetricsSnapshot:
        """Totals and gauges now."""
        return self._metrics.snapshot(self._scheduler, self._tables.num_bytes)

    # ------------------------------------------------------------------ one step

    def step(self) -> list[StepOutput]:
        """Run one step; returns what it gave each request that advanced or ended.

        With `overlap`, the next step is launched before this one's tokens are read, whenever it can be known.

        Raises:
            FallbackError: under `strict`, a kernel fell back to its eager reference.
        """
        start, self._launch_seconds = time.perf_counter(), 0.0
        flight, self._flight = self._flight, None
        if flight is None:
            step = self._scheduler.schedule()
            if step is None:
                return []
            flight = self._launch(step)
        if self.overlap and (ahead := self._scheduler.schedule_ahead(flight.step)) is not None:
            step, rows = ahead
            self._flight = self._launch(step, rows)
        launched = time.perf_counter()
        tokens = flight.token_ids()
        arrived = time.perf_counter()
        advanced = self._scheduler.update(flight.step, tokens, self._eos)
        self._metrics.on_tokens(advanced, time.monotonic())
        outputs = step_outputs(flight, advanced)
        if self._flight and not any(seq.status is Status.RUNNING for seq in self._flight.step.seqs):
            self._flight = None  # every row it continues has ended: nobody waits for it
        host = time.perf_counter() - arrived + launched - start - self._launch_seconds
        self._metrics.on_step(flight.step, advanced, host)
        self._note_fallbacks()
        return outputs

    def _launch(self, step: ScheduledStep, continues: Sequence[int] | None = None) -> Flight:
        """Queue a step's device work; nothing is waited for."""
        wanted = prompt_tokens(step)
        shape = pad_to = None
        if self._graphs is not None and wanted is None:
            shape = self._graphs.choose(step)
            pad_to = shape or self._graphs.bucket(len(step.seqs))
        batch = self._builder.build(step, pad_to, continues, sealed=True)
        kind = self._choice.kind(batch)
        self._metrics.on_launch(step, time.monotonic())
        start = time.perf_counter()
        if self._graphs is not None and shape is not None and self._graphs.is_due(shape, kind):
            self._capture(self._graphs, shape, kind)
            batch = self._builder.build(step, shape, continues, sealed=True)
        if step.swap_out or step.swap_in:
            assert self._host_blocks is not None
            self._host_blocks.move(step.swap_out, step.swap_in)
        self._latest = batch, shape
        half = self._runway.half()
        if wanted is None:
            flight = self._runway.flight(step, self._run(batch, shape, half), half)
        else:
            logits, scores = with_prompt(self._step, batch, wanted, self._choice.pack)
            sampled = self._choice(logits, batch, kind)
            self._mailbox.deliver(sampled.tokens, half)
            flight = self._runway.flight(step, sampled, half, wanted, scores)
        if self._graphs is not None and shape is not None and self._graphs.captured(shape, kind):
            self._graphs.check(batch, shape, kind)
        self._launch_seconds += time.perf_counter() - start
        return flight

    def _run(self, batch: StepBatch, shape: Shape | None, half: int) -> Sampled:
        """Queue a step of which `build` made the batch, and what delivers its tokens to a half of the mailbox."""
        kind = self._choice.kind(batch)
        if shape is not None and self._graphs is not None and self._graphs.captured(shape, kind):
            self._builder.send(half)
            sampled = self._graphs.replay(shape, kind)
            if isinstance(shape, MixedShape):
                self._mailbox.deliver(sampled.tokens, half)
        else:
            self._builder.feed(half)
            sampled = self._forward(batch, kind)
            self._mailbox.deliver(sampled.tokens, half)
        return sampled

    def _whole(self, batch: StepBatch, shape: Shape, kind: Kind) -> Sampled:
        """What a graph holds: of a size of decodes all from taking the letter to delivering tokens; else the work."""
        if isinstance(shape, MixedShape):
            return self._forward(batch, kind)
        self._builder.launch_feed(shape)
        sampled = self._forward(batch, kind)
        self._mailbox.deliver(sampled.tokens)
        return sampled

    def _capture(self, graphs: GraphRunner, shape: Shape, kind: Kind) -> None:
        """Try to capture a graph; the batch has to be built again afterwards."""
        graphs.capture(self._builder.padding(shape), shape, kind)
        self.report.cuda_graphs = graphs.sizes
        self.report.mixed_cuda_graphs = len(graphs.mixed)

    def _forward(self, batch: StepBatch, kind: Kind) -> Sampled:
        """Logits and sampled ids [S] of a batch; everything on the device, nothing read back."""
        return self._choice(self._step(batch), batch, kind)

    def capture_graphs(self, sizes: Iterable[int]) -> None:
        """Capture CUDA graphs for decodes of exactly these many rows too, whatever they bring.

        Without graphs, on a CPU or with `enforce_eager`, it does nothing.
        """
        if self._graphs is not None:
            for size in sorted(set(sizes) - set(self._graphs.sizes), reverse=True):
                self._capture(self._graphs, size, Kind())

    @property
    def graphs(self) -> GraphRunner | None:
        """The CUDA graphs; None without any."""
        return self._graphs

    def repeat_step(self) -> Tensor:
        """Queue the latest step's device work once more: same buffers, same KV slots, same values. For measuring.

        Returns: the step's sampled ids [S], on the device and not waited for.

        Raises:
            RequestError: no step has run.
        """
        if self._latest is None:
            raise RequestError("no step has run", where="repeat_step", remedy="call step() first")
        batch, shape = self._latest
        kind = self._choice.kind(batch)
        if shape is not None and self._graphs is not None and self._graphs.captured(shape, kind):
            sampled = self._graphs.replay(shape, kind)
        else:
            sampled = self._forward(batch, kind)
        self._mailbox.hold()
        return sampled.tokens

    def prompt_logits(self, prompts: list[list[int]], *, decode_last: bool = False) -> Tensor:
        """Logits [S, V] after each prompt, all packed in one step; only while no request lives.

        With `decode_last` every prompt's last token is computed as a decode, on the cached keys of those before it.

        Raises:
            RequestError: requests are being served, a prompt is too short, or the prompts do not fit one step and the
                KV cache.
        """
        self._require_idle("prompt_logits")
        return self._stand_ins.prompt_logits(self._scheduler.kv, prompts, decode_last=decode_last)

    def token_logits(self, prompt: list[int]) -> Tensor:
        """Logits [N, V] after every token of one prompt, computed in chunks of a step; only while no request lives.

        Raises:
            RequestError: requests are being served, or the prompt is empty or does not fit the context or KV cache.
        """
        self._require_idle("token_logits")
        return self._stand_ins.token_logits(self._scheduler.kv, prompt)

    def _require_idle(self, where: str) -> None:
        if self.has_unfinished_requests():
            raise RequestError("requests are being served", where=where, remedy="drain the engine first")

    def rounded_logits(self, prompt: list[int]) -> Tensor | None:
        """Logits [1, N, V] of the original model on a prompt, its keys and values rounded as an FP8 cache does.

        None for a model whose attention is not called through Hugging Face's interface.
        """
        return self._step.original_rounded(prompt)

    # ------------------------------------------------------------------ start-up

    def _new_builder(self, config: EngineConfig) -> BatchBuilder:
        assert config.max_model_len is not None
        return BatchBuilder(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            -(-config.max_model_len // config.block_size),
            config.block_size,
            self.device,
            config.seed,
            self._tables.enter,
            self._mailbox,
            self.vocab_size,
        )

    def _check_packing(self) -> None:
        """Refuse a model that mixes packed sequences; leaves the KV cache as it was."""
        start = time.perf_counter()
        check_packing(self)
        written = MOST_BLOCKS
        if self.config.deterministic and self.device.type == "cuda":  # on the CPU it holds by construction
            written = max(written, check_invariance(self))
        for cache in self._step.kv_caches:
            cache[:written].zero_()
        self.report.seconds["packing check"] = time.perf_counter() - start

    def _capture_graphs(self, largest: int) -> None:
        """Capture the greedy graphs, and check those of decodes; others are checked when they first run."""
        start = time.perf_counter()
        self._graphs = self._new_graphs(largest, CudaRecorder())
        # Any finite keys and values do for the check; blocks are rewritten before they are ever served.
        assert self.config.max_model_len is not None
        used = max(largest * -(-3 // self.config.block_size), -(-self.config.max_model_len // self.config.block_size))
        for cache, layout in zip(self._step.kv_caches, self._step.kv_layouts, strict=True):
            fill_random(cache[:used], layout.head_dim)
        self._capture_wanted(self._graphs)
        for cache in self._step.kv_caches:
            cache[:used].zero_()
        from fusecomp.lowerings.device import target_of

        counts = [*self.report.cuda_graphs, self.config.max_num_batched_tokens]
        explain_lowerings(self.report, target_of(self._step.kv_caches[0]), counts)
        self.report.seconds["graphs"] = time.perf_counter() - start

    def _capture_wanted(self, graphs: GraphRunner) -> None:
        for shape in graphs.wanted():
            self._capture(graphs, shape, Kind())
            if graphs.captured(shape, Kind()) and (batch := self._to_check(shape)) is not None:
                graphs.check(batch, shape, Kind())

    def _to_check(self, shape: Shape) -> StepBatch | None:
        """What a graph is checked by at the start; None for short mixed steps, which are when they first run."""
        if isinstance(shape, int):
            return self._stand_ins.decodes(shape, self.num_kv_blocks)
        if not is_long(shape):
            return None
        return self._stand_ins.mixed(shape, self.num_kv_blocks, self.vocab_size)

    def _new_graphs(self, largest: int, recorder: Recorder) -> GraphRunner:
        assert self.config.max_model_len is not None
        mixed, sized = mixed_shapes_of(self.config, long=self._sized.long_graphs > 0), self._sized
        rate = sized.tokens_per_s if self.device.type == "cuda" else float("inf")  # a CPU's trial is tiny
        return GraphRunner(
            self._step, self._whole, bucket_sizes(largest), mixed, self.report.notes.append, recorder,
            budget_bytes=BUDGET_BYTES + sized.long_graphs, tokens_per_s=rate, most_padding=self.config.max_model_len,
        )  # fmt: skip

    def _note_fallbacks(self) -> None:
        for (op, reason), times in take_fallbacks().items():
            if self.config.strict:
                raise FallbackError(f"{op} fell back to its eager reference", why=reason, remedy="strict=False")
            key = f"{op}: {reason}"
            self.report.fallbacks[key] = self.report.fallbacks.get(key, 0) + times
