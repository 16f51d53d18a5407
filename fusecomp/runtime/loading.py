"""Loads a checkpoint: folder or Hub name -> `PreTrainedModel` in evaluation mode, tokenizer.

Invariants: safetensors and JSON only, no remote code, and no parameter is ever left randomly initialized.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fusecomp.config import DTYPES
from fusecomp.errors import CapacityError, CheckpointError, ConfigError, FusecompError, UnsupportedModelError
from fusecomp.quant.config import quantization_format
from fusecomp.runtime.checkpoint import check_checkpoint, read_json, read_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fusecomp.config import EngineConfig
    from fusecomp.quant.formats.base import Format

logger = logging.getLogger("fusecomp")

# transformers builds a model, and Dynamo captures one, under settings of the whole process: one thread at a time.
EXCLUSIVE = threading.RLock()
# What is fetched from the Hub: never a pickle, never code.
HUB_PATTERNS = ["*.json", "model*.safetensors", "tokenizer*", "*.model", "*.txt", "*.tiktoken", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken", "spiece.*")


def load_model(
    path_or_name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    calibration: Any = None,
    *,
    portable: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the causal LM in a local folder or of a Hub name, and its tokenizer.

    Args:
        path_or_name: folder written by `save_pretrained`, or a name on the Hugging Face Hub.
        dtype: "auto" keeps the checkpoint's; otherwise parameters are converted.
        device: "auto" takes CUDA when there is one.
        quantize, calibration: as in `EngineConfig`. Layers go to the device one by one and are quantized there.
        portable: quantize only what a checkpoint for other engines can hold.

    Returns:
        The model, in evaluation mode and without gradients, and its tokenizer (None when the checkpoint has none).

    Raises:
        CheckpointError: files are missing, truncated, malformed or pickled, or weights do not fit the architecture.
        UnsupportedModelError: the architecture is not a causal LM of the installed transformers, or its weights are
            quantized in a way that is not supported.
        CapacityError: the device is too small for the weights.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported", where="load_model", remedy=f"use one of {DTYPES}")
    target = resolve_device(device)
    folder = resolve_folder(path_or_name)
    check_checkpoint(folder)
    load_config(folder)  # first: the tokenizer would be blamed for what is wrong with it
    tokenizer = load_tokenizer(folder)
    if quantize is not None:
        _refuse_quantized(folder)
    model = _load_weights(folder, "auto" if dtype == "auto" else getattr(torch, dtype))
    model.eval().requires_grad_(False)
    try:
        if quantize is not None:
            _quantize(model, quantize, calibration, lambda: tokenizer, target, portable)
        return model.to(target), tokenizer  # type: ignore[arg-type]
    except torch.OutOfMemoryError as error:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        raise CapacityError(
            f"the weights take {size / 2**30:.1f} GiB, which {target} has not free",
            where=str(path_or_name),
            why=str(error).splitlines()[0],
            remedy="free the device, or load with a smaller dtype",
        ) from error


def _refuse_quantized(folder: Path) -> None:
    config = read_json(folder / "config.json", "restore the file")
    found = quantization_format(config, str(folder / "config.json"))
    if found is not None:
        raise ConfigError(
            f"the checkpoint is quantized already, by {found.method}",
            where=str(folder),
            remedy="drop quantize, or give the checkpoint in 16 or 32 bits",
        )


def quantize_in_memory(model: Any, config: EngineConfig, tokenizer: Any = None) -> None:
    """Apply `config.quantize` to a model where it lies; text is for `tokenizer`, or that of the model's checkpoint."""
    assert config.quantize is not None

    def found() -> Any:
        return tokenizer if tokenizer is not None else _tokenizer_of(model)

    _quantize(model, config.quantize, config.calibration, found, None, False)


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer of the checkpoint that a model says it came from, if it is on this machine; None otherwise."""
    from huggingface_hub import snapshot_download

    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return load_tokenizer(name)
    try:
        return load_tokenizer(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no name of the Hub: the caller says what to do
        return None


def _quantize(
    model: Any,
    quantize: str,
    calibration: Any,
    tokenizer: Callable[[], Any],
    device: torch.device | None,
    portable: bool,
) -> None:
    from fusecomp.quant.online.transform import quantize_model

    with EXCLUSIVE:
        quantize_model(model, quantize, text=calibration, tokenizer=tokenizer, device=device, portable=portable)


def resolve_device(device: str) -> torch.device:
    """The torch device that option `device` means; `ConfigError` when it does not exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r}", where="EngineConfig", remedy='use "auto", "cpu" or "cuda"') from error
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r}", where="EngineConfig", remedy='use "auto", "cpu" or "cuda"')
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: no CUDA device is available", where="EngineConfig", remedy='use "auto"')
    return resolved


