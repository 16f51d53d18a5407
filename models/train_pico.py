"""Trains the bundled checkpoints: corpus -> tokenizer -> tokens -> training -> Hugging Face folder -> figures and card.

    python -m models.train_pico --prepare DIR            # corpus, tokenizer and token arrays only
    python -m models.train_pico --data DIR --out DIR     # train both on a GPU (about 40 s each on an H200)
    python -m models.train_pico --smoke --out DIR        # everything, reduced, on a CPU in about a minute

fp32 master weights, bf16 autocast, AdamW, linear warm-up and cosine decay to zero. The weights with the lowest loss on
the validation split are kept; the held-out split is measured on the bf16 weights as saved, after training. The schedule
follows whichever of `--epochs`, `--steps` and `--minutes` is reached first.

The MoE trains through a dense equivalent of its experts: every expert on every token, weighted by the router's top-k
weights and zero elsewhere. That is the same function with the same gradients as the sparse one, in two matrix products.
"""

import argparse
import itertools
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from models import corpus, figures, perplexity
from models.corpus import BOS_ID, EOS_ID, PAD_ID
from models.recipes import RECIPES, Recipe

DENSE_EXPERTS = "pico_dense"


def dense_experts(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, D], top_k_index and top_k_weights [T, K] -> [T, D].

    The weights are gate_up_proj [E, 2M, D] and down_proj [E, D, M].
    """
    gate_up = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
    inner = self._apply_gate(gate_up)  # [T, E, M]
    weights = inner.new_zeros(inner.shape[:2]).scatter(1, top_k_index, top_k_weights.to(inner.dtype))  # [T, E]
    return F.linear((inner * weights.unsqueeze(-1)).flatten(1), self.down_proj.transpose(0, 1).flatten(1))


def balance_loss(router_logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """router_logits [T, E] -> Switch Transformer's load-balancing loss of one layer, scaled to 1 when all is even."""
    probabilities = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return (chosen.mean(0) * probabilities.mean(0)).sum() * router_logits.shape[-1] / top_k


class Trainee:
    """A model with its loss. `compiled` compiles one decoder layer (shared by all of them) and the head."""

    def __init__(self, recipe: Recipe, device: torch.device, compiled: bool):
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.model: PreTrainedModel = recipe.build().to(device)
        self.gates = [layer.mlp.gate for layer in self.model.model.layers] if recipe.experts else []
        for layer in self.model.model.layers:  # outputs into the residual stream start smaller the deeper the model
            last = [layer.self_attn.o_proj.weight]
            last.append(layer.mlp.experts.down_proj if recipe.experts else layer.mlp.down_proj.weight)
            for weight in last:
                weight.data.mul_((2 * recipe.layers) ** -0.5)
        if recipe.experts:
            self.model.set_experts_implementation(DENSE_EXPERTS)
            for gate in self.gates:
                gate.register_forward_hook(_keep_router_logits)
        self.head = self._head
        if compiled:
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
            self.head = torch.compile(self._head, dynamic=False)

    @staticmethod
    def _head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    def losses(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [B, context + 1] -> mean nats of the tokens that are scored, and the mean balance loss (0 if dense)."""
        labels = rows[:, 1:].masked_fill((rows[:, 1:] == BOS_ID) | (rows[:, 1:] == PAD_ID), -100)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self.model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            nll = self.head(hidden, self.model.lm_head.weight, labels)
        if not self.gates:
            return nll, nll.new_zeros(())
        return nll, torch.stack([balance_loss(g.kept_logits, self.recipe.top_k) for g in self.gates]).mean()

    def validate(self, rows: torch.Tensor) -> float:
        """Mean nats per token of padded rows [N, context + 1]; runs the training graph, so that nothing recompiles."""
        nats, count = 0.0, 0
        for group in rows.split(self.recipe.rows):
            full = F.pad(group, (0, 0, 0, self.recipe.rows - len(group)), value=PAD_ID)
            scored = int(((full[:, 1:] != BOS_ID) & (full[:, 1:] != PAD_ID)).sum())
            nats += float(self.losses(full)[0].detach()) * scored
            count += scored
        return nats / count


def _keep_router_logits(gate: torch.nn.Module, args: tuple, output: tuple) -> None:
    gate.kept_logits = output[0]


def batches(stream: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless rows [B, context + 1]: `bos`, then `context` tokens of the stream. Each epoch cuts elsewhere."""
    length = recipe.context
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(stream) - offset) // length
        starts = offset + length * torch.randperm(count, generator=generator).to(stream.device)
        span = torch.arange(length, device=stream.device)
        for group in starts.split(recipe.rows):
            if len(group) == recipe.rows:
                yield F.pad(stream[group[:, None] + span], (1, 0), value=BOS_ID)


