"""Scales go only where the numbers prove it: places that hold, places that nearly do, and what is done with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusecomp.quant.online.folding import Norm
from fusecomp.quant.online.observe import observing
from fusecomp.quant.online.plan import UNPROVEN, Planner
from fusecomp.quant.online.schemes import SCHEMES
from fusecomp.quant.online.search import SHARES, Weight, search_clip, search_scale
from fusecomp.quant.online.targets import Layer, find_targets
from fusecomp.quant.online.transform import quantize_model
from models.registry import FAMILIES, build

K = 64


class RMSNorm(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.rand(K) + 0.5 - offset)

    def forward(self, x):
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (normed * (self.weight.float() + self.offset)).type_as(x)


class Block(nn.Module):
    """A gated unit after a norm; `twist` says what besides happens."""

    def __init__(self, norm, twist=""):
        super().__init__()
        self.norm, self.twist = norm, twist
        self.gate, self.up, self.down = (nn.Linear(K, K, bias=False) for _ in range(3))
        self.peek = nn.Parameter(torch.randn(3, K)) if twist == "router" else None

    def forward(self, x):
        y = self.norm(x)
        inner = nn.functional.silu(self.gate(y)) * self.up(y)
        if self.twist == "clamp":
            inner = inner.clamp(-0.3, 0.3)
        out = x + self.down(inner)
        if self.twist == "parallel":
            out = out + 0.01 * y  # someone else reads the norm's output, and nothing undoes the scales for it
        return out


def plan(block, name="int4", x=None, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(2, 40, K) if x is None else x
    targets, _ = find_targets(Layer("layer", block), SCHEMES[name], set())
    with observing(block, []) as observed, torch.no_grad():
        before = block(x)
    planner = Planner(SCHEMES[name], (), False)
    with torch.no_grad():
        return planner.calibrated("layer", targets, observed, lambda: block(x), before)


def outliers(block):
    """Make scales worth finding: some channels of each input are large."""
    with torch.no_grad():
        block.norm.weight[:4] = (block.norm.weight[:4] + getattr(block.norm, "offset", 0)) * 30
        block.up.weight[:4] *= 30


def notes(roundings):
    return {target.name.removeprefix("layer."): rounding.note for target, rounding in roundings.items()}


NORMS = {
    "rms": RMSNorm,
    "1 + w": lambda: RMSNorm(1.0),
    "LayerNorm": lambda: nn.LayerNorm(K),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_scales_change_no_result(norm, dtype):
    torch.manual_seed(1)
    block = Block(NORMS[norm]())
    outliers(block)
    block = block.to(dtype)
    x = torch.randn(2, 40, K).to(dtype)
    before = copy.deepcopy(block).float()(x.float())
    roundings = plan(block, x=x)
    found = notes(roundings)
    assert found["gate"] == found["up"] == "scales of its channels in the norm before"
    assert found["down"] == "scales of its channels in rows of layer.up"
    for target, rounding in roundings.items():
        exact = rounding.prepared(target.weight.float(), slice(None))
        target.parameter.data = exact
    after = block.float()(x.float())
    assert (after - before).norm() <= 2e-6 * before.norm()


@torch.no_grad()
def test_what_is_not_proven_is_not_scaled():
    torch.manual_seed(1)
    parallel, clamp = Block(RMSNorm(), "parallel"), Block(RMSNorm(), "clamp")
    outliers(parallel)
    outliers(clamp)
    weight = parallel.norm.weight.clone()
    found = notes(plan(parallel))
    assert found["gate"] == found["up"] == UNPROVEN and found["down"] != UNPROVEN
    assert torch.equal(parallel.norm.weight, weight)
    found = notes(plan(clamp))
    assert found["down"] == UNPROVEN and found["gate"] != UNPROVEN


@torch.no_grad()
def test_proofs_leave_no_trace():
    torch.manual_seed(1)
    block = Block(RMSNorm(), "parallel").to(torch.bfloat16)
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    targets, _ = find_targets(Layer("layer", block), SCHEMES["int4"], set())
    x = torch.randn(1, 40, K).bfloat16()
    with observing(block, []) as observed:
        before = block(x)
    planner = Planner(SCHEMES["int4"], (), False)
    planner._prove("layer", planner._groups(targets, observed), targets, observed, lambda: block(x), before)
    assert all(torch.equal(kept[name], tensor) for name, tensor in block.state_dict().items())


@torch.no_grad()
def test_a_router_that_stays_keeps_its_choices():
    """Its weight is scaled by powers of two, which no float type rounds."""
    model = build(FAMILIES["qwen3-moe"], torch.bfloat16).eval()
    ids = torch.randint(3, 90, (4, 64), generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight[:5] *= 16
        layer.mlp.gate.weight[:, :5] /= 16
        layer.mlp.experts.gate_up_proj[..., :5] /= 16
    gate, norm = model.model.layers[0].mlp.gate, model.model.layers[0].post_attention_layernorm
    before, weight = gate.weight.clone(), norm.weight.clone()
    record = quantize_model(model, "int4", text=ids.tolist())
    detail = next(w.detail for w in record.weights if w.name == "model.layers.0.mlp.experts.gate_up_proj")
    assert "in the norm before" in detail
    ratio = gate.weight.float() / before.float()
    assert bool((ratio == ratio[:1]).all()) and bool((ratio[0].log2() == ratio[0].log2().round()).all())
    assert torch.equal(norm.weight.float() * ratio[0], weight.float()) and len(ratio[0].unique()) > 1


def test_a_norms_rounding_is_part_of_the_scale():
    norm = RMSNorm().to(torch.bfloat16)
    before = norm.weight.detach().float()
    s = Norm(norm, 0.0).set(torch.rand(K) + 0.5)
    torch.testing.assert_close(norm.weight.detach().float() * s, before, rtol=1e-6, atol=0)


def test_scales_and_ranges_are_those_of_least_error():
    torch.manual_seed(0)
    rows = torch.randn(64, 2 * K) * torch.where(torch.arange(2 * K) < 4, 50.0, 1.0)
    values = torch.randn(40, 2 * K)
    values[:, 5] *= 8  # a range that is better cut
    weight = Weight(SCHEMES["int4"], torch.float32, values, rows, None, False)
    s = search_scale([weight], rows.abs().mean(0), lambda wished: wished)
    assert s is not None and float(s[:4].mean()) > 2 * float(s[4:].mean())
    clip, error = search_clip(weight, None)
    whole = search_clip(Weight(SCHEMES["int4"], torch.float32, values, rows, None, False), s)[1]
    assert whole < error and clip.shape == (40, 1) and bool(torch.isin(clip, torch.tensor(SHARES)).all())
    silent = Weight(SCHEMES["int4"], torch.float32, values, torch.zeros_like(rows), None, False)
    assert bool((search_clip(silent, None)[0] == 1).all())


@torch.no_grad()
def test_experts_inputs_are_those_of_their_tokens():
    model = build(FAMILIES["mixtral"]).eval()
    layer, experts = model.model.layers[0], model.model.layers[0].mlp.experts
    model.set_experts_implementation("eager")
    targets, _ = find_targets(Layer("model.layers.0", layer), SCHEMES["int4"], set())
    chosen = []
    hook = experts.register_forward_pre_hook(lambda _, args: chosen.append((args[0].clone(), args[1].clone())))
    with observing(layer, [t for t in targets if t.experts]) as observed:
        model(torch.randint(3, 90, (2, 30)))
    hook.remove()
    (x, index), up = chosen[0], observed.experts["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(len(up.tokens)):
        rows = x[(index == expert).any(-1)]
        assert int(up.tokens[expert]) == len(rows)
        torch.testing.assert_close(up.magnitudes[expert], rows.abs().sum(0), rtol=1e-4, atol=1e-3)
        groups = rows.unflatten(-1, (-1, up.cols))
        torch.testing.assert_close(
            up.moments[expert], torch.einsum("rgc,rgd->gcd", groups, groups), rtol=1e-3, atol=1e-3
        )
    down = observed.experts["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(down.tokens, up.tokens) and down.first > up.first
