"""Incremental texts: whole characters, no stop text, the same as decoding all at once, at linear cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fusecomp.request import SamplingParams
from fusecomp.runtime.detokenizer import UNFINISHED, Detokenizer, Followed, TextStream

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models" / "pico-llama")
TEXTS = ["def f(x):\n    return x", "naïve — 語学 🙂🙃", "a 👩‍👩‍👧 b", "\ufffd mark", "  spaces  ", "é" * 9]
# Ids of single bytes: half characters in any order, and bytes that are no UTF-8.
BYTES = [TOKENIZER.convert_tokens_to_ids(chr(0x100 + i)) for i in range(0x21)] + list(range(3, 259))
BYTES = [i for i in BYTES if i is not None]


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@st.composite
def ids_lists(draw):
    parts = st.one_of(
        st.sampled_from(TEXTS).map(TOKENIZER.encode),
        st.lists(st.sampled_from(BYTES), max_size=30),
        st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=8),
        st.sampled_from(BYTES).map(lambda i: [i] * 40),
    )
    return [i for part in draw(st.lists(parts, min_size=1, max_size=4)) for i in part]


@given(ids_lists())
def test_pieces_add_up_to_the_whole(ids):
    stream, pieces = TextStream(decode), []
    for token in ids:
        pieces.append(stream.push(token))
    pieces.append(stream.finish())
    assert "".join(pieces) == decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(text):
    stream, shown = TextStream(decode), ""
    for token in TOKENIZER.encode(text):
        piece = stream.push(token)
        assert UNFINISHED not in piece or "\ufffd" in text
        shown += piece
        assert text.startswith(shown)
    assert shown + stream.finish() == text


class Metaspace:
    """A decoder that drops the space before the first token, as SentencePiece's do."""

    words = ("▁a", "b", "▁", "▁cd", "e")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


@given(st.lists(st.integers(0, 4), max_size=40))
def test_spaces_that_depend_on_the_first_token(ids):
    stream = TextStream(Metaspace().decode)
    assert "".join([*map(stream.push, ids), stream.finish()]) == Metaspace().decode(ids)


@pytest.mark.parametrize("ids", [TOKENIZER.encode(TEXTS[0] * 400), [BYTES[200]] * 4000], ids=["text", "no text"])
def test_cost_is_linear(ids):
    decoded = 0

    def counting(window):
        nonlocal decoded
        decoded += len(window)
        return decode(window)

    stream = TextStream(counting)
    for token in ids:
        stream.push(token)
    assert decoded < 40 * len(ids)


def follow(ids, params, *, live=True, reason="length", sizes=(1,)):
    """Texts of the news, the last news, for ids that come in chunks of these sizes in turn."""
    followed, shown, at, turn = Followed("key", params, live), [], 0, 0
    while True:
        size = sizes[turn % len(sizes)]
        chunk, last = ids[at : at + size], at + size >= len(ids)
        news = followed.add(chunk, reason if last else None, decode)
        if news is not None:
            shown.append(news.text)
        if last or (news is not None and news.finished):
            return shown, news
        at, turn = at + size, turn + 1


def by_definition(ids, params, reason):
    """Text, number of tokens and stop text by decoding every prefix."""
    shown = ids[:-1] if reason == "stop" else ids
    before = 0
    for count in range(1, len(shown) + 1):
        text = decode(shown[:count])
        certain = text.rstrip(UNFINISHED)
        if count > params.min_tokens:
            found = [(at, s) for s in params.stop if (at := _ending_after(certain, s, before)) >= 0]
            if found:
                at, stop = min(found, key=lambda each: each[0])
                return certain[: at + len(stop) if params.include_stop_str_in_output else at], count, stop
        before = len(certain)
    return decode(shown), len(ids), None


def _ending_after(text, stop, before):
    at = text.find(stop, max(0, before - len(stop) + 1))
    return at


STOPS = st.lists(st.sampled_from(["x", "ret", "\n", "return x", "🙃", "é" * 3, "ab", "学 "]), min_size=1, max_size=3)


@given(
    st.lists(st.sampled_from(TEXTS[:3] + TEXTS[4:]), min_size=1, max_size=3),
    STOPS,
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 3, 11]),
    st.sampled_from(["length", "stop"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_stop_texts_end_at_the_same_token_however_tokens_come(texts, stops, include, live, least, reason, sizes):
    ids = TOKENIZER.encode("".join(texts))
    params = SamplingParams(max_tokens=None, stop=tuple(stops), include_stop_str_in_output=include, min_tokens=least)
    shown, last = follow(ids, params, live=live, reason=reason, sizes=sizes)
    text, count, stop = by_definition(ids, params, reason)
    assert ("".join(shown), last.num_tokens, last.stop_reason) == (text, count, stop)
    assert last.finished
    for end in range(len(shown)):  # what was shown is never taken back, and shows no stop text
        so_far = "".join(shown[:end])
        assert text.startswith(so_far)
        assert least or not any(s in so_far for s in stops)


def test_what_nobody_watches_is_decoded_once():
    calls = []

    def counting(ids):
        calls.append(len(ids))
        return decode(ids)

    followed = Followed("key", SamplingParams(), live=False)
    ids = TOKENIZER.encode(TEXTS[0])
    for token in ids[:-1]:
        assert followed.add([token], None, counting) is None
    assert followed.add(ids[-1:], "length", counting).text == TEXTS[0] and calls == [len(ids)]


def test_the_thread_answers_in_order_and_an_error_ends_one_completion():
    detokenizer = Detokenizer(TOKENIZER)
    ids = TOKENIZER.encode(TEXTS[1])
    followed = [Followed(i, SamplingParams(), live=True) for i in range(3)]
    for position, token in enumerate(ids):
        end = "length" if position == len(ids) - 1 else None
        detokenizer.put([(each, [token], end) for each in followed])
    news = detokenizer.take(wait=True)
    for key in range(3):
        assert "".join(n.text for n in news if n.key == key) == TEXTS[1]
    assert detokenizer.take(wait=True) == []
    broken, sound = (Followed(key, SamplingParams(), live=True) for key in (8, 9))
    detokenizer.put([(broken, ["no id"], None), (sound, ids, "length")])
    failed, made = detokenizer.take(wait=True)
    assert (failed.key, failed.finished) == (8, True) and "TypeError" in failed.error
    assert (made.key, made.text, made.error) == (9, TEXTS[1], None)
    detokenizer.put([(broken, ids, "length")])
    assert detokenizer.take(wait=True) == [], "nothing more is heard of it"
    detokenizer.close()
    detokenizer.close()