def optimizer_for(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=fused)


def train(
    trainee: Trainee,
    stream: torch.Tensor,
    validation: torch.Tensor,
    *,
    max_steps: int,
    minutes: float,
    calibrate: int = 30,
) -> dict:
    """Trains in place, loads the best weights at the end, and returns what happened."""
    recipe, model = trainee.recipe, trainee.model
    source = batches(stream, recipe, torch.Generator().manual_seed(recipe.seed))
    optimizer = optimizer_for(model, recipe)
    best, best_state, best_step, history = math.inf, {}, 0, []
    started, step, total = time.monotonic(), 0, max_steps
    nll = aux = torch.zeros(())
    while True:
        elapsed = time.monotonic() - started
        progress = max(step / total, elapsed / (60 * minutes))
        if step and (step % max(1, total // 20) == 0 or progress >= 1):
            loss = trainee.validate(validation)
            history.append(
                {"step": step, "seconds": round(elapsed, 1), "train": float(nll.detach()), "validation": loss}
            )
            print(
                f"{recipe.name} step {step}/{total} {elapsed:.0f}s train {history[-1]['train']:.4f} "
                f"validation {loss:.4f} balance {float(aux.detach()):.3f}",
                flush=True,
            )
            if not math.isfinite(loss):
                raise FloatingPointError(f"{recipe.name}: the validation loss is {loss} at step {step}")
            if loss < best:
                best, best_step = loss, step
                best_state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if progress >= 1:
            break
        rate = recipe.learning_rate * min((step + 1) / recipe.warmup_steps, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        nll, aux = trainee.losses(next(source))
        (nll + recipe.aux_coefficient * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == calibrate:
            _wait(trainee.device)
            calibrated = time.monotonic()
        if step == 2 * calibrate:  # how many steps the time allows
            _wait(trainee.device)
            seconds = (time.monotonic() - calibrated) / calibrate
            total = min(total, step + int((60 * minutes - (time.monotonic() - started)) / seconds * 0.95))
            print(f"{recipe.name}: {seconds * 1e3:.2f} ms a step, {total} steps planned", flush=True)
    model.load_state_dict(best_state)
    tokens = best_step * recipe.rows * recipe.context
    return {
        "steps": step, "best_step": best_step, "tokens": tokens, "epochs": round(tokens / len(stream), 2),
        "seconds": round(time.monotonic() - started, 1), "validation_nats_per_token": best, "history": history,
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def save(trainee: Trainee, tokenizer: Path, folder: Path) -> None:
    """bf16 weights, configuration, generation configuration and tokenizer, as `from_pretrained` wants them."""
    model = trainee.recipe.build()
    model.load_state_dict({name: value.cpu() for name, value in trainee.model.state_dict().items()})
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False
    )
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


def prepare(folder: Path, *, vocab_size: int, smoke: bool) -> None:
    """Writes `tokenizer/`, `tokens.npz`, `heldout.txt` (the committed excerpt), `heldout_all.txt` and `corpus.json`."""
    texts = corpus.read_corpus()
    if smoke:
        texts = corpus.Corpus(texts.train[:60], texts.validation[:2], texts.heldout[:2])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = corpus.train_tokenizer((d.text for d in texts.train), vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    stream, _ = corpus.tokenize(tokenizer, texts.train, cut_every=500)
    validation, starts = corpus.tokenize(tokenizer, texts.validation)
    np.savez_compressed(folder / "tokens.npz", train=stream, validation=validation, validation_starts=starts)
    excerpt = texts.heldout if smoke else corpus.select_heldout(texts.heldout)
    (folder / "heldout.txt").write_text(corpus.format_heldout(excerpt), encoding="utf-8")
    (folder / "heldout_all.txt").write_text(corpus.format_heldout(texts.heldout), encoding="utf-8")
    facts = {
        "source": f"standard library of CPython {platform.python_version()}",
        "licence": "PSF License Version 2",
        "sha256": texts.digest(),
        "train": {
            "files": len(texts.train),
            "bytes": sum(len(d.text.encode()) for d in texts.train),
            "tokens": len(stream),
        },
        "validation": {"files": len(texts.validation), "bytes": sum(len(d.text.encode()) for d in texts.validation)},
        "heldout": {"files": len(texts.heldout), "bytes": sum(len(d.text.encode()) for d in texts.heldout)},
        "heldout_lines_seen_in_training": round(corpus.shared_lines(texts.train, texts.heldout), 4),
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def validation_rows(arrays: dict[str, np.ndarray], context: int) -> torch.Tensor:
    """The validation files as padded rows [N, context + 1]."""
    rows: list[list[int]] = []
    starts = arrays["validation_starts"]
    for first, last in itertools.pairwise(starts):
        rows.extend(perplexity.windows(arrays["validation"][first + 1 : last], BOS_ID, context + 1))
    return torch.tensor([row + [PAD_ID] * (context + 1 - len(row)) for row in rows])


def ready(recipe: Recipe, device: torch.device, compiled: bool) -> Trainee:
    """A trainee that has run one step without learning from it. If compiling fails it says so and trains uncompiled."""
    trainee = Trainee(recipe, device, compiled)
    probe = torch.full((recipe.rows, recipe.context + 1), EOS_ID, device=device)
    started = time.monotonic()
    try:
        sum(trainee.losses(probe)).backward()
    except Exception as error:
        if not compiled:
            raise
        print(f"{recipe.name}: torch.compile failed, training without it: {type(error).__name__}: {error}", flush=True)
        return ready(recipe, device, compiled=False)
    trainee.model.zero_grad(set_to_none=True)
    print(f"{recipe.name}: first step after {time.monotonic() - started:.1f} s", flush=True)
    return trainee


def run(recipe: Recipe, args: argparse.Namespace, device: torch.device) -> None:
    with np.load(args.data / "tokens.npz") as loaded:
        arrays = dict(loaded)
    stream = torch.from_numpy(arrays["train"].astype(np.int64)).to(device)
    validation = validation_rows(arrays, recipe.context).to(device)
    per_epoch = len(stream) // (recipe.rows * recipe.context)
    max_steps = args.steps or max(1, int(args.epochs * per_epoch))
    trainee = ready(recipe, device, args.compile)
    print(f"{recipe.name}: {trainee.model.num_parameters()} parameters, {per_epoch} steps an epoch", flush=True)
    training = train(trainee, stream, validation, max_steps=max_steps, minutes=args.minutes)
    folder = args.out / recipe.name
    save(trainee, args.data / "tokenizer", folder)
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "tokens_per_step": recipe.rows * recipe.context,
        **training,
    }
    result = figures.write(folder, args.data, report, device)
    print(json.dumps({"name": recipe.name, **result["heldout_all"]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write the tokenizer and tokens there, then stop")
    parser.add_argument("--data", type=Path, help="what --prepare wrote (default: prepared under --out)")
    parser.add_argument("--out", type=Path, default=Path("models"), help="where pico-llama/ and pico-moe/ go")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train one of the two")
    parser.add_argument("--epochs", type=float, default=8.0, help="at most so many passes over the corpus")
    parser.add_argument("--steps", type=int, help="exactly so many steps, time permitting")
    parser.add_argument("--minutes", type=float, default=2.0, help="at most so long per model")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a slice of the corpus, a few steps")
    args = parser.parse_args()
    ALL_EXPERTS_FUNCTIONS.register(DENSE_EXPERTS, dense_experts)
    recipes = [RECIPES[args.only]] if args.only else list(RECIPES.values())
    if args.smoke:
        recipes = [recipe.smoke() for recipe in recipes]
        args.steps, args.minutes, args.compile = args.steps or 40, min(args.minutes, 0.5), False
    if args.prepare:
        prepare(args.prepare, vocab_size=recipes[0].vocab_size, smoke=args.smoke)
        return
    if args.data is None:
        args.data = args.out / "pico-data"
        prepare(args.data, vocab_size=recipes[0].vocab_size, smoke=args.smoke)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for recipe in recipes:
        run(recipe, args, device)


if __name__ == "__main__":
    main()
