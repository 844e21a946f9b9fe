"""MegaFace's protocol against brute force in float64, closed forms, and cases worked by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pipeline.params import Params
from stages.evaluate import identification
from stages.evaluate.identification import RANKS, Identification, identify
from stages.evaluate.identify import summary
from stages.evaluate.verification import EvaluationError

CPU = torch.device("cpu")


def units(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal(shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def blocks(vectors: NDArray[np.float32], size: int) -> list[NDArray[np.float32]]:
    return [vectors[start : start + size] for start in range(0, len(vectors), size)]


def brute_force(
    probes: NDArray, people: NDArray, strangers: NDArray, counts: list[int], fars: list[float]
) -> tuple[list[list[int]], list[list[float | None]]]:
    """Ranks of all mates and TAR at FAR, by count; written out."""
    pairs = [(i, j) for i in range(len(probes)) for j in range(len(probes)) if i != j and people[i] == people[j]]
    mates = [float(probes[i] @ probes[j]) for i, j in pairs]
    ranks, rates = [], []
    for count in counts:
        scores = probes @ strangers[:count].T
        ahead = [int((scores[i] >= mate).sum()) for (i, _), mate in zip(pairs, mates, strict=True)]
        ranks.append([min(each, RANKS) + 1 for each in ahead])
        of_count: list[float | None] = []
        for far in fars:
            allowed = [t for t in {*mates, np.inf} if (scores >= t).sum() <= far * scores.size + 1e-9]
            none = far * scores.size < 1 - 1e-9
            of_count.append(None if none else max(float(np.mean([mate >= t for mate in mates])) for t in allowed))
        rates.append(of_count)
    return ranks, rates


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 90),
    order=st.sampled_from(["drawn", "rising", "falling"]),
    inner=st.integers(1, 40),
    grid=st.booleans(),
)
def test_it_is_the_brute_force(seed: int, size: int, order: str, inner: int, grid: bool) -> None:
    """On whole numbers, whose products are exact and often equal, as on any others."""
    rng = np.random.default_rng(seed)
    people = rng.integers(0, 4, 9)
    people[:2] = 0
    if grid:
        probes, strangers = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (9, 240))
    else:
        probes, strangers = units(rng, 9, 16), units(rng, 240, 16)
    if order != "drawn":
        by_score = np.argsort((probes @ strangers.T).max(axis=0))
        strangers = strangers[by_score if order == "rising" else by_score[::-1]]
    counts, fars = [1, 7, 130, 240], [0.5, 0.01, 1e-3, 1e-6]
    before = identification._BLOCK["cpu"]
    identification._BLOCK["cpu"] = inner
    try:
        found = identify(probes, people, blocks(strangers, size), counts, fars, CPU)
    finally:
        identification._BLOCK["cpu"] = before
    ranks, rates = brute_force(probes.astype(np.float64), people, strangers.astype(np.float64), counts, fars)
    assert found.rank.tolist() == ranks
    told = [[None if np.isnan(rate) else rate for rate in row] for row in found.true_accept_rates().tolist()]
    for row, expected in zip(told, rates, strict=True):
        assert row == pytest.approx(expected)
    assert found.impostors() == [9 * count for count in counts]


def test_random_features_are_found_as_often_as_chance_has_it() -> None:
    """A mate is first among N strangers once in N + 1. Each person has strangers of their own: all are independent."""
    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(1500), 2)
    counts = [1, 4, 19]
    hits = np.zeros(3)
    for start in range(0, 3000, 2):  # strangers of their own for each, or they would not be independent
        found = identify(units(rng, 2, 8), people[start : start + 2], [units(rng, 19, 8)], counts, [], CPU)
        hits += found.rank[:, 0] == 1  # of one of the two ordered pairs
    for count, hit in zip(counts, hits.tolist(), strict=True):
        expected = 1 / (count + 1)
        assert abs(hit / 1500 - expected) < 4 * (expected * (1 - expected) / 1500) ** 0.5


def test_by_hand() -> None:
    """Two of Ada at a right angle, two of Bob alike; strangers along the axes."""
    probes = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]], np.float32)
    strangers = np.array([[0.6, 0.8, 0], [-1, 0, 0], [0, 0.6, 0.8]], np.float32)
    found = identify(probes, np.array([5, 5, 9, 9]), [strangers], [1, 3], [0.25, 0.01], CPU)
    # Ada's mates score 0, behind 0.6 and 0.8 of the first stranger; two of the others tie with it or are ahead.
    assert found.score.tolist() == [0, 0, 1, 1]
    assert found.rank.tolist() == [[2, 2, 1, 1], [3, 4, 1, 1]]
    assert found.identified().tolist() == [0.5, 0.5]
    assert found.identified(within=3).tolist() == [1, 0.75]
    # Of 4 scores (0.6, 0.8, 0, 0) a quarter is one; of 12, three: 0.8 each time. What is next is 0.6.
    rates = found.true_accept_rates()
    assert found.highest[0, 0] == pytest.approx(0.6)
    assert rates[0, 0] == rates[1, 0] == 0.5
    assert np.isnan(rates[:, 1]).all()


def test_no_credit_for_features_that_are_all_alike_and_all_for_perfect_ones() -> None:
    alike = np.ones((6, 1), np.float32)
    people = np.array([0, 0, 1, 1, 2, 2])
    found = identify(alike, people, [np.ones((200, 1), np.float32)], [10, 200], [0.1], CPU)
    assert found.identified().tolist() == [0, 0]
    assert found.identified(RANKS).tolist() == [1, 0]
    assert found.true_accept_rates().ravel().tolist() == [0, 0]
    perfect = np.repeat(np.eye(4, dtype=np.float32)[:3], 2, axis=0)
    found = identify(perfect, people, [np.eye(4, dtype=np.float32)[[3] * 50]], [50], [0.01], CPU)
    assert found.identified().tolist() == [1]
    assert found.true_accept_rates().tolist() == [[1]]


@pytest.mark.parametrize("length", [512, 1024])
def test_ties_go_against_us_whatever_rounding_makes_of_them(length: int) -> None:
    """Products of one and the same vector differ in their last bits, depending on how they are computed."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        alike = np.repeat(units(rng, 1, length), 20, axis=0)
        found = identify(alike, np.repeat(np.arange(10), 2), [np.repeat(alike, 50, axis=0)], [10, 1000], [0.01], CPU)
        assert found.identified().tolist() == [0, 0]
        assert found.true_accept_rates().ravel().tolist() == [0, 0]
        # each mate's copy is among the distractors, which therefore has it at the second place at best
        probes = units(rng, 60, length)
        found = identify(probes, np.repeat(np.arange(30), 2), [probes], [60], [], CPU)
        exact = probes.astype(np.float64) @ probes.astype(np.float64).T
        np.fill_diagonal(exact, 1)
        mates = exact[np.arange(60), np.arange(60) ^ 1]
        rows = list(zip(exact, mates, found.rank[0].tolist(), strict=True))
        assert all(rank >= 1 + int((row >= mate).sum()) for row, mate, rank in rows)  # never better than it is
        assert all(rank <= 1 + int((row >= mate - 2e-5).sum()) for row, mate, rank in rows)


