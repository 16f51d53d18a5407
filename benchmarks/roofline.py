"""What a step must move and compute at least, counted from a model's parameters.

Counted: every weight a step touches, once; the keys and values it reads; new keys and values; embedding rows.
Not counted: activations and logits, which a perfect kernel keeps on chip.
Legend: T tokens in the step, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.modules import QuantizedWeight

ROUTED_TOKENS_PER_PASS = 8192


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that compute with the weights of all experts stacked: parameters [E, ., .], or codes of such."""
    return [
        m
        for m in model.modules()
        if any(isinstance(child, QuantizedWeight) and child.q.dim() == 3 for child in m.children())
        or (not isinstance(m, QuantizedWeight) and any(p.dim() == 3 for p in m.parameters(recurse=False)))
    ]


def _bytes(owner: nn.Module | nn.Parameter) -> int:
    parameters = owner.parameters() if isinstance(owner, nn.Module) else [owner]
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@dataclass(frozen=True)
class Workload:
    """Sizes of one model.

    Attributes:
        dense_bytes: weights that every step reads whole, the output embedding included.
        expert_bytes: stacked expert weights of all layers.
        num_experts, top_k: E and K; 0 for a dense model.
        embedding_row_bytes: one row of the input embedding.
        kv_bytes_per_token: keys and values of one token in all layers.
        linear_flops: FLOPs per token in all matrices but the output embedding (K of E experts).
        head_flops: FLOPs per row of logits.
        attention_flops: FLOPs per pair of a query and a key it sees, all layers.
    """

    dense_bytes: int
    expert_bytes: int
    num_experts: int
    top_k: int
    embedding_row_bytes: int
    kv_bytes_per_token: int
    linear_flops: int
    head_flops: int
    attention_flops: int

    @classmethod
    def of(cls, model: Any, kv_bytes_per_token: int) -> Workload:
        """Count a stock HF causal LM."""
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        num_experts = int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)
        top_k = int(getattr(config, "num_experts_per_tok", None) or 0)
        coded = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
        parts = {id(parameter) for module in coded for parameter in module.parameters()}
        # (bytes, values that are multiplied, whether they are of stacked experts)
        weights = [(_bytes(m), math.prod(WeightSpec.from_text(m.spec).shape(m.q.shape)), m.q.dim() == 3) for m in coded]
        dense = experts = linear = 0
        for parameter in model.parameters():
            if parameter is embedding or parameter is head:
                dense += _bytes(parameter) if parameter is head else 0
            elif id(parameter) not in parts:
                weights.append((_bytes(parameter), parameter.numel() * (parameter.dim() > 1), parameter.dim() == 3))
        for size, values, stacked in weights:
            experts += size if stacked else 0
            dense += 0 if stacked else size
            linear += 2 * values * top_k // num_experts if stacked else 2 * values
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            dense,
            experts,
            num_experts if experts else 0,
            top_k if experts else 0,
            embedding[0].numel() * embedding.element_size(),
            kv_bytes_per_token,
            linear,
            2 * head.numel(),
            4 * config.num_attention_heads * head_dim * config.num_hidden_layers,
        )

    def expected_experts(self, tokens: int) -> float:
        """Distinct experts a layer touches when every token draws K of E uniformly."""
        if not self.num_experts:
            return 0.0
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)

    def decode_bytes(self, rows: int, context: float, touched: float | None = None) -> float:
        """Least bytes of a decode step of `rows` sequences that each read `context` cached tokens.

        Args:
            touched: distinct experts per layer, when measured; the expectation otherwise.
        """
        experts = 0.0
        if self.num_experts:
            share = (self.expected_experts(rows) if touched is None else touched) / self.num_experts
            experts = self.expert_bytes * share
        # Keys and values are read for the whole context and written for the new token.
        per_row = self.embedding_row_bytes + (context + 1) * self.kv_bytes_per_token
        return self.dense_bytes + experts + rows * per_row

    def prefill_flops(self, lengths: list[int]) -> float:
        """FLOPs of whole prompts: matrices, causal attention, and one row of logits each."""
        tokens = sum(lengths)
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return tokens * self.linear_flops + pairs * self.attention_flops + len(lengths) * self.head_flops


@torch.no_grad()
def touched_experts(model: Any, sequences: list[list[int]]) -> float:
    """Distinct experts per layer that the last tokens of `sequences` route to: the mean over layers.

    Sequences are cut at the front to the shortest, and run through the stock model.
    """
    length = min(map(len, sequences))
    device = next(model.parameters()).device
    ids = torch.tensor([s[-length:] for s in sequences], device=device)
    seen: dict[int, set[int]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        index = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
        assert index is not None, "an experts module is called without routing"
        last = index.reshape(-1, length, index.shape[-1])[:, -1]
        seen.setdefault(id(module), set()).update(last.unique().tolist())

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in experts_modules(model)]
    try:
        for part in ids.split(max(1, ROUTED_TOKENS_PER_PASS // length)):
            model(input_ids=part, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(map(len, seen.values())) / len(seen)
