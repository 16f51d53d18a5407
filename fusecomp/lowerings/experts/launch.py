"""Launches of the experts' kernels: two for very few tokens, otherwise routing, two grouped matmuls and the sum.

Safe under CUDA-graph capture: grids depend on shapes alone, and what depends on the routing is read on the device.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size, R = T * K routed rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.experts.codes import Codes, kernel_weight
from fusecomp.lowerings.experts.combine import launch_combine
from fusecomp.lowerings.experts.grouped import down_kernel, up_kernel
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.routing import SINGLE_LAUNCH_ROWS, launch_routing
from fusecomp.lowerings.experts.vector import down_vector_kernel, up_vector_kernel
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention.heuristics import cdiv, next_power_of_2
from fusecomp.lowerings.quant.lowering import launch_dequantize
from fusecomp.ops.experts import Activation


@dataclass(frozen=True)
class Experts:
    """The weights of a layer and how they are used; see `ops/experts.py`.

    Attributes:
        up: [E, N, C], N = 2F if gated, else F; transposed: [E, C, N]. Contiguous, as are all others.
        up_bias: [E, N], or None.
        down: [E, C, F]; transposed: [E, F, C].
        down_bias: [E, C], or None.
        up_codes, down_codes: what up and down stand for if they are codes, then [E, N, C] and [E, C, F], or bytes of
            two along the last dim, and not transposed; None if they are numbers.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: Activation
    gated: bool
    interleaved: bool
    transposed: bool
    up_codes: Codes | None = None
    down_codes: Codes | None = None

    @property
    def gating(self) -> int:
        """GATING of `pieces.py`."""
        return 0 if not self.gated else 2 if self.interleaved else 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(E, N, C, F)."""
        experts, rows, hidden = self.up.shape if self.up_codes is None else self.up_codes.spec.shape(self.up.shape)
        if self.transposed:
            rows, hidden = hidden, rows
        return experts, rows, hidden, rows // 2 if self.gated else rows

    def dequantized(self) -> Experts:
        """The same layer by weights of numbers."""
        up, down = (
            weight if codes is None else launch_dequantize(weight, codes.scale, codes.zero, codes.spec)
            for weight, codes in ((self.up, self.up_codes), (self.down, self.down_codes))
        )
        return replace(self, up=up, down=down, up_codes=None, down_codes=None)

    def act_constants(self) -> dict[str, Any]:
        act = self.activation
        return {"GATING": self.gating, "ACT": act.name, "ALPHA": act.alpha, "LIMIT": act.limit}


def run_experts(
    config: ExpertsConfig,
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
) -> Tensor:
    """residual[t] + sum over k of routing_weights[t, k] * expert_{index[t, k]}(x[t]) -> [T, C] contiguous, as x.

    Args:
        x: [T, C], last dim contiguous, any row stride; the dtype of the layer: fp32, fp16 or bf16.
        index: [T, K] integers, contiguous; a value outside of [0, E) adds nothing.
        routing_weights: [T, K] floats, contiguous.
        residual: [T, C], last dim contiguous, or None.
        use_pdl: programmatic dependent launch; needs an NVIDIA GPU of compute capability 9.0 or more.
    """
    run = run_vector if config.method == "vector" else run_grouped
    return run(config, x, index, routing_weights, layer, residual, use_pdl)


def run_vector(
    config: ExpertsConfig,
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
) -> Tensor:
    """`run_experts` by register tiles: every row reads its expert, whose weights must not be transposed."""
    if layer.transposed:
        raise ValueError("experts: the vector kernels do not read transposed weights")
    (tokens, top_k), (experts, rows, hidden_size, width) = index.shape, layer.sizes
    hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, hidden_size), dtype=x.dtype, device=x.device)
    common = {"E": experts, "K": top_k, "USE_PDL": use_pdl}
    if use_pdl:
        common["launch_pdl"] = True
    up, down = config.up, config.down
    weight, scale, zero, layout = kernel_weight(layer.up, layer.up_codes)
    launch(
        up_vector_kernel, (tokens * top_k * cdiv(rows, up.block_n),),
        x, index, weight, scale, zero, layer.up_bias, hidden, x.stride(0), N=rows, D=hidden_size, BLOCK_N=up.block_n,
        BLOCK_D=up.block_d, num_warps=up.num_warps, **layer.act_constants(), **layout, **common,
    )  # fmt: skip
    weight, scale, zero, layout = kernel_weight(layer.down, layer.down_codes)
    launch(
        down_vector_kernel, (tokens * cdiv(hidden_size, down.block_n),),
        hidden, index, weight, scale, zero, layer.down_bias, routing_weights, residual, out,
        0 if residual is None else residual.stride(0), KP=next_power_of_2(top_k), N=hidden_size, D=width,
        BLOCK_N=down.block_n, BLOCK_D=down.block_d, num_warps=down.num_warps, **layout, **common,
    )  # fmt: skip
    return out


def run_grouped(
    config: ExpertsConfig,
    x: Tensor,
    index: Tensor,
    routing_weights: Tensor,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
) -> Tensor:
    """`run_experts` by the matrix units: every touched expert is read once per `group_t` of its tiles."""
    (tokens, top_k), (experts, rows, hidden_size, width) = index.shape, layer.sizes
    plan, capacity = launch_routing(index, experts, config.block_t, use_pdl)
    hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    parts = torch.empty((tokens * top_k, hidden_size), dtype=x.dtype, device=x.device)
    sms = target_of(x).num_sms
    signals = signalled_blocks(config, tokens * top_k, rows, use_pdl)
    common = {
        "BLOCK_T": config.block_t, "GROUP_T": config.group_t, "SWAP": config.swap, "TRANSPOSED": layer.transposed,
        "USE_PDL": use_pdl, **rounding_options(),
    }  # fmt: skip
    if use_pdl:
        common["launch_pdl"] = True

    weight, scale, zero, layout = kernel_weight(layer.up, layer.up_codes)
    w_tiles = weight_tiles(weight, config.up, 2 if layer.gating == 1 else 1, hidden_size, layer.transposed)
    launch(
        up_kernel, (_programs(config.up, capacity * cdiv(rows, config.up.block_n), sms),),
        x, plan, weight, w_tiles, scale, zero, layer.up_bias, hidden, capacity, x.stride(0), K=top_k, N=rows,
        D=hidden_size, SIGNAL=signals > 0, USE_TMA=w_tiles is not None,
        FLAT=is_flat(config.up, w_tiles is not None, layer.up_codes is not None, signals), **layer.act_constants(),
        **layout, **_constants(config.up), **common,
    )  # fmt: skip
    weight, scale, zero, layout = kernel_weight(layer.down, layer.down_codes)
    w_tiles = weight_tiles(weight, config.down, 1, width, layer.transposed)
    h_tiles = None
    if reads_tokens(config.down, width * x.element_size(), layer.down_codes is not None, signals):
        h_tiles = TensorDescriptor.from_tensor(hidden, [config.block_t, config.down.block_d])
    launch(
        down_kernel, (_programs(config.down, capacity * cdiv(hidden_size, config.down.block_n), sms),),
        hidden, h_tiles, plan, weight, w_tiles, scale, zero, layer.down_bias, parts, capacity, N=hidden_size, D=width,
        UP_BLOCKS=signals, USE_TMA=w_tiles is not None,
        FLAT=is_flat(config.down, w_tiles is not None, layer.down_codes is not None, signals), **layout,
        **_constants(config.down), **common,
    )  # fmt: skip
    return launch_combine(parts, index, routing_weights, residual, experts, sms, use_pdl)


def weight_tiles(
    weight: Tensor, tiles: Tiles, groups: int, columns: int, transposed: bool, *, apart: bool = False
) -> TensorDescriptor | None:
    """The weight [E, G * N, D] as [E * G, N, D] in blocks [G, BN / G, BD]; None where TMA cannot or shall not read it.

    With groups `apart` in blocks [1, BN / G, BD]. It needs rows of a multiple of 16 bytes. Bytes of two codes count
    once: `columns` is D, of numbers.
    """
    if not tiles.use_tma or transposed or weight.shape[2] * weight.element_size() % 16 or weight.data_ptr() % 16:
        return None
    shape = [weight.shape[0] * groups, weight.shape[1] // groups, weight.shape[2]]
    strides = [shape[1] * shape[2], shape[2], 1]
    block_d = tiles.block_d * weight.shape[2] // columns
    return TensorDescriptor(weight, shape, strides, [1 if apart else groups, tiles.block_n // groups, block_d])


def reads_tokens(tiles: Tiles, row_bytes: int, coded: bool, signals: int) -> bool:
    """Whether `down_kernel` reads hidden rows by TMA: of weights that are numbers, behind the up projection's end."""
    return tiles.tokens_tma and row_bytes % 16 == 0 and not coded and signals == 0


def is_flat(tiles: Tiles, use_tma: bool, coded: bool, signals: int) -> bool:
    """FLAT of the kernels: of weights that are numbers, read by TMA, where no tile is waited for."""
    return tiles.flat and use_tma and not coded and signals == 0


def signalled_blocks(config: ExpertsConfig, routed_rows: int, rows: int, use_pdl: bool) -> int:
    """UP_BLOCKS of `down_kernel`, whose programs begin when the last of the up projection's have, and wait for tiles.

    With many rows, or persistent programs, those that wait would be in the way of those that work.
    """
    if not use_pdl or config.up.per_sm or routed_rows > SINGLE_LAUNCH_ROWS:
        return 0
    return cdiv(rows, config.up.block_n)


def _programs(tiles: Tiles, items: int, sms: int) -> int:
    return min(items, tiles.per_sm * sms) if tiles.per_sm else items


def _constants(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d, "PIECES": tiles.pieces, "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }  # fmt: skip
