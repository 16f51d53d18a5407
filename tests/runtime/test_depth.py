"""A trace of a few layers stands for all: the program and the report are those of tracing all; or all are traced.

Inductor compiles a Llama's pieces, also over an FP8 cache; which layers are traced does not depend on it elsewhere.
"""

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from fusecomp.config import EngineConfig
from fusecomp.request import SamplingParams
from fusecomp.runtime import step
from fusecomp.runtime.engine import Engine

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, kv_cache_bytes=1 << 20)
PROMPTS = [[5], [7, 11, 13, 90, 2], list(range(1, 21))]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


def randomized(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


def llama(layers=6):
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers)
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


def gemma2():
    config = transformers.Gemma2Config(**SIZES, num_hidden_layers=8, sliding_window=4, query_pre_attn_scalar=16)
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


def serve(engine, max_tokens=6):
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    tokens = [[] for _ in PROMPTS]
    while engine.has_unfinished_requests():
        for out in engine.step():
            tokens[int(out.request_id)] += out.new_token_ids
    return tokens


def greedy(model, max_tokens=6):
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(max_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def traced(engine):
    return [note for note in engine.report.notes if "traced" in note]


@pytest.mark.parametrize(
    "build, prefix, fuse",
    [(llama, 4, "always"), (gemma2, 6, "auto")],
    ids=["llama", "gemma2"],
)
def test_a_prefix_gives_the_tokens_and_the_report_of_all_layers(build, prefix, fuse, monkeypatch, request):
    if build is not llama:
        request.getfixturevalue("without_codegen")
    model = build()
    layers = model.config.num_hidden_layers
    config = CONFIG.replace(fuse=fuse)
    short = Engine(model, config)
    assert traced(short) == [f"traced {prefix} layers, which stand for {layers}"]
    stock = build()
    stock.set_attn_implementation("eager")  # the others leave the cap of Gemma's scores out
    assert serve(short) == greedy(stock)
    monkeypatch.setattr(step, "outline", lambda model, parts: "of the test")
    full = Engine(build(), config)
    assert traced(full) == ["all layers are traced: of the test"]
    for name in ("layers", "graphs", "graph_breaks", "ops_before", "ops_after", "cost_bytes", "cost_flops", "sources"):
        assert getattr(short.report, name) == getattr(full.report, name), name
    for name in ("matches", "near_misses"):
        assert sorted(map(str, getattr(short.report, name))) == sorted(map(str, getattr(full.report, name))), name


def test_a_prefix_serves_an_fp8_cache(monkeypatch):
    config = CONFIG.replace(kv_cache_dtype="fp8", fuse="always")
    short = Engine(llama(), config)
    assert traced(short) == ["traced 4 layers, which stand for 6"]
    monkeypatch.setattr(step, "outline", lambda model, parts: "of the test")
    full = Engine(llama(), config)
    assert serve(short) == serve(full)
    assert (short.report.cost_bytes, short.report.counts()) == (full.report.cost_bytes, full.report.counts())
    assert {m.numerics for m in short.report.matches if m.pattern == "rope_attention"} == {"quantizing"}


def _another_activation(model):
    model.model.layers[4].mlp.act_fn = nn.ReLU()


def _another_epsilon(model):
    model.model.layers[4].input_layernorm.variance_epsilon = 0.5


def _another_scale(model):
    model.model.layers[5].self_attn.scaling = 0.1


@pytest.mark.parametrize("change", [_another_activation, _another_epsilon, _another_scale])
def test_layers_that_differ_are_traced(change, without_codegen):
    model = llama()
    change(model)
    engine = Engine(model, CONFIG)
    assert traced(engine) == ["all layers are traced: its layers do not repeat"]
    expected = llama()
    change(expected)
    assert serve(engine) == greedy(expected)


class ReadingMLP(LlamaMLP):
    """Depends on the number of its layer in a way that the first layers do not show."""

    def forward(self, x):
        return super().forward(x) * (3.0 if self.layer_idx == 4 else 1.0)


def reading():
    model = llama()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = ReadingMLP
        layer.mlp.layer_idx = i
    return model


def test_code_that_reads_the_number_of_its_layer_is_traced_in_all(without_codegen):
    engine = Engine(reading(), CONFIG)
    assert traced(engine) == ["all layers are traced: the model's code reads its layer_idx"]
    assert serve(engine) == greedy(reading())


class CountingModel(LlamaModel):
    """Treats one layer apart by counting, which neither attributes nor guards show."""

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, **_):
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        embeddings = self.rotary_emb(hidden, position_ids=position_ids)
        for i, layer in enumerate(self.layers):
            hidden = layer(hidden, position_embeddings=embeddings, attention_mask=mask) * (3.0 if i == 4 else 1.0)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def counting():
    model = llama()
    model.model.__class__ = CountingModel
    return model


def test_a_program_whose_logits_are_not_the_model_s_is_not_used(caplog, without_codegen):
    engine = Engine(counting(), CONFIG)
    assert len(traced(engine)) == 1
    assert "all layers are traced: the program's logits are not the model's" in traced(engine)[0]
    assert "are not the model's" in caplog.text
    assert serve(engine) == greedy(counting())


def test_few_layers_are_all_traced(without_codegen):
    assert traced(Engine(llama(3), CONFIG)) == []
