"""What launches share: the GPU that a tensor lives on, and counters that every launch leaves at zero."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fusecomp.lowerings.paged_attention.heuristics import SM90, Target, next_power_of_2


@cache
def device_target(index: int) -> Target:
    """The `Target` of a CUDA or ROCm device."""
    props = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target(props.name, "hip", props.gcnArchName.split(":")[0], 64 * 1024, props.multi_processor_count)
    arch = props.major * 10 + props.minor
    smem = props.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Target(props.name, "cuda", arch, smem, props.multi_processor_count)


def target_of(tensor: Tensor) -> Target:
    """The GPU a tensor lives on; the H200 under Triton's interpreter."""
    return device_target(tensor.device.index) if tensor.is_cuda else SM90


def uses_pdl(tensor: Tensor) -> bool:
    """Whether kernels on this tensor are launched before the ones that they follow have ended."""
    return tensor.is_cuda and target_of(tensor).has_pdl


_arrival_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def zeroed_counters(device: torch.device, count: int, *, least: int = 1 << 16, owner: int = 0) -> Tensor:
    """At least `count` int32 zeros, which every launch leaves at zero; kept, so that capturing a launch adds no memset.

    Counters created during a capture hold zeros only once the graph runs, so those are not kept: warm up before
    capturing.

    Args:
        least: how many are made at least, so that few sizes occur.
        owner: launches that share counters must be ordered; those of one owner do.
    """
    size = next_power_of_2(max(count, least))
    counters = _arrival_counters.get((device, owner, size))
    if counters is None:
        counters = torch.zeros(size, dtype=torch.int32, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _arrival_counters[device, owner, size] = counters
    return counters
