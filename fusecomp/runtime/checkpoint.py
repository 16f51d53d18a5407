"""Checks a checkpoint folder before anything is loaded from it.

In: a folder. Out: nothing, or an error that names the file, what was expected, what was found and the remedy.
Only JSON is parsed here and only safetensors files are accepted: nothing is ever unpickled.
"""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from fusecomp.errors import CheckpointError, UnsupportedModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# The safetensors format refuses longer headers: a longer one is a corrupt length field.
MAX_HEADER_BYTES = 100_000_000
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Bits per element, by the dtype names of the safetensors format.
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}


def check_checkpoint(folder: Path) -> None:
    """Check `config.json` and every weight file of `folder`.

    Raises:
        CheckpointError: a file is missing, malformed, truncated, or a pickle.
        UnsupportedModelError: the architecture is not a causal LM of the installed transformers.
    """
    config = read_json(folder / "config.json", "give a folder written by save_pretrained")
    check_architecture(config, folder / "config.json")
    if (folder / "generation_config.json").exists():  # transformers would go on without it
        read_json(folder / "generation_config.json", "restore or remove the file")
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            "the folder holds an adapter",
            where=str(folder / "adapter_config.json"),
            why="the model it modifies is somewhere else and would be loaded unchecked",
            remedy="merge it (peft's merge_and_unload) and save the merged model",
        )
    weights = _weights(folder, config)
    if weights.name.endswith(".index.json"):
        _check_index(folder, weights)
    else:
        read_header(weights)


def read_tables(folder: Path) -> dict[str, dict[str, Any]]:
    """Per weight file of a checked folder, its tensor table; of shards, what the index places in them."""
    weights = _weights(folder, read_json(folder / "config.json", "restore the file"))
    if not weights.name.endswith(".index.json"):
        return {weights.name: read_header(weights)}
    placed: dict[str, list[str]] = {}
    for tensor, shard in read_json(weights, "restore the file")["weight_map"].items():
        placed.setdefault(shard, []).append(tensor)
    headers = {shard: read_header(folder / shard) for shard in placed}
    return {shard: {name: headers[shard][name] for name in tensors} for shard, tensors in placed.items()}


def _weights(folder: Path, config: dict[str, Any]) -> Path:
    """The file that holds, or lists, the weights; `CheckpointError` without one."""
    explicit = config.get("transformers_weights")  # a file name that overrides the two usual ones
    names = [WEIGHTS, INDEX] if explicit is None else [Path(str(explicit)).name]
    present = [name for name in names if (folder / name).is_file()]
    if not present:
        _refuse_without_weights(folder, names)
    return folder / present[0]


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `path`; `CheckpointError` when it is absent or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("file not found", where=str(path), remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError("not valid JSON", where=str(path), why=str(error), remedy="restore the file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__}, not an object", where=str(path), remedy=remedy)
    return value


def check_architecture(config: dict[str, Any], path: Path) -> None:
    """Raise unless `config` names a causal LM that the installed transformers has the code of."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_LMS

    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    known = sorted(set(CAUSAL_LMS.values()))
    if model_type in CAUSAL_LMS and (not architectures or any(name in known for name in architectures)):
        return
    named = ", ".join(map(str, architectures))
    if not named or model_type not in CAUSAL_LMS:
        named = f"{named} of model_type {model_type!r}" if named else f"model_type {model_type!r}"
    near = difflib.get_close_matches(named, known, n=3, cutoff=0.5)
    why = f"it is not among the {len(known)} causal LMs of transformers {transformers.__version__}"
    if "auto_map" in config:
        why += "; the checkpoint brings its own Python code, which fusecomp never runs"
    raise UnsupportedModelError(
        f"unsupported architecture {named}",
        where=str(path),
        why=why,
        remedy="use a causal LM that transformers itself implements"
        + (f"; nearest available: {', '.join(near)}" if near else ""),
    )


def read_header(path: Path) -> dict[str, Any]:
    """The tensor table of a safetensors file whose length is exactly what its header promises.

    Layout: 8 bytes little-endian n, n bytes of JSON, then the data that the JSON's `data_offsets` index.
    """

    def refuse(what: str, why: str = "") -> CheckpointError:
        remedy = "copy or download the file again"
        return CheckpointError(what, where=str(path), why=why, remedy=remedy)

    actual = path.stat().st_size
    if actual < 8:
        raise refuse(f"truncated: at least 8 bytes expected, {actual} bytes found")
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise refuse("not a safetensors file", f"its first 8 bytes announce a header of {header_bytes} bytes")
        if 8 + header_bytes > actual:
            raise refuse(f"truncated: {8 + header_bytes} bytes expected for the header alone, {actual} bytes found")
        try:
            table = json.loads(file.read(header_bytes))
            table.pop("__metadata__", None)
            end = max((_check_entry(name, entry) for name, entry in table.items()), default=0)
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise refuse("its header is malformed", str(error)) from error
    expected = 8 + header_bytes + end
    if actual != expected:
        kind = "truncated" if actual < expected else "longer than its header says"
        raise refuse(f"{kind}: {expected} bytes expected, {actual} bytes found")
    return table


def _check_entry(name: str, entry: dict[str, Any]) -> int:
    """Check one tensor's entry and return where its data end."""
    begin, end = entry["data_offsets"]
    bits = DTYPE_BITS.get(entry["dtype"])
    shape = entry["shape"]
    if not all(isinstance(size, int) and size >= 0 for size in (begin, end, *shape)):
        raise ValueError(f"tensor {name!r}: shape {shape}, offsets [{begin}, {end}]")
    if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(f"tensor {name!r}: {entry['dtype']} {shape} does not fill {end - begin} bytes")
    return end


def _check_index(folder: Path, index: Path) -> None:
    weight_map = read_json(index, "restore the file").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=str(index), remedy="copy or download the file again")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"tensor {tensor!r} is mapped to {shard!r}",
                where=str(index),
                why="a shard is a .safetensors file in the folder of its index",
                remedy="copy or download the file again",
            )
        shards.setdefault(shard, []).append(tensor)
    for shard, tensors in sorted(shards.items()):
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(
                f"shard not found; it holds {len(tensors)} tensors",
                where=str(path),
                why=f"{index.name} names {len(shards)} shards",
                remedy="copy or download the missing file",
            )
        table = read_header(path)
        lost = [tensor for tensor in tensors if tensor not in table]
        if lost:
            raise CheckpointError(
                f"lacks {len(lost)} tensors that {index.name} places in it: {', '.join(lost[:3])}",
                where=str(path),
                remedy="copy or download the shard and its index again, of one revision",
            )


def _refuse_without_weights(folder: Path, names: list[str]) -> NoReturn:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"only pickled weights found ({', '.join(pickles[:3])})",
            where=str(folder),
            why="unpickling runs code from the file, so fusecomp reads safetensors only",
            remedy="convert a checkpoint you trust: load it with transformers and call save_pretrained",
        )
    raise CheckpointError(
        "weights not found", where=str(folder), why=f"no {' or '.join(names)}", remedy="copy or download the weights"
    )
