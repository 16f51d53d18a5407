"""What the compiler says when it cannot capture a model, or would compile it again, in the words of `errors.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusecomp.errors import RecompileError, UnsupportedModelError


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


def recompile_error(model: str, why: str) -> RecompileError:
    """For a step that would be compiled again after it was sealed."""
    return RecompileError(
        "the step would be compiled again while serving",
        where=model,
        why=why,
        remedy="do not change the model while its engine lives",
    )


def _place(message: str) -> str:
    """What Dynamo could not capture, and the innermost line of the model's code that it names."""
    what = " ".join(message.split("\n\n", 1)[0].split())
    frames = message.partition("from user code:")[2].strip().split("\n\n")[0].split("File ")
    return f"{what} At {' '.join(frames[-1].split())}" if len(frames) > 1 else what
