"""Writes a model that was quantized here as a compressed-tensors checkpoint, which transformers and vLLM read as well.

Names are those of the model's own checkpoints (`names.py`), experts one by one. Tensors go to shards in the order of
their names; the folder appears under its name when it is whole.

Legend: E experts, N rows, K columns of a weight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusecomp.errors import ConfigError
from fusecomp.ops.quant import FP8, WeightSpec, unfold_codes
from fusecomp.quant.modules import CODES, QuantizedLinear, QuantizedWeight
from fusecomp.quant.online.names import Place, places, reverted
from fusecomp.quant.online.record import record_of
from fusecomp.quant.online.schemes import SCHEMES, scale_dtype

SHARD_BYTES = 5_000_000_000
VERSION = "0.20.0"  # of the format's definition that this was written and checked against
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
# What is copied beside the weights: never weights, their index, or code.
COPIED = (
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "*.tiktoken", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template*", "preprocessor_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint: made when it is written, its size known before."""

    nbytes: int
    make: Callable[[], Tensor]


def check_destination(out: Path, overwrite: bool) -> None:
    """Raise `ConfigError` when `out` holds something that may not be overwritten."""
    if out.exists() and not out.is_dir():
        raise ConfigError("is a file", where=str(out), remedy="give the name of a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigError("the folder is not empty", where=str(out), remedy="give another, or --overwrite")


def export(model: Any, source: Path, out: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model`, quantized with `portable`, from the checkpoint `source`, to the folder `out`.

    Raises:
        ConfigError: `out` may not be written.
    """
    check_destination(out, overwrite)
    pieces, config = _pieces(model), _config(model, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        _write_shards(pieces, partial, shard_bytes)
        for pattern in COPIED:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, partial / path.name)
        _write(partial / "config.json", json.dumps(config, indent=2) + "\n")
        _sync(partial)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---------------------------------------------------------------------- tensors


def _pieces(model: nn.Module) -> dict[str, Piece]:
    """Every tensor of the checkpoint by its name, in the order of names."""
    pieces: dict[str, Piece] = {}
    held: set[int] = set()
    for name, weight in _held(model):
        held |= {id(p) for p in weight.parameters()}
        for place in _places(model, name, weight):
            pieces |= {f"{place.name}.{part}": piece for part, piece in _parts(weight, place)}
    plain = {n: p for n, p in model.state_dict(keep_vars=True).items() if id(p) not in held}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, tensor in reverted(model, {n: p.detach() for n, p in plain.items() if n not in tied}).items():
        pieces[name] = Piece(tensor.nbytes, lambda t=tensor: t)  # type: ignore[misc]
    return dict(sorted(pieces.items()))


def _held(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Codes and the name of the parameter that they stand for."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.codes is not None
            yield f"{name}.weight", module.codes
        elif isinstance(module, QuantizedWeight) and name.endswith(CODES):
            yield name.removesuffix(CODES), module


def _places(model: nn.Module, name: str, weight: QuantizedWeight) -> list[Place]:
    """The weights of the checkpoint that one of the model is made of: there are some, or it had been left out."""
    found = places(model, name, tuple(weight.q.shape[:-1]))
    assert not isinstance(found, str) and not weight.transposed, found
    return found


def _parts(weight: QuantizedWeight, place: Place) -> Iterator[tuple[str, Piece]]:
    """Tensors of one weight [N, K] of the checkpoint."""
    spec = WeightSpec.from_text(weight.spec)

    def rows(tensor: Tensor) -> Tensor:
        part = tensor.detach() if place.expert is None else tensor.detach()[place.expert]
        return part[place.start : place.start + place.n]

    n, k = spec.shape(rows(weight.q).shape)
    if spec.bits == 8:
        yield "weight", Piece(n * k, lambda: rows(weight.q))
    else:
        yield "weight_packed", Piece(n * k // 2, lambda: _unfolded(rows(weight.q), spec).contiguous().view(torch.int32))
        yield "weight_shape", Piece(16, lambda: torch.tensor([n, k], dtype=torch.int64))
    scale = rows(weight.scale)
    # A linear holds scales in fp32 that were rounded to this dtype before codes were made by them.
    stored = scale_dtype(spec.torch_dtype, spec.cols > 0)
    if not torch.equal(scale.to(stored).to(scale.dtype), scale):  # the model was converted since
        stored = scale.dtype
    yield "weight_scale", Piece(scale.numel() * stored.itemsize, lambda: rows(weight.scale).to(stored))
    zero = weight.zero
    if zero is not None:
        yield "weight_zero_point", Piece(-(-n // 8) * 4 * scale.shape[1], lambda: _packed_zeros(rows(zero)))


def _unfolded(q: Tensor, spec: WeightSpec) -> Tensor:
    return unfold_codes(q, spec.fold) if spec.fold else q


def _packed_zeros(zero: Tensor) -> Tensor:
    """Zero points [N, G] of unsigned codes as int32 [N / 8, G]: eight along N to a word, the lowest bits first."""
    codes = zero.float().to(torch.int32)
    padded = nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % 8)).unflatten(0, (-1, 8))
    words = torch.zeros_like(padded[:, 0])
    for i in range(8):
        words |= padded[:, i] << (4 * i)
    return words


# ---------------------------------------------------------------------- files


def _write_shards(pieces: dict[str, Piece], folder: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, piece in pieces.items():
        if shards[-1] and size + piece.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += piece.nbytes
    single = len(shards) == 1
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: pieces[name].make().to("cpu").clone(memory_format=torch.contiguous_format) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if not single:
        total = sum(piece.nbytes for piece in pieces.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _sync(folder: Path) -> None:
    """Have every file on the disk before the folder takes its name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _replace(partial: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        os.replace(partial, out)
        return
    old = out.with_name(f"{out.name}.old-{os.getpid()}")
    os.replace(out, old)
    try:
        os.replace(partial, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old)


# ---------------------------------------------------------------------- config.json


def _config(model: nn.Module, source: Path) -> dict[str, Any]:
    record = record_of(model)
    assert record is not None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_settings(model, record.scheme)
    return config


def quantization_settings(model: nn.Module, name: str) -> dict[str, Any]:
    """`quantization_config` of a model quantized by scheme `name`."""
    groups: dict[tuple, list[str]] = {}
    for parameter, weight in _held(model):
        spec = WeightSpec.from_text(weight.spec)
        key = (spec.cols, weight.zero is None, weight.q.dim() == 3)
        groups.setdefault(key, []).extend(place.name for place in _places(model, parameter, weight))
    config_groups = {}
    alike = len({key[:2] for key in groups}) == 1
    for i, ((cols, symmetric, experts), names) in enumerate(groups.items()):
        targets = ["Linear"] if alike else _experts_pattern(names) if experts else names
        config_groups[f"group_{i}"] = {"targets": targets, **_group(name, cols, symmetric)}
        if alike:
            break
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[name],
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": config_groups,
        "ignore": _ignored(model),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(name: str, cols: int, symmetric: bool) -> dict[str, Any]:
    scheme = SCHEMES[name]
    kind = "float" if scheme.kind == FP8 else "int"
    weights = {"num_bits": scheme.bits, "type": kind, "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": cols} if cols else {"strategy": "channel"}
    inputs = None
    if scheme.activation is not None:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": FORMATS[name]}


def _experts_pattern(names: list[str]) -> list[str]:
    """Patterns that name experts, whatever their number: what makes transformers and vLLM find the group."""
    found = {re.sub(r"\\\.\d+", r"\\.\\d+", re.escape(name)) for name in names}
    return sorted(f"re:^{pattern}$" for pattern in found)


def _ignored(model: nn.Module) -> list[str]:
    """Names, as checkpoints have them, of modules with a weight [N, K] that stays as it is."""
    names = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        embedding = isinstance(module, nn.Embedding)
        if weight is not None and weight.dim() == 2 and not embedding:
            found = reverted(model, {f"{name}.weight": torch.empty(weight.shape, device="meta")})
            names += [key.removesuffix(".weight") for key in found]
    return names
