"""Router and experts of a few to some hundred tokens in five launches: logits, choice and lists, up, down, the sum.

The choice lists each expert's rows for the kernels of `listed.py`, so that none has to count and sort them. Where that
is not served, `routing.py` does, behind a router of its own.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.experts.codes import Codes, kernel_weight
from fusecomp.lowerings.experts.combine import launch_combine
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.launch import Experts, signalled_blocks, weight_tiles
from fusecomp.lowerings.experts.listed import down_listed_kernel, up_listed_kernel
from fusecomp.lowerings.experts.router import Router
from fusecomp.lowerings.experts.routing import SINGLE_LAUNCH_ROWS
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.route.kernel import empty_lists, list_capacity
from fusecomp.lowerings.route.lowering import supports
from fusecomp.lowerings.route.router import launch_router, supports_router

ASKED = 512  # bytes of each row of a tile
PAIRED = 8  # tokens of a tile up to which two are multiplied at once; two of more take too many registers
# Rows of an expert in the mean above which few have none; half-way between two and four as `distance` has it, so that
# all numbers of tokens that one entry of a table serves have the same kernels.
LEAST_ROWS = 2**1.5


def serves(config: ExpertsConfig, x: Tensor, router: Router, layer: Experts) -> bool:
    """Whether `run_listed` runs such a router in front of such experts, which `config` is for.

    Codes whose scales are of columns too keep the plan: they were not timed, and some would spill registers.
    """
    return (
        all(codes is None or not codes.spec.cols for codes in (layer.up_codes, layer.down_codes))
        and config.method == "grouped"
        and config.swap
        and not config.up.per_sm
        and not config.down.per_sm
        and len(x) * router.spec.k <= SINGLE_LAUNCH_ROWS
        and supports(x, router.weight, router.spec) is None
        and supports_router(len(x), router.weight, router.norm, router.norm_bias) is None
    )


def run_listed(
    config: ExpertsConfig, x: Tensor, router: Router, layer: Experts, residual: Tensor | None, use_pdl: bool
) -> tuple[Tensor, Tensor]:
    """(y, residual + experts of y) [T, C], chosen by y; y is norm(x), or empty without a norm. Bitwise repeatable.

    Lists have any order, which no result depends on: a row's products are the same in any place of a tile.

    Args:
        config: of the experts, which `serves` must accept.
        x, residual: [T, C], last dim contiguous.
        use_pdl: programmatic dependent launch; needs an NVIDIA GPU of compute capability 9.0 or more.
    """
    tokens, top_k = len(x), router.spec.k
    experts, rows, hidden_size, width = layer.sizes
    lists = empty_lists(tokens, experts, config.block_t, x.device)
    y, index, weights = launch_router(
        x, router.weight, router.bias, router.norm_weight, router.route_bias, router.norm, router.logits, router.spec,
        use_pdl, lists,
    )  # fmt: skip
    given = y if router.norm else x
    hidden = torch.empty((tokens * top_k, width), dtype=x.dtype, device=x.device)
    parts = torch.empty((tokens * top_k, hidden_size), dtype=x.dtype, device=x.device)
    item, sms, capacity = x.element_size(), target_of(x).num_sms, list_capacity(tokens, config.block_t)
    signals = signalled_blocks(config, tokens * top_k, rows, use_pdl)
    common = {
        "E": experts, "BLOCK_T": config.block_t, "TRANSPOSED": layer.transposed, "USE_PDL": use_pdl,
        **rounding_options(), **({"launch_pdl": True} if use_pdl else {}),
    }  # fmt: skip

    weight, scale, zero, layout = kernel_weight(layer.up, layer.up_codes)
    w_tiles = weight_tiles(weight, config.up, 2 if layer.gating == 1 else 1, hidden_size, layer.transposed)
    many = tokens * top_k >= LEAST_ROWS * experts
    certain = use_pdl and many
    programs = experts * triton.cdiv(rows, config.up.block_n)
    asking = asking_programs(layer, programs, sms) if certain else 0
    launch(
        up_listed_kernel, (programs,),
        given, lists, weight, w_tiles, scale, zero, layer.up_bias, hidden, capacity, given.stride(0), K=top_k, N=rows,
        D=hidden_size, ASKING=asking, ASKED=ASKED, SIGNAL=signals > 0, USE_TMA=w_tiles is not None,
        **layer.act_constants(), **layout, **common,
        **tile_constants(config.up, config.block_t, _bits(layer.up_codes, item), item, many),
    )  # fmt: skip
    weight, scale, zero, layout = kernel_weight(layer.down, layer.down_codes)
    w_tiles = weight_tiles(weight, config.down, 1, width, layer.transposed)
    launch(
        down_listed_kernel, (experts * triton.cdiv(hidden_size, config.down.block_n),),
        hidden, lists, weight, w_tiles, scale, zero, layer.down_bias, parts, capacity, N=hidden_size, D=width,
        ASKS=certain, UP_BLOCKS=signals, USE_TMA=w_tiles is not None, **layout,
        **tile_constants(config.down, config.block_t, _bits(layer.down_codes, item), item, many), **common,
    )  # fmt: skip
    return y, launch_combine(parts, index, weights, residual, experts, sms, use_pdl)


def asking_programs(layer: Experts, programs: int, sms: int) -> int:
    """Those of the up projection that ask the L2 for weights before the routing is known: the first on the card.

    Args:
        programs: of each expert and block.
    """
    row = layer.up.shape[-1] * layer.up.element_size()  # bytes
    if layer.transposed or row % 16 or row < ASKED or layer.up.data_ptr() % 16:
        return 0
    return min(2 * sms, programs)


def tile_constants(tiles: Tiles, block_t: int, weight_bits: int, itemsize: int, many: bool) -> dict[str, int]:
    """Constants and options of one matmul; two tiles of tokens go through the shared memory that one has.

    Args:
        many: rows of an expert, in the mean: some experts have more than a small tile.
    """
    weight, tokens = tiles.block_n * weight_bits, block_t * 8 * itemsize  # bits of a column
    pair_stages = 0
    if many and block_t <= PAIRED:
        pair_stages = max(2, tiles.num_stages * (weight + tokens) // (weight + 2 * tokens))
    return {
        "BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d, "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages, "PAIR_STAGES": pair_stages,
    }  # fmt: skip


def _bits(codes: Codes | None, itemsize: int) -> int:
    return 8 * itemsize if codes is None else codes.spec.bits
