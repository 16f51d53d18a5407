"""`quantization_config` of a config.json -> the format that reads the checkpoint."""

from __future__ import annotations

import difflib
from typing import Any

from fusecomp.errors import CheckpointError, UnsupportedModelError
from fusecomp.quant.formats.awq import Awq
from fusecomp.quant.formats.base import Format
from fusecomp.quant.formats.bitsandbytes import Nf4
from fusecomp.quant.formats.compressed_tensors import CompressedTensors
from fusecomp.quant.formats.fp8 import Fp8
from fusecomp.quant.formats.gptq import Gptq
from fusecomp.quant.formats.mxfp4 import Mxfp4

FORMATS: dict[str, type[Format]] = {f.method: f for f in (Gptq, Awq, CompressedTensors, Fp8, Mxfp4, Nf4)}


def quantization_format(config: dict[str, Any], where: str) -> Format | None:
    """The format that `config`, the content of the config.json at `where`, asks for; None without quantization.

    Raises:
        CheckpointError: the setting is malformed.
        UnsupportedModelError: the method, or a variant of it, is not supported.
    """
    settings = config.get("quantization_config")
    if settings is None and isinstance(config.get("text_config"), dict):
        settings = config["text_config"].get("quantization_config")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"quantization_config is a {type(settings).__name__}, not an object", where=where, remedy="restore the file"
        )
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # files of early versions do not say it
    if method not in FORMATS:
        near = difflib.get_close_matches(str(method), FORMATS, n=1)
        raise UnsupportedModelError(
            f"quantization method {method!r}",
            where=where,
            why=f"supported are {', '.join(FORMATS)}" + (f"; nearest: {near[0]}" if near else ""),
            remedy="use another quantization of the model, or the model itself",
        )
    return FORMATS[method](settings, where)
