"""Builds a model from a quantized checkpoint: transformers loads what is not quantized, the rest is read here.

transformers' own quantizers are never reached: they import packages, and convert what should stay as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from fusecomp.quant.files import TensorFiles
from fusecomp.quant.formats.base import Format
from fusecomp.quant.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("fusecomp")
METHOD = "fusecomp"


class _Settings:
    """Stands for a quantization configuration where transformers wants one."""

    quant_method = METHOD

    def __init__(self, placement: Placement | None) -> None:
        self.placement = placement
        self.shapes: dict[str, torch.Size] = {}

    def __deepcopy__(self, memo: dict) -> _Settings:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class _Quantizer(HfQuantizer):
    """Takes quantized parameters out of the model before transformers loads the others."""

    def __init__(self, quantization_config: Any, **_: Any) -> None:
        self.quantization_config = quantization_config
        self.pre_quantized = False  # otherwise tensors under new names would keep the checkpoint's dtype

    def preprocess_model(self, model: PreTrainedModel, *_: Any, **__: Any) -> None:
        settings: Any = self.quantization_config
        settings.placement.prepare(model)
        settings.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def postprocess_model(self, model: PreTrainedModel, *_: Any, **__: Any) -> None:
        pass

    def is_serializable(self, *_: Any) -> bool:
        return False  # `save_pretrained` would write codes under names that no reader knows

    @property
    def is_trainable(self) -> bool:
        return False


def refuse_saving(model: Any) -> None:
    """Let transformers refuse to save a model whose weights were replaced by codes."""
    model.hf_quantizer = _Quantizer(_Settings(None))


def load_quantized(
    files: TensorFiles, format_: Format, config: Any, dtype: torch.dtype | str, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The causal LM in `files`, whose quantized weights are held as codes.

    Args:
        config: its configuration.
        dtype: of unquantized parameters and of what codes dequantize to; "auto" is the configuration's, or that of
            most unquantized parameters.
        options: further arguments of `from_pretrained`.

    Returns:
        The model and transformers' account of missing, mismatched and unexpected parameters.

    Raises:
        CheckpointError: tensors are missing or do not fit.
        UnsupportedModelError: something is quantized in a way that is not supported.
    """
    placement = Placement(format_, files)
    if not isinstance(dtype, torch.dtype):
        dtype = _dtype(config) or files.plain_dtype(placement.plain)
    settings, kept = _Settings(placement), _take_quantization(config)
    model_class, config = _model_class(config)
    with _registered():
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: files.later(name) for name in placement.plain},
            quantization_config=settings,
            dtype=dtype,
            **options,
        )
    model, info = loaded
    mismatched = {
        (name, tensor.shape, settings.shapes[name])
        for name, tensor in model.state_dict().items()
        if tensor.shape != settings.shapes.get(name, tensor.shape)
    }
    info["mismatched_keys"] = {*info["mismatched_keys"], *mismatched}
    complete = not (mismatched or info["missing_keys"] or info["error_msgs"])
    if complete and placement.fill(model, str(dtype).removeprefix("torch.")):
        logger.warning("%s: inputs of experts are not quantized; they keep %s", files.folder, dtype)
    settings.placement = None
    model.config.quantization_config = kept
    model.config.name_or_path = model.name_or_path = str(files.folder)
    files.close()
    return model, info


def _model_class(config: Any) -> tuple[Any, Any]:
    """The class and the configuration that `AutoModelForCausalLM` would take, which itself accepts no tensors."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    found = _get_model_class(config, AutoModelForCausalLM._model_mapping)
    text = config.sub_configs.get("text_config")
    takes_text = text is not None and getattr(found, "config_class", None) == text
    return found, config.get_text_config() if takes_text else config


def _dtype(config: Any) -> torch.dtype | None:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found) if isinstance(found, str) else found


def _take_quantization(config: Any) -> Any:
    """Remove the checkpoint's own settings from `config`, which transformers would act on, and return them."""
    kept = None
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            kept = kept or part.quantization_config
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return kept


@contextmanager
def _registered() -> Iterator[None]:
    AUTO_QUANTIZER_MAPPING[METHOD] = _Quantizer
    try:
        yield
    finally:
        del AUTO_QUANTIZER_MAPPING[METHOD]
