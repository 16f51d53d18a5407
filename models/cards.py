"""Model cards of the pico checkpoints, written from the figures that `train_pico` measured."""

import json
from pathlib import Path


def card(figures: dict, folder: Path) -> str:
    """README.md of one checkpoint, front matter included."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    corpus, training = figures["corpus"], figures["training"]
    whole, excerpt, first = figures["heldout_all"], figures["heldout_txt"], figures["heldout_txt_first_windows"]
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parts = [
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "language: code\ntags: [python, tiny]\n---\n",
        f"# {figures['name']}\n",
        f"A small `{config['architectures'][0]}` trained by fusecomp on Python source code, so that tests, examples and "
        "small benchmarks run on real weights without a download. It writes recognisable Python and knows nothing else.\n",
        "| | |\n|---|---|",
        f"| parameters | {figures['parameters']:,}"
        + (f", {figures['active_parameters']:,} per token" if "num_local_experts" in config else "")
        + f" ({weights / 1e6:.2f} MB in bf16, embeddings tied) |",
        f"| architecture | {_architecture(config)} |",
        f"| vocabulary | {config['vocab_size']}, byte-level BPE trained on the training split; `bos` {config['bos_token_id']}, "
        f"`eos` {config['eos_token_id']}, `pad` {config['pad_token_id']} |",
        f"| context | {config['max_position_embeddings']} tokens, trained at that length |",
        f"| corpus | {corpus['source']} ({corpus['licence']}): {corpus['train']['files']} files, "
        f"{corpus['train']['bytes'] / 1e6:.1f} MB, {corpus['train']['tokens'] / 1e6:.2f} M tokens |",
        f"| trained on | {training['tokens'] / 1e6:.0f} M tokens ({training['epochs']} epochs, {training['best_step']} steps of "
        f"{training['tokens_per_step']} tokens) in {training['seconds']:.0f} s on one {training['device']} |",
        f"| validation | {training['validation_nats_per_token']:.4f} nats per token (chooses the step; bf16 autocast) |\n",
        "## Held-out loss\n",
        "bf16 weights, evaluated in fp32 by Hugging Face's eager attention"
        + (" and eager experts" if "num_local_experts" in config else "")
        + f", windows of {config['max_position_embeddings']} tokens; `models/perplexity.py` states the protocol.\n",
        "| text | tokens | nats per token | nats per byte | perplexity per token |\n|---|---|---|---|---|",
        _row(f"whole held-out split ({corpus['heldout']['files']} files)", whole),
        _row("`models/heldout.txt`", excerpt),
        _row(f"its first {first['windows']} windows", first) + "\n",
        "Held out are whole files of the library, chosen by a hash of their path; the tests of those modules are not in the "
        f"training split either. {100 * corpus['heldout_lines_seen_in_training']:.1f} % of the held-out lines longer than 40 "
        "characters (imports, licence headers, idioms) also occur in training files.\n",
    ]
    if "expert_load" in whole:
        parts.append(_expert_load(whole["expert_load"]))
    parts.append("## Greedy samples\n")
    for sample in figures["samples"]:
        parts.append(f"Prompt `{json.dumps(sample['prompt'])}`:\n\n````python\n{sample['prompt']}{sample['completion']}\n````\n")
    parts.append(
        "## Reproducing\n\n"
        f"`python -m models.train_pico --only {'moe' if 'num_local_experts' in config else 'llama'}` under the same Python "
        f"version; the corpus has SHA-256 `{corpus['sha256'][:16]}…`. AdamW, peak learning rate {training['learning_rate']}, "
        f"torch {training['torch']}. `figures.json` holds every figure and the loss curve.\n\n"
        "The weights are Apache-2.0 like the rest of the project; the corpus is under the PSF License Version 2, "
        "copyright Python Software Foundation."
    )
    return "\n".join(parts) + "\n"


def _architecture(config: dict) -> str:
    text = (
        f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {config['num_attention_heads']} query heads "
        f"and {config['num_key_value_heads']} kv heads of {config['head_dim']}"
    )
    if "num_local_experts" in config:
        return (
            f"{text}, qk-norm, {config['num_local_experts']} experts of width {config['moe_intermediate_size']}, "
            f"top-{config['num_experts_per_tok']} with normalised weights"
        )
    return f"{text}, SwiGLU of width {config['intermediate_size']}"


def _row(name: str, score: dict) -> str:
    per_byte = f"{score['nats_per_byte']:.4f}" if "nats_per_byte" in score else ""
    return f"| {name} | {score['tokens']} | {score['nats_per_token']:.4f} | {per_byte} | {score['perplexity']:.3f} |"


def _expert_load(load: list[list[float]]) -> str:
    lines = ["## Expert load\n", f"Share of routed tokens per expert over the held-out split, in % (even: {100 / len(load[0]):.2f}).\n"]
    lines.append("| layer | least | most | all |\n|---|---|---|---|")
    for index, shares in enumerate(load):
        percent = [100 * share for share in shares]
        lines.append(f"| {index} | {min(percent):.2f} | {max(percent):.2f} | {' '.join(f'{p:.1f}' for p in percent)} |")
    return "\n".join(lines) + "\n"
