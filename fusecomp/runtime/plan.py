"""What an engine will need and where it fits, from `config.json` and the safetensors headers alone.

Nothing is loaded: the model is built on the meta device, where tensors have shapes and no storage, and its forward runs
there once to see which keys and values its attention caches.

Exact: weights of a checkpoint that is not quantized, bytes of a KV block, and, given the budget, the number of blocks.
Estimated: weights of a quantized one (from its headers), and a step's workspace, which a start on a GPU measures.

Legend: T tokens in a step, S sequences, C hidden size, F width of the widest linear, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusecomp.capture import TRACE, Implementations
from fusecomp.config import EngineConfig
from fusecomp.errors import CapacityError, UnsupportedModelError
from fusecomp.packed_step import Signature
from fusecomp.quant.config import quantization_format
from fusecomp.runtime import memory
from fusecomp.runtime.checkpoint import check_checkpoint, read_json, read_tables
from fusecomp.runtime.loading import EXCLUSIVE, load_config, resolve_folder

# Names of safetensors for the floating dtypes that loading converts.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that an engine takes, and how many KV blocks are left for.

    Attributes:
        model: class of the model.
        dtype: of parameters, activations, keys and values.
        capacity: bytes that the engine may take; None on a CPU, where only the KV cache has a budget.
        weights: bytes of all parameters, tied ones once.
        weights_exact: whether they are known, rather than estimated from the headers of a quantized checkpoint.
        layers: attention layers, with (KV heads, head dim) of each.
        block_bytes: bytes of one KV block in all layers.
        workspace: estimate of what the largest step needs beyond weights and cache.
        reserve: kept free for CUDA graphs and libraries.
        kv_budget: bytes for the cache; negative when there is nothing left for it.
        num_blocks: blocks the cache will have.
        swap_blocks: blocks of host memory for preempted sequences, of `block_bytes` each.
        notes: what the figures leave open.
    """

    model: str
    dtype: str
    device: str
    capacity: int | None
    weights: int
    weights_exact: bool
    layers: tuple[tuple[int, int], ...]
    block_size: int
    block_bytes: int
    workspace: int
    reserve: int
    kv_budget: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    swap_blocks: int = 0
    notes: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.block_bytes

    @property
    def fits(self) -> bool:
        """Whether one sequence of `max_model_len` tokens can be served. The last token is never cached."""
        return self.num_blocks >= max(1, -(-(self.max_model_len - 1) // self.block_size))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self) | {"kv_bytes": self.kv_bytes, "fits": self.fits}

    def summary(self) -> str:
        """A readable account, one line per part."""
        cached = self.num_blocks * self.block_size
        kinds = ", ".join(f"{self.layers.count(k)} x {k[0]} heads of {k[1]}" for k in dict.fromkeys(self.layers))
        lines = [
            f"{self.model} in {self.dtype} on {self.device}"
            + (f": {_gib(self.capacity)} to be used" if self.capacity is not None else ""),
            f"  weights    {_gib(self.weights)}  {'exact' if self.weights_exact else 'estimated from the headers'}",
        ]
        if self.capacity is not None:
            lines += [
                f"  workspace  {_gib(self.workspace)}  estimated; a start measures it",
                f"  graphs     {_gib(self.reserve)}  reserved for CUDA graphs and libraries",
            ]
        lines += [
            f"  KV cache   {_gib(self.kv_bytes)}  {self.num_blocks} blocks of {self.block_size} tokens, "
            f"{self.block_bytes} bytes each ({kinds})",
            f"  it holds {cached} tokens: {cached / self.max_model_len:.1f} sequences of "
            f"max_model_len={self.max_model_len}, {cached // self.max_num_seqs} tokens for each of "
            f"max_num_seqs={self.max_num_seqs}",
        ]
        if self.swap_blocks:
            lines.append(
                f"  swap       {_gib(self.swap_blocks * self.block_bytes)}  of host memory, {self.swap_blocks} blocks"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _gib(size: int) -> str:
    return f"{size / GIB:9.3f} GiB"


def plan_memory(path_or_name: str | Path, config: EngineConfig, gpu_memory: int | None = None) -> MemoryPlan:
    """Plan an engine for a checkpoint; nothing is loaded, and no GPU is needed.

    Args:
        gpu_memory: bytes of the card; None takes the machine's, or plans for its CPU when it has none.

    Raises:
        CapacityError: it does not fit. Names the largest `max_model_len` and `max_num_seqs` that would, each with the
            other options as given.
        ConfigError, CheckpointError, UnsupportedModelError: as when it is loaded.
    """
    planner = Planner(resolve_folder(path_or_name), config.dtype)
    total = gpu_memory
    if total is None and torch.cuda.is_available() and config.device != "cpu":
        total = torch.cuda.mem_get_info()[1]
    plan = planner.plan(config, total)
    if not plan.fits or (plan.capacity is not None and plan.kv_budget < plan.block_bytes):
        raise _refusal(planner, plan, config, total)
    return plan


class Planner:
    """The part of a plan that does not depend on the engine's limits: shapes of one checkpoint."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        check_checkpoint(folder)
        raw = read_json(folder / "config.json", "restore the file")
        quantized = quantization_format(raw, str(folder / "config.json"))
        tensors = {name: entry for table in read_tables(folder).values() for name, entry in table.items()}
        config = load_config(folder)
        self.dtype = _dtype(dtype, config, tensors)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with EXCLUSIVE, torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        self.notes: list[str] = []
        self.weights_exact = quantized is None
        if quantized is None:
            self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        else:
            self.weights = sum(_bytes_as_loaded(entry, self.dtype) for entry in tensors.values())
        self.layers = self._layers()

    def _layers(self) -> tuple[tuple[int, int], ...]:
        """(KV heads, head dim) of every attention call, from one forward on the meta device."""
        implementations, signature = Implementations(self.model), Signature.of(self.model)
        ids, positions = torch.ones(1, 2, dtype=torch.long, device="meta"), torch.arange(2, device="meta")
        arguments = signature.arguments(ids, positions[None], positions, explicit_mask=False)
        with torch.no_grad(), implementations.use(TRACE), _AttentionShapes() as shapes:
            try:
                self.model(**arguments)
            except Exception as error:  # what depends on data cannot run without any: experts that loop, say
                self._assume_equal_layers(shapes.layers, f"{type(error).__name__}: {error}")
        if not shapes.layers:
            raise UnsupportedModelError(
                "what the model caches is not known before it is loaded",
                where=type(self.model).__name__,
                why="its attention is not on Hugging Face's interface, or depends on values",
                remedy="explain it without --memory: the start says how many blocks there are",
            )
        return tuple(shapes.layers)

    def _assume_equal_layers(self, seen: list[tuple[int, int]], reason: str) -> None:
        layers = getattr(memory.text_config(self.model), "num_hidden_layers", None)
        if len(set(seen)) == 1 and isinstance(layers, int):
            self.notes.append(f"all {layers} layers are taken to cache what the first {len(seen)} do ({reason})")
            seen[:] = seen[:1] * layers
        else:
            seen.clear()

    def plan(self, config: EngineConfig, total: int | None) -> MemoryPlan:
        """The plan of an engine with these limits on a card of `total` bytes, or on the CPU; it may not fit."""
        config = memory.resolve_limits(self.model, config)
        assert config.max_model_len is not None
        width = torch.empty((), dtype=self.dtype).element_size()
        block_bytes = sum(2 * heads * config.block_size * dim * width for heads, dim in self.layers)
        notes = list(self.notes)
        workspace = reserve = 0
        capacity: int | None = None
        if total is None:
            budget = memory.CPU_KV_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
        else:
            capacity = int(total * config.gpu_memory_utilization)
            workspace, reserve = self._workspace(config, width), memory.RESERVE_BYTES
            budget = capacity - self.weights - workspace - reserve
            long_graphs = memory.long_graphs_bytes(workspace, budget, config)
            reserve, budget = reserve + long_graphs, budget - long_graphs
            if config.kv_cache_bytes is not None:
                if config.kv_cache_bytes > budget:
                    notes.append(f"kv_cache_bytes={config.kv_cache_bytes} does not fit beside the rest")
                budget = min(budget, config.kv_cache_bytes)
            notes.append("other processes' memory, and the driver's own (about half a GiB), come off the KV cache")
        num_blocks = max(0, memory.kv_blocks(budget, block_bytes, config))
        return MemoryPlan(
            model=type(self.model).__name__,
            dtype=str(self.dtype).removeprefix("torch."),
            device="the CPU" if total is None else f"a GPU of {total / GIB:.1f} GiB",
            capacity=capacity,
            weights=self.weights,
            weights_exact=self.weights_exact,
            layers=self.layers,
            block_size=config.block_size,
            block_bytes=block_bytes,
            workspace=workspace,
            reserve=reserve,
            kv_budget=budget,
            num_blocks=num_blocks,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            swap_blocks=config.swap_bytes // block_bytes,
            notes=tuple(notes),
        )

    def _workspace(self, config: EngineConfig, width: int) -> int:
        """Bytes of the largest step: two residual streams, the widest linear's input and output for each token (for
        each of its experts in a mixture), attention's q, k, v and output, and logits, which sampling wants in fp32."""
        source = memory.text_config(self.model)
        head = self.model.get_output_embeddings()
        linears = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head]
        F = max((m.out_features for m in linears), default=0)
        C = int(getattr(source, "hidden_size", 0) or max((m.in_features for m in linears), default=0))
        heads = int(getattr(source, "num_attention_heads", 1))
        attention = max((2 * heads + 2 * kv_heads) * dim for kv_heads, dim in self.layers)
        K = next((n for n in (getattr(source, k, None) for k in ("num_experts_per_tok", "top_k")) if n), 0)
        expert = int(getattr(source, "moe_intermediate_size", 0) or getattr(source, "intermediate_size", 0) or 0)
        T, S = config.max_num_batched_tokens, config.max_num_seqs
        V = memory.vocabulary(self.model)
        per_token = 2 * C + max(attention, 3 * F, K * (3 * expert + C))
        return T * per_token * width + S * V * (width + 4)


class _AttentionShapes(TorchDispatchMode):
    """Records (KV heads, head dim) of each canonical attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fusecomp.attention.default:
            key = args[1]  # [1, KV heads, T, head dim]
            self.layers.append((key.shape[1], key.shape[3]))
        return func(*args, **(kwargs or {}))


def _dtype(asked: str, config: Any, tensors: dict[str, Any]) -> torch.dtype:
    """The dtype that loading will give the parameters; "auto" keeps the checkpoint's, as transformers does."""
    if asked != "auto":
        return getattr(torch, asked)
    declared = getattr(config, "dtype", None)
    if declared is not None:
        return getattr(torch, declared) if isinstance(declared, str) else declared
    found = (FLOATS[e["dtype"]] for e in tensors.values() if e["dtype"] in FLOATS)
    return next(found, torch.float32)


def _bytes_as_loaded(entry: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes of a tensor of a quantized checkpoint: floats are converted, codes stay as they lie."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] in FLOATS:
        return math.prod(entry["shape"]) * torch.empty((), dtype=dtype).element_size()
    return end - begin


def _refusal(planner: Planner, plan: MemoryPlan, config: EngineConfig, total: int | None) -> CapacityError:
    """Why a plan does not fit, and the largest limits with which it would."""

    def largest(name: str, below: int) -> int | None:
        """The largest value of a limit that fits: fewer sequences or a shorter context never need more."""

        def fits(value: int) -> bool:
            limits: dict[str, Any] = {name: value}
            return planner.plan(resolved.replace(**limits), total).fits

        low = 2 if name == "max_model_len" else 1
        if not fits(low):
            return None
        while low < below:
            middle = (low + below + 1) // 2
            low, below = (middle, below) if fits(middle) else (low, middle - 1)
        return low

    resolved = memory.resolve_limits(planner.model, config)
    shorter, fewer = largest("max_model_len", plan.max_model_len), largest("max_num_seqs", plan.max_num_seqs)
    remedies = [f"max_model_len={shorter}"] if shorter else []
    remedies += [f"max_num_seqs={fewer}"] if fewer else []
    needed = -(-(plan.max_model_len - 1) // plan.block_size) * plan.block_bytes
    held = f"{plan.weights} bytes of weights"
    if plan.capacity is not None:
        held += f", {plan.workspace} of workspace and {plan.reserve} in reserve, of {plan.capacity}"
    else:
        held = f"a KV budget of {plan.kv_budget} bytes"
    if remedies:
        remedy = f"the largest that fits is {' or '.join(remedies)}"
    elif plan.capacity is None:
        remedy = f"raise kv_cache_bytes: one block takes {plan.block_bytes}"
    else:
        remedy = "use a larger card, a smaller dtype, a quantized checkpoint, or fewer max_num_batched_tokens"
    return CapacityError(
        f"one sequence of max_model_len={plan.max_model_len} needs {needed} bytes of KV cache, "
        f"there is room for {max(0, plan.kv_budget)}",
        where=plan.model,
        why=held,
        remedy=remedy,
    )
