"""Mixtures of experts without an experts interface: every form at every size, HF's own, and what is refused."""

import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fusecomp._compat import mark_unbacked
from fusecomp.ops import OPS
from fusecomp.ops.experts import ACTIVATIONS
from fusecomp.patterns.base import count_ops
from fusecomp.patterns.dataflow import Dataflow
from fusecomp.patterns.expert_weights import layouts
from fusecomp.patterns.raw_moe import RawExperts
from fusecomp.patterns.raw_moe_examples import FORMS, TRACED_IN_BF16, Sizes, Weights, activation, chosen, drawn
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import flat, new_context, run_rewritten
from models.registry import build, mixture

EXPERTS = OPS.experts.default


class Mixture(nn.Module):
    """A layer with a router and experts, computed by one of the forms, as people write their own."""

    def __init__(self, form, sizes, act="silu", *, interleaved=False, skew=0.0, dtype=torch.float32):
        super().__init__()
        _, *tensors = drawn(sizes, dtype)
        self.names = ["router", "up", "down", "up_bias", "down_bias"][: len(tensors)]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor))
        self.form, self.sizes = form, sizes
        self.act = activation(act, sizes, interleaved)
        self.skew = nn.Buffer(skew * torch.arange(sizes.experts).to(dtype))

    def forward(self, hidden):
        x = hidden.view(-1, hidden.shape[-1])
        weights = Weights(*(getattr(self, name) for name in self.names))
        scores = (F.linear(x, weights.router) + self.skew).float().softmax(-1)
        top, index = scores.topk(self.sizes.top_k, dim=-1)
        return self.form(x, index, top, weights, self.act, self.sizes.transposed).view(hidden.shape)


def hidden_states(tokens, sizes, dtype=torch.float32, seed=1):
    x = torch.randn(1, tokens, sizes.hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mark_unbacked(x, 1)
    return x


def rewritten(module, x):
    """The output after the pattern, its report, and the graph."""
    context = new_context()
    output, gm = run_rewritten(module, (x,), lambda gm: RawExperts().apply(gm, context))
    return output, context.report, gm


def refused(module, x):
    """The only reason for which nothing matches; the graph is left as it was."""
    output, report, gm = rewritten(module, x)
    assert report.count("raw_experts") == 0
    assert not any(node.target is EXPERTS for node in gm.graph.nodes)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)
    (miss,) = report.near_misses
    return miss.reason


@pytest.mark.parametrize("name", FORMS)
def test_one_graph_serves_any_number_of_tokens(name):
    dtype = torch.bfloat16 if name in TRACED_IN_BF16 else torch.float32
    tolerance = {"rtol": 0.02, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    sizes = Sizes()
    module, graphs, context = Mixture(FORMS[name], sizes, dtype=dtype), [], new_context()

    def backend(gm, _):
        RawExperts().apply(gm, context)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    step = torch.compile(module, backend=backend, fullgraph=True)
    with torch.no_grad():
        for tokens in (9, 1, 40):
            x = hidden_states(tokens, sizes, dtype)
            torch.testing.assert_close(step(x), module(x), **tolerance)
    assert len(graphs) == 1 and context.report.counts() == {"raw_experts": 1}
    left = count_ops(graphs[0].graph)
    assert left["experts.default"] == left["linear"] == left["topk"] == 1
    assert not left.keys() & {"bmm", "matmul", "einsum", "_grouped_mm", "argsort", "sort", "one_hot", "scatter_"}


@given(
    name=st.sampled_from(sorted(set(FORMS) - set(TRACED_IN_BF16))),
    tokens=st.integers(1, 20),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden=st.sampled_from([8, 24]),
    inner=st.sampled_from([4, 12, 24]),
    gated=st.booleans(),
    bias=st.booleans(),
    transposed=st.booleans(),
    act=st.sampled_from(sorted(ACTIVATIONS)),
    interleaved=st.booleans(),
    skew=st.sampled_from([0.0, 30.0]),
)
@settings(max_examples=40)
def test_forms_at_every_size(
    name, tokens, experts, top_k, hidden, inner, gated, bias, transposed, act, interleaved, skew
):
    sizes = Sizes(tokens, experts, min(top_k, experts), hidden, inner, gated, bias and name != "one_hot", transposed)
    module = Mixture(FORMS[name], sizes, act, interleaved=interleaved and gated, skew=skew)
    x = hidden_states(tokens, sizes)
    output, report, _ = rewritten(module, x)
    assert report.counts() == {"raw_experts": 1}, report.near_misses
    assert report.near_misses == []
    (detail,) = (match.detail for match in report.matches)
    assert detail == f"{experts} experts, top-{sizes.top_k}, {act}{' gated' if gated else ''}"
    with torch.no_grad():
        assert relative_error(output, module.double()(x.double()).float()) < 2e-6


def test_wide_experts_are_proven_narrow():
    sizes = Sizes(experts=4, hidden=512, inner=384, bias=True)
    for name in ("batched", "dense", "einsums"):
        output, report, _ = rewritten(module := Mixture(FORMS[name], sizes), x := hidden_states(5, sizes))
        assert report.counts() == {"raw_experts": 1}, report.near_misses
        with torch.no_grad():
            assert relative_error(output, module(x)) < 2e-6


def test_narrow_proofs_see_what_only_some_features_do():
    """A slice that is none at the sizes of the proof must not pass."""
    sizes = Sizes(experts=4, hidden=512, inner=384)

    def form(x, index, scores, w, act, transposed):
        first = FORMS["batched"](x, index, scores, w, act, transposed)
        return first + 0 * x

    def sliced(x, index, scores, w, act, transposed):
        def some(h):
            h = act(h)
            return torch.cat([h[..., :100], 0 * h[..., 100:]], -1)

        return FORMS["batched"](x, index, scores, w, some, transposed)

    assert "shape" in refused(Mixture(sliced, sizes), hidden_states(5, sizes))
    output, report, _ = rewritten(module := Mixture(form, sizes), x := hidden_states(5, sizes))
    assert report.count("raw_experts") == 1
    with torch.no_grad():
        torch.testing.assert_close(output, module(x))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "granitemoe", "olmoe"])
