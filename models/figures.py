"""Measures a saved pico checkpoint and writes `figures.json` and its card.

Training calls `write`; `python -m models.figures models/pico-llama --data DIR` measures again and keeps what is on
record about the training. `DIR` is what `train_pico --prepare` wrote.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from models import cards, perplexity

PROMPTS = ("def ", "class Queue:\n    ", "import os\n\ndef read_lines(path):\n    ")
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}
FIRST_WINDOWS = 8  # how many held-out windows the tests measure again


def write(folder: Path, data: Path, training: dict, device: torch.device) -> dict:
    """Writes and returns the figures. `training` is recorded as it is."""
    excerpt = (data / "heldout.txt").read_text(encoding="utf-8")
    everything = (data / "heldout_all.txt").read_text(encoding="utf-8")
    model = perplexity.load(folder)
    figures = {
        "name": folder.name,
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "corpus": json.loads((data / "corpus.json").read_text(encoding="utf-8")),
        "training": training,
        "heldout_all": score_folder(folder, everything, device),
        "heldout_txt": score_folder(folder, excerpt, device),
        "heldout_txt_first_windows": {"windows": FIRST_WINDOWS, **score_folder(folder, excerpt, device, FIRST_WINDOWS)},
        "samples": samples(folder),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(cards.card(figures, folder), encoding="utf-8")
    return figures


def score_folder(folder: Path, text: str, device: torch.device, limit: int | None = None) -> dict:
    """The protocol of `models.perplexity` on the saved folder; for a MoE also the share of tokens of each expert."""
    model = perplexity.load(folder).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, size = perplexity.heldout_windows(tokenizer, text, model.config.max_position_embeddings)
    gates = [m.gate for m in model.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
    picks = [torch.zeros(model.config.num_experts, dtype=torch.int64) for _ in gates]
    for gate, counts in zip(gates, picks, strict=True):
        gate.register_forward_hook(_count_picks(counts))
    nats, tokens = perplexity.score_windows(model, rows[:limit])
    score = perplexity.Score(nats, tokens, size)
    result = {"tokens": tokens, "nats_per_token": score.nats_per_token, "perplexity": score.perplexity}
    if limit is None:
        result |= {"bytes": size, "nats_per_byte": score.nats_per_byte}
    if picks and limit is None:
        result["expert_load"] = [[round(float(n), 4) for n in (counts / counts.sum())] for counts in picks]
    return result


def _count_picks(counts: torch.Tensor) -> Callable[[torch.nn.Module, tuple, tuple], None]:
    """A hook that adds to `counts` [E] how often the router chose each expert."""

    def hook(gate: torch.nn.Module, args: tuple, output: tuple) -> None:
        counts.add_(torch.bincount(output[2].flatten(), minlength=len(counts)).cpu())

    return hook


@torch.no_grad()
def samples(folder: Path, prompts: tuple[str, ...] = PROMPTS, new_tokens: int = 96) -> list[dict]:
    """Completions of the saved checkpoint, on the CPU in fp32: one greedy and one sampled for each prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), perplexity.load(folder)
    results = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")
        start = ids["input_ids"].shape[1]
        greedy = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)[0, start:]
        torch.manual_seed(0)
        drawn = model.generate(**ids, max_new_tokens=new_tokens, do_sample=True, **SAMPLING)[0, start:]
        texts = tokenizer.batch_decode([greedy, drawn], skip_special_tokens=True)
        results.append({"prompt": prompt, "greedy": texts[0], "sampled": texts[1]})
    return results


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token passes through: all but the experts that it is not routed to."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not experts:
        return model.num_parameters()
    return model.num_parameters() - experts * (model.config.num_experts - model.config.num_experts_per_tok) // (
        model.config.num_experts
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a pico checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="what train_pico --prepare wrote")
    args = parser.parse_args()
    training = json.loads((args.model / "figures.json").read_text(encoding="utf-8"))["training"]
    write(args.model, args.data, training, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
