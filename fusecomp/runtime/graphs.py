"""CUDA graphs of steps: which shapes get one, when it is captured, what it costs.

A graph is keyed by (shape, variant of the sampler): those, with the model and the KV capacity, are every Python value
that reaches a kernel. A shape is a number of rows, of a step of decodes, or a `MixedShape`. Steps are padded up to a
shape. All graphs share one memory pool; each is checked once against the step that it captured, and timed.

Shapes are chosen at the start, by measured times, and none is added while requests are served (`Engine` asks for them
in turn):

- decodes: the largest size and 1, then those between as long as they bring something: a size between two that are
  captured costs no less than the smaller one, so what it could save is known before it is captured (`LEAST_GAIN`).
- mixed steps: a small grid, the largest first, whose memory serves the others, down from the step that takes the GPU
  so long that launching is surely hidden behind the step before (`Scheduler.schedule_ahead`), without the padding. A
  step is padded to less than twice its tokens, or has no graph.

Variants of the sampler beyond greedy are captured in service, each when launching its steps without a graph has taken
the host as long as a capture takes. So captures take no longer than the launches that came before them, a variant met
once costs nothing, and a capture compiles nothing: the same step ran before.

No graph is captured any more once their memory reaches its budget, or the device is out of it: what is captured
serves on, other steps run in a larger size or without a graph, and the report says so.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from fusecomp.errors import VerificationError
from fusecomp.runtime.choice import Kind, Sampled
from fusecomp.runtime.sequence import ScheduledStep
from fusecomp.runtime.step_batch import MOST_MIXED_TOKENS, MOST_PREFILLS, MixedShape, StepBatch

Shape = int | MixedShape
# Share of a row's standard deviation within which two logits count as tied.
TIE_SHARE = 0.05
# Bytes that graphs may take beyond the engine's own: half of what `memory.py` keeps in reserve. Those of `MORE_TOKENS`
# may take what such a step takes besides.
BUDGET_BYTES = 1 << 29
# Tokens of mixed steps with a graph: short ones; and long ones, the engine's most among them if it is no more.
MIXED_TOKENS = (64, 128, 256, 384, 512, 768, 1024)
MORE_TOKENS = (2048, 3072, 4096, 6144, 8192, 12288, MOST_MIXED_TOKENS)
FEW_DECODES, FEW_PREFILLS = 64, 32
# Share of a step's time on the GPU below which launches count as hidden behind it. What they take when nothing else
# runs is what is known: of a mixture of 48 layers 43 ms, and in service 72 to 128, on a host that others share.
HIDDEN = 0.33
# Sizes of decodes up to 256 that may get a graph. Their kernels are compiled at the start: each size may want its own.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
# Share of a step's time that a further size has to save.
LEAST_GAIN = 0.02


def bucket_sizes(largest: int) -> list[int]:
    """Candidates for the sizes of decode steps, which waste at most a third of a step's rows, ascending."""
    sizes = [*SIZES, *range(320, 1025, 64)]
    kept = [size for size in sizes if size < largest]
    return [*kept, largest]


def mixed_shapes(max_num_seqs: int, max_tokens: int, *, long: bool = True) -> list[MixedShape]:
    """Candidates for mixed steps, the cheapest first: short ones for few decodes and for as many as there may be, and,
    if `long`, ones of `MORE_TOKENS` for the latter."""
    shapes = []
    for tokens in MIXED_TOKENS:
        if tokens <= max_tokens:
            for decodes in sorted({min(FEW_DECODES, max_num_seqs), min(tokens, max_num_seqs)}):
                shapes.append(MixedShape(tokens, decodes, FEW_PREFILLS))
    if long and max_tokens > MIXED_TOKENS[-1]:
        sizes = sorted({min(tokens, max_tokens) for tokens in MORE_TOKENS})
        shapes += [MixedShape(tokens, min(tokens, max_num_seqs), MOST_PREFILLS) for tokens in sizes]
    return shapes


def is_long(shape: MixedShape) -> bool:
    """Whether a mixed step is one of `MORE_TOKENS`."""
    return shape.tokens > MIXED_TOKENS[-1]


