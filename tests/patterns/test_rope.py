"""The rope pattern over the registry's families and over generated layers, and the code Inductor makes of it."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusecomp.ops.rope import Rope
from fusecomp.patterns.rope import RopeAttention
from fusecomp.patterns.rope_examples import every_two, inputs, layer, rotate_half
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.verify import relative_error
from fusecomp.testing.patterns import new_context, run_fused
from models.registry import FAMILIES, build
from tests.serving import CONFIG, VARIANTS, hf_greedy, model, serve, tokens

# Each rule in fp32, whose tokens are compared, and one with and one without norms in bf16.
RULES = [
    rule
    if rule.values[1] == torch.float32 or rule.values[0] in ("llama", "qwen3")
    else pytest.param(*rule.values, marks=pytest.mark.slow)
    for rule in VARIANTS
]
FUSED = CONFIG.replace(enforce_eager=False, fuse="always", disabled_patterns=("linear", "norm", "merged_linear"))


@pytest.mark.parametrize(("name", "dtype"), RULES, ids=lambda value: str(value).removeprefix("torch."))
def test_every_layer_of_a_family_matches(name, dtype, without_codegen):
    family, params = FAMILIES[name], SamplingParams(temperature=0, max_tokens=6)
    engine = Engine(build(name, dtype), FUSED)
    details = [m.detail for m in engine.report.matches if m.pattern == "rope_attention"]
    norm = "rms eps 1e-06, " if "qwen3" in name else ""
    assert details == [f"{norm}half rotation of 32 of 32 dims"] * family.layers
    assert [m for m in engine.report.near_misses if m.pattern == "rope_attention"] == []
    if dtype == torch.float32:
        prompts = [tokens(model(name).config.vocab_size, length, length) for length in (1, 9, 40)]
        served = serve(engine, [(prompt, params) for prompt in prompts])
        assert [got.token_ids for got in served] == [hf_greedy(model(name), p, 6).token_ids for p in prompts]


def test_kv_is_written_in_place():
    """The generated code hands the op its own input, allocates no tensor of that rank and copies nothing."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        engine, code = run_and_get_code(Engine, build("llama"), FUSED)
    layers = [source for source in code if "rope_attention.default(" in source]
    assert len(layers) == 2, "one kind of piece up to the first attention, one between attentions"
    for source in layers:
        (call,) = re.findall(r"rope_attention\.default\((.+)\)\n", source)
        inputs_of_rank = {
            name
            for name, sizes in re.findall(r"assert_size_stride\((arg\d+_1), \(([^)]*)\)", source)
            if sizes.count(",") == 4
        }
        assert len(inputs_of_rank & set(re.findall(r"\barg\d+_1\b", call))) == 1, "the KV tensor is not an input"
        assert "cache_write" not in source and "paged_attention.default" not in source
        assert not re.search(r"\.copy_\(|clone", source)
        allocated = re.findall(r"empty_strided_\w+\(\(([^)]*)\)", source)
        assert not [shape for shape in allocated if shape.count(",") == 4]
    assert engine.report.count("rope_attention") == 3


