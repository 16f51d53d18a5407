"""The gate: nothing is reported for an engine whose numbers are wrong.

Three comparisons, against the stock HF model run eagerly in the same dtype (for an FP8 cache with its keys and values
rounded alike) and in fp32:
    1. logits after whole prompts: relative error <= 1.5 times that of the stock model in the same dtype;
    2. the same for the last token computed as a decode on cached keys;
    3. tokens served by `Engine.step` (CUDA graphs and sampling included) are arg-maxima of the exact logits, up to
       what logits with the allowed error could mistake, in the worst case and on average.

A quantized model is compared with itself: the stock model holds the same codes and dequantizes them in the graph. What
it rounds in large steps only is rounded for prompts, which the engine packs into one step, and not for decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusecomp.errors import VerificationError
from fusecomp.ops.kv_cache import FP8
from fusecomp.ops.quant import WeightSpec
from fusecomp.quant.modules import QuantizedInput, QuantizedWeight, as_in_step
from fusecomp.request import SamplingParams
from fusecomp.runtime.engine import Engine
from fusecomp.runtime.verify import ALLOWED_RATIO, FLOOR, model_error

# Odd lengths that end inside, at and just past a KV page.
LENGTHS = (2, 3, 5, 7, 17, 31, 65, 129)
NEW_TOKENS = 8
REMEDY = "no figure is reported for a wrong model"


@dataclass(frozen=True)
class CheckResult:
    """Relative RMS errors against fp32, and how far served tokens are from the exact arg-max.

    All figures are of a handful of random prompts.

    Attributes:
        prefill_error, decode_error: of the engine's logits.
        stock_error, stock_decode_error: of the stock model's logits in the same dtype.
        token_gap, mean_token_gap: largest exact logit minus that of the token served.
        allowed_gap, allowed_mean_gap: what logits with the allowed error could mistake.
        logit_std: spread of the exact logits; a model that answers a constant proves nothing.
    """

    prefill_error: float
    decode_error: float
    stock_error: float
    stock_decode_error: float
    token_gap: float
    allowed_gap: float
    mean_token_gap: float
    allowed_mean_gap: float
    logit_std: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, every module computes in fp32 on the model's own weights, widened one module at a time.

    This needs the memory of one module, where an fp32 copy needs twice the model. The weights' storage is untouched:
    codes stay codes, and dequantize to fp32.
    """
    saved: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, args: tuple) -> None:
        own = [(p, p.data) for p in module.parameters(recurse=False)]
        saved[id(module)] = own
        for parameter, data in own:
            parameter.data = data.float()

    def restore(module: nn.Module, args: tuple, output: Any) -> None:
        for parameter, data in saved.pop(id(module), ()):
            parameter.data = data

    coded = [m for m in model.modules() if isinstance(m, QuantizedWeight | QuantizedInput)]
    specs = [m.spec for m in coded]
    for module in coded:
        module.spec = replace(WeightSpec.from_text(module.spec), dtype="float32").to_text()
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None and m not in coded]
    hooks = [m.register_forward_pre_hook(widen) for m in owners]
    hooks += [m.register_forward_hook(restore, always_call=True) for m in owners]
    hooks += [hook for m in model.modules() if hasattr(m, "_dequantized") for hook in _dequantize_once(m)]
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation is not None:
        model.set_experts_implementation("eager")  # the grouped products of HF take bf16 only
    try:
        yield
    finally:
        if implementation is not None:
            model.set_experts_implementation(implementation)
        for hook in hooks:
            hook.remove()
        for module, spec in zip(coded, specs, strict=True):
            module.spec = spec


def _dequantize_once(experts: Any) -> Iterator[Any]:
    """Hooks by which quantized experts hold their weights for one forward pass: it reads them once per expert."""
    quantized, plain = type(experts), type(experts).__mro__[1]

    def hold(module: nn.Module, args: tuple) -> None:
        weights = {name: getattr(module, name) for name in quantized._dequantized}
        module.__class__ = plain
        vars(module).update(weights)

    def release(module: nn.Module, args: tuple, output: Any) -> None:
        for name in quantized._dequantized:
            vars(module).pop(name, None)
        module.__class__ = quantized

    yield experts.register_forward_pre_hook(hold)
    yield experts.register_forward_hook(release, always_call=True)


@torch.no_grad()
def _continued_logits(model: Any, prompts: Sequence[list[int]], rest: Sequence[list[int]]) -> Tensor:
    """Logits [rows, 1 + len(rest), V] after each prompt and each token that follows; one sequence at a time.

    Inputs are rounded as the engine's steps round them: all prompts are one step, what follows is decoded.
    """
    together = sum(map(len, prompts))
    device = next(model.parameters()).device
    rows = []
    for prompt, new in zip(prompts, rest, strict=True):
        with as_in_step(model, together):
            first = model(input_ids=torch.tensor([prompt], device=device), use_cache=bool(new), logits_to_keep=1)
        logits = [first.logits[0]]
        if new:
            with as_in_step(model, len(prompts)):
                ids = torch.tensor([new], device=device)
                logits.append(model(input_ids=ids, past_key_values=first.past_key_values).logits[0])
        rows.append(torch.cat(logits))
    return torch.stack(rows).float()


