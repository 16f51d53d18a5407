"""The experts op: its reference against a naive loop, its grouped-matmul lowering against the reference.

Legend: T tokens, K experts per token, E experts, C hidden size, F expert intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusecomp.lowerings.experts import lowering
from fusecomp.lowerings.experts.lowering import experts_dense, launch_experts, supports
from fusecomp.ops import take_fallbacks
from fusecomp.ops.experts import ACTIVATIONS, experts_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What low-precision GEMMs may add to an unfused computation in the same precision, as for every kernel.
CONTRACT = 1.5


@dataclass(frozen=True)
class Layer:
    """The arguments of the op, in its order."""

    x: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    act: str
    gated: bool
    interleaved: bool
    transposed: bool

    def run(self, function) -> Tensor:
        return function(*(getattr(self, f.name) for f in fields(self)))

    def map(self, change) -> Layer:
        """With `change` applied to each floating-point tensor."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: change(v) for k, v in tensors.items() if isinstance(v, Tensor) and v.is_floating_point()}
        )


def make_layer(
    T=7, K=2, E=4, C=16, width=24, *, act="silu", gated=True, interleaved=False, transposed=False, bias=False,
    index=None, dtype=torch.float32, device="cpu", seed=0,
) -> Layer:  # fmt: skip
    """Distinct experts per token, positive weights that sum to 1. Made on the CPU: the same values on every device."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = 2 * width if gated else width
    up, down = randn(E, rows, C) / C**0.5, randn(E, C, width) / width**0.5
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    chosen = torch.rand(T, E, generator=g).argsort(1)[:, :K] if index is None else index
    layer = Layer(
        randn(T, C), chosen.to(device), torch.rand(T, K, generator=g, dtype=torch.float64).softmax(1), up,
        randn(E, rows) / 4 if bias else None, down, randn(E, C) / 4 if bias else None,
        act, gated, interleaved, transposed,
    )  # fmt: skip
    return layer.map(lambda t: t.to(device, dtype))


def naive(layer: Layer, dtype: torch.dtype = torch.float64) -> Tensor:
    """One token and one expert at a time, every operation in `dtype`, straight from the definition."""
    wide = layer.map(lambda t: t.to(dtype))
    experts = len(wide.up)
    out = torch.zeros_like(wide.x)
    for t, token in enumerate(wide.x):
        for k, e in enumerate(wide.top_k_index[t].tolist()):
            if e == experts:
                continue
            up, down = (w.mT if wide.transposed else w for w in (wide.up[e], wide.down[e]))
            hidden = up @ token + (0 if wide.up_bias is None else wide.up_bias[e])
            if wide.gated and wide.interleaved:
                hidden = ACTIVATIONS[wide.act](hidden[0::2]) * hidden[1::2]
            elif wide.gated:
                half = len(hidden) // 2
                hidden = ACTIVATIONS[wide.act](hidden[:half]) * hidden[half:]
            else:
                hidden = ACTIVATIONS[wide.act](hidden)
            result = down @ hidden + (0 if wide.down_bias is None else wide.down_bias[e])
            out[t] += wide.top_k_weights[t, k] * result
    return out


def hf_style(layer: Layer) -> Tensor:
    """As Hugging Face's eager experts: per expert in the model's dtype, accumulated by index_add in that dtype."""
    out = torch.zeros_like(layer.x)
    for e in range(len(layer.up)):
        token, k = torch.where(layer.top_k_index == e)
        up, down = (w.mT if layer.transposed else w for w in (layer.up[e], layer.down[e]))
        hidden = F.linear(layer.x[token], up, None if layer.up_bias is None else layer.up_bias[e])
        if layer.gated:
            gate, hidden = (hidden[:, ::2], hidden[:, 1::2]) if layer.interleaved else hidden.chunk(2, -1)
            hidden = ACTIVATIONS[layer.act](gate) * hidden
        else:
            hidden = ACTIVATIONS[layer.act](hidden)
        result = F.linear(hidden, down, None if layer.down_bias is None else layer.down_bias[e])
        out.index_add_(0, token, result * layer.top_k_weights[token, k, None])
    return out


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def check_contract(layer: Layer, function) -> None:
    exact = naive(layer.map(lambda t: t.cpu()) if layer.x.is_cuda else layer).to(layer.x.device)
    out = layer.run(function)
    assert out.dtype == layer.x.dtype and out.shape == layer.x.shape
    assert relative_rms(out, exact) <= CONTRACT * relative_rms(hf_style(layer), exact)


def routings(T: int, K: int, E: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    random = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    return {
        "random": random,
        "sentinels": torch.where(torch.rand(T, K, generator=generator) < 0.5, E, random),
        "only sentinels": torch.full((T, K), E),
        "one expert": torch.arange(K).expand(T, K).contiguous(),  # the others get nothing
        "last experts": torch.arange(E - K, E).expand(T, K).contiguous(),
    }


ROUTINGS = list(routings(1, 2, 4))
FORMS = {
    "plain": {},
    "not gated": {"gated": False, "act": "relu2"},
    "interleaved": {"interleaved": True, "act": "gelu"},
    "transposed": {"transposed": True, "act": "gelu_tanh"},
    "biases": {"bias": True, "act": "relu"},
    "gpt-oss": {"bias": True, "interleaved": True, "transposed": True},
}
forms = pytest.mark.parametrize("form", FORMS)


class TestReference:
    @forms
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_is_the_naive_loop(self, form, routing):
        layer = make_layer(9, 2, 4, dtype=torch.float64, index=routings(9, 2, 4)[routing], **FORMS[form])
        # The op sums in fp32 whatever the dtype of its inputs.
        torch.testing.assert_close(layer.run(experts_reference), naive(layer), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.run(experts_dense), naive(layer), rtol=1e-6, atol=1e-6)

    @settings(max_examples=60)
    @given(
        T=st.integers(1, 12), E=st.integers(1, 6), C=st.integers(1, 9), width=st.integers(1, 9),
        act=st.sampled_from(sorted(ACTIVATIONS)), gated=st.booleans(), interleaved=st.booleans(),
        transposed=st.booleans(), bias=st.booleans(), data=st.data(),
    )  # fmt: skip
    def test_any_shape(self, T, E, C, width, act, gated, interleaved, transposed, bias, data):
        K = data.draw(st.integers(1, E))
        ids = data.draw(st.lists(st.integers(0, E), min_size=T * K, max_size=T * K))
        layer = make_layer(
            T, K, E, C, width, act=act, gated=gated, interleaved=interleaved, transposed=transposed, bias=bias,
            index=torch.tensor(ids).view(T, K),
        )  # fmt: skip
        expected = naive(layer).float()
        torch.testing.assert_close(layer.run(experts_reference), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.run(experts_dense), expected, rtol=1e-4, atol=1e-5)

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
        layer = make_layer(64, 2, 8, 64, 48, dtype=dtype, **FORMS[form])
        check_contract(layer, experts_reference)
        check_contract(layer, experts_dense)


@pytest.mark.parametrize("device", DEVICES)
class TestGroupedMatmul:
    """On the CPU torch computes the same grouped matmul by a loop, so the sorting around it is tested there too."""

    @forms
    @pytest.mark.parametrize("T", [1, 7, 64, 300])
    def test_numerics_contract(self, device, form, T):
        check_contract(make_layer(T, 2, 8, 64, 48, dtype=torch.bfloat16, device=device, **FORMS[form]), launch_experts)
        assert take_fallbacks() == {}

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("T", [1, 7, 64, 300])
    def test_routing(self, device, routing, T):
        index = routings(T, 2, 8)[routing]
        layer = make_layer(T, 2, 8, 32, 48, dtype=torch.bfloat16, device=device, index=index, bias=True)
        out = layer.run(launch_experts)
        close = {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(out, layer.run(experts_reference), **close)
        assert (out[(layer.top_k_index == 8).all(1)] == 0).all()

    def test_rows_of_sentinels_are_never_read(self, device, monkeypatch):
        """The grouped matmul leaves them unwritten: here they are NaN."""
        real = torch._grouped_mm

        def poisoned(x, weight, offs):
            out = real(x, weight, offs=offs)
            out[int(offs[-1]) :] = float("nan")
            return out

        monkeypatch.setattr(torch, "_grouped_mm", poisoned)
        index = routings(20, 2, 8)["sentinels"]
        layer = make_layer(20, 2, 8, 32, 48, dtype=torch.bfloat16, device=device, index=index)
        assert (index == 8).any() and layer.run(launch_experts).isfinite().all()

    def test_repeats_bitwise(self, device):
        layer = make_layer(64, 2, 8, 32, 48, dtype=torch.bfloat16, device=device)
        first = layer.run(launch_experts)
        assert all(torch.equal(layer.run(launch_experts), first) for _ in range(3))

    @pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"dtype": torch.float16}, {"width": 20}], ids=str)
    @pytest.mark.parametrize("limit", [0, lowering.DENSE_TOKENS])
    def test_what_it_refuses_falls_back_and_is_counted(self, device, change, limit, monkeypatch):
        monkeypatch.setattr(lowering, "DENSE_TOKENS", limit)
        layer = make_layer(**{"dtype": torch.bfloat16, "width": 24, **change}, device=device)
        reason = supports(layer.x, layer.up, layer.down)
        take_fallbacks()
        out = layer.run(launch_experts)
        assert take_fallbacks() == {("experts", reason): 1}
        tolerance = 1e-5 if layer.x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, layer.run(experts_reference), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 7, 64, 300])
def test_one_graph_serves_any_routing(dtype, T):
    """Captured on one routing and replayed on others, sentinels and idle experts included."""
    layer = make_layer(T, 2, 8, 64, 48, dtype=dtype, device="cuda", bias=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.run(launch_experts)
    torch.cuda.current_stream().wait_stream(stream)
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
    take_fallbacks()
