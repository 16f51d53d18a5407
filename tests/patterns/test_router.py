"""The router op against a naive one, and the pattern on routers of every kind: generated, and of every family.

Legend: T tokens, E experts, K chosen per token, G groups.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusecomp._compat import mark_unbacked
from fusecomp.capture import TRACE, Implementations
from fusecomp.ops import OPS, op_cost
from fusecomp.ops.router import (
    LOGITS,
    MAX,
    NONE,
    OVER_CHOSEN,
    SIGMOID,
    SOFTMAX,
    SPARSEMIXER,
    SUM,
    TOP2,
    RouteSpec,
    route_reference,
)
from fusecomp.patterns.router import Router
from fusecomp.testing.patterns import new_context, run_fused
from models.registry import FAMILIES, build, mixture


@st.composite
def routers(draw):
    """A router, its logits' shape and dtype, and whether it has a bias."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(2, 12)) if groups > 1 else draw(st.integers(2, 48))
    chosen = draw(st.integers(1, groups))
    kind = draw(st.sampled_from([SOFTMAX, SIGMOID, LOGITS, SPARSEMIXER]))
    k = draw(st.integers(1, min(8, chosen * experts // groups)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weights = draw(st.sampled_from(["float32", str(dtype).removeprefix("torch.")]))
    tokens, biased = draw(st.integers(1, 20)), kind in (SOFTMAX, SIGMOID) and draw(st.booleans())
    if kind == SPARSEMIXER:
        return RouteSpec(kind, min(k, 2), threshold=0.25, dtype=weights), tokens, experts, dtype, False
    if kind == LOGITS:
        return RouteSpec(kind, k, OVER_CHOSEN, dtype=weights), tokens, experts, dtype, False
    spec = RouteSpec(
        kind, k, draw(st.sampled_from([NONE, SUM])), groups=groups, groups_chosen=chosen,
        group_score=draw(st.sampled_from([MAX, TOP2])), scale=draw(st.sampled_from([1.0, 2.5])), dtype=weights,
    )  # fmt: skip
    return spec, tokens, experts, dtype, biased


def inputs(tokens, experts, dtype, biased, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).to(dtype)
    return logits, (0.3 * torch.randn(experts, generator=generator)).to(dtype) if biased else None


def naive(row, bias, spec):
    """Weight of each expert that one token chooses, in Python's floats."""
    if spec.kind == SPARSEMIXER:
        left, weights = dict(enumerate(row)), {}
        for _ in range(spec.k):
            top = max(left, key=left.get)
            near = [e for e, z in left.items() if (left[top] - z) / max(abs(z), left[top]) <= spec.threshold]
            weights[top] = 1 / sum(math.exp(left[e] - left[top]) for e in near)
            del left[top]
        return weights
    if spec.kind == SOFTMAX:
        total = sum(math.exp(z - max(row)) for z in row)
        scores = [math.exp(z - max(row)) / total for z in row]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in row] if spec.kind == SIGMOID else list(row)
    choice = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(row) // spec.groups
    taken = 1 if spec.group_score == MAX else 2
    rank = {g: sum(sorted(choice[g * size : (g + 1) * size])[-taken:]) for g in range(spec.groups)}
    alive = sorted(rank, key=rank.get)[-spec.groups_chosen :]
    ids = sorted((e for e in range(len(row)) if e // size in alive), key=lambda e: choice[e])[-spec.k :]
    total = sum(scores[e] for e in ids)
    if spec.normalise == OVER_CHOSEN:
        return {e: math.exp(scores[e]) / sum(math.exp(scores[i]) for i in ids) for e in ids}
    return {e: spec.scale * scores[e] / (total if spec.normalise == SUM else 1) for e in ids}


def distinct(logits):
    """Rows whose logits all differ: equal ones may be taken in any order."""
    return [i for i, row in enumerate(logits.tolist()) if len(set(row)) == len(row)]


@settings(deadline=None, max_examples=80)
@given(routers(), st.integers(0, 1000))
def test_reference_is_the_naive_router(case, seed):
    spec, tokens, experts, dtype, biased = case
    logits, bias = inputs(tokens, experts, dtype, biased, seed)
    ids, weights = route_reference(logits.double(), None if bias is None else bias.double(), spec.to_text())
    assert ids.dtype == torch.int64 and weights.dtype == getattr(torch, spec.dtype)
    assert ids.shape == weights.shape == (tokens, spec.k)
    eps = torch.finfo(weights.dtype).eps
    for i in distinct(logits):
        expected = naive(logits[i].double().tolist(), None if bias is None else bias.double().tolist(), spec)
        assert dict(zip(ids[i].tolist(), weights[i].tolist(), strict=True)) == pytest.approx(expected, rel=2 * eps)


def test_sums_are_kept_away_from_zero():
    logits = torch.full((1, 4), -60.0, dtype=torch.float64)
    weights = {
        (eps, floor): route_reference(
            logits, None, RouteSpec(SIGMOID, 2, SUM, eps, floor, dtype="float64").to_text()
        )[1].sum().item()
        for eps, floor in [(0.0, 0.0), (1e-20, 0.0), (0.0, 1e-12)]
    }  # fmt: skip
    total = 2 / (1 + math.exp(60))
    assert weights == pytest.approx(
        {(0.0, 0.0): 1.0, (1e-20, 0.0): total / (total + 1e-20), (0.0, 1e-12): total / 1e-12}
    )


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = torch.nan
    for kind in (SOFTMAX, SIGMOID, SPARSEMIXER):
        ids, weights = route_reference(logits, None, RouteSpec(kind, 2, threshold=0.02).to_text())
        assert weights[[0, 2]].isfinite().all() and weights[1].isnan().any()
        assert ((ids >= 0) & (ids < 8)).all()


def test_cost_reads_logits_and_writes_ids_and_weights():
    text = RouteSpec(SOFTMAX, 3, dtype="bfloat16").to_text()
    assert op_cost("route", (torch.empty(1, 9), None, text)).at(10, 1, 1) == (10 * (9 * 4 + 3 * (8 + 2)), 10 * 9)


def spelled(spec):
    """The router as a model would write it."""

    def sparse(left, z):
        top, index = left.max(dim=-1, keepdim=True)
        hidden = ((top - z) / z.abs().clamp(min=top)) > spec.threshold
        return left.masked_fill(hidden, float("-inf")).softmax(-1).gather(-1, index), index

    def route(logits, bias):
        z = logits.float()
        if spec.kind == SPARSEMIXER:
            weights, index = sparse(logits, logits)
            if spec.k == 2:
                second, other = sparse(logits.scatter(-1, index, float("-inf")), logits)
                weights, index = torch.cat((weights, second), -1), torch.cat((index, other), -1)
            return weights.to(getattr(torch, spec.dtype)), index
        scores = {SOFTMAX: lambda: z.softmax(-1), SIGMOID: z.sigmoid, LOGITS: lambda: z}[spec.kind]()
        choice = scores if bias is None else scores + bias
        if spec.groups > 1:
            by_group = choice.view(-1, spec.groups, choice.shape[1] // spec.groups)
            value = by_group.max(-1).values if spec.group_score == MAX else by_group.topk(2, dim=-1)[0].sum(-1)
            mask = torch.zeros_like(value)
            mask.scatter_(1, value.topk(spec.groups_chosen, dim=-1, sorted=False)[1], 1)
            mask = mask.unsqueeze(-1).expand(by_group.shape).reshape(choice.shape)
            choice = choice.masked_fill(~mask.bool(), float("-inf"))
        index = choice.topk(spec.k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, index)
        if spec.normalise == SUM:
            weights /= weights.sum(-1, keepdim=True)
        if spec.normalise == OVER_CHOSEN:
            weights = weights.softmax(-1)
        return (weights * spec.scale).to(getattr(torch, spec.dtype)), index

    return route


def route_nodes(graph):
    return [node for node in graph.nodes if node.target is OPS.route.default]


@settings(deadline=None, max_examples=12)
@given(routers(), st.booleans())
def test_any_router_is_recognised_and_chooses_the_same_experts(case, dynamic):
    spec, tokens, experts, dtype, biased = case
    tokens = max(tokens, 2)
    logits, bias = inputs(tokens, experts, dtype, biased)
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(s, generator=generator) for s in ((tokens, 4), (experts, 6, 4), (experts, 4, 3)))
    route, context, graphs = spelled(spec), new_context(), []

    def function(logits, bias, x, up, down):
        torch._check(logits.shape[0] == x.shape[0])
        weights, index = route(logits, bias)
        return OPS.experts(x, index, weights, up, None, down, None, "silu", True, False, False)

    if dynamic:
        mark_unbacked(logits, 0)
        mark_unbacked(x, 0)

    def rewrite(gm):
        Router().apply(gm, context)
        graphs.append(gm.graph)

    run_fused(function, (logits, bias, x, up, down), rewrite)
    assert context.report.count("router") == 1, context.report.summary()
    (node,) = route_nodes(graphs[0])
    ids, weights = route_reference(logits, bias, node.args[2])
    expected_weights, expected = route(logits, bias)
    assert weights.dtype == expected_weights.dtype
    assert (node.args[1] is not None) == biased
    order, wanted = ids.sort(-1), expected.sort(-1)
    rows = distinct(logits)
    assert torch.equal(order.values[rows], wanted.values[rows])
    got, exact = (w.gather(1, o.indices)[rows] for w, o in ((weights, order), (expected_weights, wanted)))
    eps = torch.finfo(weights.dtype if spec.kind != SPARSEMIXER else dtype).eps
    torch.testing.assert_close(got.float(), exact.float(), rtol=4 * eps, atol=1e-6)


EXPECTED = {
    "qwen3-moe": "9 experts, softmax -> top-3, renormalised, {} weights",
    "mixtral": "5 experts, softmax -> top-2, renormalised, float32 weights",
    "qwen2-moe": "9 experts, softmax -> top-3, {} weights",
    "olmoe": "12 experts, softmax -> top-8, {} weights",
    "deepseek-v2": "12 experts, softmax -> 2 of 3 groups by max -> top-3, scaled by 1.5, float32 weights",
    "deepseek-v3": "12 experts, sigmoid -> 2 of 3 groups by top2 -> top-3, renormalised, scaled by 1.5, "
    "float32 weights, chosen with a bias",
    "glm4-moe": "10 experts, sigmoid -> 1 of 2 groups by top2 -> top-4, renormalised, scaled by 1.25, "
    "float32 weights, chosen with a bias",
    "gpt-oss": "5 experts, top-2 -> softmax, {} weights",
    "phimoe": "6 experts, sparsemixer top-2, {} weights",
    "granitemoe": "7 experts, top-1 -> softmax, {} weights",
    "ernie4.5-moe": "8 experts, softmax -> top-3, renormalised, {} weights, chosen with a bias",
}

RAW = ("llama4", "aria")  # their experts are recognised in the graph of a whole step; see the compiled families


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_familys_router(name, dtype):
    """Hugging Face's own module, for any number of tokens; the experts that it chooses to the bit."""
    assert {name for name, family in FAMILIES.items() if "experts" in family.expected_matches} == {*EXPECTED, *RAW}
    model = build(name, dtype)
    block = mixture(model.model.layers[0])
    x = torch.randn(1, 23, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark_unbacked(x, 1)
    context, graphs = new_context(), []

    def function(x):
        torch._check(x.shape[1] > 0)
        out = block(x)
        return out[0] if isinstance(out, tuple) else out

    def rewrite(gm):
        Router().apply(gm, context)
        graphs.append(gm.graph)

    with Implementations(model).use(TRACE):
        got, _ = run_fused(function, (x,), rewrite)
        with torch.no_grad():
            expected = function(x)
    assert [match.detail for match in context.report.matches] == [EXPECTED[name].format(str(dtype)[6:])]
    assert len(route_nodes(graphs[0])) == 1 and not any("topk" in str(n.target) for n in graphs[0].nodes)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - expected).norm() <= limit * expected.norm()
