"""Equal quantizations of one value: the pattern's examples, what is left of the graph, and merging behind it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusecomp._compat import dynamo_settings
from fusecomp.ops import OPS
from fusecomp.ops.quant import FP8, INT, ActivationSpec, WeightSpec
from fusecomp.patterns.base import count_ops, own_graph
from fusecomp.patterns.linear import MergedLinears
from fusecomp.patterns.quant_examples import random_weight
from fusecomp.patterns.shared_quantize import SharedQuantize
from fusecomp.testing.patterns import check_pattern, new_context, run_rewritten

PATTERN = SharedQuantize()
EXAMPLES = {example.name: example for example in PATTERN.examples()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, dtype):
    check_pattern(PATTERN, EXAMPLES[name], new_context(), dtype, lambda _: None)


def test_one_of_three_is_left():
    example, counts = EXAMPLES["pair"], []

    def rewrite(gm):
        counts.append(count_ops(gm.graph))
        PATTERN.apply(gm, new_context())
        counts.append(count_ops(gm.graph))

    run_rewritten(example.function, example.inputs(torch.float32), rewrite)
    (before, after) = ({name.split(".")[-1]: n for name, n in count.items()} for count in counts)
    assert (before["quantize"], before["dequantize"]) == (3, 3)
    assert (after["quantize"], after["dequantize"], after["getitem"]) == (1, 1, 2)


class Projections(nn.Module):
    """Three linears of codes, each of which rounds its own input."""

    def __init__(self, kind, spelling, least):
        super().__init__()
        self.activation = ActivationSpec(kind, 8, least_tokens=least).to_text()
        self.back = ActivationSpec(kind).dequantized("float32").to_text()
        spec = WeightSpec(kind, 8, 1, 0, "float32")
        self.spec, self.spelling = spec.to_text(), spelling
        parts = [random_weight((n, 24), spec, torch.float32, seed=i) for i, n in enumerate((16, 8, 8))]
        self.q, self.scale = (
            nn.ParameterList(nn.Parameter(p[i], requires_grad=False) for p in parts) for i in range(2)
        )

    def forward(self, x):
        return tuple(self.linear(x, q, scale) for q, scale in zip(self.q, self.scale, strict=True))

    def linear(self, x, q, scale):
        if self.spelling == "fake":
            x = OPS.fake_quantize(x, None, self.activation)
        else:
            codes, scales = OPS.quantize(x, None, self.activation)
            x = OPS.dequantize(codes, scales, None, self.back)
        return F.linear(x, OPS.dequantize(q, scale, None, self.spec))


@pytest.mark.parametrize("spelling", ["fake", "pair"])
@pytest.mark.parametrize("kind", [INT, FP8])
def test_linears_of_equal_quantizations_are_merged(kind, spelling):
    module, context = Projections(kind, spelling, 3 if spelling == "fake" else 0), new_context()
    x = torch.randn(1, 5, 24)
    expected = module(x)

    def backend(gm, _):
        gm = own_graph(gm)
        for pattern in (PATTERN, MergedLinears()):
            pattern.apply(gm, context)
        gm.recompile()
        return lambda *args: gm(*args, *(merged.tensor for merged in context.merged))

    torch._dynamo.reset()
    with dynamo_settings(), torch.no_grad():
        output = torch.compile(module, backend=backend, fullgraph=True)(x)
    assert context.report.counts() == {"shared_quantize": 2, "merged_linear": 1} and not context.report.near_misses
    for found, wanted in zip(output, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