def test_hugging_faces_own_forms(name, implementation):
    """As they are traced for experts that have no interface: sentinels' masks, dead writes and all."""
    model = build(name)
    block = mixture(model.model.layers[0])
    model.set_experts_implementation(implementation)
    x = torch.randn(1, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    mark_unbacked(x, 1)
    output, report, _ = rewritten(block, x)
    assert report.counts() == {"raw_experts": 1} and report.near_misses == []
    with torch.no_grad():
        got, wanted = ((o[0] if isinstance(o, tuple) else o) for o in (output, block(x)))
    assert relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize(
    ("family", "block", "config", "detail"),
    [
        ("llama4", "Llama4TextMoe", {"num_local_experts": 4}, "4 experts, top-1, silu gated, weights on its input"),
        ("aria", "AriaTextMoELayer", {"moe_num_experts": 4, "moe_topk": 2}, "4 experts, top-2, silu gated"),
        ("jetmoe", "JetMoeMoE", {"num_local_experts": 4, "num_experts_per_tok": 2}, "4 experts, top-2, silu gated"),
    ],
)
def test_families_without_an_interface(family, block, config, detail):
    """Two of them cut sorted tokens at places that depend on the routing: sizes unknown before a run."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layer = getattr(module, block)
    config_class = inspect.get_annotations(layer.__init__).get("config") or module.Llama4TextConfig
    made = layer(config_class(hidden_size=32, intermediate_size=24, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    x = torch.randn(1, 11, 32, generator=generator)
    mark_unbacked(x, 1)
    output, report, gm = rewritten(made, x)
    assert [match.detail for match in report.matches] == [detail] and report.near_misses == []
    assert not {"item", "tolist", "bmm", "index_add", "split"} & count_ops(gm.graph).keys()
    with torch.no_grad():
        for got, wanted in zip(flat(output), flat(made(x)), strict=True):
            assert relative_error(got, wanted) < 2e-6


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class ModuleListMixture(nn.Module):
    """Every expert is a module, and sees every token."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(16, 3), nn.ModuleList(Expert() for _ in range(3))

    def forward(self, hidden):
        index, scores = chosen(hidden.view(-1, 16), self.router.weight, 2)
        out = torch.zeros_like(hidden.view(-1, 16))
        for i, expert in enumerate(self.experts):
            out += expert(hidden.view(-1, 16)) * (scores * (index == i)).sum(-1, keepdim=True)
        return out.view(hidden.shape)


def test_separate_weights_are_refused_and_named():
    reason = refused(ModuleListMixture(), hidden_states(5, Sizes()))
    assert reason == "experts.0 to 2 have weights of their own, which would have to be stacked"


def test_wider_arithmetic_is_kept():
    def in_fp32(x, index, scores, w, act, transposed):
        wide = Weights(*(None if t is None else t.float() for t in (w.router, w.up, w.down)))
        return FORMS["batched"](x.float(), index, scores, wide, act, transposed).to(x.dtype)

    sizes = Sizes()
    module = Mixture(in_fp32, sizes, dtype=torch.bfloat16)
    assert "float32, its up weight bfloat16" in refused(module, hidden_states(5, sizes, torch.bfloat16))


def test_indices_that_are_given_may_repeat():
    """Spreading weights by scatter counts a repeated expert once, adding counts it twice."""
    sizes, context = Sizes(), new_context()
    x, _, up, down = drawn(sizes)
    index, scores = torch.tensor([[1, 1]] * sizes.tokens), torch.rand(sizes.tokens, 2)
    act = activation("silu", sizes)

    def function(name):
        return lambda x, up, down, index, scores: FORMS[name](x[0], index, scores, Weights(up, up, down), act, False)

    for name, matches in (("dense", 0), ("batched", 1)):
        context = new_context()
        inputs = (x, up, down, index, scores)
        output, _ = run_rewritten(function(name), inputs, lambda gm, context=context: RawExperts().apply(gm, context))
        assert context.report.count("raw_experts") == matches
        torch.testing.assert_close(output, function(name)(*inputs))


def test_a_matrix_of_weights_and_biases_in_the_product():
    """Softmax over logits that are hidden for all but the chosen: there is no [T, K] of weights to find."""

    def form(x, index, scores, w, act, transposed):
        logits = F.linear(x, w.router)
        kept = torch.full_like(logits, -torch.inf).scatter(1, logits.topk(2, dim=-1).indices, 0.0)
        matrix = (logits + kept).softmax(-1)
        tokens = x[None].expand(len(w.up), -1, -1)
        up = torch.baddbmm(w.up_bias[:, None], tokens, w.up.transpose(1, 2))
        down = torch.baddbmm(w.down_bias[:, None], act(up), w.down.transpose(1, 2))
        return torch.einsum("eto,te->to", down, matrix)

    sizes = Sizes(bias=True)
    output, report, gm = rewritten(module := Mixture(form, sizes), x := hidden_states(5, sizes))
    assert report.counts() == {"raw_experts": 1}, report.near_misses
    assert count_ops(gm.graph)["gather"] == 1
    with torch.no_grad():
        torch.testing.assert_close(output, module(x))


def test_the_sum_may_be_read_by_another_name():
    """`out.index_add_` as a statement: `out` is what is read, and what is added to it later stays."""

    def form(x, index, scores, w, act, transposed):
        ids, rows = index.flatten(), x.repeat_interleave(index.shape[1], 0)
        up = torch.bmm(w.up[ids], rows[..., None]).squeeze(-1)
        parts = torch.bmm(w.down[ids], act(up)[..., None]).squeeze(-1) * scores.flatten()[:, None]
        out = torch.zeros_like(x)
        out.index_add_(0, torch.arange(len(x)).repeat_interleave(index.shape[1]), parts)
        out.add_(x)
        return out

    sizes = Sizes()
    output, report, _ = rewritten(module := Mixture(form, sizes), x := hidden_states(5, sizes))
    assert report.counts() == {"raw_experts": 1}, report.near_misses
    with torch.no_grad():
        torch.testing.assert_close(output, module(x))


def test_a_write_is_a_dependency():
    def function(x):
        out = torch.zeros_like(x)
        view = out.view(-1)
        out.add_(x)
        return view * 2

    seen = []
    run_rewritten(function, (torch.randn(2, 3),), seen.append)
    graph = seen[0].graph
    add, double = (
        next(n for n in graph.nodes if getattr(n.target, "__name__", n.target) == name) for name in ("add_", "mul")
    )
    flow = Dataflow(graph)
    assert add in flow.sources(double) and double in flow.descendants(add)


def test_layouts_of_square_weights_are_ambiguous():
    assert [layout.transposed for layout in layouts((4, 8, 8), (4, 8, 8), 8)] == [
        (True, True), (False, False), (True, False), (False, True),
    ]  # fmt: skip
    assert [layout.transposed for layout in layouts((4, 48, 8), (4, 8, 24), 8)] == [(False, False)]
    assert layouts((4, 48, 8), (5, 8, 24), 8) == [] == layouts((4, 47, 8), (4, 8, 24), 8)
