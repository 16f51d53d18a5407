"""What a compiler or a device refuses, told apart from mistakes of ours: candidates of a sweep may be refused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

SHOWN = 300  # characters of a reason, its end


def refusal(launch: Callable[[], object]) -> str:
    """Why what `launch` compiles and runs is refused; empty where it is not.

    Raises:
        Exception: any other than Triton's and the runtime's, which no candidate accounts for.
        torch.AcceleratorError: the device failed, and nothing in this process can be measured any more.
    """
    try:
        launch()
    except torch.AcceleratorError:
        raise
    except (triton.errors.TritonError, RuntimeError) as error:
        return f"{type(error).__name__} {str(error)[-SHOWN:]}"
    return ""