def _rounded_tail_logits(engine: Engine, sequences: list[list[int]], keep: int) -> Tensor:
    """Logits [rows, keep, V] at the last positions of the stock model, keys and values rounded as the cache does."""
    rows = [engine.rounded_logits(s) for s in sequences]
    if any(row is None for row in rows):
        raise VerificationError("an FP8 cache cannot be checked", where=engine.report.model, remedy=REMEDY)
    return torch.stack([row[0, -keep:] for row in rows if row is not None]).float()


def _serve(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of `NEW_TOKENS` tokens, through the serving loop."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(f"check {i}", prompt, params)
        tokens[f"check {i}"] = []
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.error is not None:
                raise VerificationError(out.error, where=out.request_id, remedy=REMEDY)
            tokens[out.request_id] += out.new_token_ids
    return list(tokens.values())


def check_engine(engine: Engine, model: Any, seed: int = 0) -> CheckResult:
    """Run the three comparisons on an idle engine.

    Raises:
        VerificationError: one of them fails.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = LENGTHS[-min(len(LENGTHS), engine.config.max_num_seqs) :]
    prompts = [torch.randint(0, engine.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    prefill = engine.prompt_logits(prompts).float()
    decode = engine.prompt_logits(prompts, decode_last=True).float()
    served = _serve(engine, prompts)

    # Position i after a prompt predicts its i-th served token. The last token of a prompt is decoded as well.
    rest = [new[:-1] for new in served]
    begun, last = [p[:-1] for p in prompts], [p[-1:] for p in prompts]
    stock, stock_decode = _continued_logits(model, prompts, rest), _continued_logits(model, begun, last)[:, 1]
    exact, exact_decode = stock, stock_decode
    if next(model.parameters()).dtype != torch.float32:
        with in_float32(model):
            exact, exact_decode = _continued_logits(model, prompts, rest), _continued_logits(model, begun, last)[:, 1]
    if engine.config.kv_cache_dtype == FP8:
        sequences = [p + new for p, new in zip(prompts, rest, strict=True)]
        with as_in_step(model, sum(map(len, prompts))):
            stock = _rounded_tail_logits(engine, sequences, NEW_TOKENS)
        stock_decode = stock[:, 0]
    after_prompt = exact[:, 0]
    chosen = torch.tensor(served, device=exact.device)
    gap = exact.amax(-1) - exact.gather(-1, chosen[..., None])[..., 0]
    # An arg-max of logits that are each off by at most e lies within 2 e of the exact maximum. On average, with
    # independent errors of deviation s, it lies well within 4 s.
    error = (stock - exact).abs()
    floor = FLOOR * float(exact.abs().max())
    routed = engine.report.count("experts") > 0
    result = CheckResult(
        prefill_error=model_error(prefill, after_prompt, routed=routed),
        decode_error=model_error(decode, exact_decode, routed=routed),
        stock_error=model_error(stock[:, 0], after_prompt, routed=routed),
        stock_decode_error=model_error(stock_decode, exact_decode, routed=routed),
        token_gap=float(gap.max()),
        allowed_gap=2 * max(ALLOWED_RATIO * float(error.max()), 10 * floor),
        mean_token_gap=float(gap.mean()),
        allowed_mean_gap=4 * max(ALLOWED_RATIO * float(error.square().mean().sqrt()), floor),
        logit_std=float(after_prompt.std()),
    )
    _judge(result, engine.report.model)
    return result


def _judge(result: CheckResult, where: str) -> None:
    for path, error, stock in (
        ("prefill", result.prefill_error, result.stock_error),
        ("decode", result.decode_error, result.stock_decode_error),
    ):
        allowed = max(ALLOWED_RATIO * stock, FLOOR)
        if not error <= allowed:
            raise VerificationError(
                f"{path} logits have error {error:.2e} against fp32, allowed {allowed:.2e}", where=where, remedy=REMEDY
            )
    for what, gap, limit in (
        ("a served token is", result.token_gap, result.allowed_gap),
        ("served tokens are on average", result.mean_token_gap, result.allowed_mean_gap),
    ):
        if not gap <= limit:
            raise VerificationError(
                f"{what} {gap:.2e} below the best logit, allowed {limit:.2e}", where=where, remedy=REMEDY
            )
    if not result.logit_std > 1e-2:
        raise VerificationError(
            f"the logits hardly differ (std {result.logit_std:.1e})", where=where, remedy="use weights that tell"
        )
