"""The experts' kernels under Triton's interpreter. `tests/lowerings/test_interpreted.py` runs this file.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp.lowerings.experts import grouped, lowering, routing
from fusecomp.lowerings.experts import launch as launches
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles
from fusecomp.lowerings.experts.lowering import launch_experts
from fusecomp.lowerings.experts.routing import HEADER, TILE, launch_routing
from fusecomp.lowerings.paged_attention.heuristics import SM90
from fusecomp.ops.experts import ACTIVATIONS
from tests.lowerings.experts_cases import FORMS, GPT_OSS, ROUTINGS, check_contract, make_layer, naive, routings
from tests.lowerings.interpreted.bfloat16 import multiply_bfloat16, round_to_nearest
from tests.lowerings.searches import SETTINGS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


multiply_bfloat16()
round_to_nearest()


VECTOR = ExpertsConfig("vector", Tiles(8, 32), Tiles(4, 32))
IN_TURN = ExpertsConfig("vector", Tiles(8, 8), Tiles(4, 8))  # more than `AHEAD` tiles from 33 columns on
GROUPED = ExpertsConfig("grouped", Tiles(16, 16), Tiles(16, 16), 16)
SWAPPED = ExpertsConfig("grouped", Tiles(32, 32, per_sm=1), Tiles(16, 32), 8, swap=True, group_t=2)
BY_TMA = ExpertsConfig("grouped", Tiles(32, 32, use_tma=True), Tiles(16, 32, use_tma=True), 16)
# Each program takes several tiles in turn, and none signals; both operands by TMA, or tokens of the up projection not.
FLAT = ExpertsConfig(
    "grouped", Tiles(32, 32, per_sm=1, use_tma=True, flat=True, pieces=2),
    Tiles(64, 16, per_sm=1, use_tma=True, tokens_tma=True, flat=True, pieces=4), 16, group_t=2,
)  # fmt: skip
TOKENS_BY_TMA = replace(FLAT, up=Tiles(16, 16), down=Tiles(16, 32, per_sm=1, tokens_tma=True), group_t=1)
CONFIGS = {
    "vector": VECTOR, "in turn": IN_TURN, "grouped": GROUPED, "swapped": SWAPPED, "tma": BY_TMA, "flat": FLAT,
    "tokens by tma": TOKENS_BY_TMA,
}  # fmt: skip


def launch(layer, config: ExpertsConfig) -> torch.Tensor:
    """One call with this configuration; the down projection waits for tiles, as under dependent launch.

    Where its programs are persistent it does not, and there are fewer of them than tiles.
    """

    def signalled(config: ExpertsConfig, routed: int, rows: int, pdl: bool) -> int:
        return 0 if config.down.tokens_tma else -(-rows // config.up.block_n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "experts_config", lambda *_, **__: config)
        patch.setattr(launches, "signalled_blocks", signalled)
        patch.setattr(launches, "target_of", lambda _: replace(SM90, num_sms=3))
        return layer.run(launch_experts)


def run(layer, config: ExpertsConfig) -> torch.Tensor:
    """One call, checked against the definition."""
    out = launch(layer, config)
    if layer.x.dtype == torch.float32:
        torch.testing.assert_close(out, naive(layer).float(), rtol=1e-4, atol=1e-5)
    elif layer.residual is not None or (layer.top_k_index < len(layer.up)).any():
        check_contract(layer, lambda *_: out)
    else:
        assert (out == 0).all()
    return out


@settings(SETTINGS, max_examples=16)
@given(st.data(), st.sampled_from([1, 5, 40, 150]), st.sampled_from([1, 3, 8, 40, 130]), st.sampled_from([8, 16]))
def test_plan(data, T, E, block_t):
    """Tiles cover the rows in stable order of experts, each of one expert; sentinels are in none, by either way."""
    K = data.draw(st.integers(1, 4))
    few = data.draw(st.integers(0, E))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    index = torch.randint(E - few, E + 1, (T, K), generator=generator)
    index = index.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(routing, "SINGLE_LAUNCH_ROWS", 0)
            patch.setattr(routing, "CHUNK", data.draw(st.sampled_from([32, 128])))
        plan, capacity = launch_routing(index, E, block_t, False)
    flat = index.flatten().long()
    order = flat.argsort(stable=True).tolist()
    tiles, rows, starts, begin = [], [], [], 0
    for expert, count in enumerate(torch.bincount(flat, minlength=E + 1).tolist()):
        starts.append(len(tiles))
        for first in range(begin, begin + count, block_t):
            tiles.append([expert, first])
            found = order[first : min(first + block_t, begin + count)]
            rows.append(found + [-1] * (block_t - len(found)))
        begin += count
    del tiles[starts[E] :], rows[starts[E] :]
    assert plan[0] == len(tiles) <= capacity
    assert plan[HEADER : HEADER + TILE * len(tiles)].view(-1, TILE).tolist() == tiles
    placed, counts = plan[HEADER + TILE * capacity :].split([block_t * capacity, capacity])
    assert placed.view(capacity, block_t)[: len(tiles)].tolist() == rows
    assert not counts[: len(tiles)].any()


@st.composite
def layers(draw, tokens: st.SearchStrategy[int], transposed: st.SearchStrategy[bool]):
    T, E = draw(tokens), draw(st.integers(1, 9))
    K = draw(st.integers(1, min(E, 4)))
    act = draw(st.sampled_from([*sorted(ACTIVATIONS), GPT_OSS]))
    lo, hi = draw(st.sampled_from([(0, E - 1), (0, E), (0, 0), (E - 1, E), (E, E)]))
    index = torch.randint(lo, hi + 1, (T, K), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    C, width = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    return make_layer(
        T, K, E, C, width, act=act, gated=act == GPT_OSS or draw(st.booleans()),
        interleaved=draw(st.booleans()), transposed=draw(transposed), bias=draw(st.booleans()),
        residual=draw(st.booleans()), index=index,
        dtype=draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 9)),
    )  # fmt: skip


@settings(SETTINGS, max_examples=20)
@given(layers(st.integers(1, 3), st.just(False)), st.sampled_from([VECTOR, IN_TURN]))
def test_vector(layer, config):
    run(layer, config)


@settings(SETTINGS, max_examples=30)
@given(layers(st.integers(1, 40), st.booleans()), st.sampled_from([GROUPED, SWAPPED, FLAT, TOKENS_BY_TMA]))
def test_grouped(layer, config):
    run(layer, config)


@settings(SETTINGS, max_examples=12)
@given(st.data(), st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([FLAT, TOKENS_BY_TMA]))
def test_hidden_rows_by_tma(data, dtype, config):
    """Blocks of hidden rows reach into the next expert's, past the last row, and into what sentinels leave NaN."""
    E, T, K = data.draw(st.integers(2, 6)), data.draw(st.integers(9, 40)), data.draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    index = torch.randint(data.draw(st.integers(0, 1)), E + data.draw(st.integers(0, 1)), (T, K), generator=generator)
    C, width = data.draw(st.sampled_from([8, 40, 72])), data.draw(st.sampled_from([8, 24, 40]))
    layer = make_layer(T, K, E, C, width, gated=data.draw(st.booleans()), index=index, dtype=dtype)
    described = []

    def launch_described(kernel, grid, *args, **options):
        if kernel is grouped.down_kernel:
            described.append((args[1] is not None, options["FLAT"]))
        real(kernel, grid, *args, **options)

    real = launches.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "launch", launch_described)
        run(layer, config)
    assert described == [(True, config is FLAT)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("form", "routing"), [*((form, "sentinels") for form in FORMS), *(("plain", routing) for routing in ROUTINGS)]
)
def test_forms(form, routing, config):
    index = routings(5, 2, 8)[routing]
    layer = make_layer(5, 2, 8, 40, 48, index=index, dtype=torch.bfloat16, **FORMS[form])
    if layer.transposed and CONFIGS[config].method == "vector":
        with pytest.raises(ValueError, match="transposed"):
            launch(layer, CONFIGS[config])
        return
    out = run(layer, CONFIGS[config])
    nothing = (index == 8).all(1)
    assert torch.equal(
        out[nothing], torch.zeros_like(out[nothing]) if layer.residual is None else layer.residual[nothing]
    )
    if routing == "random":
        assert torch.equal(launch(layer, CONFIGS[config]), out)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_committed_choice(T, dtype):
    layer = make_layer(T, 4, 8, 32, 24, dtype=dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(layer.run(launch_experts), naive(layer).float(), rtol=1e-4, atol=1e-5)
    else:
        check_contract(layer, launch_experts)


def test_strided_inputs():
    layer = make_layer(5, 2, 4, 32, 24)
    wide = torch.full((5, 40), float("nan"))
    wide[:, :32] = layer.x

    for config in (GROUPED, VECTOR):
        run(replace(layer, x=wide[:, :32]), config)
        run(replace(layer, residual=wide[:, :32]), config)