def test_true_accept_rates_are_scikit_learns() -> None:
    rng = np.random.default_rng(3)
    probes, strangers = units(rng, 30, 6), units(rng, 400, 6)
    found = identify(probes, np.repeat(np.arange(10), 3), [strangers], [400], [0.1, 0.02, 0.001], CPU)
    impostors = (probes @ strangers.T).ravel()
    truth = np.r_[np.ones(len(found.score)), np.zeros(len(impostors))]
    far, tar, _ = roc_curve(truth, np.r_[found.score, impostors], drop_intermediate=False)
    expected = [tar[far <= rate + 1e-12].max() for rate in found.fars]
    assert found.true_accept_rates()[0] == pytest.approx(expected)


def test_intervals_are_those_of_people_not_of_pairs() -> None:
    """25 people, each found always or never: the standard error of a mean of 25, however many pairs each has."""
    person = np.repeat(np.arange(25), 90)
    rank = np.where(person % 5 < 3, 1, 50)[None].astype(np.int32)
    found = Identification((10,), person, np.where(rank[0] == 1, 0.9, 0.1), rank, (0.1,), np.array([[0.5]]), 250)
    (first,), ((rates,),) = found.intervals(2000, 1)
    width = 2 * 1.96 * (0.6 * 0.4 / 25) ** 0.5
    assert first[1] - first[0] == pytest.approx(width, rel=0.15)
    assert first[0] < 0.6 < first[1]
    assert rates.tolist() == first.tolist()
    assert all(np.array_equal(*both) for both in zip(found.intervals(200, 7), found.intervals(200, 7), strict=True))


