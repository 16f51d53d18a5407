"""Quantized checkpoints of the registry's tiny models, beside the plain ones that they stand for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from fusecomp.runtime.loading import load_model
from models.registry import FAMILIES, build
from tests.quant import packers

# Linears of decoder layers; the router, norms, embeddings and the output stay as they are.
LINEARS = r"model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"
PROMPT = torch.tensor([[3, 17, 5, 80, 44, 9, 120, 61, 7]])


@dataclass
class Checkpoint:
    """A folder, its tensors, the plain weights [N, K] they stand for, and a folder of the plain model."""

    folder: Path
    tensors: dict[str, Any]
    values: dict[str, np.ndarray]
    plain: Path

    def rewrite(self, **config: Any) -> None:
        packers.write(self.folder / "model.safetensors", self.tensors)
        if config:
            path = self.folder / "config.json"
            settings = json.loads(path.read_text())
            settings["quantization_config"] |= config
            path.write_text(json.dumps(settings))

    def load(self, dtype: str = "float32"):
        return load_model(self.folder, dtype, "cpu")[0]

    def load_plain(self, dtype: str = "float32"):
        return load_model(self.plain, dtype, "cpu")[0]


def make(tmp_path: Path, family: str, pack, config: dict, only: str = LINEARS, sep: str = ".", **changes) -> Checkpoint:
    """Save a family's model with every weight that `only` matches packed by `pack(weight) -> tensors, value`."""
    folder, plain = tmp_path / "quantized", tmp_path / "plain"
    entry = FAMILIES[family]
    if changes:
        windows = entry.windows[: changes.pop("num_hidden_layers", entry.layers)]
        entry = replace(entry, config={**entry.config, **changes}, windows=windows)
    model = build(entry)
    model.save_pretrained(plain)
    tensors = dict(load_file(plain / "model.safetensors"))
    values = {}
    for name in sorted(tensors):
        weight = name.removesuffix(".weight")
        if not re.fullmatch(only, weight) or tensors[name].ndim < 2:
            continue
        parts, value = pack(tensors.pop(name))
        tensors |= {f"{weight}{sep}{part}": tensor for part, tensor in parts.items()}
        values[weight] = value
    assert values
    folder.mkdir()
    settings = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings))
    if (plain / "generation_config.json").exists():
        (folder / "generation_config.json").write_bytes((plain / "generation_config.json").read_bytes())
    original = dict(load_file(plain / "model.safetensors"))
    original |= {f"{w}.weight" if f"{w}.weight" in original else w: value for w, value in values.items()}
    packers.write(plain / "model.safetensors", original)
    checkpoint = Checkpoint(folder, tensors, values, plain)
    checkpoint.rewrite()
    return checkpoint


def check_logits(checkpoint: Checkpoint, exact: bool = True) -> torch.nn.Module:
    """The model has the plain model's weights and logits, and generates its tokens."""
    model, plain = checkpoint.load(), checkpoint.load_plain()
    expected = dict(plain.named_parameters())
    for name, value in weights(model):
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        got, wanted = model(PROMPT).logits, plain(PROMPT).logits
    if exact:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(PROMPT, **options), plain.generate(PROMPT, **options))
    assert torch.isfinite(got).all()
    return model


def weights(model):
    """Names and values of all weights that are held as codes."""
    from fusecomp.quant.modules import QuantizedLinear

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield f"{name}.weight", module.weight
        for leaf in getattr(type(module), "_dequantized", ()):
            yield f"{name}.{leaf}", getattr(module, leaf)
