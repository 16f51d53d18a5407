"""What a request does to its logits before a token is drawn: bias, bans and penalties, on the device.

Legend: S rows of a step, R table rows (`max_num_seqs` and one more, which padding rows use), V vocabulary, W bans of a
row, L longest prefix of a ban.

Every running sequence has a line, `SequenceState.row`, in tables on the device. The host writes a line when a sequence
is admitted, with all tokens it has then; the step itself adds the token it was fed, so the host need not know a step's
tokens before it launches the next. A token is added when its position is beyond the last one added: running a step
twice, for a warm-up or to measure, changes nothing. Tables are made when a request first needs them; each has a line
for every row, and a neutral line changes no bit of a logit.

Writes are issued on the stream of the steps, behind those in flight. No sync, no shape that depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fusecomp.errors import CapacityError, RequestError
from fusecomp.request import SamplingParams
from fusecomp.runtime.scheduler import SequenceState

# A count above any output's length: added once to what the prompt holds, so that one table tells both.
PROMPT = 1 << 24
NEVER = 2**31 - 1
# Columns of the parameter table, and what a row without wishes has there.
REPETITION, PRESENCE, FREQUENCY, MIN_P, TYPICAL_P = range(5)
NEUTRAL = (1.0, 0.0, 0.0, 0.0, 1.0)
MAX_BANS, MAX_BAN_LENGTH = 1024, 32


class RowTables:
    """The lines of all running sequences.

    Args:
        max_num_seqs: R - 1.
        device: of the tables.
        eos_ids: ids that `min_tokens` holds back unless they are ignored.

    Attributes:
        vocab: V; set before the first request.
        version: grows when a table is made or replaced: graphs hold addresses.
        params: [R, 5] float32.
        bias: [R, V] float32, added to logits; -inf bans.
        counts: [R, V] int32, occurrences in the output, and `PROMPT` more for tokens of the prompt.
        counted: [R] int64, position of the last token in `counts` and `recent`; `NEVER` for rows with nothing there.
        recent: [R, L] int64, ring of the latest tokens: position p at p mod L.
        prefixes: [R, W, L] int32, what must precede a banned token, latest first; -1 is any token.
        banned: [R, W] int64 ids.
        until: [R, W] int64: the ban holds while the last token's position is below.
    """

    def __init__(self, max_num_seqs: int, device: torch.device | str, eos_ids: Sequence[int] = ()) -> None:
        self.padding_row = max_num_seqs
        self.vocab = 0
        self.version = 0
        self.device = torch.device(device)
        self._eos = tuple(eos_ids)
        self.params = torch.tensor(NEUTRAL, device=self.device).repeat(max_num_seqs + 1, 1)
        self.bias: Tensor | None = None
        self.counts: Tensor | None = None
        self.counted = torch.full((max_num_seqs + 1,), NEVER, dtype=torch.int64, device=self.device)
        self.recent: Tensor | None = None
        self.prefixes: Tensor | None = None
        self.banned: Tensor | None = None
        self.until: Tensor | None = None
        self.back: Tensor | None = None  # [L] int64, 0 to L - 1
        self._special: dict[str, set[int]] = {name: set() for name in ("params", "bias", "counts", "bans")}

    @property
    def num_bytes(self) -> int:
        """Memory of the tables made so far."""
        bans = (self.recent, self.prefixes, self.banned, self.until, self.back)
        tables = (self.params, self.bias, self.counts, self.counted, *bans)
        return sum(table.nbytes for table in tables if table is not None)

    # ------------------------------------------------------------------ making tables

    def reserve(self, params: SamplingParams, where: str = "") -> None:
        """Make the tables that a request with `params` needs, before it is queued.

        Raises:
            RequestError: an id outside the vocabulary, or more bans than tables take.
            CapacityError: they do not fit the device's memory. Those there were stay.
        """
        bans = self._bans_of(params)
        self._check(params, bans, where)
        try:
            if self._biased(params) and self.bias is None:
                self.bias = torch.zeros(len(self.params), self.vocab, device=self.device)
                self.version += 1
            if params.penalised and self.counts is None:
                self.counts = torch.zeros(len(self.params), self.vocab, dtype=torch.int32, device=self.device)
                self.version += 1
            if bans:
                self._reserve_bans(len(bans), max(len(prefix) for prefix, _ in bans))
        except torch.OutOfMemoryError as error:
            size = len(self.params) * self.vocab * 4
            raise CapacityError(
                f"no memory for a table of up to {size} bytes, which the request's sampling options need",
                where=where,
                why="penalties, bias and bans have a line of the vocabulary for each of max_num_seqs sequences",
                remedy="lower max_num_seqs or gpu_memory_utilization",
            ) from error

    def _check(self, params: SamplingParams, bans: list[tuple[tuple[int, ...], int]], where: str) -> None:
        ids = [*params.logit_bias, *(params.allowed_token_ids or ())]
        ids += [i for word in params.bad_words for i in self._word(word, where)]
        bad = next((i for i in ids if i >= self.vocab), None)
        if bad is not None:
            raise RequestError(
                f"token id {bad} of a sampling option is outside the vocabulary of {self.vocab}",
                where=where,
                remedy="use the tokenizer of this model",
            )
        if len(bans) > MAX_BANS or any(len(prefix) >= MAX_BAN_LENGTH for prefix, _ in bans):
            raise RequestError(
                f"{len(bans)} bad words of several tokens and stop ids under min_tokens",
                where=where,
                why=f"a request may have {MAX_BANS}, of at most {MAX_BAN_LENGTH} tokens each",
                remedy="give fewer or shorter ones",
            )

    @staticmethod
    def _word(word: str | tuple[int, ...], where: str) -> tuple[int, ...]:
        if isinstance(word, str):
            raise RequestError(
                f"the bad word {word!r} is a text", where=where, remedy="give token ids, or use LLM with a tokenizer"
            )
        return word

    def _reserve_bans(self, count: int, length: int) -> None:
        have = (0, 0) if self.prefixes is None else self.prefixes.shape[1:]
        W, L = max(8, have[0]), max(4, have[1])
        while count > W:
            W *= 2
        while length > L:
            L *= 2
        if tuple(have) == (W, L):
            return
        R = len(self.params)
        prefixes = torch.full((R, W, L), -1, dtype=torch.int32, device=self.device)
        banned = torch.zeros(R, W, dtype=torch.int64, device=self.device)
        until = torch.full((R, W), -1, dtype=torch.int64, device=self.device)
        recent = torch.full((R, L), -1, dtype=torch.int64, device=self.device)
        if self.prefixes is not None:
            assert self.banned is not None and self.until is not None and self.recent is not None
            prefixes[:, : have[0], : have[1]] = self.prefixes
            banned[:, : have[0]], until[:, : have[0]] = self.banned, self.until
            self._move_rings(recent)
        self.prefixes, self.banned, self.until, self.recent = prefixes, banned, until, recent
        self.back = torch.arange(L, device=self.device)
        self.version += 1

    def _move_rings(self, longer: Tensor) -> None:
        """Copy rings into longer ones. Where a token belongs depends on its position modulo the length, so it is put
        at every place that the new modulus may give: what older places hold is never compared by a shorter prefix.
        """
        assert self.recent is not None
        longer.copy_(self.recent.repeat(1, longer.shape[1] // self.recent.shape[1]))

    # ------------------------------------------------------------------ a line

    def enter(self, seq: SequenceState) -> None:
        """Write the line of a sequence that was just admitted."""
        params, row = seq.params, seq.row
        wishes = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.min_p,
            params.typical_p,
        )
        if self._turns("params", row, wishes != NEUTRAL):
            self.params[row].copy_(self._move(wishes, torch.float32))
        if self._turns("bias", row, self._biased(params)):
            self._enter_bias(row, params)
        bans = self._bans_of(params)
        counts_turn, bans_turn = self._turns("counts", row, params.penalised), self._turns("bans", row, bool(bans))
        if counts_turn:
            self._enter_counts(row, seq)
        if bans_turn:
            self._enter_bans(row, seq, bans)
        if counts_turn or bans_turn:
            self.counted[row].fill_(len(seq.token_ids) - 1 if params.penalised or bans else NEVER)

    def _turns(self, table: str, row: int, special: bool) -> bool:
        """Whether the line of `row` must be written: it gets something, or has something of an earlier sequence."""
        rows = self._special[table]
        if not special and row not in rows:
            return False
        (rows.add if special else rows.discard)(row)
        return True

    def _move(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Host values on the device, without a sync: torch keeps pinned memory until its copy has ended."""
        host = torch.tensor(values, dtype=dtype, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)

    @staticmethod
    def _biased(params: SamplingParams) -> bool:
        single = any(len(word) == 1 for word in params.bad_words)
        return bool(params.logit_bias or params.allowed_token_ids is not None or single)

    def _enter_bias(self, row: int, params: SamplingParams) -> None:
        assert self.bias is not None
        line = self.bias[row]
        if params.allowed_token_ids is None:
            line.zero_()
        else:
            line.fill_(-float("inf"))
            line.index_fill_(0, self._move(params.allowed_token_ids, torch.int64), 0.0)
        values = dict(params.logit_bias)
        values |= {word[0]: -float("inf") for word in params.bad_words if len(word) == 1}  # type: ignore[misc]
        if values:
            ids = self._move(list(values), torch.int64)
            line.index_add_(0, ids, self._move(list(values.values()), torch.float32))

    def _enter_counts(self, row: int, seq: SequenceState) -> None:
        assert self.counts is not None
        self.counts[row].zero_()
        if not seq.params.penalised:
            return
        prompt = np.unique(np.asarray([*seq.prompt_ids, *seq.params.repetition_context], np.int64))
        prompt = prompt[prompt < self.vocab]  # an embedding may have more rows than there are logits
        output, times = np.unique(np.asarray(seq.output_ids, np.int64), return_counts=True)
        ids = self._move([*prompt.tolist(), *output.tolist()], torch.int64)
        values = self._move([*[PROMPT] * len(prompt), *times.tolist()], torch.int32)
        self.counts[row].index_add_(0, ids, values)

    def _bans_of(self, params: SamplingParams) -> list[tuple[tuple[int, ...], int]]:
        """(prefix, banned id) of words of several tokens, then of ids that may not end the request yet."""
        bans = [(word[:-1], word[-1]) for word in params.bad_words if len(word) > 1 and not isinstance(word, str)]
        if params.min_tokens:
            bans += [((), i) for i in self._enders(params) if i < self.vocab]
        return bans

    def _enders(self, params: SamplingParams) -> list[int]:
        return list(dict.fromkeys([*params.stop_token_ids, *(() if params.ignore_eos else self._eos)]))

    def _enter_bans(self, row: int, seq: SequenceState, bans: list[tuple[tuple[int, ...], int]]) -> None:
        assert self.prefixes is not None and self.banned is not None
        assert self.until is not None and self.recent is not None
        self.until[row].fill_(-1)
        if not bans:
            return
        count, L = len(bans), self.prefixes.shape[2]
        prefixes = np.full((count, L), -1, np.int32)
        for line, (prefix, _) in zip(prefixes, bans, strict=True):
            line[: len(prefix)] = prefix[::-1]
        held_back = len(seq.prompt_ids) + seq.params.min_tokens - 1
        until = [NEVER if prefix else held_back for prefix, _ in bans]
        self.prefixes[row, :count] = self._move(prefixes.reshape(-1).tolist(), torch.int32).view(count, L)
        self.banned[row, :count] = self._move([i for _, i in bans], torch.int64)
        self.until[row, :count] = self._move(until, torch.int64)
        ring = [-1] * L
        known = seq.token_ids
        for position in range(max(0, len(known) - L), len(known)):
            ring[position % L] = known[position]
        self.recent[row] = self._move(ring, torch.int64)

    # ------------------------------------------------------------------ in the step

    def note_fed(self, rows: Tensor, positions: Tensor, fed: Tensor) -> None:
        """Add the tokens that the step was fed, if they are new. rows, positions, fed [S] int64: each row's last."""
        counted = self.counted[rows]
        new = positions > counted
        if self.counts is not None:
            places = rows * self.vocab + fed.clamp(max=self.vocab - 1)
            self.counts.view(-1).scatter_add_(0, places, new.to(torch.int32))
        if self.recent is not None:
            length = self.recent.shape[1]
            places = rows * length + positions % length
            ring = self.recent.view(-1)
            ring.scatter_(0, places, torch.where(new, fed, ring[places]))
        self.counted.scatter_(0, rows, torch.maximum(positions, counted))


