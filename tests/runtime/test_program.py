"""Step programs: a second start loads what the first compiled, gives the same tokens, and traces nothing."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

from fusecomp.capture import Implementations, run_probe
from fusecomp.config import EngineConfig
from fusecomp.errors import RecompileError
from fusecomp.request import SamplingParams
from fusecomp.runtime import identity as identity_module
from fusecomp.runtime import program as program_module
from fusecomp.runtime.artifacts import differences
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.identity import Undescribable, identity
from fusecomp.runtime.program import CALL, INPUT, ITEM, STEP, STEP_INPUTS, Plan, StepProgram

pytestmark = pytest.mark.xdist_group("programs")
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, kv_cache_bytes=1 << 20)
PROMPTS = [[5], [7, 11, 13, 90, 2], list(range(1, 21))]


def sizes(**changes):
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "max_position_embeddings": 128,
        **changes,
    }


def llama(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes(**changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)
    return model


def gptj():
    """Attention written out in the graph: its KV layout comes from a capture, its mask from a buffer or a function."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        n_embd=32, n_layer=2, n_head=2, n_positions=128, vocab_size=97, rotary_dim=8, n_inner=48
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def serve(engine):
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    tokens = {str(i): [] for i in range(len(PROMPTS))}
    while engine.has_unfinished_requests():
        for out in engine.step():
            tokens[out.request_id] += out.new_token_ids
    return tokens


