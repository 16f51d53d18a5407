"""`fuse` and `unfuse`: Hugging Face models whose `generate` is served by an engine.

A fused model is the same object with the same weights, configuration and `forward`. Only its class changes, to a
subclass of the same name that overrides `generate`; `unfuse` changes it back. The engine is built at the first call
that needs it, and built again when weights were changed or moved, or modules given hooks, since.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from fusecomp.capture import forward_hooks
from fusecomp.config import EngineConfig, check_keys
from fusecomp.errors import ConfigError, FallbackError, FallbackWarning, UnsupportedModelError
from fusecomp.generation import decode, make_plan, refuse_call
from fusecomp.runtime.loading import quantize_in_memory, resolve_device
from fusecomp.runtime.session import Session

if TYPE_CHECKING:
    from fusecomp.report import FusionReport

logger = logging.getLogger("fusecomp")

LIBRARIES = ("fusecomp", "torch", "transformers")
# Of the call to `generate` that is being prepared.
_TOKENIZER: ContextVar[Any] = ContextVar("tokenizer", default=None)


def fuse(target: Any = None, /, *, warmup: bool = False, **options: Any) -> Any:
    """Serve `generate` of a Hugging Face model by a fusecomp engine.

    Four forms, all with the options of `EngineConfig`:

        model = fusecomp.fuse(model, max_num_seqs=64)        # an instance: changed in place and returned

        @fusecomp.fuse                                       # a function that returns a model, alone or in a tuple
        def load(): return AutoModelForCausalLM.from_pretrained("...")

        @fusecomp.fuse(max_num_seqs=64)                      # the same, with options
        def load(): ...

        Llama = fusecomp.fuse(LlamaForCausalLM)              # a class: what its from_pretrained returns is fused

    `generate` keeps its contract: arguments, left padding, `GenerationConfig`, streamers, outputs. In float32, greedy
    tokens are those of stock `generate`. Sampling is governed by `torch.manual_seed`, but draws other numbers.
    A call the engine cannot serve exactly (beams, n-gram bans, `output_scores`, ...) goes to stock `generate` with one
    `FallbackWarning` for each cause, or raises `FallbackError` under `strict=True`. With `return_dict_in_generate`,
    `past_key_values` is None: the engine's cache is paged and shared.

    Args:
        target: a model, a function that returns one, or a model class. None makes a decorator.
        warmup: build the engine now rather than at the first `generate`.
        **options: fields of `EngineConfig`. An explicit `dtype` or `device` converts the model as `model.to` does,
            and `quantize` replaces its weights by codes, which `unfuse` does not undo: it gives back a model of stock
            class that computes with those codes. "auto" and None leave it as it is.

    Raises:
        ConfigError: an option is unknown or invalid, or `target` is nothing that can be fused.
    """
    check_keys(EngineConfig, options, "fuse", also=("warmup",))
    config = EngineConfig(**options)
    if target is None:
        return functools.partial(_fuse_target, config, warmup)
    return _fuse_target(config, warmup, target)


def unfuse(model: Any) -> Any:
    """Give a fused model its own class back and release the engine. Returns the model; others are left as they are."""
    if isinstance(model, FusedGeneration):
        model.__class__ = stock_class(type(model))
        vars(model).pop("_fusecomp", None)
    return model


def _fuse_target(config: EngineConfig, warmup: bool, target: Any) -> Any:
    if isinstance(target, PreTrainedModel):
        return _fuse_instance(target, config, warmup)
    if isinstance(target, type) and issubclass(target, PreTrainedModel):
        _refuse_without_generate(target)
        if warmup:
            raise ConfigError(
                "warmup needs weights",
                where=f"fuse({target.__name__})",
                remedy="use fuse(model, warmup=True) on the instance",
            )
        return _subclass(stock_class(target), config)
    if callable(target) and not isinstance(target, type | torch.nn.Module):

        @functools.wraps(target)
        def load(*args: Any, **kwargs: Any) -> Any:
            return _fuse_returned(target(*args, **kwargs), config, warmup, getattr(target, "__name__", "function"))

        return load
    name = target.__name__ if isinstance(target, type) else type(target).__name__
    raise ConfigError(
        f"cannot fuse {name}",
        where="fuse",
        remedy="give a transformers model, a function that returns one, or a model class; "
        "for another torch module use fusecomp.LLM(module)",
    )


def _fuse_returned(value: Any, config: EngineConfig, warmup: bool, name: str) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    if sum(isinstance(item, PreTrainedModel) for item in values) != 1:
        raise ConfigError(
            f"returned {type(value).__name__}",
            where=f"{name}()",
            remedy="return one transformers model, alone or in a tuple",
        )
    fused = tuple(_fuse_instance(v, config, warmup) if isinstance(v, PreTrainedModel) else v for v in values)
    return fused if isinstance(value, tuple) else fused[0]


def _fuse_instance(model: Any, config: EngineConfig, warmup: bool) -> Any:
    stock = stock_class(type(model))
    _refuse_without_generate(stock)
    state = FusedState(model, config)
    model.__class__ = _instance_class(stock)
    object.__setattr__(model, "_fusecomp", state)
    if warmup:
        state.session(model)
    return model


def _refuse_without_generate(cls: type) -> None:
    if not issubclass(cls, GenerationMixin):
        raise UnsupportedModelError(
            f"{cls.__name__} has no generate", where="fuse", remedy="use the ...ForCausalLM class of the same family"
        )


def stock_class(cls: Any) -> Any:
    """The class a fused one was made from; `cls` itself when it is not fused."""
    return cls._fusecomp_stock if issubclass(cls, FusedGeneration) else cls


@functools.cache
def _instance_class(stock: type) -> type:
    return _subclass(stock, EngineConfig())


def _subclass(stock: Any, config: EngineConfig) -> Any:
    """A subclass of `stock` that passes for it by name (registries and saved configurations hold names)."""
    same = {name: getattr(stock, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        stock.__name__, (FusedGeneration, stock), {**same, "_fusecomp_stock": stock, "_fusecomp_config": config}
    )


class FusedState:
    """What a fused model has besides itself: options, the engine once built, and the fallbacks taken."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.config = config
        self.fallbacks: Counter[str] = Counter()
        self._session: Session | None = None
        self._refusal: UnsupportedModelError | None = None
        self._fingerprint: tuple = ()
        self._lock = threading.Lock()
        if config.dtype != "auto" or config.device != "auto":
            dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
            model.to(device=None if config.device == "auto" else resolve_device(config.device), dtype=dtype)
        if config.quantize is not None:
            quantize_in_memory(model, config)
            self.config = config.replace(quantize=None, calibration=None)  # a copy has its codes already

    def session(self, model: Any) -> Session:
        """The session for `model` as it is now. Raises `UnsupportedModelError` (again) when there cannot be one."""
        with self._lock:
            return self._session_of(model)

    def _session_of(self, model: Any) -> Session:
        if (self._session or self._refusal) and self._fingerprint == _fingerprint(model):
            if self._refusal is not None:
                raise self._refusal
            assert self._session is not None
            return self._session
        if self._session is not None:
            logger.warning("weights or modules were changed since the engine was built: building it again")
        self._session = self._refusal = None
        try:
            self._session = Session(model, self.config.replace(device=str(model.device)))
        except UnsupportedModelError as error:
            self._refusal = error
            raise
        finally:
            self._fingerprint = _fingerprint(model)
        self._session.engine.report.fallbacks.update({f"generate: {c}": n for c, n in self.fallbacks.items()})
        return self._session

    def fall_back(self, cause: str) -> None:
        """Count a fallback and warn of its cause the first time; raise under `strict`."""
        if self.config.strict:
            raise FallbackError(
                f"this call needs stock generate: {cause}",
                where="generate",
                remedy="drop the option, or use strict=False",
            )
        self.fallbacks[cause] += 1
        if self._session is not None:
            self._session.engine.report.fallbacks[f"generate: {cause}"] = self.fallbacks[cause]
        if self.fallbacks[cause] == 1:
            warnings.warn(f"fusecomp: served by stock generate: {cause}", FallbackWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The `stacklevel` that makes a warning point at the user's line, whichever way through transformers led here."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


def _fingerprint(model: Any) -> tuple:
    """Changes when a parameter is replaced, moved or written in place, or a module gets a hook or another `forward`."""
    weights = tuple(
        (id(p), p.data_ptr() if not p.is_meta else 0, 0 if p.is_inference() else p._version) for p in model.parameters()
    )
    code = tuple((name, id(vars(m).get("forward")), *map(id, forward_hooks(m))) for name, m in model.named_modules())
    return weights, code


class FusedGeneration:
    """Mixed in before a model class: `generate` by the engine, and what the engine reports."""

    @torch.no_grad()
    def generate(  # the parameters are those of GenerationMixin.generate
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`GenerationMixin.generate`, decoded by the fusecomp engine. See `fusecomp.fuse` for what is served how."""
        state = _state(self)
        model: Any = self

        def stock_generate(custom: Any) -> Any:
            return super(FusedGeneration, model).generate(  # type: ignore[misc]
                inputs,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                synced_gpus=synced_gpus,
                assistant_model=assistant_model,
                streamer=streamer,
                negative_prompt_ids=negative_prompt_ids,
                negative_prompt_attention_mask=negative_prompt_attention_mask,
                custom_generate=custom,
                **kwargs,
            )

        cause = refuse_call(
            model,
            stock_class(type(self)),
            generation_config,
            custom_generate=custom_generate,
            assistant_model=assistant_model,
            synced_gpus=synced_gpus,
            kwargs=kwargs,
        )
        session = None
        if cause is None:
            try:
                session = state.session(model)
            except UnsupportedModelError as error:
                cause = str(error)
        if session is None:
            state.fall_back(str(cause))
            return stock_generate(custom_generate)

        # `generate` prepares inputs, lengths, processors and criteria, then calls this in place of its decoding loop.
        def decoding(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            plan = make_plan(
                input_ids,
                model_kwargs.get("attention_mask"),
                processors=logits_processor,
                criteria=stopping_criteria,
                config=generation_config,
                max_model_len=session.engine.config.max_model_len or sys.maxsize,
            )
            sequences = plan if isinstance(plan, str) else decode(session, plan, input_ids, streamer)
            if not isinstance(sequences, str):
                as_dict = generation_config.return_dict_in_generate
                return GenerateDecoderOnlyOutput(sequences=sequences) if as_dict else sequences  # type: ignore[arg-type]
            state.fall_back(sequences)
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=streamer,
                **model_kwargs,
            )

        token = _TOKENIZER.set(kwargs.get("tokenizer"))
        try:
            return stock_generate(decoding)
        finally:
            _TOKENIZER.reset(token)

    def _get_stopping_criteria(self, *args: Any, tokenizer: Any = None, **kwargs: Any) -> Any:
        # `generate` drops the tokenizer, which stop strings need, when a decoding loop is given.
        tokenizer = _TOKENIZER.get() if tokenizer is None else tokenizer
        return super()._get_stopping_criteria(*args, tokenizer=tokenizer, **kwargs)  # type: ignore[misc]

    @property
    def fusion_report(self) -> FusionReport:
        """What was rewritten in the model, what was not and why. Builds the engine when there is none yet."""
        return _state(self).session(self).engine.report

    @property
    def fusion_fallbacks(self) -> dict[str, int]:
        """How many calls went to stock `generate`, by cause."""
        return dict(_state(self).fallbacks)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or a pickle is fused with the same options and builds an engine of its own.
        attributes = {name: value for name, value in vars(self).items() if name != "_fusecomp"}
        cls = type(self)
        importable = getattr(sys.modules.get(cls.__module__), cls.__qualname__, None)
        return _restore, (cls if importable is cls else stock_class(cls), _state(self).config), attributes


def _restore(cls: Any, config: EngineConfig) -> Any:
    model = cls.__new__(cls)
    model.__class__ = cls if issubclass(cls, FusedGeneration) else _instance_class(cls)
    model.__dict__["_fusecomp_pending"] = config
    return model


def _state(model: Any) -> FusedState:
    """The state of a fused model; instances of a fused class and copies get theirs here, at first use."""
    state = vars(model).get("_fusecomp")
    if state is None:
        state = FusedState(model, vars(model).pop("_fusecomp_pending", type(model)._fusecomp_config))
        object.__setattr__(model, "_fusecomp", state)
    return state
