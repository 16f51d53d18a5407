"""fusecomp: graph-fusion compilation for LLM inference of unmodified Hugging Face models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusecomp import errors
    from fusecomp.api import LLM, explain
    from fusecomp.hf import fuse, unfuse
    from fusecomp.request import CompletionOutput, Logprob, RequestOutput, RequestOutputKind, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "errors",
    "explain",
    "fuse",
    "unfuse",
]

# Public name -> its module. Resolved on first use: `fusecomp --help` imports neither torch nor transformers.
_HOMES = {
    "LLM": "fusecomp.api",
    "explain": "fusecomp.api",
    "fuse": "fusecomp.hf",
    "unfuse": "fusecomp.hf",
    "SamplingParams": "fusecomp.request",
    "Logprob": "fusecomp.request",
    "RequestOutput": "fusecomp.request",
    "RequestOutputKind": "fusecomp.request",
    "CompletionOutput": "fusecomp.request",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("fusecomp.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'fusecomp' has no attribute {name!r}; it has {', '.join(__all__)}")
    from fusecomp.imports import fast_imports

    with fast_imports():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
