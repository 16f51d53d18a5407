"""Every sampling option against Hugging Face's processors and a NumPy reference, on tables as an engine fills them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from fusecomp.errors import CapacityError, RequestError
from fusecomp.request import SamplingParams
from fusecomp.runtime.adjust import MAX_BAN_LENGTH, MAX_BANS, RowTables
from fusecomp.runtime.choice import TokenChoice
from fusecomp.runtime.sampler import _keep, _keep_typical, sample
from fusecomp.runtime.scheduler import INVALID_TOKEN, SequenceState
from tests.runtime.sampling_reference import adjusted, kept

V, EOS = 23, (3, 7)
INF = float("inf")
tokens = st.integers(0, V - 1)


def choice(rows=3):
    tables = RowTables(rows, "cpu", EOS)
    chosen = TokenChoice(tables, torch.device("cpu"))
    chosen.set_vocabulary(V)
    return chosen


def admit(chosen, row, prompt, output, params):
    """A sequence with these tokens on a row, as after a preemption when there is output."""
    chosen.tables.reserve(params)
    seq = SequenceState(f"row {row}", prompt, params)
    seq.token_ids += output
    seq.row = row
    chosen.tables.enter(seq)
    return seq


def step_of(seqs):
    """A decode of the last token of each sequence."""
    rows = torch.tensor([seq.row for seq in seqs])
    last = [[seq.token_ids[-1] for seq in seqs], [len(seq.token_ids) - 1 for seq in seqs]]
    return SimpleNamespace(rows=rows, tokens=torch.tensor(last), logit_indices=torch.arange(len(seqs)))


def adjust(chosen, seqs, logits):
    batch = step_of(seqs)
    return chosen._adjusted(logits, batch, batch.tokens[1])


def stock(seq, params, logits):
    """Hugging Face's processors in the order of `generate`, for one row."""
    processors = hf.LogitsProcessorList()
    if params.logit_bias:
        processors.append(hf.SequenceBiasLogitsProcessor({(i,): float(b) for i, b in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.bad_words:
        processors.append(hf.NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.min_tokens:
        processors.append(
            hf.MinNewTokensLengthLogitsProcessor(
                len(seq.prompt_ids), params.min_tokens, [*params.stop_token_ids, *(() if params.ignore_eos else EOS)]
            )
        )
    if params.allowed_token_ids is not None:
        processors.append(hf.SuppressTokensLogitsProcessor(sorted(set(range(V)) - set(params.allowed_token_ids))))
    return processors(torch.tensor([seq.token_ids]), logits[None])[0]


@st.composite
def wishes(draw, penalties=(0.0,)):
    return SamplingParams(
        max_tokens=None,
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7, 2.5])),
        presence_penalty=draw(st.sampled_from(penalties)),
        frequency_penalty=draw(st.sampled_from(penalties)),
        logit_bias=draw(st.dictionaries(st.integers(1, V - 1), st.sampled_from([-INF, -2.5, 1.0, 40.0]), max_size=4)),
        bad_words=tuple(draw(st.lists(st.lists(tokens, min_size=1, max_size=6).map(tuple), max_size=12, unique=True))),
        allowed_token_ids=draw(st.none() | st.lists(tokens, min_size=1, max_size=V).map(tuple)),
        min_tokens=draw(st.integers(0, 6)),
        stop_token_ids=tuple(draw(st.lists(tokens, max_size=2, unique=True))),
        ignore_eos=draw(st.booleans()),
    )


@st.composite
def histories(draw, params):
    """Prompts and outputs of few different tokens, so that words occur, and the tokens of further steps."""
    few = st.sampled_from(draw(st.lists(tokens, min_size=2, max_size=3)))
    lists = [st.lists(few, min_size=7, max_size=12), st.lists(few, max_size=4), st.lists(few, max_size=6)]
    return [(draw(params), *(draw(x) for x in lists)) for _ in range(draw(st.integers(1, 3)))]


def logits_of(seed, rows):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


@given(histories(wishes()), st.integers(0, 1000))
def test_adjusted_logits_are_hugging_faces_to_the_bit(rows, seed):
    """Admitted with some output, then fed token by token; all rows together, each as if it were alone."""
    chosen = choice()
    seqs = [admit(chosen, i, prompt, output, params) for i, (params, prompt, output, _) in enumerate(rows)]
    for number in range(1 + max(len(more) for *_, more in rows)):
        logits = logits_of(seed + number, len(seqs))
        got = adjust(chosen, seqs, logits)
        for seq, line, own in zip(seqs, logits, got, strict=True):
            assert own.equal(stock(seq, seq.params, line))
        for seq, (*_, more) in zip(seqs, rows, strict=True):
            seq.token_ids += more[number : number + 1]


@given(histories(wishes((0.0, 0.5, -1.0))), st.integers(0, 1000))
def test_adjusted_logits_are_the_references(rows, seed):
    chosen = choice()
    seqs = [admit(chosen, i, prompt, output, params) for i, (params, prompt, output, _) in enumerate(rows)]
    for number in range(4):
        logits = logits_of(seed + number, len(seqs))
        got = adjust(chosen, seqs, logits)
        assert adjust(chosen, seqs, logits).equal(got), "running a step twice must change nothing"
        for seq, line, own in zip(seqs, logits, got, strict=True):
            expected = adjusted(line, list(seq.prompt_ids), seq.output_ids, seq.params, EOS)
            np.testing.assert_allclose(own.numpy(), expected, rtol=1e-5, atol=1e-5)
        for seq, (*_, more) in zip(seqs, rows, strict=True):
            seq.token_ids += more[number : number + 1]


def test_a_row_keeps_nothing_of_its_last_sequence():
    chosen = choice(1)
    special = SamplingParams(
        repetition_penalty=2.0, logit_bias={4: 9.0}, bad_words=((5, 6), (8,)), min_tokens=3, allowed_token_ids=(1, 2)
    )
    admit(chosen, 0, [5, 5, 5], [5], special)
    logits = logits_of(0, 1)
    plain = admit(chosen, 0, [5, 1], [5], SamplingParams())
    assert adjust(chosen, [plain], logits).equal(logits)
    plain.token_ids += [6, 5]
    assert adjust(chosen, [plain], logits).equal(logits)
    again = admit(chosen, 0, [9, 9], [], SamplingParams(presence_penalty=1.0))
    assert adjust(chosen, [again], logits).equal(logits), "nothing was generated yet"


def test_tables_made_later_leave_rows_alone():
    """Tables for words of four tokens, then of twenty, while a row with short words runs."""
    chosen = choice()
    seq = admit(chosen, 0, list(range(1, 14)), [], SamplingParams(bad_words=((11, 12, 13, 4),)))
    version = chosen.tables.version
    logits = logits_of(0, 1)
    assert adjust(chosen, [seq], logits)[0, 4] == -INF
    long = tuple(range(20))
    other = admit(chosen, 1, list(long[:-1]), [], SamplingParams(bad_words=(long,)))
    assert chosen.tables.version > version
    got = adjust(chosen, [seq, other], logits.expand(2, -1))
    assert got[0, 4] == -INF and got[1, 19] == -INF and got.isinf().sum() == 2
    seq.token_ids += [11, 12, 13]
    for end in range(len(seq.token_ids) - 2, len(seq.token_ids) + 1):
        shown = SequenceState("", seq.token_ids[:end], seq.params)
        shown.row = 0
        got = adjust(chosen, [shown], logits)
    assert got[0, 4] == -INF


def test_prefill_chunks_add_nothing():
    """Before its last chunk a row is fed tokens that the table has: their positions are not beyond the last one."""
    chosen = choice()
    params = SamplingParams(frequency_penalty=1.0, bad_words=((2, 9, 5),))
    seq = admit(chosen, 0, [1, 2, 9, 9], [2, 9], params)
    logits = logits_of(0, 1)
    expected = adjust(chosen, [seq], logits).clone()
    for end in range(1, 6):
        shown = SequenceState("", seq.token_ids[:end], params)
        shown.row = 0
        adjust(chosen, [shown], logits)
    assert adjust(chosen, [seq], logits).equal(expected)
    assert expected[0, 5] == -INF


def test_padding_rows_are_inert():
    chosen = choice(2)
    seq = admit(chosen, 0, [1, 2], [3], SamplingParams(presence_penalty=1.0, bad_words=((2, 3, 4),)))
    padding = SequenceState("padding", [0], SamplingParams())
    padding.row = 2
    logits = logits_of(0, 3)
    for _ in range(3):
        got = adjust(chosen, [seq, padding, padding], logits)
        assert got[1:].equal(logits[1:])


def test_memory_is_made_when_needed_and_counted():
    tables = RowTables(4, "cpu")
    tables.vocab = 1000
    small = tables.num_bytes
    assert small < 1000
    tables.reserve(SamplingParams(min_p=0.1, typical_p=0.5, top_k=3))
    assert tables.num_bytes == small and tables.version == 0
    tables.reserve(SamplingParams(logit_bias={1: 2.0}))
    assert tables.num_bytes == small + 5 * 1000 * 4 and tables.version == 1
    tables.reserve(SamplingParams(frequency_penalty=0.1))
    assert tables.num_bytes == small + 2 * 5 * 1000 * 4 and tables.version == 2
    tables.reserve(SamplingParams(min_tokens=1, stop_token_ids=(4,)))
    assert tables.num_bytes > small + 2 * 5 * 1000 * 4 and tables.version == 3
    tables.reserve(SamplingParams(min_tokens=1, stop_token_ids=(4,), presence_penalty=1))
    assert tables.version == 3


def test_no_memory_for_a_table_refuses_the_request(monkeypatch):
    tables = choice().tables

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(CapacityError, match=r"no memory for a table of up to \d+ bytes"):
        tables.reserve(SamplingParams(frequency_penalty=1.0))
    monkeypatch.undo()
    assert tables.counts is None and tables.version == 0
    tables.reserve(SamplingParams(frequency_penalty=1.0))
    assert tables.counts is not None


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={V: 1.0}), f"token id {V} of a sampling option"),
        (SamplingParams(allowed_token_ids=(1, 99)), "token id 99"),
        (SamplingParams(bad_words=((1, 99),)), "token id 99"),
        (SamplingParams(bad_words=("text",)), "'text' is a text"),
        (SamplingParams(bad_words=tuple((i % V, i // V) for i in range(MAX_BANS + 1))), "token id"),
        (SamplingParams(bad_words=((1,) * (MAX_BAN_LENGTH + 1),)), "bad words of several tokens"),
    ],
)
def test_what_tables_cannot_hold_is_refused(params, message):
    with pytest.raises(RequestError, match=message):
        choice().tables.reserve(params)


# ---------------------------------------------------------------------- filters


@st.composite
def filters(draw):
    return SamplingParams(
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0])),
        top_k=draw(st.sampled_from([0, 1, 4, 9, 100])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.35])),
        min_p=draw(st.sampled_from([0.0, 0.03, 0.3, 1.0])),
        typical_p=draw(st.sampled_from([1.0, 0.9, 0.4, 0.05])),
    )


