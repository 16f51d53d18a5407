"""The verified families: for each, a tiny random model of unmodified Hugging Face code and what fusecomp does to it.

Tests are parametrized over `FAMILIES`; `build` makes the model. Sizes are awkward where that is legal: heads
per kv head that are no power of two, an odd vocabulary, widths that no tile divides. `docs/models.md` says how to add
a family.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from models.family import Family

WINDOW = 7  # sliding windows, small enough for every test prompt to cross
_TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}  # nothing ends a generation early
_LONG_CONTEXT = {
    "rope_type dynamic, longrope": "Hugging Face derives the frequencies from the longest sequence of the batch, "
    "so the result of one sequence depends on what it is packed with"
}
_ROUTING = (
    "where two experts' router logits nearly tie, a low-precision run may choose another expert than fp32 does and is "
    "then wrong by a whole expert; `build` spreads the router, and comparisons are made on the token in the middle"
)
_DENSE = {"attention": 1, "paged_attention": 1, "merged_linear": 2}
_SPARSE = {"attention": 1, "paged_attention": 1, "merged_linear": 1, "experts": 1}
_DENSE_FUSED = {"linear": 4, "norm": 2, "rope_attention": 1, "linear_pair": 2}
_ROUTED_FUSED = {"router": 1, "router_linear": 1, "routed_experts": 1, "linear": 3, "norm": 2, "rope_attention": 1}
_ROUTED_FUSED |= {"linear_experts": 1}
_SPARSE_FUSED = {**_ROUTED_FUSED, "experts_residual": 1}
_NEXT_FUSED = {"experts_linear": 1}
_SHARED = {**_SPARSE, "merged_linear": 2}
_SHARED_FUSED = {**_ROUTED_FUSED, "linear": 5, "linear_pair": 1}
_LATENT_FUSED = {**_ROUTED_FUSED, "linear": 7, "norm": 4, "linear_pair": 1}
_SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_OWN_HEADS = {name: value for name, value in _SMALL.items() if name != "head_dim"}  # hidden size / heads = 16
_DEEPSEEK = {
    **_OWN_HEADS,
    "num_key_value_heads": 6,
    "vocab_size": 151,
    "intermediate_size": 96,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 48,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.5,
    **_TOKENS,
}
_SOME_DENSE = {
    "mlp_only_layers, decoder_sparse_step > 1, first_k_dense_replace > 0": "some layers are dense, so matches differ "
    "between layers; the registry counts one number for all of them"
}
_LATENT = {
    "v_head_dim other than qk_nope_head_dim + qk_rope_head_dim": "latent attention is expanded before it reaches "
    "the attention interface, whose KV pages hold keys and values of one width"
}

_ENTRIES = (
    Family(
        name="llama",
        architecture="LlamaForCausalLM",
        config={**_SMALL, "vocab_size": 173, "intermediate_size": 200, **_TOKENS},
        expected_matches=_DENSE,
        fused_matches=_DENSE_FUSED,
        windows=(0, 0, 0),
        exclusions=_LONG_CONTEXT,
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        # Heads are together wider than the hidden size, as in Qwen3's small models; embeddings are tied.
        config={**_SMALL, "hidden_size": 80, "vocab_size": 151, "intermediate_size": 136, **_TOKENS}
        | {"num_attention_heads": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
        expected_matches=_DENSE,
        fused_matches=_DENSE_FUSED,
        windows=(0, 0, 0),
        exclusions=_LONG_CONTEXT,
    ),
    Family(
        name="qwen3-mixed",
        architecture="Qwen3ForCausalLM",
        # The first layer attends to everything, the others through a window: masks differ between layers of one graph.
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 136, **_TOKENS}
        | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        expected_matches=_DENSE,
        fused_matches=_DENSE_FUSED,
        windows=(0, WINDOW, WINDOW),
        exclusions=_LONG_CONTEXT,
    ),
    Family(
        name="mistral",
        architecture="MistralForCausalLM",
        config={**_SMALL, "vocab_size": 173, "intermediate_size": 200, "sliding_window": WINDOW, **_TOKENS},
        expected_matches=_DENSE,
        fused_matches=_DENSE_FUSED,
        windows=(WINDOW, WINDOW),
        exclusions=_LONG_CONTEXT,
    ),
    Family(
        name="qwen3-moe",
        architecture="Qwen3MoeForCausalLM",
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 96, **_TOKENS}
        | {"moe_intermediate_size": 48, "num_experts": 9, "num_experts_per_tok": 3, "norm_topk_prob": True},
        expected_matches=_SPARSE,
        fused_matches=_SPARSE_FUSED,
        fused_between=_NEXT_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={**_LONG_CONTEXT, **_SOME_DENSE},
    ),
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        config={**_SMALL, "vocab_size": 173, "intermediate_size": 80, **_TOKENS}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2},
        expected_matches=_SPARSE,
        fused_matches=_SPARSE_FUSED,
        fused_between=_NEXT_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
    ),
    Family(
        name="qwen2-moe",
        architecture="Qwen2MoeForCausalLM",
        # A shared expert with a gate of its own; weights are not renormalised.
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 96, **_TOKENS}
        | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 72, "num_experts": 9}
        | {"num_experts_per_tok": 3},
        expected_matches=_SHARED,
        fused_matches={**_SHARED_FUSED, "linear": 6},
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={**_LONG_CONTEXT, **_SOME_DENSE},
        core=False,
    ),
    Family(
        name="olmoe",
        architecture="OlmoeForCausalLM",
        config={**_OWN_HEADS, "vocab_size": 151, "intermediate_size": 48, **_TOKENS}
        | {"num_experts": 12, "num_experts_per_tok": 8},
        expected_matches=_SPARSE,
        fused_matches=_SPARSE_FUSED,
        fused_between=_NEXT_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        core=False,
    ),
    Family(
        name="deepseek-v2",
        architecture="DeepseekV2ForCausalLM",
        config={**_DEEPSEEK, "topk_method": "group_limited_greedy"},
        expected_matches=_SHARED,
        fused_matches=_LATENT_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={**_LONG_CONTEXT, **_SOME_DENSE, **_LATENT},
        wide_router=True,
        core=False,
    ),
    Family(
        name="deepseek-v3",
        architecture="DeepseekV3ForCausalLM",
        config=_DEEPSEEK,
        expected_matches=_SHARED,
        fused_matches={name: count for name, count in _LATENT_FUSED.items() if name != "rope_attention"},
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={**_LONG_CONTEXT, **_SOME_DENSE, **_LATENT},
        near_misses={"rope_attention": "no norm and rotation in the vocabulary"},
        wide_router=True,
        core=False,
    ),
    Family(
        name="glm4-moe",
        architecture="Glm4MoeForCausalLM",
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 96, **_TOKENS}
        | {"moe_intermediate_size": 48, "n_routed_experts": 10, "num_experts_per_tok": 4, "n_shared_experts": 2}
        | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.25},
        expected_matches=_SHARED,
        fused_matches=_SHARED_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={**_LONG_CONTEXT, **_SOME_DENSE},
        wide_router=True,
        core=False,
    ),
    Family(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        # Experts are interleaved, biased, clamped and stored transposed; attention has sinks.
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 56, "sliding_window": WINDOW, **_TOKENS}
        | {"num_local_experts": 5, "num_experts_per_tok": 2},
        expected_matches=_SPARSE,
        fused_matches=_SPARSE_FUSED,
        fused_between=_NEXT_FUSED,
        windows=(WINDOW, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        core=False,
    ),
    Family(
        name="phimoe",
        architecture="PhimoeForCausalLM",
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 56, **_TOKENS}
        | {"num_local_experts": 6, "num_experts_per_tok": 2},
        expected_matches=_SPARSE,
        fused_matches=_SPARSE_FUSED,
        fused_between=_NEXT_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        core=False,
    ),
    Family(
        name="granitemoe",
        architecture="GraniteMoeForCausalLM",
        config={**_OWN_HEADS, "vocab_size": 151, "intermediate_size": 56, **_TOKENS}
        | {"num_local_experts": 7, "num_experts_per_tok": 1, "embedding_multiplier": 1.5, "residual_multiplier": 0.7}
        | {"attention_multiplier": 0.2, "logits_scaling": 0.8},
        expected_matches=_SPARSE,
        fused_matches=_ROUTED_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        core=False,
    ),
    Family(
        name="ernie4.5-moe",
        architecture="Ernie4_5_MoeForCausalLM",
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 96, **_TOKENS}
        | {"moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 0},
        expected_matches=_SHARED,
        # The norm in front of the router stays an op of its own.
        fused_matches={name: count for name, count in _SHARED_FUSED.items() if name != "linear_experts"},
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        wide_router=True,
        core=False,
    ),
    Family(
        name="llama4",
        architecture="Llama4ForCausalLM",
        # No experts interface: every expert sees every token, scaled by its weight; most of those are zero.
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 48, "intermediate_size_mlp": 80, **_TOKENS}
        | {"num_local_experts": 6, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
        | {"no_rope_layers": [1, 1], "layer_types": ["full_attention", "full_attention"]},
        expected_matches={**_SHARED, "raw_experts": 1},
        # Without a router, nothing of what is made of one.
        fused_matches={
            name: count for name, count in _SHARED_FUSED.items() if "rout" not in name and name != "linear_experts"
        },
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions={
            "layer_types with chunked_attention": "a chunk is no window, and its mask depends on the row of the batch",
            "num_experts_per_tok > 1": "weights multiply what experts read, which the canonical op does not do",
            "interleave_moe_layer_step > 1, no_rope_layers with 0": "matches differ between layers, and the registry "
            "counts one number for all of them",
        },
        near_misses={"router": "is also read by"},
        core=False,
    ),
    Family(
        name="aria",
        architecture="AriaTextForCausalLM",
        # No experts interface: a loop over experts, each with a slice of the sorted tokens.
        config={**_SMALL, "vocab_size": 151, "intermediate_size": 48, **_TOKENS}
        | {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 2},
        expected_matches={**_SHARED, "raw_experts": 1},
        fused_matches=_SHARED_FUSED,
        windows=(0, 0),
        tolerance=_ROUTING,
        exclusions=_LONG_CONTEXT,
        core=False,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ENTRIES})


def mixture(layer: torch.nn.Module) -> torch.nn.Module:
    """What a decoder layer has for an MLP, a mixture of experts or not."""
    names = ("mlp", "block_sparse_moe", "feed_forward")
    return next(getattr(layer, name) for name in names if hasattr(layer, name))


def build(family: Family | str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the family in eval mode, the same for the same seed, whatever the global random state.

    Hugging Face's initialization gives logits of about 0.02, where rounding decides the argmax. Here every projection
    keeps unit variance, attention and routing are far from uniform, norms and biases are not neutral, and the rows of
    the output projection differ a little in length, which keeps the two largest logits apart; were they to differ much,
    greedy decoding would soon repeat one token. The values are drawn in fp32 and
    rounded to `dtype`, so that models of different dtypes are roundings of one model.

    Raises:
        KeyError: the name is not in `FAMILIES`.
    """
    if isinstance(family, str):
        if family not in FAMILIES:
            raise KeyError(f"no family {family!r} in the registry; known: {', '.join(FAMILIES)}")
        family = FAMILIES[family]
    state = torch.get_rng_state()
    try:
        model = family.model_class()(family.make_config())
    finally:
        torch.set_rng_state(state)
    generator = torch.Generator().manual_seed(seed)
    tied = bool(model.config.tie_word_embeddings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter, tied, generator))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(_draw(name, buffer, tied, generator))
    return model.to(dtype).eval()


def _draw(name: str, parameter: torch.Tensor, tied: bool, generator: torch.Generator) -> torch.Tensor:
    """Values for one parameter; a projection's last dimension is its fan-in."""
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if parameter.dim() == 1:  # norm weights
        return (10 if tied and name == "model.norm.weight" else 1) * (1 + 0.2 * noise)
    unit = parameter.shape[-1] ** -0.5
    is_output = "lm_head" in name or (tied and "embed_tokens" in name)
    if is_output:
        lengths = torch.exp(0.2 * torch.randn(parameter.shape[0], 1, generator=generator))
        # Tied rows stay short next to what the layers add, or every token would predict itself; the last norm scales.
        return (0.3 if tied else 3) * unit * lengths * noise
    if "embed_tokens" in name:
        return noise
    if "gate.weight" in name or "router" in name:
        return 2 * unit * noise
    return unit * noise
