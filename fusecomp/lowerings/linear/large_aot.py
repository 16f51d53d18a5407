"""What the large-M linear launches, for ahead-of-time compilation: every committed tile, and its other kernels."""

from __future__ import annotations

from collections.abc import Iterator

from fusecomp.lowerings.aot import Specialization
from fusecomp.lowerings.keep import KEEP
from fusecomp.lowerings.linear import large_heuristics
from fusecomp.lowerings.linear.epilogue_aot import RESIDUAL, SWIGLU
from fusecomp.lowerings.linear.large_heuristics import PLAIN, LargeConfig, norm_block, pointwise_block, sum_block
from fusecomp.lowerings.linear.norm import MAX_DEPENDENT_K, norm_kernel
from fusecomp.lowerings.linear.persistent import persistent_kernel
from fusecomp.lowerings.linear.pointwise import pointwise_kernel
from fusecomp.lowerings.linear.skinny_pieces import plain
from fusecomp.lowerings.linear.sum_norm import sum_norm_kernel
from fusecomp.lowerings.paged_attention.heuristics import Target

ARGS: dict[int, tuple[str, ...]] = {1: ("bf16",), 2: ()}  # the residual's epilogue has an operand, SwiGLU's none


def _tiles(target: Target) -> set[tuple[LargeConfig, int]]:
    """(configuration, groups) of the kernels that this target's choices launch, and the ones without TMA."""
    found = {(PLAIN, 1), (PLAIN, 2)}
    for entry in large_heuristics.load_table(target.table)["entries"] if target.has_tma else []:
        shape = {key: entry[key] for key in ("n", "k", "groups", "tokens", "kind")}
        config = large_heuristics.large_config(target, itemsize=2, **shape)
        if config.method == "persistent":
            found.add((LargeConfig(**config.constants()), entry["groups"]))
    return found


def specializations(target: Target) -> Iterator[Specialization]:
    """The kernels of one layer's shapes, N=14336 and K=4096, in bf16 with strides of any alignment class."""
    n, k, pdl = 14336, 4096, target.has_tma
    for config, groups in sorted(_tiles(target), key=str):
        args = ARGS[groups] if config.splits == 1 else ()
        x_tiles: dict = {"x_tiles": None, "w_tiles": None}
        described: dict = {}
        if config.use_tma:
            block = [config.block_n, config.block_k] if groups == 1 else [2, config.block_n, config.block_k]
            described["x_tiles"] = f"tensordesc<bf16[{config.block_t}, {config.block_k}]>"
            described["w_tiles"] = f"tensordesc<bf16{block}>"
            x_tiles = {}
        stages = config.num_stages if target.backend == "cuda" else 2
        yield Specialization(
            f"linear-{groups}-{config.constants()}",
            persistent_kernel,
            {"x": "bf16", "w": "bf16", "out": "fp32" if config.splits > 1 else "bf16", "args": args, **described},
            {"num_tokens": "i32", "stride_x": "i32", "stride_o": "i32", "strides": ("i32",) * len(args)},
            {
                "N": n, "K": k, "G": groups, "BLOCK_T": config.block_t, "BLOCK_N": config.block_n,
                "BLOCK_K": config.block_k, "GROUP_T": config.group_t, "SPLITS": config.splits, "PIECES": config.pieces,
                "SWAP": config.swap, "POLICY": KEEP.value if config.splits > 1 else "", "USE_TMA": config.use_tma,
                "USE_PDL": pdl,
                "EPILOGUE": plain if config.splits > 1 else RESIDUAL if groups == 1 else SWIGLU, **x_tiles,
            },
            config.num_warps,
            stages,
        )  # fmt: skip
    for groups, splits in ((1, 3), (2, 1)):
        block_t, block_n, num_warps = pointwise_block(n)
        args = ARGS[groups]
        yield Specialization(
            f"linear_epilogue-{groups}-{splits}",
            pointwise_kernel,
            {"acc": "fp32" if splits > 1 else "bf16", "out": "bf16", "args": args},
            {"num_tokens": "i32", "stride_o": "i32", "strides": ("i32",) * len(args)},
            {
                "N": n, "G": groups, "SPLITS": splits, "BLOCK_T": block_t, "BLOCK_N": block_n, "USE_PDL": pdl,
                "EPILOGUE": RESIDUAL if groups == 1 else SWIGLU,
            },
            num_warps,
            num_stages=3,
        )  # fmt: skip
    for tokens, width, centered in ((1, 4096, False), (8192, 2048, False), (64, 16384, True), (64, 20000, True)):
        block_t, block_k, num_warps = norm_block(tokens, width)
        yield Specialization(
            f"norm-{tokens}-{width}",
            norm_kernel,
            dict.fromkeys(("x", "weight", "bias", "y"), "bf16"),
            {"eps": "fp32", "num_tokens": "i32", "stride_x": "i32"},
            {
                "K": width, "BLOCK_T": block_t, "BLOCK_K": block_k, "CENTERED": centered, "PLUS_ONE": True,
                "USE_PDL": pdl and width <= MAX_DEPENDENT_K,
            },
            num_warps,
            num_stages=3,
        )  # fmt: skip
    for tokens, width, splits in ((64, 2048, 4), (64, 4096, 2), (8192, 16384, 1)):
        block_n, num_warps = sum_block(tokens, width)
        yield Specialization(
            f"sum_norm-{tokens}-{width}-{splits}",
            sum_norm_kernel,
            dict.fromkeys(("total", "y", "weight"), "bf16")
            | {"acc": "fp32" if splits > 1 else "bf16", "args": ("bf16",)},
            {"eps": "fp32", "num_tokens": "i32", "strides": ("i32",)},
            {
                "N": width, "G": 1, "SPLITS": splits, "BLOCK_N": block_n, "CENTERED": False, "PLUS_ONE": False,
                "EPILOGUE": RESIDUAL, "USE_PDL": pdl, "bias": None,
            },
            num_warps,
            num_stages=3,
        )  # fmt: skip
