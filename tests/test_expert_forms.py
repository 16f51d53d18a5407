"""What experts modules compute between their matmuls is recognised by numbers, or not at all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusecomp.expert_forms import expert_form, remember_experts, trace_experts, unfused_reason
from fusecomp.ops import OPS
from models.registry import FAMILIES, build, mixture


class Experts(nn.Module):
    """The attributes of a Hugging Face experts module, with the gate under test."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, gate, act_fn=None, **numbers):
        super().__init__()
        self._apply_gate, self.act_fn = (lambda x: gate(self, x)), act_fn or nn.SiLU()
        vars(self).update(numbers)


def halves(function):
    return lambda module, x: function(module, *x.chunk(2, dim=-1))


def alternating(function):
    return lambda module, x: function(module, x[..., ::2], x[..., 1::2])


def clamped(module, gate, up):
    gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
    return (up + 1) * gate * torch.sigmoid(module.alpha * gate)


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (Experts(halves(lambda m, g, u: m.act_fn(g) * u)), ("silu", False)),
        (Experts(halves(lambda m, g, u: u * m.act_fn(g)), nn.GELU()), ("gelu", False)),
        (Experts(alternating(lambda m, g, u: F.gelu(g, approximate="tanh") * u)), ("gelu_tanh", True)),
        (Experts(alternating(clamped), alpha=1.702, limit=7.0), ("gpt_oss(1.702,7.0)", True)),
        (Experts(halves(clamped), alpha=1.5, limit=900), ("gpt_oss(1.5,900.0)", False)),
        # What must not be taken for one of these.
        (Experts(halves(lambda m, g, u: F.mish(g) * u)), ("", False)),
        (Experts(halves(lambda m, g, u: m.act_fn(u) * g)), ("", False)),
        (Experts(halves(lambda m, g, u: m.act_fn(g.clamp(max=m.limit)) * u), limit=7.0), ("", False)),
        (Experts(halves(lambda m, g, u: m.act_fn(g.clamp(max=500)) * u)), ("", False)),
        (Experts(alternating(lambda m, g, u: clamped(m, g, u) - u), alpha=1.702, limit=7.0), ("", False)),
        (Experts(alternating(lambda m, g, u: clamped(m, g, u + 1)), alpha=1.702, limit=7.0), ("", False)),
        (Experts(halves(lambda m, g, u: m.act_fn(g) * u * u.mean())), ("", False)),
        (Experts(halves(lambda m, g, u: g[:3])), ("", False)),
        (Experts(lambda m, x: 1 / 0), ("", False)),
    ],
)
def test_gates(module, form):
    assert expert_form(module) == form
    assert bool(unfused_reason(module)) == (form == ("", False))


@pytest.mark.parametrize(("act", "form"), [(nn.GELU(), "gelu"), (lambda x: F.relu(x).square(), "relu2"), (F.mish, "")])
def test_experts_without_a_gate(act, form):
    module = Experts(None, act)
    module.has_gate = False
    assert expert_form(module) == (form, False)


def test_the_reason_names_the_activation():
    assert unfused_reason(Experts(halves(lambda m, g, u: m.act_fn(g) * u), nn.Mish())) == (
        "its gate (Mish) is none in the vocabulary"
    )


THROUGH_INTERFACE = [
    name
    for name, family in FAMILIES.items()
    if "experts" in family.expected_matches and "raw_experts" not in family.expected_matches
]


@pytest.mark.parametrize("name", THROUGH_INTERFACE)
@torch.no_grad()
def test_a_familys_experts_are_the_canonical_op(name):
    """Sentinels (an index equal to the number of experts) add nothing, as under expert parallelism."""
    module = mixture(build(name).model.layers[0]).experts
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, module.down_proj.shape[2 if module.is_transposed else 1], generator=generator)
    weights = torch.rand(7, 2, generator=generator)
    index = torch.stack([torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(7)])
    module.config._experts_implementation_internal = "eager"
    remember_experts(module)
    expected = module(x, index, weights)
    torch.testing.assert_close(trace_experts(module, x, index, weights), expected, rtol=1e-4, atol=1e-5)
    index[3, 1] = module.num_experts
    weights[3, 1] = 0
    torch.testing.assert_close(
        trace_experts(module, x, index, weights), module(x, index.clamp(max=module.num_experts - 1), weights),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_the_form_is_a_constant_of_the_trace():
    module = Experts(alternating(clamped), alpha=1.702, limit=7.0)
    module.gate_up_proj, module.down_proj = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 4))
    remember_experts(module)
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm.forward

    step = torch.compile(lambda x, i, w: trace_experts(module, x, i, w), backend=backend, fullgraph=True)
    step(torch.randn(4, 5), torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1))
    (node,) = [node for node in graphs[0].graph.nodes if node.target in (OPS.experts, OPS.experts.default)]
    assert node.args[7:] == ("gpt_oss(1.702,7.0)", True, True, False)
