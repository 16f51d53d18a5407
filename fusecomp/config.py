"""Frozen configuration objects. An unknown key is an error that names the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fusecomp.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
BLOCK_SIZES = (1, 16, 32, 64)
VERIFY_MODES = ("off", "first")
FUSE_MODES = ("auto", "always", "never")
QUANTIZE_SCHEMES = ("fp8", "int8", "int4")
KV_CACHE_DTYPES = ("auto", "fp8")

C = TypeVar("C")


def check_keys(cls: type, keys: Any, where: str, *, also: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for the first of `keys` that is neither a field of dataclass `cls` nor in `also`."""
    valid = [*also, *(f.name for f in dataclasses.fields(cls))]
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"valid options are {', '.join(valid)}"
            raise ConfigError(f"unknown option {key!r}", where=where, remedy=remedy)


def refuses_unknown_options(cls: type[C]) -> type[C]:
    """Make the constructor of dataclass `cls` raise `ConfigError` for a keyword that is none of its fields."""
    construct: Any = cls.__init__

    @functools.wraps(construct)
    def init(self: Any, *args: Any, **options: Any) -> None:
        check_keys(cls, options, cls.__name__)
        construct(self, *args, **options)

    cls.__init__ = init  # type: ignore[assignment, method-assign]
    return cls


