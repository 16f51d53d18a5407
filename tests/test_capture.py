"""Capture: one graph, no breaks, no recompiles, no copies, nothing left changed, and reasons when it refuses."""

import re

import pytest
import torch
import transformers
from torch import nn

from fusecomp.capture import TRACE, Implementations
from fusecomp.config import EngineConfig
from fusecomp.errors import RecompileError, UnsupportedModelError
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine

BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SIZES = {**BASE, "intermediate_size": 96, "max_position_embeddings": 256}
SMALL = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, enforce_eager=True)


def build(config, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model


def llama(**changes):
    return transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, "head_dim": 32, **changes})


def serve(engine, prompts, max_tokens=6):
    """Greedy tokens per prompt."""
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=max_tokens))
    tokens = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished_requests():
        for out in engine.step():
            tokens[out.request_id] += out.new_token_ids
    return [tokens[str(i)] for i in range(len(prompts))]


def eager_greedy(model, prompt, max_tokens=6):
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


PROMPTS = [[5], [7, 11, 13, 90, 2], list(range(1, 71)), [3, 3]]


def n_embd(config, **options):
    return config(n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=99, **options)


# Families outside models/: through HF's interface with sinks or softcap, and those whose attention is in the graph.
OTHERS = {
    "gemma2-softcap": (
        lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=32, sliding_window=8),
        "attention",
    ),
    "gpt-oss-sinks": (
        lambda: transformers.GptOssConfig(
            **{**SIZES, "intermediate_size": 32},
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
        ),
        "attention",
    ),
    "gptj-eager": (lambda: n_embd(transformers.GPTJConfig, rotary_dim=8), "softmax_attention"),
    "codegen-eager": (lambda: n_embd(transformers.CodeGenConfig, rotary_dim=8), "softmax_attention"),
    "gpt-neo-local": (
        lambda: transformers.GPTNeoConfig(
            hidden_size=64,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=4,
            vocab_size=99,
            max_position_embeddings=256,
            window_size=8,
        ),
        "softmax_attention",
    ),
    "falcon-sdpa": (
        lambda: transformers.FalconConfig(**BASE, alibi=False, multi_query=True, max_position_embeddings=256),
        "sdpa_attention",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_family_outside_the_registry(name):
    config, pattern = OTHERS[name]
    model = build(config())
    engine = Engine(model, SMALL)
    assert engine.report.count(pattern) == engine.report.count("paged_attention") == engine.report.layers == 2
    assert serve(engine, PROMPTS) == [eager_greedy(model, p) for p in PROMPTS]


def test_weights_and_configuration_are_untouched():
    model = build(llama())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    implementation = model.config._attn_implementation
    engine = Engine(model, SMALL)
    serve(engine, PROMPTS[:2])
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert list(after) == list(before) and model.config._attn_implementation == implementation


def test_a_served_model_is_saved_as_it_was(tmp_path):
    """Merged parameters share their memory; a checkpoint has each by itself, under its own name."""
    model = build(llama())
    Engine(model, SMALL)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert list(again) == list(model.state_dict())
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_configuration_is_restored_after_an_error():
    model = build(llama())
    with pytest.raises(KeyError), Implementations(model).use(TRACE):
        raise KeyError
    assert model.config._attn_implementation != TRACE


def test_one_graph_serves_every_length_without_recompiling():
    engine = Engine(build(llama()), SMALL.replace(max_num_batched_tokens=40, max_num_seqs=3))
    for length in range(1, 42):
        serve(engine, [[1] * length, [2]], 2)
    assert (engine.report.graphs, engine.report.graph_breaks, engine.report.recompiles) == (1, 0, 0)


def test_recompiling_while_serving_is_an_error():
    model = build(llama())
    engine = Engine(model, SMALL)
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    with pytest.raises(RecompileError, match=r"compiled again while serving.*act_fn"):
        serve(engine, PROMPTS[:1])
    assert engine.report.recompiles == 1


def test_kv_is_written_in_place():
    """The generated code hands both ops its own input, allocates no tensor of that rank and copies nothing."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    config = SMALL.replace(enforce_eager=False)
    engine, code = run_and_get_code(Engine, build(llama(num_hidden_layers=3)), config)
    layers = [source for source in code if "cache_write.default(" in source]
    assert len(layers) == 2, "one kind of piece up to the first attention, one between attentions"
    for source in layers:
        (write,) = re.findall(r"cache_write\.default\((.+)\)\n", source)
        (read,) = re.findall(r"paged_attention\.default\((.+)\)\n", source)
        (cache,) = [x for x in re.findall(r"(?<!\()\b(arg\d+_1)\b", read) if x in write and f"{x}, (" in source][:1]
        rank = re.search(rf"assert_size_stride\({cache}, \(([^)]*)\)", source).group(1).count(",") + 1
        assert rank == 5, f"{cache} is not the KV tensor"
        assert not re.search(r"\.copy_\(|clone", source)
        allocated = re.findall(r"empty_strided_\w+\(\(([^)]*)\)", source)
        assert allocated and not [shape for shape in allocated if shape.count(",") == 4]
    assert engine.report.count("paged_attention") == 3


class Custom(nn.Module):
    """A causal LM that knows nothing of transformers: eager attention, its own mask, no logits_to_keep."""

    def __init__(self, mask="causal", positions=True):
        super().__init__()
        self.embed, self.at = nn.Embedding(50, 64), nn.Embedding(256, 64)
        self.qkv, self.out, self.head = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 50)
        self.mask, self.positions = mask, positions
        self.register_buffer("hidden", torch.ones(256, 256, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, input_ids, position_ids):
        T = input_ids.shape[1]
        own = torch.arange(T, device=input_ids.device)[None]
        x = self.embed(input_ids) + self.at(position_ids if self.positions else own)
        q, k, v = (y.view(1, T, 2, 32).transpose(1, 2) for y in self.qkv(x).split(64, -1))
        scores = q @ k.transpose(2, 3) / 32**0.5
        if self.mask == "causal":
            at = position_ids[0]
            scores = scores.masked_fill(at[None] > at[:, None], float("-inf"))
        elif self.mask == "weights":
            scores = scores + self.out.weight[0, 0] - (own > own.mT) * 1e9
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(1, T, 64))
        return self.head(x)

    def greedy(self, prompt, n=6):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(n):
                out = self(torch.tensor([ids]), torch.arange(len(ids))[None])
                ids.append(int(out[0, -1].argmax()))
        return ids[len(prompt) :]


def custom(**options):
    torch.manual_seed(0)
    return Custom(**options).eval().requires_grad_(False)


def test_a_module_that_knows_nothing_of_transformers():
    torch.manual_seed(0)
    model = custom()
    model.config = type("Config", (), {"vocab_size": 50, "max_position_embeddings": 256})()
    engine = Engine(model, SMALL)
    prompts = [[5], [7, 11, 13, 40, 2], [t % 50 for t in range(70)]]
    assert serve(engine, prompts) == [model.greedy(p) for p in prompts]
    assert engine.report.counts() == {"softmax_attention": 1, "paged_attention": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "none"}, "bidirectional mask cannot be served"),
        ({"mask": "weights"}, "depends on a weight"),
        ({"positions": False}, "ignores the positions"),
    ],
    ids=["bidirectional", "mask from weights", "own positions"],
)
def test_refusals_say_why(options, reason):
    model = custom(**options)
    model.config = type("Config", (), {"vocab_size": 50, "max_position_embeddings": 256})()
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model, SMALL)


def test_chunked_attention_is_refused():
    config = transformers.Llama4TextConfig(
        **{**SIZES, "intermediate_size": 64},
        intermediate_size_mlp=64,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        attention_chunk_size=8,
    )
    with pytest.raises(UnsupportedModelError, match="mask"):
        Engine(build(config), SMALL)


def test_alibi_and_missing_positions_are_refused():
    config = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=99)
    with pytest.raises(UnsupportedModelError, match="position"):
        Engine(build(config), SMALL)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_batch_are_refused(rope_type):
    """Frequencies chosen by the longest position in the batch would change when sequences are packed."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 64}
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0} | (factors if rope_type == "longrope" else {})
    with pytest.raises(UnsupportedModelError, match=r"one graph.*modeling_rope_utils"):
        Engine(build(llama(rope_parameters=rope)), SMALL)


def test_training_mode_is_refused():
    with pytest.raises(UnsupportedModelError, match="training mode"):
        Engine(build(llama()).train(), SMALL)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_stateless_backend(implementation):
    from fusecomp.backend import fusecomp, last_reports

    torch._dynamo.reset()
    model = build(llama(), attn_implementation=implementation)
    compiled = torch.compile(model, backend=fusecomp)
    for length in (13, 29):
        ids = torch.randint(0, 99, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            difference = compiled(ids, use_cache=False).logits - model(ids).logits
        assert float(difference.abs().max()) < 1e-5
    first = "sdpa_attention" if implementation == "sdpa" else "softmax_attention"
    assert last_reports[-1].counts() == {first: 2, "fused_sdpa": 2}


def test_backend_is_declared_and_works_by_name():
    import tomllib
    from importlib import import_module
    from importlib.metadata import entry_points
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["torch_dynamo_backends"]["fusecomp"].split(":")
    backend = getattr(import_module(module), name)
    installed = [point for point in entry_points(group="torch_dynamo_backends") if point.name == "fusecomp"]
    x = torch.randn(3, 8)
    layer = nn.Linear(8, 8)
    compiled = torch.compile(layer, backend="fusecomp" if installed else backend)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
