"""Every private torch API that fusecomp uses, behind one import, for torch 2.11 to 2.13."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import sympy
import torch
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import GraphModule

from fusecomp.imports import import_beside

__all__ = [
    "CustomGraphPass",
    "compiler_prepared",
    "compiler_settings",
    "counters",
    "decomposes_outer_products",
    "distinct_sizes",
    "dynamo_settings",
    "functional_backend",
    "inductor_artifact",
    "inductor_cache_dir",
    "inductor_compile",
    "load_artifact",
    "mark_unbacked",
    "own_tracing_context",
    "real_tensors",
    "recompiles_are_errors",
    "traced_guards",
]

# They decide how, not what, Inductor compiles.
SETTINGS_WITHOUT_EFFECT = {"compile_threads", "worker_start_method", "debug_dir_root"}


def inductor_compile(gm: GraphModule, example_inputs: list[Any], patches: dict[str, Any] | None = None) -> Callable:
    """Compile a Dynamo graph with Inductor (AOT functionalization, reinplacing, code generation)."""
    from torch._inductor.compile_fx import compile_fx

    with reshapes_of_unknown_sizes():
        compiled: Any = compile_fx(gm, example_inputs, config_patches=_settings(gm) | (patches or {}))
    return compiled


def _settings(gm: GraphModule) -> dict[str, Any]:
    """Inductor settings that `gm` needs.

    A rotation in complex numbers begins with ones in the strides of its angles; Inductor folds them into a constant
    only after asking whether they are contiguous, which fails for an unknown number of tokens.
    """
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    rotates = any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    return {"joint_graph_constant_folding": False} if rotates else {}


@contextmanager
def reshapes_of_unknown_sizes() -> Iterator[None]:
    """Inside, Inductor reshapes a computed value of unknown size without a copy where it can, as torch 2.13 does.

    Torch 2.11 writes such a value out at every squeeze: a rotary table for any number of tokens would be five kernels.
    """
    from torch._inductor import ir

    if torch.__version__ >= "2.13":
        yield
        return
    original = vars(ir.View)["create"]

    def create(cls: Any, x: Any, new_size: Sequence[Any]) -> Any:
        if not ir.is_storage_and_layout(x):  # computed, and so far in no buffer
            old, new = cls.resolve_negative_size(x.get_size(), new_size)
            if reindex := _reindex(cls, old, new):
                return cls(data=x, size=list(new), reindex=reindex)
        return original.__func__(cls, x, new_size)

    ir.View.create = classmethod(create)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ir.View.create = original  # type: ignore[method-assign]


def _reindex(view: Any, old: Sequence[Any], new: Sequence[Any]) -> Callable | None:
    """Where a view of unknown size finds its elements, if that does not depend on the size; None otherwise.

    A prime stands for each size, and then another one: indices that are the same for both keep the sizes whole.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if not free_unbacked_symbols([*old, *new]) or list(old) == list(new):
        return None
    symbols = sorted({symbol for size in (*old, *new) for symbol in size.free_symbols}, key=str)
    index = [sympy.Symbol(f"view_{i}", integer=True, nonnegative=True) for i in range(len(new))]
    found = []
    for first in (5000, 5000 + len(symbols)):
        primes = {symbol: sympy.Integer(sympy.prime(first + i)) for i, symbol in enumerate(symbols)}
        try:
            found.append(view.dynamic_reshape_indexer(*([s.xreplace(primes) for s in sizes] for sizes in (old, new))))
        except Exception:  # no indices are found for such sizes: what Inductor does is right, if slower
            return None
    return found[0] if tuple(found[0](index)) == tuple(found[1](index)) else None


