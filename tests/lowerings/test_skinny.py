"""The skinny matmul: its configurations, and, on a GPU, real sizes and races."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusecomp.lowerings.aot import compile_one
from fusecomp.lowerings.device import device_target
from fusecomp.lowerings.linear import skinny_heuristics
from fusecomp.lowerings.linear.skinny import run_skinny
from fusecomp.lowerings.linear.skinny_aot import specialization
from fusecomp.lowerings.linear.skinny_heuristics import MAX_SPLITS, load_table, skinny_config
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS, Target
from tests.lowerings.linear_cases import EPILOGUES, Linear


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_configuration(target):
    sizes = (1, 48, 1000, 4096, 128256)
    for n, k, groups, tokens, itemsize in itertools.product(sizes, sizes, (1, 2), (1, 2, 16, 17, 500), (2, 4)):
        config = skinny_config(target, n=n, k=k, groups=groups, tokens=tokens, itemsize=itemsize)
        assert (config.kernel == "vector") == (tokens == 1) == (config.block_t == 1)
        assert 1 <= config.splits <= MAX_SPLITS
        assert config.block_r % groups == 0
        for size in (config.block_r, config.block_k):
            assert size & (size - 1) == 0
        if config.num_stages > 1:
            assert config.num_stages * config.block_r * config.block_k * itemsize <= target.smem_bytes


def test_source_says_whether_the_entry_was_tuned_for_the_shape():
    for entry in load_table(SM90.table)["skinny"]:
        shape = {"k": entry["k"], "groups": entry["groups"], "tokens": entry["tokens"], "itemsize": entry["itemsize"]}
        n = entry["rows"] // entry["groups"]
        exact = skinny_config(SM90, n=n, **shape)
        assert exact.source.endswith("(exact)")
        assert exact.splits == entry["config"].get("splits", 1)
        assert skinny_config(SM90, n=n + 16, **shape).source.endswith("(nearest)")
        other = Target("Some GPU", "cuda", 90, SM90.smem_bytes, 100)
        assert skinny_config(other, n=n, **shape).source.endswith("(nearest)")


def test_splits_follow_the_gpu():
    large = Target("Some GPU", "cuda", 90, SM90.smem_bytes, 2 * SM90.num_sms)
    shape = {"n": 4096, "k": 4096, "groups": 1, "tokens": 16, "itemsize": 2}
    assert skinny_config(large, **shape).splits > skinny_config(SM90, **shape).splits
    assert skinny_config(SM90, **{**shape, "n": 1 << 20}).splits == 1
    assert skinny_config(SM90, **{**shape, "k": 64}).splits == 1


@pytest.mark.parametrize(("tokens", "first_load"), [(1, "ld.global"), (8, "cp.async"), (32, "cp.async")])
def test_weights_are_asked_for_before_the_wait(tokens, first_load):
    """Under dependent launch; it is Triton's pipeline that puts the copies there."""
    spec = specialization(SM90, 14336, 4096, 2, tokens, "bf16", norm=2)
    assert spec.constants.get("EARLY", True)
    ptx = compile_one(spec, "sm_90")[1].asm["ptx"]
    assert 0 < ptx.index(first_load) < ptx.index("griddepcontrol.wait")
    assert ptx.count("griddepcontrol.wait") == 1
    assert "st.global" not in ptx[: ptx.index("griddepcontrol.wait")]


def launch(layer: Linear, use_pdl: bool = True, out: torch.Tensor | None = None) -> torch.Tensor:
    """The layer with the configuration that the heuristic chooses."""
    tokens, k = layer.x.shape
    n = layer.weight.shape[0] // layer.epilogue.groups
    config = skinny_config(
        device_target(0), n=n, k=k, groups=layer.epilogue.groups, tokens=tokens, itemsize=layer.x.element_size()
    )
    if out is None:
        out = torch.full((tokens, n), float("nan"), dtype=layer.x.dtype, device="cuda")
    run_skinny(config, layer.x, layer.weight, out, *layer.call, use_pdl)
    return out


@pytest.mark.gpu
def test_tuned_configurations():
    """Every committed entry at its own shape, with and without norm, at the fewest and most tokens of its bucket."""
    for entry in load_table(device_target(0).table)["skinny"]:
        groups, bucket = entry["groups"], entry["tokens"]
        dtype = torch.bfloat16 if entry["itemsize"] == 2 else torch.float32
        for tokens, norm in {(bucket, "weight"), (max(1, bucket // 2 + 1), "none")}:
            layer = Linear.random(
                tokens, entry["rows"] // groups, entry["k"], norm=norm, dtype=dtype, device="cuda",
                epilogue="swiglu" if groups == 2 else "residual",
            )  # fmt: skip
            layer.assert_accurate(launch(layer))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epilogue", [*EPILOGUES])
def test_odd_sizes(epilogue, dtype):
    sizes = [(100, 72), (4097, 2056), (50, 5000)]
    for (n, k), tokens, norm in itertools.product(sizes, (1, 3, 17, 70), ("none", "unit", "weight", "plus one")):
        layer = Linear.random(tokens, n, k, epilogue=epilogue, norm=norm, dtype=dtype, device="cuda")
        layer.assert_accurate(launch(layer))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
def test_dependent_launches_do_not_race(tokens):
    """A chain under dependent launch, whose launches share scratch and counters, equals the ordered one bitwise."""
    hidden, layers = 2048, 12
    chain = [
        Linear.random(tokens, hidden, hidden, norm="weight", epilogue="residual", dtype=torch.bfloat16, device="cuda",
                      seed=i)
        for i in range(layers)
    ]  # fmt: skip
    start = chain[0].x.clone().contiguous()
    buffers = [torch.empty_like(start) for _ in range(2)]

    def run(use_pdl: bool) -> torch.Tensor:
        x = start
        for i, layer in enumerate(chain):
            layer.x, out = x, buffers[i % 2]
            x = launch(layer, use_pdl, out)
        return x

    expected = run(False).clone()
    run(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(True)
    for _ in range(300):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


def test_tables_name_their_gpu():
    assert load_table("no such gpu")["gpu"] == skinny_heuristics.load_table(SM90.table)["gpu"] == "NVIDIA H200"
