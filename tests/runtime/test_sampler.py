"""Draws against the distributions they claim, against Hugging Face's filters, and against themselves."""

import math

import pytest
import torch

from fusecomp.runtime.sampler import _keep, _noise, greedy, sample
from fusecomp.runtime.scheduler import INVALID_TOKEN

INF, NAN = float("inf"), float("nan")
MANY = 40_000


def draw(logits, n=MANY, temperature=1.0, top_k=None, top_p=None, seeds=None, positions=None):
    """n draws from one row of logits, one seed each unless given."""
    return sample(
        logits.expand(n, -1),
        torch.full((n,), temperature),
        None if top_k is None else torch.full((n,), top_k, dtype=torch.int32),
        None if top_p is None else torch.full((n,), top_p),
        torch.arange(n) if seeds is None else seeds,
        torch.zeros(n, dtype=torch.int64) if positions is None else positions,
    )


def assert_follows(counts, probabilities):
    """Pearson's chi-square: its mean is the degrees of freedom f, its deviation sqrt(2 f); six of them are allowed."""
    assert counts[probabilities == 0].sum() == 0, "a token of probability 0 was drawn"
    counts, expected = counts[probabilities > 0].double(), probabilities[probabilities > 0] * counts.sum()
    assert expected.min() > 5, "too few draws for the test"
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * math.sqrt(2 * freedom)


def filtered_softmax(logits, temperature, top_k, top_p):
    """By definition, in float64: [V] probabilities after top-k then top-p."""
    p = (logits.double() / temperature).softmax(0)
    if top_k:
        p = torch.where(p >= p.sort(descending=True).values[min(top_k, len(p)) - 1], p, 0)
        p = p / p.sum()
    values, order = p.sort(descending=True, stable=True)
    before = values.cumsum(0) - values
    keep = torch.zeros_like(p, dtype=torch.bool).scatter(0, order, before < top_p)
    p = torch.where(keep, p, 0)
    return p / p.sum()


