"""Whatever mixes tokens outside attention is refused, in every dtype; whatever does not is served."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fusecomp.config import EngineConfig
from fusecomp.errors import UnsupportedModelError
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.packing import row_errors

SMALL = EngineConfig(max_model_len=64, max_num_seqs=5, max_num_batched_tokens=48, enforce_eager=True)
APART, LOST = "packed in one step influence each other", "is lost between steps"


class Mixer(nn.Module):
    """A causal LM with `mix(self, x, positions)` before its attention."""

    def __init__(self, mix, attention=None):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(50, 64), nn.Linear(64, 192), nn.Linear(64, 50)
        self.at = nn.Embedding(256, 64)
        self.conv = nn.Conv1d(64, 64, 4, groups=64)
        self.register_buffer("state", torch.zeros(64))
        self.mix, self.attention = mix, attention or causal

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, position_ids):
        T = input_ids.shape[1]
        x = self.mix(self, self.embed(input_ids) + self.at(position_ids), position_ids)
        q, k, v = (y.view(1, T, 2, 32).transpose(1, 2) for y in self.qkv(x).split(64, -1))
        return self.head(x + self.attention(q, k, v, position_ids[0]).transpose(1, 2).reshape(1, T, 64))


def engine(mix=lambda m, x, p: x, attention=None, dtype=torch.float32, **limits):
    torch.manual_seed(0)
    return Engine(Mixer(mix, attention).eval().requires_grad_(False).to(dtype), SMALL.replace(**limits))


def causal(q, k, v, at):
    scores = q @ k.transpose(2, 3) / 32**0.5
    return scores.masked_fill(at[None] > at[:, None], -math.inf).softmax(-1) @ v


def shifted(x, by=1):
    return F.pad(x, (0, 0, by, 0))[:, :-by]


def follows(positions):
    """Whether a token's left neighbour looks like its predecessor, by position."""
    return (F.pad(positions, (1, 0), value=-5)[:, :-1] + 1 == positions)[..., None]


def remember(m, x, p):
    m.state.mul_(0.5).add_(x[0, -1])
    return x + m.state


MIXES = {
    "convolution": lambda m, x, p: x + m.conv(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2),
    "token shift": lambda m, x, p: x + 0.5 * shifted(x),
    "token shift by position": lambda m, x, p: x + 0.5 * shifted(x) * follows(p),
    "far shift": lambda m, x, p: x + 0.5 * shifted(x, 8),
    "mean": lambda m, x, p: x + x.mean(1, keepdim=True),
    "cumulative mean": lambda m, x, p: x + x.cumsum(1) / (p[..., None] + 1),
    "own positions": lambda m, x, p: x + m.at(torch.arange(x.shape[1]))[None],
    "state in a buffer": remember,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_tokens_is_refused(name, dtype):
    with pytest.raises(UnsupportedModelError, match=f"{APART}.*logits differ by"):
        engine(MIXES[name], dtype=dtype)


def test_without_room_to_pack_a_lost_past_is_still_noticed():
    with pytest.raises(UnsupportedModelError, match=LOST):
        engine(MIXES["token shift"], max_num_seqs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 1}, {"max_num_seqs": 2, "max_num_batched_tokens": 2}], ids=str)
def test_what_does_not_mix_is_served(dtype, limits):
    assert engine(dtype=dtype, **limits).report.count("paged_attention") == 1


def hybrid():
    return transformers.Lfm2Config(
        **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "vocab_size": 99, "pad_token_id": 0},
    )


def roberta():
    return transformers.RobertaConfig(
        **{"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"vocab_size": 99, "pad_token_id": 0, "is_decoder": True},
    )


def latent():
    return transformers.DeepseekV3Config(
        **{"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1},
        **{"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
        **{"vocab_size": 99, "first_k_dense_replace": 1},
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [(hybrid, APART), (roberta, "own positions are not 0, 1, 2"), (latent, "value head dim 16 differs")],
)
def test_families_that_are_refused(config, reason):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model, SMALL)


def in_place(q, k, v, at, *, what):
    scores = q @ k.transpose(2, 3)
    if what == "scores":
        scores.clamp_(max=0.1)
    if what == "a view of the scores":
        scores[:, 0].mul_(3)
    scores = (scores / 32**0.5).masked_fill(at[None] > at[:, None], -math.inf)
    if what == "the queries":
        q.mul_(0)
    if what == "a view of the masked scores":
        scores[..., :1].add_(1)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("what", ["scores", "a view of the scores", "the queries", "a view of the masked scores"])
def test_writes_in_place_are_noticed(what):
    with pytest.raises(UnsupportedModelError, match=r"changed in place|second user"):
        engine(attention=lambda *args: in_place(*args, what=what))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, at: s / s.shape[-1], "depends on the number of tokens"),
        (lambda s, at: s / (1 + at.max()), "depends on the number of tokens"),
        (lambda s, at: s.clamp(-50, 50), "large scores"),
        (lambda s, at: torch.where((s > 40) & (s < 900), s / 2, s), "large scores"),
    ],
    ids=["tokens", "last position", "clamp", "a band"],
)
def test_scores_are_fitted_at_two_lengths_and_all_magnitudes(change, reason):
    def attention(q, k, v, at):
        return change(q @ k.transpose(2, 3), at).masked_fill(at[None] > at[:, None], -math.inf).softmax(-1) @ v

    with pytest.raises(UnsupportedModelError, match=reason):
        engine(attention=attention)


def test_rows_that_are_not_finite_in_both_say_nothing():
    exact = torch.ones(3, 4)
    exact[0] = math.nan
    actual = exact.clone()
    actual[1] *= 1.5
    assert row_errors(actual, exact) == [0.5, 0.0]
    actual[2, 0] = math.nan
    assert row_errors(actual, exact) == [0.5, math.inf]
    assert row_errors(torch.zeros(1, 2), torch.zeros(1, 2)) == [0.0]
