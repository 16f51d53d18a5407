"""What `step_tune` tries: launches of linears, products of codes, attention and experts, and how they are in force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar
from unittest import mock

from benchmarks import quant_large, quant_tune
from benchmarks.linear_layers import Layer
from benchmarks.quant_schemes import quant_shape_of
from fusecomp.lowerings.experts import quant_routed
from fusecomp.lowerings.experts.heuristics import DigitTiles, ExpertsConfig, Tiles
from fusecomp.lowerings.linear import large_heuristics, lowering
from fusecomp.lowerings.linear.large_heuristics import LargeConfig
from fusecomp.lowerings.linear.skinny_heuristics import SkinnyConfig
from fusecomp.lowerings.paged_attention import heuristics
from fusecomp.lowerings.paged_attention.heuristics import DecodeConfig, Target
from fusecomp.lowerings.quant import activations
from fusecomp.lowerings.quant import lowering as quant_lowering
from fusecomp.lowerings.quant.heuristics import QuantConfig
from fusecomp.lowerings.quant.scaled_heuristics import LIBRARY, PERSISTENT, ScaledConfig, ScaledShape
from fusecomp.ops.experts import CodesShape
from fusecomp.ops.linear import LinearShape
from fusecomp.ops.quant_linear import QuantShape

Config = LargeConfig | ScaledConfig | QuantConfig | DecodeConfig | DigitTiles
Tile = TypeVar("Tile", LargeConfig, ScaledConfig)
ATTENTION, EXPERTS = "attention", "experts"  # which are no linears
Key = tuple[int, int, int, str] | str
MOST_PROGRAMS = 256  # of a launch whose warps are apart; where none loads a tile ahead, with those of unused splits
FEW_PAIRS = 64  # rows times kv heads up to which an attention launch leaves most of the GPU idle


def key_of(name: str, layer: Layer | None) -> Key:
    """What a choice is found by: the name of what is no linear."""
    return name if layer is None else (layer.n, layer.k, layer.groups, layer.kind)


def linear_candidates(layer: Layer, tokens: int, num_sms: int) -> Iterator[LargeConfig]:
    """Tiles with splits of K for about one program a multiprocessor, or two of those that leave room for two."""
    library = ["cublas"] + ["cublas_addmm"] * (layer.kind == "residual")
    yield from (LargeConfig(method=method) for method in library)
    for rows in _rows(tokens):
        stages = 1 if rows == 64 else 0
        tiles = [
            LargeConfig(block_t=rows, block_n=128, num_stages=6 + stages),
            LargeConfig(block_t=rows, block_n=128, num_stages=6 + stages, swap=True),
            LargeConfig(block_t=rows, block_n=128, num_warps=4, num_stages=3 + stages, per_sm=2),
            LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=6 + 2 * stages, pieces=1),
            LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=3 + 2 * stages, pieces=1, per_sm=2),
            LargeConfig(block_t=rows, block_n=128, block_k=128, num_stages=3, swap=True),
            LargeConfig(block_t=rows, block_n=64, block_k=128, num_warps=4, num_stages=4 + stages, pieces=1),
            LargeConfig(block_t=rows, block_n=128, block_k=128, num_warps=4, num_stages=3 + stages),
        ]
        if rows == 64:
            tiles.append(
                LargeConfig(block_t=64, block_n=32, block_k=128, num_warps=4, num_stages=4, pieces=1, per_sm=2)
            )
        if rows == 256:
            wide = LargeConfig(block_t=256, num_stages=4, pieces=8)
            tiles = [wide, replace(wide, swap=True), replace(wide, block_n=64, num_stages=5, pieces=4)]
        if layer.groups == 2:  # as many columns of each
            halves = [replace(tile, block_n=tile.block_n // 2) for tile in tiles if not tile.swap]
            tiles = [*halves, LargeConfig(block_t=rows, block_n=64, num_warps=4, num_stages=5 + stages)]
            if rows == 128:
                tiles.append(LargeConfig(num_stages=4, pieces=4))
        for tile in tiles:
            yield from _split(layer, tokens, tile, num_sms)


def _rows(tokens: int) -> tuple[int, ...]:
    """Tokens of a tile of which the last is at most half empty, or, of one tile, whatever."""
    if tokens <= 64:
        return (64,)
    return (128, 64) if tokens <= 128 else (64, 128, 256) if tokens <= 192 else (128, 256)


def _split(layer: Layer, tokens: int, tile: Tile, num_sms: int) -> Iterator[Tile]:
    count = math.ceil(tokens / tile.block_t) * math.ceil(layer.n / tile.block_n)
    most, steps = num_sms * tile.per_sm, layer.k // tile.block_k
    found = {1, most // count, most // count // 2} if count <= most and layer.groups == 1 else {1}
    for splits in sorted(found):
        if 0 < splits <= steps // 2 and count * splits >= 0.6 * num_sms:
            yield replace(tile, splits=splits)


def code_candidates(layer: Layer, tokens: int, num_sms: int) -> Iterator[ScaledConfig]:
    """Those of `quant_large` for products of codes, and narrow tiles of one warpgroup with splits of K."""
    yield from quant_large.candidates(layer, tokens, "fp8")
    g = layer.groups
    for rows in _rows(tokens):
        stages = 2 if rows == 64 else 0
        narrow = ScaledConfig(PERSISTENT, rows, 64 // g, num_warps=4, num_stages=6 + stages, pieces=1)
        tiles = [narrow, replace(narrow, num_stages=4, per_sm=2)]
        tiles.append(replace(narrow, block_k=256, num_stages=4 + stages))
        tiles.append(replace(narrow, block_n=128 // g, num_warps=8, num_stages=6, pieces=2, swap=g == 1))
        if rows == 64:
            tiles.append(replace(narrow, block_n=128 // g, num_stages=4, pieces=2, per_sm=2))
            tiles.append(replace(narrow, block_n=128 // g, block_k=256, num_stages=4, pieces=2))
            tiles.append(replace(narrow, block_n=32 // g, block_k=256, num_stages=4, per_sm=2))
        for tile in tiles:
            if tile.block_t <= 128:
                yield from _split(layer, tokens, tile, num_sms)


def weight_candidates(layer: Layer, tokens: int, scheme: str) -> Iterator[QuantConfig]:
    """Those of `quant_linear --tune`."""
    yield from quant_tune.candidates(quant_shape_of(scheme, layer), tokens)


def attention_candidates(committed: DecodeConfig, pairs: int, *, apart: bool = False) -> Iterator[DecodeConfig]:
    """Other tiles, with and without the first one read ahead; and of few rows, whose splits are many, other splits.

    Args:
        apart: the kernel whose warps are apart serves the shape; it is for few rows.
    """
    shapes = [(16, 1, 3), (16, 1, 4), (32, 1, 3), (32, 1, 4), (32, 2, 3), (64, 2, 3), (64, 4, 3)]
    ahead = [(32, 1, 2), (32, 2, 2), (64, 2, 2), (64, 4, 2), (128, 4, 2), (128, 8, 2)]
    for block_n, warps, stages in (*shapes, *ahead):
        splits = [committed.min_split]
        if pairs <= FEW_PAIRS:
            splits = [keys for keys in (32, 64, 128, 256) if block_n <= keys <= 4 * block_n]
        for least in splits:
            yield replace(
                committed, block_n=block_n, num_warps=warps, num_stages=stages, read_ahead=stages == 2,
                min_split=least, apart=0, source="",
            )  # fmt: skip
    if apart and pairs <= FEW_PAIRS:
        splits = max(1, min(32, MOST_PROGRAMS // pairs))
        for keys, warps, times in itertools.product((16, 32), (4, 8), (1, 2, 4)):
            tile = keys * warps
            yield DecodeConfig(tile, warps, 1, splits, times * tile, apart=keys)
    if apart and pairs <= MOST_PROGRAMS:  # splits as an engine for at most 2,048 tokens has them
        for warps, least in itertools.product((4, 8), (256, 1024, 2048)):
            yield DecodeConfig(16 * warps, warps, 2, 2048 // least, least, apart=16)


def digit_candidates(committed: DigitTiles) -> Iterator[DigitTiles]:
    """Other tiles of one projection or the other, then of both, of which up to three fit a multiprocessor."""
    ups = [(64, 256, 3), (64, 256, 4), (64, 128, 6), (128, 128, 3), (128, 128, 4), (128, 128, 5), (128, 256, 2)]
    downs = [(64, 128, 5), (64, 256, 4), (128, 64, 8), (128, 128, 3), (128, 128, 4), (128, 128, 5), (128, 256, 3)]
    up_tiles, down_tiles = ([Tiles(n, d, 4, stages, 0, True) for n, d, stages in tiles] for tiles in (ups, downs))
    yield from (replace(committed, up=up) for up in up_tiles)
    yield from (replace(committed, down=down) for down in down_tiles)
    yield from itertools.starmap(DigitTiles, itertools.product(up_tiles, down_tiles[3:5]))


@contextmanager
def chosen(configs: dict[Key, Config]) -> Iterator[None]:
    """Linears of these shapes run as said, and the attention of decodes and experts of codes, others as ever."""
    choose, large, decode = lowering.choose, large_heuristics.large_config, heuristics.decode_config
    scaled, quant = activations.scaled_config, quant_lowering.quant_config
    experts = quant_routed.quant_experts_config
    of_weights = {key[:3]: found for key, found in configs.items() if isinstance(found, QuantConfig)}

    def patched_choose(target: Target, shape: LinearShape, tokens: int) -> SkinnyConfig | LargeConfig:
        found = configs.get((shape.n, shape.k, shape.groups, shape.kind))
        return found if isinstance(found, LargeConfig) else choose(target, shape, tokens)

    def patched_large(target: Target, *, n: int, k: int, groups: int, kind: str, **sizes: int) -> LargeConfig:
        found = configs.get((n, k, groups, kind))
        return found if isinstance(found, LargeConfig) else large(target, n=n, k=k, groups=groups, kind=kind, **sizes)

    def patched_scaled(target: Target, shape: ScaledShape, tokens: int) -> ScaledConfig:
        found = configs.get((shape.n, shape.k, shape.groups, shape.epilogue))
        return found if isinstance(found, ScaledConfig) else scaled(target, shape, tokens)

    def patched_quant(target: Target, shape: QuantShape, tokens: int, held: bool = True) -> QuantConfig:
        return of_weights.get((shape.n, shape.k, shape.groups)) or quant(target, shape, tokens, held)

    def patched_decode(target: Target, **sizes: int) -> DecodeConfig:
        found = configs.get(ATTENTION)
        if isinstance(found, DecodeConfig) and (not found.apart or sizes.get("new_key")):
            return found
        return decode(target, **sizes)

    def patched_experts(target: Target, shape: CodesShape, tokens: int) -> ExpertsConfig:
        found, config = configs.get(EXPERTS), experts(target, shape, tokens)
        return replace(config, digits=found) if isinstance(found, DigitTiles) and config.digits else config

    with (
        mock.patch.object(quant_routed, "quant_experts_config", patched_experts),
        mock.patch.object(heuristics, "decode_config", patched_decode),
        mock.patch.object(lowering, "choose", patched_choose),
        mock.patch.object(large_heuristics, "large_config", patched_large),
        mock.patch.object(activations, "scaled_config", patched_scaled),
        mock.patch.object(quant_lowering, "quant_config", patched_quant),
    ):
        yield


def brief(config: Config) -> str:
    """A configuration in a few letters."""
    if isinstance(config, DecodeConfig):
        splits = f"s{config.num_splits} from {config.min_split}"
        options = " ahead" * config.read_ahead + f" apart {config.apart}" * bool(config.apart)
        return f"n{config.block_n} w{config.num_warps} st{config.num_stages} {splits}{options}"
    if isinstance(config, DigitTiles):
        return ", ".join(f"{t.block_n}x{t.block_d} w{t.num_warps} st{t.num_stages}" for t in (config.up, config.down))
    if isinstance(config, QuantConfig):
        tile = (
            f"{config.kernel} {config.block_t}x{config.block_r}x{config.block_k} s{config.splits} w{config.num_warps}"
        )
        options = "".join(f" {name}" for name in ("early", "sums", "halves", "use_tma") if getattr(config, name))
        return f"{tile} st{config.num_stages} p{config.parts} a{config.ahead}{options}"
    if config.method in (LIBRARY, "cublas", "cublas_addmm"):
        return config.method
    tile = f"{config.block_t}x{config.block_n}x{config.block_k} s{config.splits} w{config.num_warps}"
    options = " swap" * config.swap + f" x{config.per_sm}" * (config.per_sm > 1)
    if isinstance(config, ScaledConfig) and config.method != PERSISTENT:
        options += f" {config.method} ahead {config.ahead}"
    return f"{tile} st{config.num_stages}{options}"