def adjust(
    logits: Tensor,
    rows: Tensor,
    positions: Tensor,
    params: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    recent: Tensor | None,
    prefixes: Tensor | None,
    banned: Tensor | None,
    until: Tensor | None,
    back: Tensor | None,
) -> Tensor:
    """Logits [S, V] with what the rows' lines ask for, in float32. Arguments from `params` on: see `RowTables`.

    Order: bias, bans, repetition, frequency, presence. Hugging Face's and vLLM's agree: bias comes before penalties,
    and a ban (-inf) commutes with all.
    """
    x = logits.float()
    if bias is not None:
        x = x + bias[rows]
    if counts is not None:
        line, wishes = counts[rows], params[rows]
        penalty = wishes[:, REPETITION, None]
        x = torch.where(line != 0, torch.where(x < 0, x * penalty, x / penalty), x)
        times = line & (PROMPT - 1)
        x = x - wishes[:, FREQUENCY, None] * times
        x = x - wishes[:, PRESENCE, None] * (times > 0)
    if recent is not None:
        assert prefixes is not None and banned is not None and until is not None and back is not None
        at = positions[:, None] - back  # [S, L], latest first
        context = recent[rows].gather(1, at % back.shape[0]).masked_fill(at < 0, -2)
        wanted = prefixes[rows]
        follows = ((wanted < 0) | (wanted == context[:, None, :])).all(dim=-1)
        holds = follows & (positions[:, None] < until[rows])
        x = x.scatter_add(1, banned[rows], x.new_zeros(holds.shape).masked_fill(holds, -float("inf")))
    return x
