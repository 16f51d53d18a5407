"""Shapes and training settings of the pico checkpoints. Weights and tokenizer stay under 12 MB in bf16."""

from dataclasses import dataclass, replace

from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeForCausalLM

from models.corpus import BOS_ID, CONTEXT, EOS_ID, PAD_ID, VOCAB_SIZE

_TOKENS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


@dataclass(frozen=True)
class Recipe:
    """What one checkpoint is and how it is trained. `rows` sequences of `context` tokens make one step."""

    name: str
    hidden_size: int = 256
    layers: int = 8
    heads: int = 8  # head_dim is 32
    kv_heads: int = 2
    intermediate_size: int = 560  # of one expert in the MoE
    experts: int = 0
    top_k: int = 0
    vocab_size: int = VOCAB_SIZE
    context: int = CONTEXT
    rows: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.5  # high, because the corpus is seen several times
    warmup_steps: int = 200
    aux_coefficient: float = 0.01
    seed: int = 0

    def config(self) -> PreTrainedConfig:
        shared = dict(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=32,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            **_TOKENS,
        )
        if not self.experts:
            return LlamaConfig(intermediate_size=self.intermediate_size, **shared)
        return Qwen3MoeConfig(
            intermediate_size=self.intermediate_size,
            moe_intermediate_size=self.intermediate_size,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            router_aux_loss_coef=self.aux_coefficient,
            **shared,
        )

    def build(self) -> PreTrainedModel:
        return (Qwen3MoeForCausalLM if self.experts else LlamaForCausalLM)(self.config())

    def smoke(self) -> "Recipe":
        """The same kind of model, small enough for a minute on two CPU cores."""
        return replace(
            self,
            hidden_size=64,
            layers=2,
            heads=2,
            kv_heads=1,
            vocab_size=512,
            context=128,
            rows=4,
            warmup_steps=5,
            intermediate_size=32 if self.experts else 96,
        )


RECIPES = {
    "llama": Recipe("pico-llama"),
    "moe": Recipe("pico-moe", layers=5, intermediate_size=64, experts=16, top_k=4),
}
