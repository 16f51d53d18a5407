"""Router and experts of a few to some hundred tokens in five launches: logits, choice and lists, up, down, the sum.

The choice lists each expert's rows for the kernels of `listed.py`, so that none has to count and sort them. Where that
is not served, `routing.py` does, behind a router of its own.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fusecomp.lowerings.device import target_of
from fusecomp.lowerings.experts.codes import kernel_weight
from fusecomp.lowerings.experts.combine import launch_combine
from fusecomp.lowerings.experts.digits import halves_apart, rows_at_once
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.launch import Experts, signalled_blocks, weight_tiles
from fusecomp.lowerings.experts.listed import down_listed_kernel, up_listed_kernel
from fusecomp.lowerings.experts.router import Router
from fusecomp.lowerings.experts.routing import SINGLE_LAUNCH_ROWS
from fusecomp.lowerings.launch import launch, rounding_options
from fusecomp.lowerings.paged_attention.heuristics import cdiv
from fusecomp.lowerings.quant.digit_rows import Digits, empty_digits
from fusecomp.lowerings.route.kernel import empty_lists, list_capacity
from fusecomp.lowerings.route.lowering import supports
from fusecomp.lowerings.route.router import launch_router, supports_router

ASKED = 512  # bytes of each row of a tile
PAIRED = 8  # tokens of a tile up to which two are multiplied at once; two of more take too many registers
# Rows of an expert in the mean above which few have none; half-way between two and four as `distance` has it, so that
# all numbers of tokens that one entry of a table serves have the same kernels.
LEAST_ROWS = 2**1.5


def fits(config: ExpertsConfig, routed_rows: int) -> bool:
    """Whether the kernels of `listed.py` run experts by this configuration."""
    alone = not config.up.per_sm and not config.down.per_sm
    return config.method == "grouped" and config.swap and alone and routed_rows <= SINGLE_LAUNCH_ROWS


def reads(bits: int, columns: int) -> bool:
    """Whether they read codes of so many bits of which so many columns share a scale, 0 for all.

    Others were not timed, and some would spill registers.
    """
    return bits == 8 and not columns


def serves(config: ExpertsConfig, x: Tensor, router: Router, layer: Experts) -> bool:
    """Whether `run_listed` runs such a router in front of such experts, which `config` is for."""
    return (
        all(codes is None or reads(codes.spec.bits, codes.spec.cols) for codes in (layer.up_codes, layer.down_codes))
        and fits(config, len(x) * router.spec.k)
        and supports(x, router.weight, router.spec) is None
        and supports_router(len(x), router.weight, router.norm, router.norm_bias) is None
    )


def run_listed(
    config: ExpertsConfig,
    x: Tensor,
    router: Router,
    layer: Experts,
    residual: Tensor | None,
    use_pdl: bool,
    digits: Digits | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, residual + experts of y) [T, C], chosen by y; y is norm(x), or empty without a norm. Bitwise repeatable.

    Lists have any order, which no result depends on: a row's products are the same in any place of a tile.

    Args:
        config: of the experts, which `serves` must accept.
        x, residual: [T, C], last dim contiguous.
        use_pdl: programmatic dependent launch; needs an NVIDIA GPU of compute capability 9.0 or more.
        digits: of x, bf16 and without a norm in front, which the experts are multiplied by then; the configuration
            has tiles for them.
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
    made, tiles = None, config.digits
    if digits is not None:
        assert tiles is not None
        made = empty_digits(tokens * top_k, width, x)
        config = replace(config, up=tiles.up, down=tiles.down)
    parts = torch.empty((tokens * top_k, hidden_size), dtype=x.dtype, device=x.device)
    sms, capacity = target_of(x).num_sms, list_capacity(tokens, config.block_t)
    bits = 8 * x.element_size()
    row = layer.up.shape[-1] * layer.up.element_size() if not layer.transposed and layer.up.data_ptr() % 16 == 0 else 0
    ups, downs = listed_constants(
        config, (experts, rows, top_k, tokens), row, sms, use_pdl, bits, 8 if layer.up_codes else bits,
        digits=digits is not None,
    )  # fmt: skip
    block_r, block_f = rows_at_once(width)
    common = {
        "E": experts, "BLOCK_T": config.block_t, "TRANSPOSED": layer.transposed, "USE_PDL": use_pdl,
        **rounding_options(), **({"launch_pdl": True} if use_pdl else {}),
    }  # fmt: skip

    weight, scale, zero, layout = kernel_weight(layer.up, layer.up_codes)
    groups = 2 if layer.gating == 1 else 1
    apart = digits is not None and halves_apart(layer.gating, config.up.block_n)
    w_tiles = weight_tiles(weight, config.up, groups, hidden_size, layer.transposed, apart=apart)
    launch(
        up_listed_kernel, (experts * cdiv(rows, config.up.block_n),),
        *((given, None) if digits is None else digits), lists, weight, w_tiles, scale, zero, layer.up_bias, hidden,
        *(made or (None, None)), capacity, given.stride(0), K=top_k, N=rows, D=hidden_size,
        USE_TMA=w_tiles is not None, num_warps=config.up.num_warps, num_stages=config.up.num_stages, BLOCK_R=block_r,
        BLOCK_F=block_f, **layer.act_constants(), **layout, **ups, **common,
    )  # fmt: skip
    weight, scale, zero, layout = kernel_weight(layer.down, layer.down_codes)
    w_tiles = weight_tiles(weight, config.down, 1, width, layer.transposed)
    launch(
        down_listed_kernel, (experts * cdiv(hidden_size, config.down.block_n),),
        *(made or (hidden, None)), lists, weight, w_tiles, scale, zero, layer.down_bias, parts, capacity, N=hidden_size,
        D=width, USE_TMA=w_tiles is not None, num_warps=config.down.num_warps, num_stages=config.down.num_stages,
        **layout, **downs, **common,
    )  # fmt: skip
    return y, launch_combine(parts, index, weights, residual, experts, sms, use_pdl)


def listed_constants(
    config: ExpertsConfig,
    sizes: tuple[int, int, int, int],
    row_bytes: int,
    sms: int,
    use_pdl: bool,
    bits: int,
    weight_bits: int,
    digits: bool = False,
) -> tuple[dict[str, int], dict[str, int]]:
    """Constants of the two kernels that follow from the configuration and the number of tokens.

    Args:
        sizes: (E, N of the up projection, K, T).
        row_bytes: of a row of the up projection's weight; 0 if it may not be asked for.
        bits, weight_bits: of a number of the activations and of the weights.
        digits: activations are two of eight bits.
    """
    experts, rows, top_k, tokens = sizes
    many = tokens * top_k >= LEAST_ROWS * experts
    signals = signalled_blocks(config, tokens * top_k, rows, use_pdl)
    asks = use_pdl and many and row_bytes >= ASKED and row_bytes % 16 == 0
    asking = min(2 * sms, experts * cdiv(rows, config.up.block_n)) if asks else 0
    up, down = (_tile_constants(t, config.block_t, bits, weight_bits, many) for t in (config.up, config.down))
    # Digits of hidden rows are made when an expert's blocks have been counted, whether or not these are waited for.
    ups = {"ASKING": asking, "ASKED": ASKED, "SIGNAL": signals > 0 or digits, **up}
    return ups, {"ASKS": use_pdl and many, "UP_BLOCKS": signals, **down}


def _tile_constants(tiles: Tiles, block_t: int, bits: int, weight_bits: int, many: bool) -> dict[str, int]:
    """Of one matmul; two tiles of tokens go through the shared memory that one has.

    Args:
        many: rows of an expert, in the mean: some experts have more than a small tile.
    """
    weight, tokens = tiles.block_n * weight_bits, block_t * bits  # bits of a column
    pair_stages = 0
    if many and block_t <= PAIRED:
        pair_stages = max(2, tiles.num_stages * (weight + tokens) // (weight + 2 * tokens))
    return {"BLOCK_N": tiles.block_n, "BLOCK_D": tiles.block_d, "PAIR_STAGES": pair_stages}
