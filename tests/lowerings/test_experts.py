"""The experts op: its reference against a naive loop, its configurations, and its kernels on a GPU.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import moe
from benchmarks.moe_tune import frames
from fusecomp.lowerings.experts.heuristics import METHODS, VECTOR_ELEMENTS, ExpertsConfig, experts_config, load_table
from fusecomp.lowerings.experts.launch import Experts
from fusecomp.lowerings.experts.lowering import launch_experts, supports
from fusecomp.lowerings.paged_attention.heuristics import SM90, TARGETS, Target
from fusecomp.ops import take_fallbacks
from fusecomp.ops.experts import ACTIVATIONS, Activation, experts_reference
from tests.lowerings.experts_cases import FORMS, GPT_OSS, ROUTINGS, check_contract, make_layer, naive, routings

forms = pytest.mark.parametrize("form", FORMS)


class TestReference:
    @forms
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_is_the_naive_loop(self, form, routing):
        layer = make_layer(9, 2, 4, dtype=torch.float64, index=routings(9, 2, 4)[routing], **FORMS[form])
        # The op sums in fp32 whatever the dtype of its inputs.
        torch.testing.assert_close(layer.run(experts_reference), naive(layer), rtol=1e-6, atol=1e-6)

    @settings(max_examples=60)
    @given(
        T=st.integers(1, 12), E=st.integers(1, 6), C=st.integers(1, 9), width=st.integers(1, 9),
        act=st.sampled_from([*sorted(ACTIVATIONS), GPT_OSS]), gated=st.booleans(), interleaved=st.booleans(),
        transposed=st.booleans(), bias=st.booleans(), data=st.data(),
    )  # fmt: skip
    def test_any_shape(self, T, E, C, width, act, gated, interleaved, transposed, bias, data):
        K = data.draw(st.integers(1, E))
        ids = data.draw(st.lists(st.integers(0, E), min_size=T * K, max_size=T * K))
        layer = make_layer(
            T, K, E, C, width, act=act, gated=gated or act == GPT_OSS, interleaved=interleaved, transposed=transposed,
            bias=bias, index=torch.tensor(ids).view(T, K),
        )  # fmt: skip
        torch.testing.assert_close(layer.run(experts_reference), naive(layer).float(), rtol=1e-4, atol=1e-5)

    def test_one_token(self):
        layer = make_layer(1, 4, 4)
        torch.testing.assert_close(layer.run(experts_reference), naive(layer).float())

    def test_a_token_does_not_depend_on_the_others_beyond_rounding(self):
        layer = make_layer(12, 2, 4)
        half = replace(layer, x=layer.x[:5], top_k_index=layer.top_k_index[:5], top_k_weights=layer.top_k_weights[:5])
        torch.testing.assert_close(half.run(experts_reference), layer.run(experts_reference)[:5])

    @forms
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_numerics_contract(self, form, dtype):
        check_contract(make_layer(64, 2, 8, 64, 48, dtype=dtype, **FORMS[form]), experts_reference)


class TestActivation:
    @pytest.mark.parametrize("text", ["", "swish", "gpt_oss", "gpt_oss()", "gpt_oss(1)", "gpt_oss(a,7)", "gpt_oss(1,2"])
    def test_unknown_text_is_refused_with_what_is_known(self, text):
        with pytest.raises(ValueError, match=r"none of gelu.*gpt_oss\(alpha,limit\)"):
            Activation.parse(text, True)

    @pytest.mark.parametrize(
        ("text", "gated"), [("gpt_oss(1.7,7)", False), ("gpt_oss(1,0)", True), ("gpt_oss(1,-2)", True)]
    )
    def test_what_gpt_oss_needs(self, text, gated):
        with pytest.raises(ValueError, match="positive limit"):
            Activation.parse(text, gated)

    def test_numbers(self):
        assert Activation.parse("gpt_oss(1.702, 7)", True) == Activation("gpt_oss", 1.702, 7.0)
        assert Activation.parse("silu", False) == Activation("silu")


class TestConfiguration:
    @pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
    def test_every_shape_has_one(self, target):
        sizes = ((8, 2, 4096, 14336), (128, 8, 2048, 768), (512, 22, 2048, 512), (1, 1, 16, 16), (32, 4, 2880, 2880))
        for (e, k, c, f), tokens, itemsize in itertools.product(sizes, (1, 2, 7, 64, 500, 8192, 65536), (2, 4)):
            config = experts_config(target, experts=e, top_k=k, hidden=c, width=f, tokens=tokens, itemsize=itemsize)
            assert config.method in METHODS
            if config.method == "vector":
                down, lanes = config.down, 1 << (k - 1).bit_length()
                assert tokens <= 4 or tokens * k <= 8  # what was measured, and fp32
                assert lanes * down.block_n * down.block_d <= VECTOR_ELEMENTS * 32 * down.num_warps
            transposed = experts_config(
                target, experts=e, top_k=k, hidden=c, width=f, tokens=tokens, itemsize=itemsize, transposed=True
            )
            assert transposed.method == "grouped" and not (transposed.up.use_tma or transposed.down.use_tma)
            for tiles in (config.up, config.down):
                assert tiles.block_n & (tiles.block_n - 1) == 0 and tiles.block_n >= 1
                assert target.has_tma or not tiles.use_tma
                if config.method == "grouped":
                    need = tiles.num_stages * (tiles.block_n + config.block_t) * tiles.block_d * itemsize
                    assert need <= target.smem_bytes

    def test_source_says_whether_the_entry_was_tuned_for_the_shape(self):
        for entry in load_table(SM90.table)["entries"]:
            shape = {key: entry[key] for key in ("experts", "top_k", "hidden", "width", "tokens")}
            exact = experts_config(SM90, itemsize=2, **shape).source
            assert "(exact" in exact and ("not measured" in exact) == ("us" not in entry)
            other = Target("Some GPU", "cuda", 90, SM90.smem_bytes, 100)
            assert experts_config(other, itemsize=2, **shape).source.count("(nearest") == 1
            shape["hidden"] += 16
            assert experts_config(SM90, itemsize=2, **shape).source.count("(nearest") == 1


class TestBenchmark:
    @pytest.mark.parametrize("peer", [moe.grouped_mm, moe.batched_mm, lambda *a: moe.expert_loop(*a, torch.bfloat16)])
    def test_peers_compute_the_op(self, peer):
        layer = make_layer(20, 2, 8, 64, 48, dtype=torch.bfloat16)
        weights = Experts(layer.up, None, layer.down, None, Activation("silu"), True, False, False)
        out = peer(layer.x, layer.top_k_index, layer.top_k_weights, weights)
        torch.testing.assert_close(out, layer.run(experts_reference), rtol=3e-2, atol=3e-2)

    def test_what_is_tried_includes_the_method_of_the_table(self):
        for entry in load_table(SM90.table)["entries"]:
            config = ExpertsConfig.from_entry(entry["config"])
            tried = [f for f, _, _ in frames(entry["top_k"], entry["experts"], entry["width"], entry["tokens"])]
            assert (config.method, config.block_t, config.swap) in {(f.method, f.block_t, f.swap) for f in tried}

    def test_a_written_table_keeps_what_was_not_tuned(self, tmp_path):
        entries = load_table(SM90.table)["entries"]
        tuned = {**entries[0], "us": 12.3}
        moe.write_table(tmp_path / "table.json", {"gpu": SM90.name}, [tuned])
        written = json.loads((tmp_path / "table.json").read_text())
        assert written["gpu"] == SM90.name and len(written["entries"]) == len(entries)
        assert tuned in written["entries"] and all(e in written["entries"] for e in entries[1:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.double(), "none of fp32, fp16, bf16"),
        (lambda t: t.to(torch.bfloat16) if t.dim() == 3 else t, "activations are torch.float32"),
        (lambda t: t.mT.contiguous().mT if t.dim() == 3 else t, "not contiguous"),
    ],
)
def test_what_the_kernels_refuse_falls_back_and_is_counted(change, reason):
    layer = make_layer().map(change)
    assert reason in supports(layer.x, layer.up, layer.up_bias, layer.down, layer.down_bias)
    if layer.x.dtype == layer.up.dtype:
        take_fallbacks()
        torch.testing.assert_close(layer.run(launch_experts), layer.run(experts_reference))
        ((op, why),) = take_fallbacks()
        assert op == "experts" and reason in why


TOKENS = [1, 7, 64, 300]


@pytest.mark.gpu
class TestOnAGPU:
    @forms
    @pytest.mark.parametrize("T", TOKENS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_numerics_contract(self, form, T, dtype):
        take_fallbacks()
        check_contract(make_layer(T, 2, 8, 64, 48, dtype=dtype, device="cuda", **FORMS[form]), launch_experts)
        check_contract(make_layer(T, 3, 8, 200, 72, dtype=dtype, device="cuda", **FORMS[form]), launch_experts)
        assert take_fallbacks() == {}

    @forms
    @pytest.mark.parametrize("T", TOKENS)
    def test_fp32(self, form, T):
        layer = make_layer(T, 2, 8, 64, 48, device="cuda", **FORMS[form])
        exact = naive(layer.map(lambda t: t.cpu())).float().cuda()
        torch.testing.assert_close(layer.run(launch_experts), exact, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("T", TOKENS)
    def test_routing(self, routing, T):
        index = routings(T, 2, 8)[routing]
        layer = make_layer(T, 2, 8, 32, 48, dtype=torch.bfloat16, device="cuda", index=index, bias=True)
        out = layer.run(launch_experts)
        torch.testing.assert_close(out, layer.run(experts_reference), rtol=2e-2, atol=2e-2)
        assert (out[(layer.top_k_index == 8).all(1)] == 0).all()

    @pytest.mark.parametrize("T", TOKENS)
    def test_repeats_bitwise(self, T):
        layer = make_layer(T, 8, 128, 256, 96, dtype=torch.bfloat16, device="cuda")
        first = layer.run(launch_experts)
        assert all(torch.equal(layer.run(launch_experts), first) for _ in range(20))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("T", TOKENS)
    def test_one_graph_serves_any_routing(self, dtype, T):
        """Captured on one routing and replayed on others, sentinels and idle experts included."""
        layer = make_layer(T, 2, 8, 64, 48, dtype=dtype, device="cuda", bias=True)
        layer.run(launch_experts)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.run(launch_experts)
        for seed, index in enumerate(routings(T, 2, 8).values()):
            layer.top_k_index.copy_(index)
            layer.x.copy_(torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(out, layer.run(launch_experts))
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(out, layer.run(experts_reference), rtol=tolerance, atol=tolerance)
        assert take_fallbacks() == {}