@st.composite
def rules(draw):
    """A rule, heads and a way to spell them."""
    head_dim = draw(st.sampled_from([6, 8, 16]))
    style = draw(st.sampled_from(["half", "interleaved", "none"]))
    norm = draw(st.sampled_from(["none", "rms", "rms+1"]))
    eps = draw(st.sampled_from([1e-6, 1e-5, 0.25])) if norm != "none" else 0.0
    dims = 2 * draw(st.integers(1, head_dim // 2)) if style != "none" else 0
    table = draw(st.sampled_from(["full", "pairs"])) if dims else "full"
    heads = draw(st.sampled_from([(1, 1), (4, 1), (6, 3), (2, 2)]))
    spelling = {
        "tokens_first": draw(st.booleans()),  # rotate [1, T, N, D], as GPT-J does
        "fp32": draw(st.booleans()),
        "root": draw(st.booleans()),  # x / sqrt(...), not x * rsqrt(...)
        "weighted": draw(st.booleans()) or norm == "rms+1",
    }
    return Rope(style, dims, table, norm, eps), head_dim, heads, spelling


def spelled(rope: Rope, spelling: dict, change: str = ""):
    """`rotate` for `layer`, in the given spelling; `change` breaks the rule in one place."""

    def rotate(x, cos, sin, weight):
        dtype = x.dtype
        if spelling["tokens_first"]:
            x = x.transpose(1, 2)
        if spelling["fp32"]:
            x, cos, sin = x.float(), cos.float(), sin.float()
        if rope.norm != "none":
            square = x.pow(2).mean(-1, keepdim=True) + rope.eps * (3 if change == "eps" else 1)
            x = x / square.sqrt() if spelling["root"] else x * torch.rsqrt(square)
            if spelling["weighted"]:
                x = x * (1 + weight if rope.norm == "rms+1" else weight)
        if rope.dims:
            if rope.table == "pairs":
                wide = (
                    (lambda t: torch.cat([t, t], -1))
                    if rope.style == "half"
                    else (lambda t: t.repeat_interleave(2, -1))
                )
                cos, sin = wide(cos), wide(sin)
            at = 2 if spelling["tokens_first"] else 1
            cos, sin = cos.unsqueeze(at), sin.unsqueeze(at)
            turned, rest = x[..., : rope.dims], x[..., rope.dims :]
            partner = rotate_half(turned) if rope.style == "half" else every_two(turned)
            if change == "sign":
                partner = -partner
            elif change == "table":
                cos = sin
            elif change == "partner":
                partner = partner.roll(1, -1)
            x = torch.cat([turned * cos + partner * sin, rest], -1)
        if change == "scale":
            x = x * 1.0001
        if spelling["tokens_first"]:
            x = x.transpose(1, 2)
        return x.to(dtype)

    return rotate


def capture(rope, head_dim, heads, spelling, change=""):
    """(output, exact output, plain output, context) of one layer."""
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
    function = layer(spelled(rope, spelling, change), **sizes)
    arguments = inputs(max(rope.columns(), 1), tokens=5, **sizes)(torch.float32)
    context = new_context()
    output, graph = run_fused(function, arguments, lambda gm: RopeAttention().apply(gm, context))
    wide = tuple(x.double() if x.is_floating_point() else x for x in arguments)
    return output, function(*wide), function(*arguments), context, graph


@settings(deadline=None, max_examples=25)
@given(case=rules())
def test_any_spelling_of_a_rule_is_recognised(case):
    rope, *rest = case
    output, exact, plain, context, graph = capture(rope, *rest)
    assert context.report.count("rope_attention") == 1, context.report.summary()
    assert relative_error(output, exact) <= max(1.5 * relative_error(plain, exact), 2e-6)
    (call,) = [n for n in graph.graph.nodes if "auto_functionalized" in str(n.target)]
    found = Rope.parse(call.kwargs["rope"])
    # Two dims make one pair in either style, and one column serves it as a table of pairs or as a part of a full one.
    assert (found.norm, found.dims) == (rope.norm, rope.dims)
    assert rope.norm == "none" or found.eps == rope.eps
    assert found.dims == 2 or (found.style, found.table) == (rope.style, rope.table)


@settings(deadline=None, max_examples=15)
@given(case=rules(), change=st.sampled_from(["sign", "table", "partner", "scale"]))
def test_nothing_else_is(case, change):
    rope, head_dim, heads, spelling = case
    assume(rope.dims and not (change == "partner" and rope.dims == 2))
    _, _, _, context, _ = capture(rope, head_dim, heads, spelling, change)
    assert context.report.count("rope_attention") == 0
    assert "no norm and rotation in the vocabulary" in context.report.near_misses[0].reason


def test_queries_and_keys_must_follow_one_rule():
    calls = []

    def first_only(x, cos, sin, weight):
        calls.append(x)
        rotated = x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)
        return rotated if x.shape[1] == 4 else x * sin.unsqueeze(1) + rotate_half(x) * cos.unsqueeze(1)

    context = new_context()
    run_fused(layer(first_only), inputs(16)(torch.float32), lambda gm: RopeAttention().apply(gm, context))
    assert context.report.count("rope_attention") == 0
    assert "with other tables" in context.report.near_misses[0].reason


NOT_RULES = ["half", "half:8", "half:7:full", "spiral:8:full", "none rms", "half:8:full rms:x", "half:8:full rms:1e-6"]


@pytest.mark.parametrize("text", NOT_RULES)
def test_only_canonical_rules_are_read(text):
    with pytest.raises(ValueError, match="rope"):
        Rope.parse(text)