def stock_kept(logits, params):
    processors = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    processors.append(hf.MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        processors.append(hf.TypicalLogitsWarper(params.typical_p))
    return set(processors(None, logits[None].clone())[0].isfinite().nonzero()[:, 0].tolist())


@settings(max_examples=settings().max_examples * 2)
@given(filters(), st.integers(0, 10_000))
def test_filters_keep_what_hugging_face_keeps(params, seed):
    logits = logits_of(seed, 1)
    expected = stock_kept(logits[0], params)
    assert expected == kept(logits[0], params)
    scaled = (logits - logits.amax()) / params.temperature
    scores, order = scaled.sort(dim=-1, descending=True, stable=True)
    keep = _keep(
        scores,
        torch.tensor([params.top_k]),
        torch.tensor([params.top_p]),
        torch.tensor([params.min_p], dtype=torch.float32),
    )
    keep = _keep_typical(scores, keep, torch.tensor([params.typical_p], dtype=torch.float32))
    assert set(order[keep].tolist()) == expected


@given(filters(), st.integers(0, 10_000))
def test_draws_come_from_what_is_kept(params, seed):
    """And from all of it: with noise of 400 positions, no likely token is missed."""
    logits, n = logits_of(seed, 1), 400
    tokens_ = sample(
        logits.expand(n, -1),
        torch.full((n,), params.temperature),
        torch.full((n,), params.top_k, dtype=torch.int32),
        torch.full((n,), params.top_p),
        torch.full((n,), seed),
        torch.arange(n),
        min_p=torch.full((n,), params.min_p),
        typical_p=torch.full((n,), params.typical_p),
    )
    expected = {int(logits.argmax())} if params.greedy else kept(logits[0], params)
    assert set(tokens_.tolist()) <= expected
    p = (logits[0].double() / params.temperature)[sorted(expected)].softmax(0)
    likely = {token for token, share in zip(sorted(expected), p.tolist(), strict=True) if share > 0.1}
    assert likely <= set(tokens_.tolist())


def test_min_p_alone_needs_no_sort_and_draws_the_same():
    logits, n = logits_of(5, 64), 64
    args = torch.full((n,), 0.8), None, None, torch.arange(n), torch.arange(n)
    min_p = torch.tensor([0.0, 0.05, 0.5, 1.0] * 16)
    alone = sample(logits, *args, min_p=min_p)
    sorted_ = sample(logits, args[0], torch.zeros(n, dtype=torch.int32), torch.ones(n), *args[3:], min_p=min_p)
    assert alone.equal(sorted_)
    assert alone[3::4].equal(logits[3::4].argmax(-1))
    assert not alone.equal(sample(logits, *args))


def test_greedy_rows_ignore_filters_beside_them():
    """typical-p may drop the most likely token, which a greedy row takes all the same."""
    logits = torch.zeros(2, V)
    logits[:, 4] = 3.0
    both = torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int32), torch.ones(2)
    got = sample(
        logits, *both, torch.arange(2), torch.arange(2), min_p=torch.zeros(2), typical_p=torch.full((2,), 0.05)
    )
    assert got[0] == 4 and got[1] != 4


def test_a_row_with_everything_banned_gives_no_token():
    chosen = choice()
    seq = admit(chosen, 0, [1, 2], [], SamplingParams(allowed_token_ids=(4,), logit_bias={4: -INF}))
    got = adjust(chosen, [seq], logits_of(0, 1))
    at = torch.zeros(1, dtype=torch.int64)
    assert sample(got, torch.ones(1), None, None, at, at).tolist() == [INVALID_TOKEN]