def shapes_to_meet(shapes: Sequence[MixedShape], max_tokens: int) -> list[MixedShape]:
    """Mixed steps that together want the kernels of all, also of those without a graph: every number of tokens once,
    and powers of two beyond; every small number of decodes, and those of `SIZES`."""
    if not shapes:
        return []
    most, rows = max(shape.tokens for shape in shapes), max(shape.decodes for shape in shapes)
    longer = (MixedShape(t, rows, FEW_PREFILLS) for t in (2048, 4096) if most < t < max_tokens)
    few = sorted({*range(1, 17), *SIZES})  # launches of few rows differ from one to the next
    short = max(shape.tokens for shape in shapes if not is_long(shape))
    decodes = (MixedShape(short, size, FEW_PREFILLS) for size in few if size <= min(rows, short))
    return list(dict.fromkeys([*{shape.tokens: shape for shape in shapes}.values(), *longer, *decodes]))


class Recorder(Protocol):
    """Makes graphs."""

    def record(self, run: Callable[[], Sampled]) -> tuple[Callable[[], object], Sampled]:
        """Capture `run`, which ran before; returns the replay and what `run` returned, which a replay writes again.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
        """

    def seconds(self, replay: Callable[[], object]) -> float:
        """Device time of one replay."""

    def used_bytes(self) -> int:
        """Memory of the device in use."""


