"""The calibration text of the package, what is made of a user's own, and what quantizing costs in accuracy."""

from __future__ import annotations

from functools import cache

import pytest

from fusecomp.quant.online.calibration import DEFAULT, HEADER, LENGTH, WINDOWS, calibration
from models import perplexity
from models.corpus import HELDOUT_HEADER, bucket, line_runs

FIRST_WINDOWS = 2
# Against the same model in fp32, over the held-out text: the project's bars.
WITHIN = {"fp8": 0.005, "int8": 0.01, "int4": 0.04}
BY_HAND = (("pico-llama", "int8"), ("pico-moe", "int4"))  # each model and each scheme is in another one, too


def test_no_held_out_text_is_in_it():
    text, heldout = DEFAULT.read_text(encoding="utf-8"), perplexity.HELDOUT.read_text(encoding="utf-8")
    paths = [line.split()[-2] for line in HEADER.findall(text)]
    assert len(paths) > 5 and all(bucket(path) >= 8 for path in paths)  # below lie both measured splits
    assert not {*paths} & {*HELDOUT_HEADER.findall(heldout)}
    runs = {run for body in HEADER.split(text) for run in line_runs(body)}
    assert len(runs) > 500 and not runs & {*line_runs(heldout)}


class Words:
    bos_token_id = 1

    def __call__(self, text, **_):
        return {"input_ids": [2 + len(word) for word in text.split()]}


def test_windows_are_of_one_length():
    made = calibration(None, Words, 4096, 5000)
    assert made is not None and made.ids.shape[1] == LENGTH and made.ids.shape[0] <= WINDOWS
    assert int(made.ids[0, 0]) == 1 and "default text" in made.source
    assert calibration(None, Words, 100, 5000).ids.shape == (WINDOWS, 100)
    assert calibration([[5] * 40, [6] * 60], lambda: None, 4096, None).ids.tolist() == [[5] * 40 + [6] * 60]
    assert calibration([], lambda: None, 4096, None) is None


def test_it_fills_the_windows_of_the_pico_models():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("models/pico-llama")
    assert calibration(None, lambda: tokenizer, 1024, 4096).ids.shape == (WINDOWS, LENGTH)


@cache
def plain_perplexity(name: str) -> float:
    return perplexity.measure(f"models/{name}", limit=FIRST_WINDOWS).perplexity


@pytest.mark.xdist_group("calibration")
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(name, scheme, marks=pytest.mark.slow if (name, scheme) in BY_HAND else ())
        for name in ("pico-llama", "pico-moe")
        for scheme in WITHIN
    ],
)
def test_perplexity(name, scheme):
    """On the first windows; figures over the whole text are in docs/models.md."""
    quantized = perplexity.measure(f"models/{name}", limit=FIRST_WINDOWS, scheme=scheme).perplexity
    assert 0.99 < quantized / plain_perplexity(name) < 1 + WITHIN[scheme]