def traced():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSECOMP_COMPILE_CACHE", "1")
    monkeypatch.setenv("FUSECOMP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with the stored program of `llama()`, and the tokens that it gives."""
    folder = tmp_path_factory.mktemp("compiled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSECOMP_COMPILE_CACHE", "1")
        patch.setenv("FUSECOMP_CACHE_DIR", str(folder))
        engine = Engine(llama(), CONFIG)
        assert "stored as" in engine.report.program
        return folder, serve(engine)


@pytest.fixture
def expected(cache, compiled):
    """The tokens of `llama()`, whose program the test finds in a store of its own."""
    folder, tokens = compiled
    shutil.copytree(folder, cache)
    return tokens


@pytest.mark.parametrize(
    ("build", "kv_cache_dtype"),
    [(llama, "auto"), (lambda: llama(tie_word_embeddings=True), "auto"), (gptj, "auto"), (llama, "fp8"), (gptj, "fp8")],
    ids=["llama", "tied", "gptj", "llama fp8", "gptj fp8"],
)
def test_a_second_engine_loads_the_program_and_traces_nothing(cache, build, kv_cache_dtype):
    config = CONFIG.replace(kv_cache_dtype=kv_cache_dtype)
    cold = Engine(build(), config)
    expected = serve(cold)
    assert "stored as" in cold.report.program
    before = traced()
    warm = Engine(build(), config)
    assert warm.report.program.startswith("loaded ")
    assert warm.report.program in warm.report.summary()
    assert serve(warm) == expected
    assert traced() == before
    for name in ("layers", "graphs", "graph_breaks", "ops_before", "ops_after", "cost_bytes", "sources", "notes"):
        assert getattr(warm.report, name) == getattr(cold.report, name), name
    assert (warm.report.matches, warm.report.near_misses) == (cold.report.matches, cold.report.near_misses)


CHILD = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tests.runtime.test_program import CONFIG, llama, serve, traced
from fusecomp.runtime.engine import Engine
engine = Engine(llama(), CONFIG)
print(json.dumps([engine.report.program, serve(engine), traced()]))
"""


def test_a_second_process_loads_the_program(expected):
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", CHILD, root]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root, env=dict(os.environ))
    program, tokens, graphs = json.loads(done.stdout.splitlines()[-1])
    assert program.startswith("loaded ")
    assert (tokens, graphs) == (expected, 0)


def test_another_model_compiles_and_says_what_differs(expected):
    report = Engine(llama(rms_norm_eps=1e-3), CONFIG).report
    assert "rms_norm_eps: 1e-06 -> 0.001" in report.program
    assert "stored as" in report.program


def test_another_kv_cache_compiles_and_says_so(expected):
    report = Engine(llama(), CONFIG.replace(kv_cache_dtype="fp8")).report
    assert "kv_cache_dtype: auto -> fp8" in report.program
    assert "stored as" in report.program


@pytest.mark.parametrize("fuse", ["always", "never"])
def test_longer_steps_do_not_take_code_compiled_for_shorter_ones(cache, fuse):
    """Inductor's own cache, which both share, does not know what a number of tokens is bounded by."""
    prompt = list(range(3, 60))
    for most in (32, 64):
        engine = Engine(llama(num_hidden_layers=1), CONFIG.replace(max_num_batched_tokens=most, fuse=fuse))
        engine.add_request("0", prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        while engine.has_unfinished_requests():
            assert not any(out.error for out in engine.step())


def test_a_damaged_artefact_compiles_again_with_the_reason(cache, expected, caplog):
    for path in cache.glob("programs/*/piece-*"):
        path.write_bytes(path.read_bytes()[:-20])
    engine = Engine(llama(), CONFIG)
    assert "is damaged" in engine.report.program
    assert "is damaged" in caplog.text
    assert serve(engine) == expected
    assert Engine(llama(), CONFIG).report.program.startswith("loaded ")


def test_an_artefact_that_does_not_load_compiles_again_with_the_reason(expected, monkeypatch):
    def load(path):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("fusecomp.runtime.program_cache.load_artifact", load)
    assert "fails to load (RuntimeError: no such operator)" in Engine(llama(), CONFIG).report.program


def test_a_program_that_computes_something_else_compiles_again_with_the_reason(expected, monkeypatch):
    call = StepProgram.__call__
    monkeypatch.setattr(StepProgram, "__call__", lambda self, *args: -call(self, *args))
    engine = Engine(llama(), CONFIG)
    assert "the program's logits are not the model's" in engine.report.program
    assert serve(engine) == expected


def test_the_store_can_be_turned_off(cache, monkeypatch):
    report = Engine(llama(), CONFIG.replace(compile_cache=False)).report
    assert "compile_cache=False" in report.program
    monkeypatch.setenv("FUSECOMP_COMPILE_CACHE", "0")
    assert "FUSECOMP_COMPILE_CACHE=0" in Engine(llama(), CONFIG).report.program
    assert "enforce_eager" in Engine(llama(), CONFIG.replace(enforce_eager=True)).report.program
    assert not cache.exists()


class WithConstant(nn.Module):
    """Multiplies the logits by a tensor that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.model = llama()
        self.config = self.model.config
        self.factor = [torch.full((1,), 2.0)]

    def forward(self, input_ids, position_ids=None, use_cache=None, logits_to_keep=0):
        out = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_to_keep)
        return out.logits * self.factor[0]


def test_a_model_that_cannot_be_described_is_not_stored(cache):
    model = llama()
    model.model.layers[1].mlp.mystery = object()
    assert "model.layers.1.mlp.mystery holds a builtins.object" in Engine(model, CONFIG).report.program
    assert "not stored" in Engine(WithConstant().eval(), CONFIG).report.program
    assert not list(cache.glob("programs/*"))


@pytest.mark.parametrize("change", ["attribute", "parameter", "module", "dtype"])
def test_a_change_after_a_warm_start_is_refused(expected, change):
    model = llama()
    engine = Engine(model, CONFIG)
    mlp = model.model.layers[0].mlp
    mlp.act_fn.training = mlp.act_fn.training  # assigning the same value changes nothing
    model.model.norm.variance_epsilon = float("1e-6")
    assert engine.report.program.startswith("loaded ")
    assert serve(engine) == expected
    if change == "attribute":
        model.model.norm.variance_epsilon = 1e-3
    elif change == "parameter":
        mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.clone())
    elif change == "module":
        mlp.act_fn = nn.ReLU()
    else:
        model.half()
    with pytest.raises(RecompileError, match="is not what it was"):
        assert serve(engine) != expected


# ---------------------------------------------------------------- identity


def parts(model, config=CONFIG):
    probe = run_probe(model, Implementations(model), config.max_model_len)
    parameter = next(model.parameters())
    return identity(model, config, probe, parameter.device, parameter.dtype)


def changed_parts(a, b):
    return {name for name in a if a[name] != b[name]}


def test_equal_models_have_equal_identities():
    a, b = parts(llama()), parts(llama())
    assert changed_parts(a, b) == set()
    assert json.loads(json.dumps(a)) == json.loads(json.dumps(b))


def _eps(model):
    model.model.norm.variance_epsilon = 0.5


def _activation(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()


def _forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: x, mlp)


def _strides(model):
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()


def _tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def _buffer(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def _grad(model):
    model.lm_head.weight.requires_grad_(True)


@pytest.mark.parametrize(
    "change, part",
    [
        (_eps, "modules"),
        (_activation, "modules"),
        (_forward, "modules"),
        (_strides, "tensors"),
        (_tied, "tensors"),
        (_buffer, "buffers"),
        (_grad, "tensors"),
        (lambda model: model.double(), "engine"),
    ],
)
def test_a_change_of_the_model_changes_its_identity(change, part):
    model = llama()
    before = parts(model)
    change(model)
    assert part in changed_parts(before, parts(model))


@pytest.mark.parametrize("change", [{"block_size": 32}, {"max_model_len": 32}, {"max_num_batched_tokens": 16}])
def test_a_change_of_the_engine_changes_the_identity(change):
    assert "engine" in changed_parts(parts(llama()), parts(llama(), CONFIG.replace(**change)))


def test_versions_settings_and_sources_are_parts(monkeypatch):
    before = parts(llama())
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(identity_module, "_own_source", lambda: "edited")
    with torch._inductor.config.patch(max_autotune=True):
        after = parts(llama())
    assert changed_parts(before, after) == {"torch", "fusecomp", "settings"}
    assert differences(before["settings"], after["settings"]) == ["inductor.max_autotune: false -> true"]


def test_a_method_replaced_in_its_class_changes_the_identity(monkeypatch):
    before = parts(llama())
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm

    def forward(self, hidden_states):
        return self.weight * hidden_states

    monkeypatch.setattr(norm, "forward", forward)
    assert {"modules", "model code"} <= changed_parts(before, parts(llama()))


def test_a_function_replaced_in_the_model_s_module_changes_the_identity(monkeypatch):
    before = parts(llama())
    module = transformers.models.llama.modeling_llama
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: (q, k))
    assert changed_parts(before, parts(llama())) == {"model code"}


def test_code_without_a_source_file_is_undescribable():
    scope = {"nn": nn, "__name__": "nowhere"}
    exec("class Act(nn.Module):\n    def forward(self, x):\n        return x", scope)
    sys.modules["nowhere"] = types.ModuleType("nowhere")
    try:
        model = llama()
        model.model.layers[0].mlp.act_fn = scope["Act"]()
        with pytest.raises(Undescribable, match="'nowhere', which has no source file"):
            parts(model)
    finally:
        del sys.modules["nowhere"]


def test_while_kernels_compile_ahead_equal_pieces_are_called_once(monkeypatch):
    calls = []

    def piece(kind):
        return lambda x: (calls.append(kind), (x + 1,))[1]

    chain = [[INPUT, [STEP, "tokens"]]]
    for kind in "abbb":
        chain += [[CALL, kind, [["at", len(chain) - 1]]], [ITEM, len(chain), 0]]
    program = StepProgram(Plan(chain, len(chain) - 1), {kind: piece(kind) for kind in "ab"}, nn.Module())
    step = [torch.zeros(1)] * len(STEP_INPUTS)
    assert program(step, []).item() == 4
    assert calls == list("abbb")
    calls.clear()
    monkeypatch.setattr(program_module, "compiling_ahead", lambda: True)
    program(step, [])
    assert calls == list("ab")
