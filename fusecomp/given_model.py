"""What a user gives for a model and a tokenizer, as the module and the tokenizer that serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusecomp.config import EngineConfig
from fusecomp.errors import CheckpointError, ConfigError
from fusecomp.request import SamplingParams
from fusecomp.runtime.loading import load_model, load_tokenizer, quantize_in_memory, resolve_device


def materialize(model: Any, config: EngineConfig, given: Any = None) -> tuple[Any, Any, EngineConfig]:
    """A module in evaluation mode, its tokenizer if it came with one, and `config` with the device settled.

    Args:
        given: the tokenizer that a user gave; None if none.
    """
    if isinstance(model, str | Path):
        module, tokenizer = load_model(model, config.dtype, config.device, config.quantize, config.calibration)
        return module, tokenizer, config.replace(device=str(resolve_device(config.device)))
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}", where="LLM", remedy="give a folder, a Hub name or a torch module"
        )
    model.eval()
    if config.dtype != "auto" or config.device != "auto":
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        model.to(device=None if config.device == "auto" else resolve_device(config.device), dtype=dtype)
    if config.quantize is not None:
        quantize_in_memory(model, config, given)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return model, None, config.replace(device=str(device))


def tokenizer_of(given: Any) -> Any:
    """The tokenizer a user gave, as an object or as its folder."""
    if not isinstance(given, str | Path):
        if not (hasattr(given, "encode") and hasattr(given, "decode")):
            raise ConfigError(
                f"tokenizer is a {type(given).__name__}", where="LLM", remedy="give a tokenizer, or the folder of one"
            )
        return given
    tokenizer = load_tokenizer(given)
    if tokenizer is None:
        raise ConfigError("no tokenizer files found", where=f"tokenizer={str(given)!r}", remedy="check the folder")
    return tokenizer


def vocab_size(module: Any) -> int | None:
    """Rows of the embedding: an id past them would read out of bounds."""
    try:
        return int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def default_sampling_params(module: Any) -> SamplingParams:
    """What a model's own `generation_config` asks for, if it samples; otherwise greedy.

    Raises:
        CheckpointError: an option of it that no request may have.
    """
    config = getattr(module, "generation_config", None)
    if config is None or not getattr(config, "do_sample", None):
        return SamplingParams()
    names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
    given = {name: getattr(config, name, None) for name in names}
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        raise CheckpointError(error.what, where="generation_config.json", remedy=error.remedy) from error
