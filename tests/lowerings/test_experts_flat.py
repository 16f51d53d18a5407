"""Many rows: what the compiler makes of the experts' kernels whose loop over tiles is fused with that over columns."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from benchmarks.moe_tune import frames
from fusecomp.lowerings.aot import compile_one
from fusecomp.lowerings.experts import experts_aot, lowering
from fusecomp.lowerings.experts.experts_aot import Shape, specializations
from fusecomp.lowerings.experts.grouped import down_kernel, up_kernel
from fusecomp.lowerings.experts.heuristics import ExpertsConfig, Tiles, fit_tiles
from fusecomp.lowerings.experts.launch import is_flat, reads_tokens
from fusecomp.lowerings.experts.lowering import launch_experts
from fusecomp.lowerings.machine_code import waits_for_each_product
from fusecomp.lowerings.paged_attention.heuristics import SM80, SM90
from tests.lowerings.experts_cases import ROUTINGS, check_contract, make_layer, routings

QWEN3 = Shape(128, 8, 2048, 768, 8192)
UP = Tiles(256, 64, 8, 4, 1, use_tma=True, flat=True, pieces=2)
DOWN = replace(UP, tokens_tma=True, pieces=4)
CONFIG = ExpertsConfig("grouped", UP, DOWN, 128, False, 16)
KERNELS = pytest.mark.parametrize("kernel", [up_kernel, down_kernel], ids=["up", "down"])


@pytest.fixture
def compiled(monkeypatch):
    def compile_for_sm90(kernel, shape: Shape = QWEN3, config: ExpertsConfig = CONFIG):
        monkeypatch.setattr(experts_aot, "config_of", lambda *_: config)
        spec = next(s for s in specializations(SM90, shape) if s.kernel is kernel)
        return compile_one(spec, "sm_90")

    return compile_for_sm90


@KERNELS
def test_one_loop_whose_products_overlap_copies(compiled, kernel):
    resources, code = compiled(kernel)
    assert resources.spills == 0 and resources.shared_bytes <= resources.shared_limit
    ttgir = code.asm["ttgir"]
    assert ttgir.count("scf.for") == 1 and "pendings = 1" in ttgir
    assert not waits_for_each_product(code)
    assert f"<{UP.num_stages}x128x64x" in ttgir  # all stages of tokens
    copied = ttgir.count("ttg.async_copy_global_to_local"), ttgir.count("ttng.async_tma_copy_global_to_local")
    assert copied == ((UP.num_stages, UP.num_stages) if kernel is up_kernel else (0, 2 * DOWN.num_stages))


@KERNELS
def test_all_steps_of_a_tile_read_its_own_expert(compiled, kernel):
    """What is carried between tiles is, in a fused loop, that of the next tile from the second step on.

    So where weights are read comes from the conditional part that begins a tile, not from the loop's own arguments.
    """
    ttgir = compiled(kernel)[1].asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    (expert, block) = re.search(r"async_tma_copy_global_to_local %w_tiles\S*\[(%[\w#]+), (%[\w#]+), ", loop).groups()
    while product := re.search(rf"{re.escape(expert)} = arith\.muli (%[\w#]+), %c2_i32", loop):
        expert = product[1]
    for value in (expert, block):
        assert re.search(rf"{re.escape(value.split('#')[0])}:\d+ = scf\.if", loop), (
            f"{value} is not of the tile's begin"
        )


def test_who_reads_tokens_by_tma_and_fuses_loops():
    assert reads_tokens(DOWN, 1536, False, 0) and is_flat(DOWN, True, False, 0)
    assert not reads_tokens(UP, 1536, False, 0)
    assert not reads_tokens(DOWN, 1544, False, 0)  # rows that TMA does not read
    assert not reads_tokens(DOWN, 1536, True, 0) and not is_flat(DOWN, True, True, 0)  # codes
    assert not reads_tokens(DOWN, 1536, False, 6) and not is_flat(DOWN, True, False, 6)  # tiles that are waited for
    assert not is_flat(DOWN, False, False, 0)


def test_a_finished_tile_has_room_beside_the_stages():
    assert fit_tiles(UP, 128, SM90, 2) == UP and fit_tiles(DOWN, 128, SM90, 2) == DOWN
    assert fit_tiles(replace(DOWN, pieces=1), 128, SM90, 2).num_stages == 3
    plain = fit_tiles(DOWN, 128, SM80, 2)
    assert not (plain.use_tma or plain.tokens_tma or plain.flat)


def test_tuning_tries_it_for_many_rows():
    for tokens in (2048, 8192):
        tried = [(c.block_t, ups, downs) for c, ups, downs in frames(8, 128, 768, tokens)]
        assert any(block_t == 128 and UP in ups and DOWN in downs for block_t, ups, downs in tried)
    assert not any(t.flat for _, ups, downs in frames(8, 128, 768, 64) for t in (*ups, *downs))


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("block_t", [64, 128])
def test_on_a_gpu(routing, block_t, monkeypatch):
    """More tiles than programs, so that what a program carries from one to the next matters; no two calls differ."""
    index = routings(3000, 2, 8)[routing]
    layer = make_layer(3000, 2, 8, 1032, 392, dtype=torch.bfloat16, device="cuda", index=index, bias=True)
    wanted = layer.run(launch_experts)
    monkeypatch.setattr(lowering, "experts_config", lambda *_, **__: replace(CONFIG, block_t=block_t, group_t=4))
    found = layer.run(launch_experts)
    some = slice(0, 300)
    part = replace(layer, x=layer.x[some], top_k_index=layer.top_k_index[some], top_k_weights=layer.top_k_weights[some])
    check_contract(part, lambda *_: found[some])
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert all(torch.equal(layer.run(launch_experts), found) for _ in range(20))