def test_intervals_are_drawn_as_params_yaml_says(params: Params) -> None:
    rng = np.random.default_rng(1)
    rank, score = rng.integers(1, 4, (1, 400), np.int32), rng.random(400, np.float32)
    found = Identification((10,), rng.integers(25, size=400), score, rank, (0.1,), np.array([[0.5]]), 250)
    section = params.evaluate.model_copy(update={"replicates": 100, "seed": 7})
    first, rates = found.intervals(100, 7)
    assert summary(found, section)["distractors"]["10"]["intervals"] == {
        "rank_1": pytest.approx(first[0].tolist(), abs=1e-9),
        "tar_at_far_0.1": pytest.approx(rates[0, 0].tolist(), abs=1e-9),
    }
    for other, _ in (found.intervals(101, 7), found.intervals(100, 8)):
        assert (other != first).any()


def test_people_without_mates_are_not_drawn() -> None:
    """Whoever is numbered between those with mates, with whom a draw could otherwise be filled."""
    rank = np.array([[1, 1, 50, 50]], np.int32)
    score = np.array([0.9, 0.9, 0.1, 0.1], np.float32)
    few, many = (
        Identification((10,), np.array(person), score, rank, (0.1,), np.array([[0.5]]), 300).intervals(500, 1)
        for person in ([0, 0, 1, 1], [3, 3, 99, 99])
    )
    assert all(np.array_equal(*both) for both in zip(few, many, strict=True))
    assert few[0].tolist() == [[0, 1]]


def test_what_no_draw_changes_is_not_bounded() -> None:
    for person, rank in (([4, 4], [1, 50]), ([0, 0, 1, 1], [1, 1, 1, 1])):  # one person; all found
        ranks, score = np.array([rank], np.int32), np.full(len(rank), 0.9, np.float32)
        found = Identification((10,), np.array(person), score, ranks, (0.1,), np.array([[0.5]]), 9)
        first, rates = found.intervals(100, 1)
        assert np.isnan(first).all()
        assert np.isnan(rates).all()


def test_what_cannot_be_measured_is_said() -> None:
    two = np.eye(2, dtype=np.float32)
    with pytest.raises(EvaluationError, match="2 probes: no two of them show one person"):
        identify(two, np.array([0, 1]), [two], [2], [], CPU)
    with pytest.raises(EvaluationError, match="distractors: 5, but there are only 2"):
        identify(two, np.array([0, 0]), [two], [1, 5], [], CPU)
    with pytest.raises(EvaluationError, match="2 probes, but 1 people"):
        identify(two, np.array([0]), [two], [2], [], CPU)
    for counts in ([], [2, 1], [0, 1]):
        with pytest.raises(EvaluationError, match="must increase from 1 on"):
            identify(two, np.array([0, 0]), [two], counts, [], CPU)
    with pytest.raises(EvaluationError, match="distractors: features that are not finite"):
        identify(two, np.array([0, 0]), [two * np.nan], [2], [], CPU)
    with pytest.raises(EvaluationError, match="probes: features that are not finite"):
        identify(np.full((2, 2), np.inf, np.float32), np.array([0, 0]), [two], [2], [], CPU)