class CudaRecorder:
    """Captures on a stream of its own, in one pool; other threads may use the device meanwhile."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        # A pool that lost its last graph cannot be captured into again, and the first capture may fail.
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            torch.zeros(1, device="cuda")

    def record(self, run: Callable[[], Sampled]) -> tuple[Callable[[], object], Sampled]:
        torch.cuda.synchronize()
        try:
            return self._record(run)
        except torch.OutOfMemoryError:
            # The allocator does not give cached memory back during a capture.
            torch.cuda.empty_cache()
            return self._record(run)

    def _record(self, run: Callable[[], Sampled]) -> tuple[Callable[[], object], Sampled]:
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what is collected may call what a capture forbids
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    sampled = run()
                except BaseException:
                    with suppress(RuntimeError):  # the first error says more
                        graph.capture_end()
                    raise
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the driver's own: to instantiate a graph takes memory too
            if "out of memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise
        finally:
            if collects:
                gc.enable()
        return graph.replay, sampled

    def seconds(self, replay: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        replay()
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free


class GraphRunner:
    """Captured steps of one engine.

    Args:
        logits: `batch -> logits [S, V]`, made only of capturable work on the current stream; its work may be queued
            any number of times for one batch.
        run: `(batch, shape, kind) -> sampled token ids [S] and their scores`, likewise: the whole of a step, which in a
            size of decodes takes its inputs and delivers its tokens itself, if it is given new ones.
        sizes: candidates for decode steps, ascending.
        mixed: candidates for mixed steps, the cheapest first.
        note: called with what the report should say.
        recorder: makes the graphs.
        budget_bytes: memory that they may take.
        tokens_per_s: of a long prefill without a graph, by which long steps that need none are known beforehand.
        most_padding: tokens of padding that a mixed step may have, as they are one prompt.

    Attributes:
        sizes, mixed: captured shapes, the cheapest first.
        seconds: measured device time of each.
        num_bytes: memory that the graphs took.
        captures_seconds: time that captures took.
        full: why no more are captured, or empty.
    """

    def __init__(
        self,
        logits: Callable[[StepBatch], Tensor],
        run: Callable[[StepBatch, Shape, Kind], Sampled],
        sizes: Sequence[int],
        mixed: Sequence[MixedShape],
        note: Callable[[str], None],
        recorder: Recorder,
        budget_bytes: int = BUDGET_BYTES,
        tokens_per_s: float = float("inf"),
        most_padding: int = 1 << 31,
    ) -> None:
        self._logits, self._run, self._note, self._recorder = logits, run, note, recorder
        self._candidates, self._mixed = list(sizes), list(mixed)
        self._budget, self._tokens_per_s, self._most_padding = budget_bytes, tokens_per_s, most_padding
        self.sizes: list[int] = []
        self._fastest: list[int] = []  # for each size the one in which its rows run
        self.mixed: list[MixedShape] = []
        self.seconds: dict[Shape, float] = {}
        self.num_bytes = 0
        self.captures_seconds = 0.0
        self.full = ""
        self._graphs: dict[tuple[Shape, Kind], tuple[Callable[[], object], Sampled]] = {}
        self._launched: defaultdict[tuple[Shape, Kind], float] = defaultdict(float)  # seconds, without a graph
        self._unchecked: set[Shape] = set()
        self._capture_seconds = 0.0  # of the latest capture
        self._launch_seconds = float("inf")  # of the host, for one step without a graph: the least seen

    @property
    def launch_seconds(self) -> float:
        """What launching a step without a graph takes the host, at least."""
        return self._launch_seconds

    @property
    def num_captures(self) -> int:
        """Graphs that can be replayed."""
        return len(self._graphs)

    # ------------------------------------------------------------------ which shape

    def choose(self, step: ScheduledStep) -> Shape | None:
        """The captured shape to which `step` is padded; None to run it as it is, without a graph."""
        if step.decode_only:
            return self.bucket(len(step.seqs))
        sizes = step.num_tokens, step.num_decodes, len(step.seqs) - step.num_decodes
        most = min(2 * max(step.num_tokens, MIXED_TOKENS[0]) - 1, step.num_tokens + self._most_padding)
        return next((shape for shape in self.mixed if shape.tokens <= most and shape.holds(*sizes)), None)

    def bucket(self, rows: int) -> int | None:
        """The captured size in which `rows` decodes run: the fastest that holds them, which may not be the next one."""
        at = bisect_left(self.sizes, rows)
        return self._fastest[at] if at < len(self.sizes) else None

    def wanted(self) -> Iterator[Shape]:
        """What is to be captured at the start; each is asked for when those before it are captured, or failed."""
        largest, smallest = self._candidates[-1], self._candidates[0]
        yield largest
        if smallest != largest:
            yield smallest
        yield from self._between(0, len(self._candidates) - 1)
        no_room = False
        for shape in reversed(self._mixed):
            if not self._hides_launches(shape) and not (no_room and is_long(shape)):
                yield shape
                no_room = no_room or shape not in self.seconds

    def _between(self, first: int, last: int) -> Iterator[int]:
        """Candidates between two, the middle first, as long as one may save enough against the larger."""
        smaller, larger = (self.seconds.get(self._candidates[i]) for i in (first, last))
        if last - first < 2 or smaller is None or larger is None or larger - smaller < LEAST_GAIN * larger:
            return
        middle = (first + last) // 2
        yield self._candidates[middle]
        yield from self._between(middle, last)
        yield from self._between(first, middle)

    def _hides_launches(self, shape: MixedShape) -> bool:
        """Whether the GPU takes so long for a step of this shape that the host can launch another meanwhile: as long
        as decodes of fewer tokens, a long one as so many tokens of a prefill."""
        least = [self.seconds[size] for size in self.sizes if size <= shape.tokens]
        if is_long(shape):
            least.append(shape.tokens / self._tokens_per_s)
        return self._hidden(max(least, default=0.0))

    def _hidden(self, seconds: float) -> bool:
        return seconds * HIDDEN > self._launch_seconds

    # ------------------------------------------------------------------ captures

    def is_due(self, shape: Shape, kind: Kind) -> bool:
        """Whether a variant of a captured shape, about to be launched, is to be captured first; counts the launch."""
        key = shape, kind
        if self.full or key in self._graphs:
            return False
        if self._launched[key] >= self._capture_seconds:
            return True
        self._launched[key] += self._launch_seconds
        return False

    def captured(self, shape: Shape, kind: Kind) -> bool:
        """Whether `replay` has a graph for this key."""
        return (shape, kind) in self._graphs

    def capture(self, padding: StepBatch, shape: Shape, kind: Kind) -> bool:
        """Capture the step of `shape` from a batch of nothing but padding, and time it.

        That batch announces the longest possible context and writes no key, so the capture may come between any two
        steps. It runs once before, so that lazy initialisation stays out of the graph. Times of padding compare: what
        a row costs beyond them depends on its context, in whatever shape it runs.

        Returns: False when there is no memory for a graph; nothing is captured from then on, unless it was a long
            mixed step's.
        """
        if self.full:
            return False
        begin = time.perf_counter()
        try:
            self._run(padding, shape, kind)
            launched = time.perf_counter()
            before = self._recorder.used_bytes()  # what the step takes without a graph is the engine's
            graph = self._recorder.record(lambda: self._run(padding, shape, kind))
            seconds = self._recorder.seconds(graph[0])
        except torch.OutOfMemoryError as error:
            why = f"there is no memory for that of {_name(shape)} ({str(error).splitlines()[0][:120]})"
            if isinstance(shape, MixedShape) and is_long(shape):
                self._note(f"longer mixed steps run without a CUDA graph: {why}")
            else:
                self._stop(why)
            return False
        self._launch_seconds = min(self._launch_seconds, launched - begin)
        self._graphs[shape, kind] = graph
        if kind == Kind():
            self._unchecked.add(shape)
        self.seconds.setdefault(shape, seconds)
        self.sizes = sorted(size for size in self.seconds if isinstance(size, int))
        costs = {size: (self.seconds[size], size) for size in self.sizes}
        self._fastest = [min(self.sizes[at:], key=costs.__getitem__) for at in range(len(self.sizes))]
        # One that hides launches itself, of which those before gave no hint, is better left unpadded.
        mixed = [size for size in self.seconds if isinstance(size, MixedShape)]
        self.mixed = sorted(size for size in mixed if not self._hidden(self.seconds[size]))
        self.num_bytes += max(0, self._recorder.used_bytes() - before)
        if kind.tables:  # graphs of an earlier version read tables that were replaced; a capture has waited for them
            for key in [key for key in self._graphs if key[1].tables not in (0, kind.tables)]:
                del self._graphs[key]
                self._launched.pop(key, None)
        if self.num_bytes >= self._budget:
            self._stop(f"they take {self.num_bytes >> 20} MiB of {self._budget >> 20}")
        self._capture_seconds = time.perf_counter() - begin
        self.captures_seconds += self._capture_seconds
        return True

    def check(self, batch: StepBatch, shape: Shape, kind: Kind) -> None:
        """Compare the first replay of a greedy graph with the same step run without it; later ones cost nothing.

        A library may choose another algorithm while capturing, so a token may differ where its logit is within a small
        share of the row's spread of the best one.

        Raises:
            VerificationError: they disagree.
        """
        if kind != Kind() or shape not in self._unchecked:
            return
        self._unchecked.discard(shape)
        rows = self._logits(batch).float()
        tokens = self.replay(shape, kind).tokens
        gap = rows.amax(1) - rows.gather(1, tokens.clamp(min=0)[:, None])[:, 0]
        wrong = ((tokens < 0) | ~(gap <= TIE_SHARE * rows.std(1))).nonzero()[:, 0].tolist()
        if wrong:
            raise VerificationError(
                f"the CUDA graph for batch {_name(shape)} samples other tokens than the step it captured",
                where=f"rows {wrong[:8]}",
                remedy="run with enforce_eager=True and report this",
            )

    def _stop(self, why: str) -> None:
        shapes = [*map(str, self.sizes), *(_name(shape) for shape in self.seconds if isinstance(shape, MixedShape))]
        kept = f"those of batches {', '.join(shapes)} stay, " if shapes else ""
        self.full = why
        self._note(f"no more CUDA graphs are captured: {why}; {kept}other steps are padded further or run without one")

    def replay(self, shape: Shape, kind: Kind) -> Sampled:
        """Run the captured step on the batch now in the static buffers; returns its token buffer [size] and scores."""
        replay, sampled = self._graphs[shape, kind]
        replay()
        return sampled


def _name(shape: Shape) -> str:
    if isinstance(shape, int):
        return str(shape)
    return f"{shape.tokens} tokens ({shape.decodes} decodes, {shape.prefills} prefills)"
