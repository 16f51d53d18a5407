"""Model cards of the pico checkpoints, written from the figures that `train_pico` measured."""

import json
from pathlib import Path

_HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: code
tags: [python, tiny]
---

# {name}

A small `{architecture}` trained by fusecomp on Python source code, so that tests, examples and small benchmarks run on
real weights without a download. It writes recognisable Python, repeats itself when decoded greedily, and knows nothing
else.
"""

_HELDOUT = """## Held-out loss

bf16 weights, evaluated in fp32 by Hugging Face's eager attention{experts}, windows of {context} tokens;
`models/perplexity.py` states the protocol.

| text | tokens | nats per token | nats per byte | perplexity per token |
|---|---|---|---|---|
{rows}

Held out are whole files of the library, chosen by a hash of their path; the tests of those modules are not in the
training split either. {shared:.1f} % of the held-out lines longer than 40 characters (imports, licence headers, idioms)
also occur in training files.
"""

_FOOTER = """## Reproducing

`python -m models.train_pico --only {only}` under the same Python version; the corpus has SHA-256 `{sha}…`. AdamW, peak
learning rate {learning_rate}, weight decay {weight_decay}, torch {torch}. `figures.json` holds every figure and the
loss curve.

The weights are Apache-2.0 like the rest of the project. The corpus is under the PSF License Version 2, copyright Python
Software Foundation.
"""


def card(figures: dict, folder: Path) -> str:
    """README.md of one checkpoint, front matter included."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = figures["heldout_all"]
    parts = [
        _HEADER.format(name=figures["name"], architecture=config["architectures"][0]),
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(figures, config, folder)),
        "",
        _heldout(figures, config),
        *([_expert_load(whole["expert_load"])] if "expert_load" in whole else []),
        "## Samples\n",
        *(_sample(sample) for sample in figures["samples"]),
        _FOOTER.format(
            only="moe" if "num_local_experts" in config else "llama",
            sha=figures["corpus"]["sha256"][:16],
            **{key: figures["training"][key] for key in ("learning_rate", "weight_decay", "torch")},
        ),
    ]
    return "\n".join(parts)


def _facts(figures: dict, config: dict, folder: Path) -> list[tuple[str, str]]:
    corpus, training = figures["corpus"], figures["training"]
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    active = f", {figures['active_parameters']:,} per token" if "num_local_experts" in config else ""
    ids = ", ".join(f"`{name}` {config[f'{name}_token_id']}" for name in ("bos", "eos", "pad"))
    train = corpus["train"]
    return [
        ("parameters", f"{figures['parameters']:,}{active} ({weights / 1e6:.2f} MB in bf16, embeddings tied)"),
        ("architecture", _architecture(config)),
        ("vocabulary", f"{config['vocab_size']}, byte-level BPE trained on the training split; {ids}"),
        ("context", f"{config['max_position_embeddings']} tokens, trained at that length"),
        (
            "corpus",
            f"{corpus['source']} ({corpus['licence']}): {train['files']} files, {train['bytes'] / 1e6:.1f} MB, "
            f"{train['tokens'] / 1e6:.2f} M tokens",
        ),
        (
            "trained on",
            f"{training['tokens'] / 1e6:.0f} M tokens ({training['epochs']} epochs, {training['best_step']} steps of "
            f"{training['tokens_per_step']} tokens) in {training['seconds']:.0f} s on one {training['device']}",
        ),
        ("validation", f"{training['validation_nats_per_token']:.4f} nats per token (chooses the step; bf16 autocast)"),
    ]


def _heldout(figures: dict, config: dict) -> str:
    corpus, first = figures["corpus"], figures["heldout_txt_first_windows"]
    rows = [
        _row(f"whole held-out split ({corpus['heldout']['files']} files)", figures["heldout_all"]),
        _row("`models/heldout.txt`", figures["heldout_txt"]),
        _row(f"its first {first['windows']} windows", first),
    ]
    return _HELDOUT.format(
        experts=" and eager experts" if "num_local_experts" in config else "",
        context=config["max_position_embeddings"],
        rows="\n".join(rows),
        shared=100 * corpus["heldout_lines_seen_in_training"],
    )


def _architecture(config: dict) -> str:
    heads = f"{config['num_attention_heads']} query heads and {config['num_key_value_heads']} kv heads"
    text = f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {heads} of {config['head_dim']}"
    if "num_local_experts" in config:
        return (
            f"{text}, qk-norm, {config['num_local_experts']} experts of width {config['moe_intermediate_size']}, "
            f"top-{config['num_experts_per_tok']} with normalised weights"
        )
    return f"{text}, SwiGLU of width {config['intermediate_size']}"


def _sample(sample: dict) -> str:
    blocks = (
        f"{title}:\n\n````python\n{sample['prompt']}{sample[kind]}\n````\n"
        for kind, title in (
            ("greedy", "Greedy"),
            ("sampled", "Sampled at temperature 0.8, top-k 50, top-p 0.95, seed 0"),
        )
    )
    return f"Prompt `{json.dumps(sample['prompt'])}`\n\n" + "\n".join(blocks)


def _row(name: str, score: dict) -> str:
    per_byte = f"{score['nats_per_byte']:.4f}" if "nats_per_byte" in score else ""
    return f"| {name} | {score['tokens']} | {score['nats_per_token']:.4f} | {per_byte} | {score['perplexity']:.3f} |"


def _expert_load(load: list[list[float]]) -> str:
    lines = [
        "## Expert load\n",
        f"Share of routed tokens per expert over the held-out split, in % (even: {100 / len(load[0]):.2f}).\n",
    ]
    lines.append("| layer | least | most | all |\n|---|---|---|---|")
    for index, shares in enumerate(load):
        percent = [100 * share for share in shares]
        lines.append(f"| {index} | {min(percent):.2f} | {max(percent):.2f} | {' '.join(f'{p:.1f}' for p in percent)} |")
    return "\n".join(lines) + "\n"
