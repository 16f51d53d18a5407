"""The large-M side of `linear`: its table, and real sizes on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusecomp.lowerings.linear import large, large_heuristics
from fusecomp.lowerings.linear.large_heuristics import LargeConfig, large_config, load_table
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS, Target
from tests.lowerings.linear_epilogues import EPILOGUES, make_args, norm_reference, reference, row_strides

ENTRIES = load_table("nvidia_h200")["entries"]
# The smallest shape of each committed way to run a kind of layer.
DISTINCT = {
    (entry["groups"], entry["kind"], str(entry["config"])): entry
    for entry in sorted(ENTRIES, key=lambda e: -e["n"] * e["k"] * e["tokens"])
}
EPILOGUE_OF = {"identity": "identity", "residual": "residual", "bias": "bias", "other": "swiglu"}


def choose(target: Target = SM90, **changes) -> LargeConfig:
    shape = {"n": 4096, "k": 4096, "groups": 1, "tokens": 256, "itemsize": 2, "kind": "residual", **changes}
    return large_config(target, **shape)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_every_shape_has_a_choice(target):
    for n, k, tokens, itemsize in itertools.product((1, 100, 4096, 128256), (64, 4096), (1, 130, 9000), (2, 4)):
        for kind, groups in (("identity", 1), ("residual", 1), ("bias", 1), ("other", 1), ("other", 2)):
            config = choose(target, n=n, k=k, groups=groups, tokens=tokens, itemsize=itemsize, kind=kind)
            assert config.method in large_heuristics.METHODS
            assert config.method != "cublas_addmm" or kind in ("residual", "bias")
            if config.method == "persistent":
                assert target.has_tma and itemsize == 2
                assert not (config.swap and groups == 2)
                stage = (config.block_t + groups * config.block_n) * config.block_k * itemsize
                assert (
                    config.num_stages * stage + 4 * config.block_t * config.block_n // config.pieces < target.smem_bytes
                )


def test_measured_shapes_get_their_own_entry():
    for entry in ENTRIES:
        shape = {key: entry[key] for key in ("n", "k", "groups", "tokens", "kind")}
        config = choose(**shape)
        measured = "us" in entry or {"step_us", "step_us_before", "step", "gpu"} <= entry.keys()
        assert config.source.endswith("(exact)" if measured else "(exact, not measured)")
        assert measured or "note" in entry, "where it was measured"
        assert config.constants() == LargeConfig(**entry["config"]).constants()
    assert choose(n=4095).source.endswith("(nearest)")
    assert choose(Target("Some GPU", "cuda", 90, SM90.smem_bytes, 100)).source.endswith("(nearest)")
    with pytest.raises(ValueError, match="kind"):
        choose(kind="unknown")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "entry", DISTINCT.values(), ids=lambda e: f"{e['groups']}x{e['n']}x{e['k']}-{e['kind']}-{e['tokens']}"
)
def test_committed_choices(entry):
    """At the entry's own and at an odd number of tokens, with a norm before; repeated launches agree bitwise."""
    name = EPILOGUE_OF[entry["kind"]]
    kernel, groups, _, hint = EPILOGUES[name]
    torch.manual_seed(0)
    n, k = entry["n"], entry["k"]
    weight = torch.randn(groups * n, k, dtype=torch.bfloat16, device="cuda") / k**0.5
    scale = torch.randn(k, dtype=torch.bfloat16, device="cuda")
    for tokens in (entry["tokens"], min(entry["tokens"], 1024) - 27):
        x = torch.randn(tokens, k + 64, dtype=torch.bfloat16, device="cuda")[:, :k]
        args = make_args(name, tokens, n, torch.bfloat16, "cuda", 8)

        def launch(x: torch.Tensor = x, args: tuple = args) -> torch.Tensor:
            return large.launch_large(
                x,
                weight,
                torch.bfloat16,
                "rms",
                scale,
                None,
                1e-6,
                False,
                kernel,
                args,
                row_strides(args),
                groups,
                hint,
            )

        found = launch()
        rows = slice(max(0, tokens - 300), tokens)
        args = tuple(arg[rows] if arg.dim() == 2 else arg for arg in args)
        normed = norm_reference(x[rows], scale, None, 1e-6, "rms", False)
        exact = norm_reference(x[rows].float(), scale, None, 1e-6, "rms", False) @ weight.float().t()
        unfused = relative_error(reference(name, normed @ weight.t(), args), reference(name, exact, args))
        assert relative_error(found[rows], reference(name, exact, args)) <= 1.5 * unfused
        for _ in range(10):
            assert torch.equal(found, launch())


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(EPILOGUES))
def test_tails_and_captures(name):
    """Shapes that TMA cannot read, by the library and by the kernel, and replays of a captured launch."""
    kernel, groups, _, hint = EPILOGUES[name]
    for n, k, tokens, config in (
        (1000, 777, 130, LargeConfig(block_n=64)),
        (1000, 777, 130, large_heuristics.PLAIN),
        (520, 1032, 257, LargeConfig(block_n=64)),
        (520, 1032, 257, LargeConfig(block_n=64, splits=3)),
    ):
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(groups * n, k, dtype=torch.bfloat16, device="cuda") / k**0.5
        args = make_args(name, tokens, n, torch.bfloat16, "cuda")
        rest = (weight, torch.bfloat16, kernel, args, row_strides(args), groups, hint)
        found = large.run_matmul(config, x, *rest)
        exact = reference(name, x.float() @ weight.float().t(), args)
        assert relative_error(found, exact) <= 1.5 * relative_error(reference(name, x @ weight.t(), args), exact)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = large.run_matmul(config, x, *rest)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(captured, large.run_matmul(config, x, *rest))
