"""The bundled checkpoints are what their cards say, and every family of the registry builds a usable model."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusecomp.runtime.verify import model_error
from models import perplexity
from models.corpus import parse_heldout
from models.registry import FAMILIES, WINDOW, build, mixture

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = {name: ROOT / "models" / name for name in ("pico-llama", "pico-moe")}
ARCHITECTURES = {"pico-llama": "LlamaForCausalLM", "pico-moe": "Qwen3MoeForCausalLM"}
checkpoints = pytest.mark.parametrize("name", sorted(CHECKPOINTS))
families = pytest.mark.parametrize("name", sorted(FAMILIES))


@cache
def figures(name: str) -> dict:
    return json.loads((CHECKPOINTS[name] / "figures.json").read_text(encoding="utf-8"))


@cache
def tokenizer(name: str):
    return AutoTokenizer.from_pretrained(CHECKPOINTS[name], local_files_only=True)


@cache
def fp32_model(name: str):
    return perplexity.load(CHECKPOINTS[name])


def prompt_ids(vocab_size: int, shape: tuple[int, int], seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class TestCheckpoints:
    @checkpoints
    def test_is_small_and_holds_only_safetensors_json_and_its_card(self, name):
        files = list(CHECKPOINTS[name].iterdir())
        assert {file.suffix for file in files} == {".safetensors", ".json", ".md"}
        assert sum(file.stat().st_size for file in files) <= 12_000_000

    @checkpoints
    def test_loads_in_bf16_and_agrees_with_its_card(self, name):
        model = AutoModelForCausalLM.from_pretrained(
            CHECKPOINTS[name], dtype="auto", use_safetensors=True, local_files_only=True
        )
        assert type(model).__name__ == ARCHITECTURES[name]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.num_parameters() == figures(name)["parameters"]
        with safe_open(CHECKPOINTS[name] / "model.safetensors", framework="pt") as weights:
            assert all(weights.get_slice(key).get_dtype() == "BF16" for key in weights.keys())  # noqa: SIM118
        config = model.config
        assert config.num_attention_heads > config.num_key_value_heads
        assert config.head_dim == 32
        assert config.max_position_embeddings >= 1024
        card = (CHECKPOINTS[name] / "README.md").read_text(encoding="utf-8")
        assert f"{figures(name)['parameters']:,}" in card
        for key in ("heldout_all", "heldout_txt"):
            assert f"{figures(name)[key]['nats_per_token']:.4f}" in card

    @checkpoints
    def test_special_tokens_are_the_same_everywhere(self, name):
        model = fp32_model(name)
        for holder in (model.config, model.generation_config):
            for token in ("bos", "eos", "pad"):
                assert getattr(holder, f"{token}_token_id") == getattr(tokenizer(name), f"{token}_token_id")
        assert len({model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id}) == 3
        assert len(tokenizer(name)) == model.config.vocab_size
        assert tokenizer(name)("x").input_ids[0] == model.config.bos_token_id

    def test_the_moe_uses_every_expert(self):
        config = fp32_model("pico-moe").config
        assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (16, 4, True)
        for shares in figures("pico-moe")["heldout_all"]["expert_load"]:
            assert len(shares) == 16
            assert min(shares) > 0.005

    @settings(max_examples=100)
    @given(text=st.text(max_size=200))
    def test_the_tokenizer_loses_nothing(self, text):
        for name in CHECKPOINTS:
            ids = tokenizer(name)(text).input_ids
            assert tokenizer(name).decode(ids[1:]) == text
            assert all(0 <= i < 4096 for i in ids)

    def test_the_heldout_text_is_whole_python_files(self):
        documents = parse_heldout(perplexity.HELDOUT.read_text(encoding="utf-8"))
        assert len(documents) >= 5
        for document in documents:
            ast.parse(document.text)

    @checkpoints
    def test_perplexity_of_the_first_windows_is_the_cards(self, name):
        expected = figures(name)["heldout_txt_first_windows"]
        text = perplexity.HELDOUT.read_text(encoding="utf-8")
        rows, _ = perplexity.heldout_windows(tokenizer(name), text)
        nats, tokens = perplexity.score_windows(fp32_model(name), rows[: expected["windows"]])
        assert tokens == expected["tokens"]
        # Measured on a GPU, repeated here: fp32 sums in another order, and at most a routing tie differs.
        assert nats / tokens == pytest.approx(expected["nats_per_token"], rel=1e-4)

    @checkpoints
    def test_padding_on_the_right_does_not_change_a_score(self, name):
        rows = [[1, *range(300, 340)], [1, *range(500, 520)]]
        separately = [perplexity.score_windows(fp32_model(name), [row]) for row in rows]
        together = perplexity.score_windows(fp32_model(name), rows, batch=2)
        assert together[1] == sum(tokens for _, tokens in separately)
        assert together[0] == pytest.approx(sum(nats for nats, _ in separately), rel=1e-5)

    @checkpoints
    def test_greedy_completions_are_the_cards_and_look_like_python(self, name):
        sample = figures(name)["samples"][0]
        assert sample["prompt"] == "def "
        ids = tokenizer(name)("def ", return_tensors="pt")
        out = fp32_model(name).generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        text = tokenizer(name).decode(out, skip_special_tokens=True)
        assert sample["greedy"].startswith(text)
        signature, _, body = ("def " + text).partition("\n")
        ast.parse(signature + "\n    pass")
        assert body.startswith("    ")

    @checkpoints
    def test_a_finished_file_ends_with_eos(self, name):
        """The end of a whole file makes `eos` far likelier than it is in the middle of one."""
        document = parse_heldout(perplexity.HELDOUT.read_text(encoding="utf-8"))[-1]
        ids = tokenizer(name)(document.text, verbose=False).input_ids
        bos, eos = tokenizer(name).bos_token_id, tokenizer(name).eos_token_id
        with torch.no_grad():
            scores = fp32_model(name)(input_ids=torch.tensor([[bos, *ids[-512:]]])).logits[0].log_softmax(-1)[:, eos]
        assert scores[-1] > scores[:-1].median() + 3


class TestRegistry:
    @families
    def test_entry_is_consistent_with_the_model_it_builds(self, name):
        family = FAMILIES[name]
        model = build(family)
        assert family.name == name
        assert type(model).__name__ == family.architecture
        assert type(model).__module__.startswith("transformers.models.")
        assert len(model.model.layers) == family.layers
        assert not model.training
        blocks = [mixture(layer) for layer in model.model.layers]
        sparse = sum(hasattr(block, "experts") for block in blocks)
        assert sparse == family.expected_total().get("experts", 0)
        assert family.expected_total()["paged_attention"] == family.layers
        assert all(reason for reason in family.exclusions.values())

    @families
    def test_windows_are_those_of_the_configuration(self, name):
        family = FAMILIES[name]
        config = family.make_config()
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None) or 0
        kinds = kinds or ["sliding_attention" if window else "full_attention"] * family.layers
        assert family.windows == tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    @families
    def test_is_deterministic_and_leaves_the_random_state_alone(self, name):
        before = torch.get_rng_state()
        first, second, other = build(name, seed=3), build(name, seed=3), build(name, seed=4)
        assert torch.equal(before, torch.get_rng_state())
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key])
        key = "model.embed_tokens.weight"
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key])

    @families
    def test_every_dtype_runs_and_is_a_rounding_of_the_fp32_model(self, name):
        family = FAMILIES[name]
        reference = build(family)
        ids = prompt_ids(reference.config.vocab_size, (2, 33))
        with torch.no_grad():
            expected = reference(ids).logits
            for dtype in family.dtypes:
                model = build(family, dtype)
                assert {p.dtype for p in model.parameters()} == {dtype}
                logits = model(ids).logits
                assert logits.dtype == dtype
                assert logits.isfinite().all()
                routed = "experts" in family.expected_matches
                assert model_error(logits.flatten(0, 1), expected.flatten(0, 1), routed=routed) < 0.05

    @families
    def test_logits_are_spread_so_that_the_argmax_is_safe(self, name):
        model = build(name)
        ids = prompt_ids(model.config.vocab_size, (4, 40))
        with torch.no_grad():
            logits = model(ids).logits
        largest = logits.topk(2, dim=-1).values
        gap = (largest[..., 0] - largest[..., 1]).flatten()
        assert gap.median() > 0.7
        assert (gap < 0.02).float().mean() < 0.05
        generated = model.generate(ids, max_new_tokens=40, do_sample=False)[:, ids.shape[1] :]
        assert sum(row.unique().numel() for row in generated) > 40  # and it is not soon one token for ever

    @families
    def test_the_context_matters_as_far_as_the_windows_let_it(self, name):
        """The last logits depend on the first token exactly when the layers' windows together reach it."""
        family = FAMILIES[name]
        model = build(family)
        length = 3 * WINDOW
        ids = prompt_ids(model.config.vocab_size, (1, length))
        changed = ids.clone()
        changed[0, 0] = (changed[0, 0] + 1) % model.config.vocab_size
        with torch.no_grad():
            difference = (model(ids).logits - model(changed).logits)[0].abs().amax(-1)
        reach = length if 0 in family.windows else sum(window - 1 for window in family.windows)
        assert difference[: reach + 1].min() > 1e-3
        assert difference[reach + 1 :].eq(0).all()

    def test_an_unknown_family_is_an_error_that_lists_the_known_ones(self):
        with pytest.raises(KeyError, match=r"no family 'gpt5'.*llama"):
            build("gpt5")


@pytest.mark.slow
def test_training_runs_from_corpus_to_card(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "models.train_pico", "--smoke", "--out", str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    for name, architecture in ARCHITECTURES.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        assert type(model).__name__ == architecture
        result = json.loads((tmp_path / name / "figures.json").read_text(encoding="utf-8"))
        history = result["training"]["history"]
        assert history[-1]["validation"] < history[0]["validation"] - 0.5
        assert (tmp_path / name / "README.md").read_text(encoding="utf-8").count(name) >= 1
