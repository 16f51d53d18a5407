"""Named model shapes: HF configurations with random weights made on the device, and the bundled pico checkpoints.

Weights are drawn from N(0, 1 / fan_in), so that activations keep their scale through any depth: logits stay finite
and spread, and a router's choices spread over all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHECKPOINTS = Path(__file__).resolve().parent.parent / "models"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class ShapeError(ValueError):
    """The shape is unknown, or its checkpoint or memory is missing."""


def _llama(factor: float | None = None, **sizes: Any) -> Any:
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0} if factor is None else LLAMA3_ROPE | {"factor": factor}
    return LlamaConfig(rope_parameters=rope, rms_norm_eps=1e-5, **sizes)


def _qwen3_moe(**sizes: Any) -> Any:
    from transformers import Qwen3MoeConfig

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return Qwen3MoeConfig(rope_parameters=rope, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], **sizes)


def _llama_1b() -> Any:
    return _llama(
        32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def _llama_8b() -> Any:
    return _llama(
        8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def _qwen3_30b_a3b() -> Any:
    return _qwen3_moe(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}


def _tiny() -> Any:
    return _llama(tie_word_embeddings=True, **TINY)


def _tiny_moe() -> Any:
    return _qwen3_moe(moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, **TINY)


@dataclass(frozen=True)
class Shape:
    """A configuration to fill with random weights, or the folder of a checkpoint."""

    name: str
    config: Callable[[], Any] | None = None
    folder: Path | None = None

    def build(self, device: torch.device, dtype: torch.dtype, *, layers: int | None = None, seed: int = 0) -> nn.Module:
        """The stock HF model on `device`, in eval mode, without gradients.

        Args:
            layers: depth other than the shape's; only for shapes with random weights.

        Raises:
            ShapeError: the checkpoint is missing.
        """
        if self.config is not None:
            config = self.config()
            config.num_hidden_layers = layers or config.num_hidden_layers
            model = random_model(config, device, dtype, seed)
        else:
            if layers:
                raise ShapeError(f"{self.name} is a checkpoint: its depth cannot be changed")
            model = self._load(device, dtype)
        return model.eval().requires_grad_(False)

    def _load(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from transformers import AutoModelForCausalLM

        assert self.folder is not None
        if not (self.folder / "config.json").is_file():
            raise ShapeError(f"{self.name}: no checkpoint in {self.folder}; train it first, or take the shape 'tiny'")
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
        return model.to(device)


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    """A causal LM of `config` with random weights; nothing is made on another device or in another dtype.

    Constructors run on the device, so buffers that are not parameters (rotary frequencies) hold their real values.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    if device.type == "meta":  # sizes only
        return model
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-1b", _llama_1b),
        Shape("llama-8b", _llama_8b),
        Shape("qwen3-30b-a3b", _qwen3_30b_a3b),
        Shape("tiny", _tiny),
        Shape("tiny-moe", _tiny_moe),
        Shape("pico-llama", folder=CHECKPOINTS / "pico-llama"),
        Shape("pico-moe", folder=CHECKPOINTS / "pico-moe"),
    )
}
