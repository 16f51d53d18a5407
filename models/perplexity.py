"""Perplexity of a checkpoint on the committed held-out text: `python -m models.perplexity models/pico-llama`.

The protocol, fixed so that figures stay comparable:
- `heldout.txt` is split at its header lines into whole files; headers are not scored. A file is its tokens, then `eos`.
- A file is cut into consecutive, non-overlapping windows of `context - 1` tokens, the last one shorter. Every window
  starts with `bos` and sees nothing of the windows before it. Every token but `bos` is scored, `eos` too.
- The weights are loaded in fp32 and run by Hugging Face's eager attention and eager experts. With `--quantize` they are
  quantized as `fusecomp.LLM(model, quantize=...)` does, and inputs of linears are rounded in steps of any size.
- nats/token divides the summed negative log likelihood by the tokens scored, nats/byte by the UTF-8 bytes of the files.

`--engine dtype=bfloat16 kv_cache_dtype=fp8` scores what an engine with those options computes: its own step over its
own cache, every window in chunks of `max_num_batched_tokens` (256 unless given), each on the cached keys before it.
"""

import argparse
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fusecomp.config import EngineConfig, check_keys
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.loading import load_model
from models.corpus import CONTEXT, parse_heldout

HELDOUT = Path(__file__).with_name("heldout.txt")
ENGINE = {"max_num_batched_tokens": 256, "max_num_seqs": 16, "kv_cache_bytes": 1 << 27}


@dataclass(frozen=True)
class Score:
    nats: float
    tokens: int
    bytes: int  # 0 when only some windows were scored

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def nats_per_byte(self) -> float:
        return self.nats / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def windows(ids: Sequence[int] | np.ndarray, bos: int, context: int = CONTEXT) -> Iterator[list[int]]:
    """`ids` is one file's tokens, `eos` last, no `bos`; every window is `bos` and up to `context - 1` of them."""
    for start in range(0, len(ids), context - 1):
        yield [bos, *(int(i) for i in ids[start : start + context - 1])]


@torch.no_grad()
def score_windows(model: PreTrainedModel, rows: Sequence[list[int]], batch: int = 1) -> tuple[float, int]:
    """Summed nats and the number of tokens scored. Rows of a batch are padded on the right; padding is not scored."""
    nats, tokens = 0.0, 0
    pad = model.config.pad_token_id or 0
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        longest = max(map(len, group))
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in group], device=model.device)
        scored = [[1] * (len(row) - 1) + [0] * (longest - len(row)) for row in group]
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        nats += float((losses.double() * torch.tensor(scored, device=model.device)).sum())
        tokens += sum(map(sum, scored))
    return nats, tokens


@torch.no_grad()
def score_engine(engine: Engine, rows: Sequence[list[int]]) -> tuple[float, int]:
    """As `score_windows`, of an idle engine: every window alone, chunk by chunk, with the logits of all its tokens."""
    nats, tokens = 0.0, 0
    for window in rows:
        logits = engine.token_logits(window)
        losses = torch.nn.functional.cross_entropy(
            logits[:-1].float(), torch.tensor(window[1:], device=logits.device), reduction="none"
        )
        nats, tokens = nats + float(losses.double().sum()), tokens + len(window) - 1
    return nats, tokens


def load_engine(folder: str | Path, options: Mapping[str, Any]) -> Engine:
    """An engine on the checkpoint with these options of `EngineConfig`."""
    config = EngineConfig(**{**ENGINE, **options})
    model, _ = load_model(folder, config.dtype, config.device, config.quantize, config.calibration)
    return Engine(model, config)


def engine_options(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of `EngineConfig` from `name=value`, numbers and booleans as JSON writes them.

    Raises:
        ConfigError: a name is no field.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        hint = typing.get_type_hints(EngineConfig).get(name)
        options[name] = value if hint in (str, str | None) else json.loads(value)
    check_keys(EngineConfig, options, "--engine")
    return options


def load(folder: str | Path) -> PreTrainedModel:
    """The checkpoint as the protocol wants it: fp32, eager attention, eager experts."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True, local_files_only=True
    ).eval()
    if hasattr(model.config, "num_experts") or hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    return model


def heldout_windows(tokenizer, text: str, context: int = CONTEXT) -> tuple[list[list[int]], int]:
    """All windows of a held-out text and the UTF-8 bytes that they stand for."""
    documents = parse_heldout(text)
    rows: list[list[int]] = []
    for document in documents:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        rows.extend(windows([*ids, tokenizer.eos_token_id], tokenizer.bos_token_id, context))
    return rows, sum(len(d.text.encode()) for d in documents)


def quantize(model: PreTrainedModel, tokenizer, scheme: str, calibrated: bool) -> None:
    """Quantize a loaded model as fusecomp does, with activations rounded whatever the number of tokens."""
    from fusecomp.quant.online.schemes import SCHEMES
    from fusecomp.quant.online.transform import quantize_model

    every_step = SCHEMES[scheme].from_tokens(0)
    quantize_model(model, every_step, text=None if calibrated else [], tokenizer=lambda: tokenizer)


def measure(
    folder: str | Path,
    text: str | None = None,
    limit: int | None = None,
    context: int = CONTEXT,
    scheme: str | None = None,
    calibrated: bool = True,
    engine: Mapping[str, Any] | None = None,
) -> Score:
    """Scores a checkpoint on the held-out text, or on its first `limit` windows.

    Args:
        scheme: quantize it so first.
        engine: options of the engine that scores it; None for Hugging Face's eager model.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows, size = heldout_windows(tokenizer, HELDOUT.read_text(encoding="utf-8") if text is None else text, context)
    if engine is not None and scheme is not None:
        raise ValueError("the engine quantizes by its own option: --engine quantize=SCHEME")
    if engine is not None:
        nats, tokens = score_engine(load_engine(folder, engine), rows[:limit])
        return Score(nats, tokens, size if limit is None or limit >= len(rows) else 0)
    model = load(folder)
    if scheme is not None:
        quantize(model, tokenizer, scheme, calibrated)
    nats, tokens = score_windows(model, rows[:limit])
    return Score(nats, tokens, size if limit is None or limit >= len(rows) else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a checkpoint in Hugging Face's format")
    parser.add_argument("--text", type=Path, default=HELDOUT, help="held-out text (default: the committed one)")
    parser.add_argument("--windows", type=int, help="score only the first N windows")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"window length (default: {CONTEXT})")
    parser.add_argument("--quantize", metavar="SCHEME", help="fp8, int8 or int4 (default: as the checkpoint is)")
    parser.add_argument("--no-calibration", action="store_true", help="quantize by rounding alone")
    parser.add_argument(
        "--engine", nargs="*", metavar="NAME=VALUE", help="score an engine with these options of EngineConfig"
    )
    args = parser.parse_args()
    if args.engine is not None and args.quantize:
        parser.error("--quantize is for Hugging Face's model; an engine takes --engine quantize=SCHEME")
    score = measure(
        args.model,
        args.text.read_text(encoding="utf-8"),
        args.windows,
        args.context,
        args.quantize,
        not args.no_calibration,
        None if args.engine is None else engine_options(args.engine),
    )
    how = f" quantized to {args.quantize}" if args.quantize else ""
    print(f"{args.model}{how}: {score.tokens} tokens, perplexity {score.perplexity:.3f}")
    result = asdict(score) | {
        "nats_per_token": score.nats_per_token,
        "nats_per_byte": score.nats_per_byte if score.bytes else None,
        "perplexity": score.perplexity,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
