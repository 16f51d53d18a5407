"""Offline inference: `LLM(model).generate(prompts, sampling_params)`, and `explain(model)`.

Names, defaults and the shape of the results are vLLM's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from fusecomp.config import QUANTIZE_SCHEMES, EngineConfig, check_keys, is_int
from fusecomp.errors import ConfigError, FusecompError
from fusecomp.given_model import default_sampling_params, materialize, tokenizer_of, vocab_size
from fusecomp.hf import FusedGeneration
from fusecomp.prompts import prompt_list, prompt_token_ids, with_token_ids
from fusecomp.request import RequestOutput, SamplingParams
from fusecomp.results import Asked, Assembler
from fusecomp.runtime.call import Progress
from fusecomp.runtime.collection import earlier_objects_spared
from fusecomp.runtime.detokenizer import Detokenizer
from fusecomp.runtime.loading import load_model, resolve_folder
from fusecomp.runtime.session import Session, interrupts_between_steps

if TYPE_CHECKING:
    from fusecomp.quant.online.record import QuantizationRecord
    from fusecomp.report import FusionReport

logger = logging.getLogger("fusecomp")

ERROR_MODES = ("raise", "return")


class LLM:
    """A causal LM behind a fusecomp engine, for lists of prompts.

    Args:
        model: a folder, a name on the Hugging Face Hub, or an `nn.Module` in memory. A module is put in evaluation
            mode, and an explicit `dtype` or `device` converts it as `module.to` does; "auto" leaves both.
        tokenizer: a tokenizer, or the folder of one; None takes the checkpoint's.
        **other: see `EngineConfig`.

    Raises:
        ConfigError: an option is unknown (the nearest is named) or invalid.
        CheckpointError, UnsupportedModelError, CapacityError: the model cannot be loaded, captured or fitted.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        gpu_memory_utilization: float = 0.9,
        block_size: int = 16,
        enforce_eager: bool = False,
        seed: int = 0,
        deterministic: bool = False,
        strict: bool = False,
        device: str = "auto",
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: str = "auto",
        swap_space: float = 0.0,
        enable_prefix_caching: bool = True,
        verify: str = "off",
        fuse: str = "auto",
        disabled_patterns: Sequence[str] = (),
        compile_cache: bool = True,
        quantize: str | None = None,
        calibration: Any = None,
        tokenizer: Any = None,
        **unknown: Any,
    ) -> None:
        check_keys(EngineConfig, unknown, "LLM", also=("tokenizer",))
        config = EngineConfig(
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=kv_cache_bytes,
            kv_cache_dtype=kv_cache_dtype,
            swap_space=swap_space,
            enable_prefix_caching=enable_prefix_caching,
            block_size=block_size,
            enforce_eager=enforce_eager,
            seed=seed,
            deterministic=deterministic,
            strict=strict,
            verify=verify,
            fuse=fuse,
            disabled_patterns=tuple(disabled_patterns),
            compile_cache=compile_cache,
            quantize=quantize,
            calibration=calibration,
            **unknown,
        )
        given = None if tokenizer is None else tokenizer_of(tokenizer)
        module, own_tokenizer, config = materialize(model, config, given)
        self.config = config
        self._tokenizer = own_tokenizer if given is None else given
        self._vocab_size = vocab_size(module)
        self._default_params = default_sampling_params(module)
        self._session = Session(module, config)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete `prompts` and return their outputs in the same order.

        Args:
            prompts: a text, a list of texts, a list of token ids (one prompt), a list of those, or vLLM's dictionaries
                with "prompt" or "prompt_token_ids".
            sampling_params: for all prompts, or one each. None takes `get_default_sampling_params()`: as in vLLM,
                `SamplingParams()` (16 tokens) with the temperature, filters and repetition penalty of the model's
                `generation_config.json` when that says `do_sample`.
            use_tqdm: show a progress bar on stderr.
            priority: for all prompts, or one each; a lower number goes first, those of the same in order.

        Raises:
            RequestError, CapacityError: a prompt cannot be served (empty, too long, ids outside the vocabulary, no
                tokenizer, ...). Names the index, and is raised before anything runs. A request that fails by itself
                later comes back with `error` set.
        """
        return self.serve(prompts, sampling_params, errors="raise", use_tqdm=use_tqdm, priority=priority)

    def serve(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams | FusecompError] | None = None,
        *,
        errors: str = "return",
        use_tqdm: bool = False,
        on_output: Callable[[int, RequestOutput], None] | None = None,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """`generate` for callers that must not lose good requests to a bad one.

        Args:
            sampling_params: may hold an error in a request's place, which is then that request's outcome.
            errors: "return" gives a request that cannot be served an output with `error` set; "raise" refuses all.
            on_output: called with the index and the output of each request as it finishes, in order of completion.
            priority: as in `generate`.
        """
        if errors not in ERROR_MODES:
            raise ConfigError(f"errors={errors!r}", where="LLM.serve", remedy=f"use one of {', '.join(ERROR_MODES)}")
        requests, assembler = self._prepare(prompts, sampling_params, priority)
        outputs: dict[int, RequestOutput] = {}

        def collect(everything: list[Progress], ended: list[Progress]) -> None:
            if not assembler.expected:
                assembler.expect(everything)
            for progress in ended:
                output = assembler.whole(progress)
                if output is None:
                    continue
                outputs[progress.index] = output
                bar.advance(sum(len(completion.token_ids) for completion in output.outputs))
                if on_output is not None:
                    on_output(progress.index, output)

        with earlier_objects_spared(), _Bar(len(requests), use_tqdm) as bar:
            self._session.run(requests, errors=errors, on_step=collect, detokenizer=Detokenizer(self._tokenizer))
        return [outputs[index] for index in range(len(requests))]

    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[RequestOutput]:
        """Complete `prompts` and yield outputs as tokens come, of all requests in turn.

        Each output holds the completion that got tokens, all of them or only the new ones
        (`SamplingParams.output_kind`), and characters that are whole and cannot begin a stop text. `request_id` is
        unique in this `LLM`: `abort` ends the request with the reason "abort". Closing the iterator aborts what is
        unfinished. Other calls may be made meanwhile, also from the loop over this one: all share the engine's steps,
        and `priority` decides between them as between the prompts of one.

        Raises:
            RequestError, CapacityError: as `generate`, before the first output.
        """
        requests, assembler = self._prepare(prompts, sampling_params, priority)
        return self._stream(requests, assembler)

    def _stream(self, requests: list[Any], assembler: Assembler) -> Iterator[RequestOutput]:
        with self._session.call(requests, "raise", Detokenizer(self._tokenizer), live=True) as call:
            assembler.expect(call.all)
            for progress in call.all:
                assembler.name(progress.index, progress.request_id.split("/")[0])
            while not call.finished:
                with interrupts_between_steps():
                    news = call.advance()
                for progress in news:
                    output = assembler.increment(progress)
                    if output is None:
                        continue
                    if output.error is not None:  # here, perhaps, and not in the engine
                        self._session.abort(progress.request_id)
                    yield output

    def abort(self, request_id: str) -> None:
        """End a request of a stream, all its completions; unknown ids are ignored, since it may just have finished."""
        self._session.abort(request_id)

    def get_tokenizer(self) -> Any:
        """The tokenizer; None when the checkpoint has none."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when no parameters are given."""
        return self._default_params

    @property
    def fusion_report(self) -> FusionReport:
        """What was rewritten in the model, what was not and why."""
        return self._session.engine.report

    @property
    def metrics(self) -> Any:
        """A snapshot of the engine's counters."""
        return self._session.engine.metrics

    def _params_for(self, given: Any, count: int) -> list[SamplingParams | FusecompError]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self._default_params] * count
        params = list(given) if isinstance(given, Sequence) else [given]
        strange = [item for item in params if not isinstance(item, SamplingParams | FusecompError)]
        if strange or not isinstance(given, Sequence):
            raise ConfigError(
                f"sampling_params of type {type((strange or [given])[0]).__name__}",
                where="LLM.generate",
                remedy="give a SamplingParams for all prompts, or a list with one each",
            )
        if len(params) != count:
            raise ConfigError(
                f"{len(params)} sampling_params for {count} prompts",
                where="LLM.generate",
                remedy="give one for all, or one each",
            )
        return params

    @staticmethod
    def _priorities_for(given: Any, count: int) -> list[int]:
        priorities = [given] * count if is_int(given) else list(given) if isinstance(given, Sequence) else [given]
        strange = [item for item in priorities if not is_int(item)]
        if strange or len(priorities) != count:
            what = f"a priority of type {type(strange[0]).__name__}" if strange else f"{len(priorities)} priorities"
            raise ConfigError(what, where=f"{count} prompts", remedy="give an integer for all prompts, or one each")
        return priorities

    def _prepare(self, prompts: Any, sampling_params: Any, priority: Any = 0) -> tuple[list[Any], Assembler]:
        """Requests for the session, or the errors that refuse them, and what will put their outputs together."""
        items = prompt_list(prompts)
        requests: list[Any] = []
        asked = []
        every = zip(
            items,
            self._params_for(sampling_params, len(items)),
            self._priorities_for(priority, len(items)),
            strict=True,
        )
        for item, params, rank in every:
            try:
                if isinstance(params, FusecompError):
                    raise params
                request = (
                    prompt_token_ids(item, self._tokenizer, self._vocab_size),
                    with_token_ids(params, self._tokenizer),
                )
            except FusecompError as error:
                requests.append(error)
                request = [], SamplingParams()
            else:
                requests.append((*request, rank))
            text = item.get("prompt") if isinstance(item, Mapping) else item
            asked.append(Asked(text if isinstance(text, str) else None, *request))
        return requests, Assembler(asked, self._tokenizer)