def resolve_folder(path_or_name: str | Path) -> Path:
    """The folder of a checkpoint, fetched from the Hub when the name is not a local folder."""
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if path.exists():
        raise CheckpointError("not a folder", where=name, remedy="give the folder that holds config.json")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except HFValidationError:
        raise CheckpointError("no such folder", where=name, remedy="check the path") from None
    except Exception as error:  # the Hub client raises errors of several HTTP libraries
        raise CheckpointError(
            "not a local folder, and it could not be fetched from the Hugging Face Hub",
            where=name,
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}",
            remedy="check the path or name; without a network, give a folder that was downloaded before",
        ) from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `folder`, or None when the folder has no tokenizer files."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizer back ends raise bare Exception on malformed files
        raise CheckpointError(
            "the tokenizer could not be loaded",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            remedy="restore the tokenizer files, or remove them to serve token ids only",
        ) from error


def load_config(folder: Path) -> Any:
    """transformers' configuration of the model; `CheckpointError` when it refuses `config.json`."""
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validators and model classes raise many kinds
        raise CheckpointError(
            "transformers refuses the configuration",
            where=str(folder / "config.json"),
            why=f"{type(error).__name__}: {error}",
            remedy="restore the file",
        ) from error


def _load_weights(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        "weights_only": True,
        # Mismatches are collected instead of raised one by one; they are refused below, never initialized.
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    config = read_json(folder / "config.json", "restore the file")
    quantized = quantization_format(config, str(folder / "config.json"))
    try:
        with EXCLUSIVE, _quiet_transformers():
            if quantized is None:
                _refuse_codes(folder)
                loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options)
            else:
                loaded = _load_quantized(folder, quantized, dtype, options)
            model, info = loaded
    except FusecompError:
        raise
    except ImportError as error:
        raise UnsupportedModelError(
            "a package that the checkpoint needs is missing", where=str(folder), why=str(error), remedy="install it"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # transformers raises many classes on inconsistent configurations
        raise CheckpointError(
            "transformers could not load the checkpoint",
            where=str(folder),
            why=f"{type(error).__name__}: {error}",
            remedy="check config.json against the weights",
        ) from error
    _refuse_incomplete(folder, type(model).__name__, info)
    return model


def _refuse_codes(folder: Path) -> None:
    """Raise `CheckpointError` for codes that nothing describes: transformers would take them for numbers."""
    for file, table in read_tables(folder).items():
        for name, entry in table.items():
            if entry["dtype"].startswith(("F8", "F4")):
                raise CheckpointError(
                    f"tensor {name!r} is {entry['dtype']}",
                    where=str(folder / file),
                    why="config.json has no quantization_config that says what its codes stand for",
                    remedy="restore the config.json of this checkpoint",
                )


def _load_quantized(folder: Path, quantized: Format, dtype: torch.dtype | str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, GenerationConfig

    from fusecomp.quant.files import TensorFiles
    from fusecomp.quant.loading import load_quantized

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if (folder / "generation_config.json").exists():
        options = {**options, "generation_config": GenerationConfig.from_pretrained(str(folder))}
    return load_quantized(TensorFiles(folder, read_tables(folder)), quantized, config, dtype, options)


def _refuse_incomplete(folder: Path, architecture: str, info: dict[str, Any]) -> None:
    """Raise when transformers had to initialize a parameter that the checkpoint should have brought."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    mismatched = [
        f"{name} (checkpoint {list(there)}, model {list(here)})"
        for name, there, here in sorted(info["mismatched_keys"], key=str)
    ]
    missing = sorted(set(info["missing_keys"]) - {key[0] for key in info["mismatched_keys"]})
    problems = [f"{len(missing)} missing: {some(missing)}"] if missing else []
    problems += [f"{len(mismatched)} of another shape: {some(mismatched)}"] if mismatched else []
    problems += [str(message) for message in info["error_msgs"]]
    if problems:
        raise CheckpointError(
            f"the weights do not fit {architecture}: {'; '.join(problems)}",
            where=str(folder),
            why="these parameters would have been random",
            remedy="use the config.json and the weights of one checkpoint",
        )
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        logger.warning("%s: %d tensors are not used by %s: %s", folder, len(unused), architecture, some(unused))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' load report and progress bar: what matters of it is raised or logged here."""
    from transformers.utils import logging as hf_logging

    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