def inductor_cache_dir() -> Path:
    """Where Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def decomposes_outer_products() -> bool:
    """Whether Inductor itself multiplies where a bmm sums one product: torch 2.13 does, 2.11 does not."""
    from torch._inductor.decomposition import bmm

    return bmm(torch.ones(1, 2, 1), torch.ones(1, 1, 2)) is not NotImplemented


# What compiled code and its artefacts import.
INDUCTOR = (
    "torch._inductor.standalone_compile",
    "torch._inductor.select_algorithm",
    "torch._inductor.codegen.memory_planning",
)


@contextmanager
def compiler_prepared() -> Iterator[None]:
    """Beside what runs inside, which must not import Inductor, import it, and hash Triton's own files.

    Those are hundreds of megabytes, and part of every cache key. Reading and hashing need no lock of Python's. What
    asks for the hash before it is there computes it again.
    """
    from triton.runtime.cache import triton_key

    threading.Thread(target=triton_key, name="hash-compiler", daemon=True).start()
    with import_beside(INDUCTOR):
        yield


def functional_backend(gm: GraphModule, example_inputs: list[Any], rewrite: Callable[[GraphModule], None]) -> Callable:
    """Turn a Dynamo graph into the ATen graph that Inductor would compile, `rewrite` it, and run it without codegen."""
    from torch._functorch import config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    def run(graph: GraphModule, inputs: Any, **_: Any) -> Callable:
        rewrite(graph)
        graph.recompile()
        interpreter = torch.fx.Interpreter(graph)

        def call(args: list[Any]) -> Any:
            return interpreter.boxed_run(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    with functorch_config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=run)  # type: ignore[arg-type]
    return compiled


def inductor_artifact(gm: GraphModule, example_inputs: list[Any], patches: dict[str, Any] | None = None) -> Any:
    """Like `inductor_compile`, for a graph that returns a tuple; the result's `save(path=...)` writes it to a file.

    The ambient tracing context supplies the symbols.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import standalone_compile

    # torch 2.11 does not know that a check of sizes is no state. What has no cache key becomes an artefact even so:
    # ours are found by a key of our own.
    patched = {"unsafe_marked_cacheable_functions": {"torch._check": "1"}} | _settings(gm)
    options = {"config_patches": patched | (patches or {})}
    with functorch_config.patch(bypass_autograd_cache_key=True), reshapes_of_unknown_sizes():
        return standalone_compile(gm, example_inputs, dynamic_shapes="from_tracing_context", options=options, aot=True)


def load_artifact(path: str) -> Callable:
    """The callable that an `inductor_artifact` was saved as. Loading runs code from the file."""
    from torch._inductor import CompiledArtifact

    return CompiledArtifact.load(path=path, format="binary")


def compiler_settings() -> dict[str, Any]:
    """Every setting of Dynamo, AOTAutograd and Inductor that may change what they produce, by name."""
    import torch._functorch.config
    import torch._inductor.config

    configs = {"dynamo": torch._dynamo.config, "aot": torch._functorch.config, "inductor": torch._inductor.config}
    settings = {}
    for name, config in configs.items():
        for key, value in config.save_config_portable().items():  # type: ignore[attr-defined]
            if key not in SETTINGS_WITHOUT_EFFECT and not key.startswith("trace."):
                settings[f"{name}.{key}"] = _plain(value)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


@contextmanager
def own_tracing_context(example_inputs: list[Any]) -> Iterator[None]:
    """A tracing context apart from Dynamo's, so that a part of its graph compiles as a graph of its own."""
    from torch._guards import TracingContext, detect_fake_mode, tracing

    mode = detect_fake_mode(example_inputs)
    with tracing(TracingContext(mode)):
        yield


def traced_guards() -> list[str]:
    """What the trace now being compiled has read, as Dynamo names it: the names of its guards."""
    from torch._guards import TracingContext

    guards = TracingContext.get().guards_context.dynamo_guards
    names = [guard.name for guard in guards]
    return [str(name() if callable(name) else name) for name in names]  # a method in torch 2.11


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside a pass, where tensors are fake, compute with real ones."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


class _DynamoPatch:
    """A set of Dynamo settings to be in force for a while, as often as for every step.

    torch's patch object makes a `ContextVar`, which the thread's context then holds for good: torch 2.13 leaks some 100
    bytes with every `config.patch(...)`. So objects are used again. There is one for each use at the same time, nested
    or in another thread, since torch 2.11's cannot be entered twice.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._idle: list[Any] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            patch = self._idle.pop()
        except IndexError:
            patch = torch._dynamo.config.patch(self._settings)
        try:
            with patch:
                yield
        finally:
            self._idle.append(patch)


_CAPTURE = _DynamoPatch(specialize_float=True, fail_on_recompile_limit_hit=True, automatic_dynamic_shapes=False)
_NO_RECOMPILES = _DynamoPatch(error_on_recompile=True)


def dynamo_settings() -> AbstractContextManager[None]:
    """Capture settings: floats are constants (a scale must not become an input); one graph, never a silent retry.

    Sizes are dynamic where they are marked, and nowhere else: otherwise Dynamo remembers the sizes of earlier engines'
    captures by source line, and one whose sizes differ would be compiled for sizes that never change.
    """
    return _CAPTURE()


def recompiles_are_errors() -> AbstractContextManager[None]:
    """Inside, a guard failure raises `torch._dynamo.exc.RecompileError` naming the failed guard."""
    return _NO_RECOMPILES()


def distinct_sizes() -> Any:
    """A context manager, in which sizes that are equal when a function is traced are not taken to be equal always.

    It may be entered again and again, but not twice at a time. It is to be kept: torch 2.13 leaks a context variable
    with every new one.
    """
    from torch.fx.experimental import _config

    return _config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
