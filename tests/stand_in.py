"""The engine's contract on Hugging Face eager: what the interfaces above it are tested on where there is no engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusecomp.config import EngineConfig
from fusecomp.errors import CapacityError, RequestError
from fusecomp.request import SamplingParams


@dataclass
class StepOutput:
    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Metrics:
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Report:
    def summary(self) -> str:
        return "attention: matched in 2 of 2 layers"

    def to_dict(self) -> dict:
        return {"matches": [{"pattern": "attention", "layers": 2}]}


@dataclass
class Running:
    ids: list[int]
    params: SamplingParams
    limit: int
    generated: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)


class StandInEngine:
    """Greedy or sampled decoding without a cache, `max_num_seqs` requests at a time, others waiting."""

    def __init__(self, model: torch.nn.Module, config: EngineConfig, *, eos_token_ids: tuple[int, ...] = ()) -> None:
        limit = model.config.max_position_embeddings
        self.config = config.replace(max_model_len=min(config.max_model_len or limit, limit))
        self.report, self.metrics = Report(), Metrics()
        self._model, self._eos = model, eos_token_ids
        self._requests: dict[str, Running] = {}
        shape = model.config
        token_bytes = 8 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        self._capacity = (config.kv_cache_bytes or 1 << 30) // token_bytes

    def add_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> None:
        longest = self.config.max_model_len
        if len(prompt_token_ids) >= longest:
            raise RequestError(
                f"the prompt has {len(prompt_token_ids)} tokens, max_model_len is {longest}",
                where=request_id,
                remedy="shorten the prompt or raise max_model_len",
            )
        limit = min(len(prompt_token_ids) + (params.max_tokens or longest), longest)
        if limit > self._capacity:
            raise CapacityError(
                f"the KV cache holds {self._capacity} tokens, the request may need {limit}",
                where=request_id,
                remedy="raise kv_cache_bytes",
            )
        running = Running(list(prompt_token_ids), params, limit)
        running.generator.manual_seed(self.config.seed if params.seed is None else params.seed)
        self._requests[request_id] = running
        self.metrics.prompt_tokens += len(prompt_token_ids)

    def abort_request(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        outputs = []
        for request_id, running in list(self._requests.items())[: self.config.max_num_seqs]:
            device = next(self._model.parameters()).device
            logits = self._model(input_ids=torch.tensor([running.ids], device=device)).logits[0, -1].float()
            token = self._choose(logits, running)
            running.ids.append(token)
            running.generated += 1
            self.metrics.generation_tokens += 1
            stops = set(running.params.stop_token_ids) | (set() if running.params.ignore_eos else set(self._eos))
            reason = "stop" if token in stops else "length" if len(running.ids) >= running.limit else None
            if reason:
                del self._requests[request_id]
            outputs.append(StepOutput(request_id, [token], reason))
        return outputs

    @staticmethod
    def _choose(logits: torch.Tensor, running: Running) -> int:
        params = running.params
        if params.greedy:
            return int(logits.argmax())
        logits = logits / params.temperature
        if params.top_k > 0:
            logits[logits < logits.topk(min(params.top_k, logits.numel())).values[-1]] = -torch.inf
        probabilities, order = logits.softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities >= params.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=running.generator)])