def is_int(value: Any) -> bool:
    """Whether `value` is an integer, which a bool is not meant to be."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether `value` is a finite number that a float can hold."""
    try:
        return (is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _calibration(given: Any) -> str | tuple[Any, ...] | None:
    """A path as text, or texts and lists of token ids as tuples."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        return os.fspath(given)
    items = tuple(given) if isinstance(given, list | tuple) else (None,)
    ids = tuple(tuple(item) if isinstance(item, list | tuple) else item for item in items)
    if not all(isinstance(item, str) or (isinstance(item, tuple) and all(map(is_int, item))) for item in ids):
        raise ConfigError(
            f"calibration is a {type(given).__name__} of something else",
            where="EngineConfig",
            remedy="give the path of a text file, a list of texts, or a list of lists of token ids",
        )
    return ids


@refuses_unknown_options
@dataclass(frozen=True)
class EngineConfig:
    """Everything that shapes an engine. Field names follow vLLM's where the meaning is the same.

    Attributes:
        dtype: parameter dtype after loading; "auto" keeps the checkpoint's.
        device: "auto" takes CUDA when there is one.
        max_model_len: longest prompt plus output, in tokens; None takes the model's own limit.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step (decodes and prefill chunks together).
        gpu_memory_utilization: share of the card's memory for weights, workspace and KV cache.
        kv_cache_bytes: explicit KV budget; None derives it (from the share above on a GPU,
            from `max_num_seqs * max_model_len` capped at 1 GiB on the CPU).
        kv_cache_dtype: "auto" keeps keys and values in the model's dtype; "fp8" as codes of one byte (e4m3) with a
            scale per token and kv head: half the memory of 16 bits, and 2.5% of rounding error in each key and value.
        block_size: tokens per KV page.
        swap_space: GiB of host memory (pinned on a GPU) in which preempted sequences may keep their keys and values,
            where copying them both ways is measured to take less time than computing them again. 0, the default, takes
            none: preemption is rare with a cache that is large enough, prefix caching finds most of what was computed,
            and so vLLM, which had 4 here, has dropped it.
        enable_prefix_caching: requests that begin with the same tokens share the full KV pages of these, and later ones
            find them as long as nothing else took the pages. A page's values depend on its prefix alone, so every
            model that is served allows it; results are those of computing the prefix in another step.
        enforce_eager: run the captured, rewritten graph without Inductor and without CUDA graphs.
        compile_cache: keep the compiled step below FUSECOMP_CACHE_DIR (default ~/.cache/fusecomp), so that the next
            start of the same model loads it, and trace only as many layers as differ.
        deterministic: a request's tokens and log-probabilities are bitwise the same alone and in any batch, however its
            prompt is cut into steps and whatever the prefix cache holds; one that draws tokens needs a seed of its own.
            On a GPU every op must have a batch-invariant kernel, or the model is refused, naming the op; on the CPU,
            each token is computed by itself.
        seed: seed of requests that bring none.
        strict: a fallback raises instead of being reported.
        verify: "first" compares the rewritten model with the original and with fp32 before serving, for a receipt
            in the report; a failed receipt is an error. It holds an fp32 copy of the weights meanwhile.
        fuse: run the fuse stage (norms, matmuls with their epilogues, rotary embedding with the cache write become
            canonical ops): "auto" on a GPU, where they have kernels; "always", on a CPU by their eager references.
        disabled_patterns: names of patterns, of merging or of the fuse stage, that are left out.
        quantize: hold the weights of linears and experts as codes, "fp8", "int8" or "int4"; None leaves them. A model
            in memory is changed.
        calibration: for int8 and int4, a text file, or a list of texts or of lists of token ids; None takes the text
            that comes with the package, an empty list does without.
    """

    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    block_size: int = 16
    swap_space: float = 0.0
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    compile_cache: bool = True
    deterministic: bool = False
    seed: int = 0
    strict: bool = False
    verify: str = "off"
    fuse: str = "auto"
    disabled_patterns: tuple[str, ...] = ()
    quantize: str | None = None
    calibration: str | tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        self._one_of("dtype", DTYPES)
        self._one_of("block_size", BLOCK_SIZES)
        self._one_of("kv_cache_dtype", KV_CACHE_DTYPES)
        self._one_of("verify", VERIFY_MODES)
        self._one_of("fuse", FUSE_MODES)
        if isinstance(self.disabled_patterns, str) or not all(isinstance(n, str) for n in self.disabled_patterns):
            raise ConfigError(
                f"disabled_patterns={self.disabled_patterns!r}", where="EngineConfig", remedy="give a tuple of names"
            )
        object.__setattr__(self, "disabled_patterns", tuple(self.disabled_patterns))
        if self.quantize is not None:
            self._one_of("quantize", QUANTIZE_SCHEMES)
        object.__setattr__(self, "calibration", _calibration(self.calibration))
        if self.calibration is not None and self.quantize is None:
            raise ConfigError("calibration without quantize", where="EngineConfig", remedy="give quantize as well")
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            self._positive_int(name, getattr(self, name))
        for name in ("max_model_len", "kv_cache_bytes"):
            if getattr(self, name) is not None:
                self._positive_int(name, getattr(self, name))
        for name in ("enable_prefix_caching", "enforce_eager", "compile_cache", "deterministic", "strict"):
            if not isinstance(getattr(self, name), bool):
                value = getattr(self, name)
                raise ConfigError(f"{name}={value!r}", where="EngineConfig", remedy="give True or False")
        if not is_int(self.seed):
            raise ConfigError(f"seed={self.seed!r}", where="EngineConfig", remedy="give an integer")
        if not is_real(self.swap_space) or self.swap_space < 0:
            raise ConfigError(f"swap_space={self.swap_space!r}", where="EngineConfig", remedy="give GiB, 0 for none")
        share = self.gpu_memory_utilization
        if not is_real(share) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {share!r}", where="EngineConfig", remedy="give a share in (0, 1]"
            )
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs={self.max_num_seqs} exceeds max_num_batched_tokens={self.max_num_batched_tokens}",
                where="EngineConfig",
                why="every running sequence needs at least one token a step",
                remedy="raise max_num_batched_tokens or lower max_num_seqs",
            )

    @property
    def swap_bytes(self) -> int:
        """`swap_space` in bytes."""
        return int(self.swap_space * 2**30)

    def replace(self, **changes: Any) -> EngineConfig:
        """A copy with `changes` applied and checked."""
        check_keys(EngineConfig, changes, "EngineConfig")
        return dataclasses.replace(self, **changes)

    def _one_of(self, name: str, valid: tuple) -> None:
        if getattr(self, name) not in valid:
            raise ConfigError(
                f"{name}={getattr(self, name)!r} is not supported",
                where="EngineConfig",
                remedy=f"use one of {', '.join(map(str, valid))}",
            )

    @staticmethod
    def _positive_int(name: str, value: Any) -> None:
        if not is_int(value) or value < 1:
            raise ConfigError(f"{name}={value!r}", where="EngineConfig", remedy="give an integer of at least 1")
