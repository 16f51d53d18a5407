"""A whole model with weights of codes: every linear is merged, fused and folded as one with plain weights is."""

import torch
import torch.nn.functional as F
from torch import nn

from fusecomp.ops import OPS
from fusecomp.ops.quant import INT, WeightSpec
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from tests.serving import CONFIG, build, hf_greedy, serve, tokens


class Int4Linear(nn.Module):
    """A linear's weight in 4 bits, asymmetric, in groups of 8 columns."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        groups = linear.weight.data.view(n, -1, 8)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = (-low / scale).round()
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15).to(torch.uint8).view(n, k)
        parts = {"q": codes[:, ::2] | (codes[:, 1::2] << 4), "scale": scale, "zero": zero}
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.text = WeightSpec(INT, 4, 1, 8, "float32").to_text()

    def forward(self, x):
        return F.linear(x, OPS.dequantize(self.q, self.scale, self.zero, self.text))


def quantized_model():
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, Int4Linear(child))
    return model


def test_a_quantized_model_is_merged_fused_and_folded():
    """fp32 tokens are those of `generate` on the same codes; also of a second engine, which finds the stacks made."""
    model, stock = quantized_model(), quantized_model()
    config = CONFIG.replace(block_size=16, verify="first", fuse="always", enforce_eager=False)
    layers = len(model.model.layers)
    prompts = [tokens(model.config.vocab_size, n) for n in (3, 11, 20)]
    expected = [hf_greedy(stock, prompt, 8).token_ids for prompt in prompts]
    for _ in range(2):
        engine = Engine(model, config)
        served = serve(engine, [(prompt, SamplingParams(temperature=0, max_tokens=8)) for prompt in prompts])
        assert [request.token_ids for request in served] == expected
        report = engine.report
        assert report.count("merged_linear") == 2 * layers and report.count("quant_linear") == 4 * layers
        assert report.count("norm") == 2 * layers + 1
        assert not report.near_misses and all(receipt.passed for receipt in report.receipts)
    folded = [match for match in report.matches if match.pattern == "quant_linear"]
    assert all("int4, a scale for 8 columns of a row, with zero points" in match.detail for match in folded)
    assert all(match.operation.startswith("quant_linear ") for match in folded)
    assert sum("rms norm" in match.detail for match in folded) == 2 * layers
