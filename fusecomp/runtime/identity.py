"""What a compiled program depends on, as named parts: two engines with equal parts may share one.

Dynamo guards what a trace read; a program that is loaded has no trace, so everything that a trace could read is part
of its identity: code, configuration, attributes of every module, layout of every tensor, versions and settings.
What cannot be described makes the model `Undescribable`, and its program is not stored.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import platform
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusecomp._compat import compiler_settings

if TYPE_CHECKING:
    from fusecomp.capture import Probe
    from fusecomp.config import EngineConfig

# Packages that a version in the key identifies; the code of all others is hashed, with what it refers to.
VERSIONED = {"torch", "triton", "transformers", "numpy"}
PACKAGES = {*VERSIONED, "fusecomp", *sys.stdlib_module_names} - {"__main__"}
# Attributes of a module that its forward pass does not read.
NEUTRAL = {
    *("_parameters", "_buffers", "_modules", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks_with_kwargs", "_non_persistent_buffers_set", "_is_hf_initialized"),  # hooks: `refuse_hooks`
    *("generation_config", "name_or_path", "warnings_issued", "hf_quantizer", "_fusecomp", "_fusecomp_pending"),
    "_fusecomp_quantization",  # an account for reports; what it accounts for are modules and tensors
    *("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "all_tied_weights_keys", "_tied_weights_keys"),
    *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules", "_skip_keys_device_placement"),
    *("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_save"),
}
# Fields of a model's configuration that its forward pass does not read.
NEUTRAL_CONFIG = {"_name_or_path", "transformers_version"}
ENGINE_FIELDS = (
    *("max_model_len", "max_num_batched_tokens", "block_size", "kv_cache_dtype", "fuse", "disabled_patterns"),
    "deterministic",
)
# A mask proof reads buffers, up to this size each; larger ones hold weights.
LARGEST_PROVEN_BUFFER = 64 << 20


class Undescribable(Exception):
    """Part of a model cannot be described; the message names it."""


def identity(
    model: nn.Module, config: EngineConfig, probe: Probe, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The named parts, as JSON values.

    Raises:
        Undescribable: something that a trace of `model` may read cannot be described.
    """
    described = _Description(model)
    modules = {name or "(model)": described.module(module, name) for name, module in model.named_modules()}
    return {
        **versions(),
        "device": _device(device),
        "engine": {name: described.value(getattr(config, name)) for name in ENGINE_FIELDS} | {"dtype": str(dtype)},
        "settings": compiler_settings() | _torch_settings(device),
        "model config": described.configs,
        "model code": described.code(),
        "modules": modules,
        "tensors": _tensors(model),
        "buffers": _buffer_contents(model, read_by_proofs=not probe.calls),
        "probe": {
            "masks": {str(layer): dataclasses.asdict(mask) for layer, mask in sorted(probe.masks.items())},
            "calls": [list(call) for call in probe.calls],
            "unfused": probe.unfused_experts,
        },
    }