def explain(model: str | Path | torch.nn.Module, **options: Any) -> FusionReport:
    """What fusecomp rewrites in `model`, what it does not and why; the options are those of `EngineConfig`."""
    if isinstance(model, FusedGeneration) and not options:
        return model.fusion_report
    check_keys(EngineConfig, options, "explain")
    config = EngineConfig(**options)
    if config.quantize is not None and isinstance(model, torch.nn.Module):
        raise ConfigError(
            "explain would change the weights of a model in memory",
            where=f"quantize={config.quantize!r}",
            remedy="give the folder or the name, or use LLM(model, quantize=...).fusion_report",
        )
    module, _, config = materialize(model, config)
    return Session(module, config).engine.report


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str,
    *,
    calibration: Any = None,
    overwrite: bool = False,
    device: str = "auto",
) -> QuantizationRecord:
    """Quantize a checkpoint in 16 or 32 bits into another, which fusecomp, transformers and vLLM read.

    Args:
        model: a folder, or a name on the Hugging Face Hub.
        out: the folder that is made; it appears when it is whole.
        scheme: "fp8", "int8" or "int4".
        calibration: see `EngineConfig`.
        overwrite: replace what `out` holds.

    Returns:
        What was quantized, and what was not and why.

    Raises:
        ConfigError: an option is invalid, `out` is not empty, or the checkpoint is quantized already.
        CheckpointError, UnsupportedModelError, CapacityError: the model cannot be loaded or written.
    """
    from fusecomp.quant.online.export import check_destination, export
    from fusecomp.quant.online.record import record_of

    config = EngineConfig(quantize=scheme, calibration=calibration, device=device)
    if config.quantize is None:
        raise ConfigError("no scheme", where="quantize", remedy=f"use one of {', '.join(QUANTIZE_SCHEMES)}")
    check_destination(Path(out), overwrite)
    source = resolve_folder(model)
    module, _ = load_model(source, "auto", config.device, config.quantize, config.calibration, portable=True)
    export(module, source, Path(out), overwrite=overwrite)
    record = record_of(module)
    assert record is not None
    return record


class _Bar:
    """A tqdm bar that counts finished prompts and shows output tokens per second."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="Processed prompts", unit="prompt", disable=not shown, dynamic_ncols=True)
        self._tokens = 0

    def advance(self, tokens: int) -> None:
        """One more prompt is finished, with `tokens` output tokens."""
        self._tokens += tokens
        elapsed = self._bar.format_dict["elapsed"] if not self._bar.disable else 0
        if elapsed:
            self._bar.set_postfix_str(f"{self._tokens / elapsed:.1f} output tok/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