LOGITS = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.2


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.6, None, None),
        (1.0, 5, None),
        (1.7, None, 0.8),
        (0.9, 9, 0.7),
        (1.0, 0, 1.0),
        (1.0, 99, 1.0),
    ],
)
def test_draws_follow_the_softmax(temperature, top_k, top_p):
    tokens = draw(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = filtered_softmax(LOGITS, temperature, top_k or 0, top_p or 1.0)
    assert_follows(torch.bincount(tokens, minlength=24), expected)


@pytest.mark.parametrize("vary", ["positions", "both"])
def test_draws_at_other_positions_follow_the_softmax(vary):
    at = torch.arange(MANY)
    tokens = draw(
        LOGITS,
        seeds=torch.zeros_like(at) if vary == "positions" else at // 200,
        positions=at % 200 if vary == "both" else at,
    )
    assert_follows(torch.bincount(tokens, minlength=24), LOGITS.double().softmax(0))


@pytest.mark.parametrize("neighbour", ["seed", "position", "swapped"])
def test_neighbouring_draws_are_independent(neighbour):
    logits = torch.tensor([0.0, 0.5, -0.5, 0.2, 1.0])
    seeds, positions = torch.arange(MANY) * 3, torch.arange(MANY) % 7
    first = draw(logits, seeds=seeds, positions=positions)
    others = {"seed": (seeds + 1, positions), "position": (seeds, positions + 1), "swapped": (positions, seeds)}
    second = draw(logits, seeds=others[neighbour][0], positions=others[neighbour][1])
    if neighbour == "swapped":  # seeds and positions are small on one side: keep one draw of each pair
        first, second = first[positions != seeds], second[positions != seeds]
    p = logits.double().softmax(0)
    assert_follows(torch.bincount(first * 5 + second, minlength=25), (p[:, None] * p).flatten())


def test_noise_is_gumbel_finite_and_fine_grained():
    ids = torch.arange(200_000)
    noise = _noise(torch.tensor([7, 7, -3]), torch.tensor([0, 1, 0]), ids, torch.zeros(3, dtype=torch.bool))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    correlation = torch.corrcoef(torch.cat([noise, noise[:1].roll(1, 1)]))
    assert (correlation - torch.eye(4)).abs().max() < 0.01
    top = noise.flatten().sort(descending=True).values[:1000]
    assert (top.diff() < 0).all(), "the largest values must not tie"


def test_a_large_flat_vocabulary_is_drawn_evenly():
    tokens = draw(torch.zeros(8192), n=500)
    assert_follows(torch.bincount(tokens * 16 // 8192, minlength=16), torch.full((16,), 1 / 16, dtype=torch.double))


def batch(rows=12, vocab=300):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, vocab, generator=generator) * 3,
        torch.tensor([0.0, 1.0, 0.7, 1e-9] * (rows // 4)),
        torch.tensor([0, 1, 7, -1, 40, 1000] * (rows // 6), dtype=torch.int32),
        torch.tensor([1.0, 0.9, 0.3] * (rows // 3)),
        torch.arange(rows) * 7919 - 2**62,
        torch.arange(rows) % 3,
    )


def test_a_row_does_not_depend_on_its_batch():
    args = batch()
    together = sample(*args)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert sample(*(a[order] for a in args)).equal(together[order])
    assert torch.cat([sample(*(a[i : i + 1] for a in args)) for i in range(12)]).equal(together)


def test_rows_without_a_filter_draw_the_same_with_and_without_the_sort():
    logits, temperature, _, _, seeds, positions = batch()
    zeros, ones = torch.zeros(12, dtype=torch.int32), torch.ones(12)
    plain = sample(logits, temperature, None, None, seeds, positions)
    assert sample(logits, temperature, zeros, ones, seeds, positions).equal(plain)


def test_greedy_rows_take_the_first_maximum():
    logits, temperature, top_k, top_p, seeds, positions = batch()
    logits[0, [5, 80]] = 50.0
    tokens = sample(logits, temperature, top_k, top_p, seeds, positions)
    rows = (temperature < 1e-5) | (top_k == 1)
    assert rows.sum() >= 6
    assert tokens[rows].equal(greedy(logits)[rows])
    assert tokens[0] == greedy(logits)[0] == 5


def test_ties_are_cut_by_rank_in_top_p_and_kept_in_top_k():
    equal = torch.zeros(1, 4)
    assert _keep(equal, None, torch.tensor([0.5])).tolist() == [[True, True, False, False]]
    assert _keep(equal, None, torch.tensor([0.51])).tolist() == [[True, True, True, False]]
    assert _keep(equal, None, torch.tensor([1e-6])).tolist() == [[True, False, False, False]]
    assert _keep(equal, torch.tensor([2]), None).tolist() == [[True] * 4]
    assert set(draw(equal[0], n=200, top_p=0.5).tolist()) == {0, 1}


def test_top_p_of_1_keeps_tokens_whose_mass_rounds_to_0():
    scores = torch.tensor([[0.0, -40.0]])
    assert _keep(scores, None, torch.tensor([1.0])).tolist() == [[True, True]]
    assert _keep(scores, None, torch.tensor([0.999])).tolist() == [[True, False]]


def test_a_tiny_temperature_is_greedy():
    logits = torch.tensor([0.0, 1e-7])
    assert draw(logits, n=200, temperature=1e-6).eq(1).all()
    assert not draw(logits, n=200, temperature=2e-5).eq(1).all()


def test_filters_keep_what_hugging_face_keeps():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(3)
    for scale, k, p in [(0.5, 50, 0.9), (3.0, 7, 0.5), (1.0, 1000, 0.99), (8.0, 20, 0.05)]:
        logits = torch.randn(6, 500, generator=generator) * scale
        warped = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, logits))
        scores, order = (logits - logits.amax(-1, keepdim=True)).sort(dim=-1, descending=True, stable=True)
        keep = _keep(scores, torch.full((6,), k), torch.full((6,), p))
        assert keep.equal(warped.isfinite().gather(1, order))


def test_bad_rows_give_no_token():
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    rows[1, 7] = NAN
    rows[2] = NAN
    rows[3, 0] = INF
    rows[4] = -INF
    rows[5, 1:] = -INF
    bad = [False, True, True, True, True, False]
    args = torch.arange(6), torch.arange(6)
    k, p = torch.full((6,), 5), torch.full((6,), 0.9)
    for temperature in (torch.ones(6), torch.zeros(6)):
        for tokens in (
            greedy(rows),
            sample(rows, temperature, None, None, *args),
            sample(rows, temperature, k, p, *args),
        ):
            assert (tokens == INVALID_TOKEN).tolist() == bad
            assert tokens[5] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(dtype):
    logits, *rest = batch()
    logits = logits.to(dtype)
    assert sample(logits, *rest).equal(sample(logits.float(), *rest))


def test_traces_as_one_graph():
    args = batch()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=False)
    assert compiled(*args).equal(sample(*args))


@pytest.mark.slow
def test_inductor_draws_the_same_tokens():
    args = batch()
    assert torch.compile(sample, fullgraph=True, dynamic=False)(*args).equal(sample(*args))


@pytest.mark.gpu
def test_capture_and_replay_agree_with_the_cpu():
    args = batch()
    on_gpu = [a.cuda() for a in args]
    sample(*on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(*on_gpu)
    for shift in range(5):
        on_gpu[5].copy_(args[5] + shift)
        graph.replay()
        assert tokens.cpu().equal(sample(*args[:5], args[5] + shift))