def versions() -> dict[str, str]:
    """Versions of what compiles and of what is compiled."""
    installed = {name: importlib.metadata.version(name) for name in ("transformers", "triton") if _installed(name)}
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "transformers": installed.get("transformers", "none"),
        "triton": installed.get("triton", "none"),
        "fusecomp": _own_source(),
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@functools.cache
def _own_source() -> str:
    """Hash of fusecomp's own code and tables."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {"name": name, "threads": torch.get_num_threads()}


def _torch_settings(device: torch.device) -> dict[str, Any]:
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default_dtype": str(torch.get_default_dtype()),
        "autocast": torch.is_autocast_enabled(device.type),
    }


def _tensors(model: nn.Module) -> dict[str, Any]:
    """Layout of every parameter and buffer; tensors that share memory name the first of them."""
    first: dict[int, str] = {}
    layouts: dict[str, Any] = {}
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            if type(tensor) not in (Tensor, nn.Parameter):
                raise Undescribable(f"{kind} {name} is a {type(tensor).__name__}")
            if tensor.layout != torch.strided:
                raise Undescribable(f"{kind} {name} has layout {tensor.layout}")
            memory = tensor.untyped_storage()._cdata
            layout = [kind, str(tensor.dtype), list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
            owner = first.setdefault(memory, name)
            layouts[name] = [*layout, str(tensor.device), tensor.requires_grad, "" if owner == name else owner]
    return layouts


def _buffer_contents(model: nn.Module, *, read_by_proofs: bool) -> dict[str, str]:
    """Hash of every buffer's values: masks and positions are proven from them."""
    contents = {}
    for name, buffer in model.named_buffers():
        if buffer.nbytes <= LARGEST_PROVEN_BUFFER:
            data = buffer.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            contents[name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
        elif read_by_proofs:
            raise Undescribable(f"buffer {name} has {buffer.nbytes} bytes, and the model's masks may depend on it")
    return contents


class _Description:
    """Describes the modules of one model; collects the configurations and the code they refer to."""

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, Any] = {}
        self._names = {id(m): name or "(model)" for name, m in model.named_modules()}
        self._tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._config_names: dict[int, str] = {}
        self._classes: dict[type, str] = {}
        self._roots: set[str] = set()

    def module(self, module: nn.Module, name: str) -> dict[str, Any]:
        """Class and attributes."""
        facts: dict[str, Any] = {"class": self._class(type(module))}
        for attribute, value in sorted(vars(module).items()):
            if attribute not in NEUTRAL:
                try:
                    facts[attribute] = self.value(value)
                except Undescribable as error:
                    where = f"{name}.{attribute}" if name else attribute
                    raise Undescribable(f"attribute {where} holds {error}") from None
        return facts

    def value(self, value: Any) -> Any:
        """A JSON value that is equal for equal values, in this process and the next."""
        if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum)):
            return value
        if isinstance(value, list | tuple):
            return [type(value).__name__, *map(self.value, value)]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(map(str, map(self.value, value)))]
        if isinstance(value, dict):
            if not all(isinstance(k, str | int) for k in value):
                raise Undescribable("a dict whose keys are neither names nor numbers")
            return {"dict": {f"{type(k).__name__} {k}": self.value(v) for k, v in value.items()}}
        if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format | enum.Enum):
            return f"{type(value).__name__} {value}"
        if isinstance(value, nn.Module) and id(value) in self._names:
            return ["module", self._names[id(value)]]
        if isinstance(value, Tensor) and id(value) in self._tensors:
            return ["tensor", self._tensors[id(value)]]
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            return ["config", self._config(value)]
        if isinstance(value, type):
            return ["class", self._class(value)]
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, types.MethodType):
            return ["method", self.value(value.__self__), self.value(value.__func__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.BuiltinFunctionType):
            return ["builtin", f"{value.__module__}.{value.__qualname__}"]
        if type(value).__module__.split(".")[0] == "torch" and isinstance(value, torch._ops.OpOverload):
            return ["op", str(value)]
        raise Undescribable(f"a {type(value).__module__}.{type(value).__qualname__}")

    def code(self) -> dict[str, str]:
        """Per module of code that the model comes from: hash of its source and of what its globals refer to."""
        found: dict[str, str] = {}
        stack = sorted(self._roots)
        while stack:
            name = stack.pop()
            if name in found:
                continue
            source = getattr(sys.modules.get(name), "__file__", None)
            if source is None or not Path(source).is_file():
                raise Undescribable(f"code of the module {name!r}, which has no source file")
            digest = hashlib.sha256(Path(source).read_bytes())
            for global_name, value in sorted(vars(sys.modules[name]).items()):
                home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
                if isinstance(value, type | types.FunctionType | types.ModuleType) and isinstance(home, str):
                    digest.update(f"{global_name}={home}.{getattr(value, '__qualname__', '')}\n".encode())
                    if home.split(".")[0] not in PACKAGES and home in sys.modules:
                        stack.append(home)
            found[name] = digest.hexdigest()[:16]
        return dict(sorted(found.items()))

    def _class(self, cls: type) -> str:
        """Qualified name and a hash of the methods, which are not always those of the source."""
        if cls not in self._classes:
            digest = hashlib.sha256()
            for base in cls.__mro__:
                if base in (nn.Module, object):
                    continue
                digest.update(f"{base.__module__}.{base.__qualname__}\n".encode())
                self._need_source(base.__module__)
                for name, member in sorted(vars(base).items()):
                    function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)) or member)
                    if isinstance(function, types.FunctionType):
                        self._need_source(function.__module__)
                        digest.update(f"{name} {_code_digest(function.__code__)}\n".encode())
            self._classes[cls] = f"{cls.__module__}.{cls.__qualname__} {digest.hexdigest()[:16]}"
        return self._classes[cls]

    def _function(self, function: types.FunctionType) -> list:
        self._need_source(function.__module__)
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        return [
            "function",
            f"{function.__module__}.{function.__qualname__} {_code_digest(function.__code__)}",
            *map(self.value, (function.__defaults__, function.__kwdefaults__, *cells)),
        ]

    def _need_source(self, module: str) -> None:
        if module.split(".", maxsplit=1)[0] not in PACKAGES or module.startswith("transformers.models."):
            self._roots.add(module)

    def _config(self, config: Any) -> str:
        if id(config) not in self._config_names:
            name = f"{type(config).__name__} {len(self._config_names)}"
            self._config_names[id(config)] = name
            fields = {k: v for k, v in config.to_dict().items() if k not in NEUTRAL_CONFIG}
            self._class(type(config))
            self.configs[name] = {k: self.value(v) for k, v in sorted(fields.items())}
            for implementation in ("_attn_implementation", "_experts_implementation"):
                self.configs[name][implementation] = self.value(getattr(config, implementation, None))
        return self._config_names[id(config)]


def _code_digest(code: types.CodeType) -> str:
    """Hash of what a code object does; `marshal` is not deterministic."""
    digest = hashlib.sha256(code.co_code)
    for constant in code.co_consts:
        text = _code_digest(constant) if isinstance(constant, types.CodeType) else repr(_sorted(constant))
        digest.update(f"{text}\n".encode())
    digest.update("\n".join((*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars)).encode())
    return digest.hexdigest()[:16]


def _sorted(constant: Any) -> Any:
    return sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant
