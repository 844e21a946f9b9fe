"""Metrics against hand-worked numbers, brute force over every threshold, and scikit-learn."""

from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from stages.evaluate.verification import EvaluationError, Metrics, best_threshold, evaluate

FARS = [0.1, 0.01, 0.001]
Pairs = tuple[NDArray, NDArray, NDArray]


def drawn(seed: int, count: int = 600, folds: int = 10, digits: int = 8) -> Pairs:
    """Overlapping scores, unbalanced folds of unequal size; few digits make many ties."""
    rng = np.random.default_rng(seed)
    same = rng.random(count) < 0.4
    scores = np.round(np.where(same, rng.normal(0.4, 0.2, count), rng.normal(0.1, 0.15, count)), digits)
    return scores, same, rng.choice(folds, count, p=rng.dirichlet(np.full(folds, 5)))


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    """Few distinct scores, multiples of 1/16, so that ties abound and scaling by powers of two is exact."""
    count = draw(st.integers(6, 40))
    numbers = draw(st.lists(st.integers(-16, 16), min_size=count, max_size=count))
    same = [True, False, *draw(st.lists(st.booleans(), min_size=count - 2, max_size=count - 2))]
    fold = [0, 1, *draw(st.lists(st.integers(0, 3), min_size=count - 2, max_size=count - 2))]
    return np.array(numbers) / 16, np.array(same), np.array(fold)


def of_ranks(metrics: Metrics) -> tuple[object, ...]:
    """What depends on the order of the scores only."""
    return metrics.auc, metrics.eer, metrics.tar_at_far, metrics.roc.far.tolist(), metrics.roc.tar.tolist()


def crossing(far: NDArray, tar: NDArray) -> float:
    """Where the polyline meets FAR = 1 - TAR, by halving the distance along it from its beginning."""
    walked = np.append(0, np.cumsum(np.hypot(np.diff(far), np.diff(tar))))
    low, high = 0.0, float(walked[-1])
    for _ in range(100):
        middle = (low + high) / 2
        if np.interp(middle, walked, far) + np.interp(middle, walked, tar) < 1:
            low = middle
        else:
            high = middle
    return float(np.interp(high, walked, far))


def test_hand_worked_example() -> None:
    scores = [0.9, 0.8, 0.3, 0.1, 0.7, 0.2, 0.6, 0.4]
    same = [1, 1, 0, 0, 1, 1, 0, 0]
    metrics = evaluate(scores, same, [0, 0, 0, 0, 1, 1, 1, 1], [0.5, 0.25, 0.1])
    # Fold 0 is judged by fold 1 (same 0.2 and 0.7, different 0.4 and 0.6): three of four right at 0.65.
    # Fold 1 is judged by fold 0 (same 0.8 and 0.9, different 0.1 and 0.3): all right at 0.55.
    assert metrics.fold_threshold == pytest.approx((0.65, 0.55))
    assert metrics.fold_accuracy == (1.0, 0.5)  # in fold 1 are wrong: 0.2 (same), 0.6 (different)
    assert metrics.accuracy == 0.75
    assert metrics.threshold == pytest.approx(0.6)
    assert metrics.accuracy_std == pytest.approx(0.5 / 2**0.5)
    assert metrics.accuracy_se == pytest.approx(0.25)
    assert metrics.auc == (4 + 4 + 4 + 1) / 16  # different pairs below 0.9, 0.8, 0.7 and 0.2
    assert metrics.tar_at_far == {"0.5": 0.75, "0.25": 0.75, "0.1": None}
    assert metrics.eer == 0.25  # at 0.6: FAR 1/4, FRR 1/4


def test_folds_weigh_the_same_whatever_their_size() -> None:
    scores = [0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.2, 0.8]
    same = [1, 0, 1, 0, 1, 0, 1, 0]
    metrics = evaluate(scores, same, [0, 0, 0, 0, 0, 0, 1, 1], [0.1])
    assert metrics.fold_accuracy[1] == 0.0
    assert metrics.accuracy == metrics.fold_accuracy[0] / 2


def test_perfect_scores() -> None:
    same = np.arange(100) % 2 == 0
    metrics = evaluate(np.where(same, 0.7, 0.2), same, np.arange(100) // 10, FARS)
    assert (metrics.accuracy, metrics.accuracy_std, metrics.auc, metrics.eer) == (1, 0, 1, 0)
    assert metrics.tar_at_far == {"0.1": 1.0, "0.01": None, "0.001": None}
    assert metrics.threshold == pytest.approx(0.45)


def test_equal_scores_say_nothing() -> None:
    same = np.arange(100) % 4 == 0
    metrics = evaluate(np.full(100, 0.3), same, np.arange(100) // 20, [0.1])
    assert (metrics.auc, metrics.eer, metrics.tar_at_far) == (0.5, 0.5, {"0.1": 0.0})
    assert metrics.accuracy == 0.75  # the more frequent answer for all


def test_reversed_scores() -> None:
    same = np.arange(100) % 2 == 0
    metrics = evaluate(np.where(same, 0.2, 0.7), same, np.arange(100) // 10, [0.1])
    assert (metrics.auc, metrics.eer, metrics.tar_at_far) == (0, 1, {"0.1": 0.0})


@pytest.mark.parametrize("digits", [8, 1])
@pytest.mark.parametrize("seed", range(5))
def test_accuracy_by_brute_force_over_every_threshold(seed: int, digits: int) -> None:
    scores, same, fold = drawn(seed, count=200, digits=digits)
    metrics = evaluate(scores, same, fold, FARS)
    for number, threshold, accuracy in zip(metrics.folds, metrics.fold_threshold, metrics.fold_accuracy, strict=True):
        train = fold != number
        distinct = sorted(set(scores[train]))
        cuts = [distinct[0], *((a + b) / 2 for a, b in pairwise(distinct)), distinct[-1] + 1e-12]
        right = [sum((s >= cut) == t for s, t in zip(scores[train], same[train], strict=True)) for cut in cuts]
        best = [cut for cut, count in zip(cuts, right, strict=True) if count == max(right)]
        assert threshold == pytest.approx(best[(len(best) - 1) // 2], abs=1e-9)
        held_out = [(s >= threshold) == t for s, t in zip(scores[~train], same[~train], strict=True)]
        assert accuracy == pytest.approx(np.mean(held_out), abs=1e-15)


@pytest.mark.parametrize("digits", [8, 1])
@pytest.mark.parametrize("seed", range(5))
def test_curve_and_area_as_scikit_learn(seed: int, digits: int) -> None:
    scores, same, fold = drawn(seed, digits=digits)
    metrics = evaluate(scores, same, fold, FARS)
    far, tar, _ = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(metrics.roc.far, far, rtol=0, atol=1e-15)
    np.testing.assert_allclose(metrics.roc.tar, tar, rtol=0, atol=1e-15)
    assert metrics.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
    assert metrics.eer == pytest.approx(crossing(far, tar), abs=1e-9)
    for name, value in metrics.tar_at_far.items():
        resolved = (~same).sum() * float(name) >= 1
        assert value == (pytest.approx(max(tar[far <= float(name) + 1e-12])) if resolved else None)


@pytest.mark.parametrize(
    ("different", "far", "accepted"), [(10, 0.1, 1), (9, 0.1, None), (100, 0.29, 29), (1000, 0.001, 1)]
)
def test_far_is_exact_and_null_where_it_cannot_be_resolved(different: int, far: float, accepted: int | None) -> None:
    # same and different pairs alternate from the top: with k false accepts there are k + 1 true ones
    scores = np.linspace(1, -1, 2 * different)
    same = np.arange(2 * different) % 2 == 0
    value = evaluate(scores, same, np.arange(2 * different) // different, [far]).tar_at_far[str(far)]
    assert value == (None if accepted is None else (accepted + 1) / different)


def test_threshold_of_neighbouring_floats_separates_them() -> None:
    low = 0.5
    for _ in range(2):  # the midpoint rounds down for one of the two, up for the other
        high = np.nextafter(low, 1)
        threshold = best_threshold(np.array([low, high]), np.array([False, True]))
        assert low < threshold <= high
        low = float(high)


@given(pairs(), st.randoms(use_true_random=False))
def test_order_of_pairs_is_irrelevant(given_pairs: Pairs, random: Random) -> None:
    scores, same, fold = given_pairs
    order = random.sample(range(len(scores)), len(scores))
    first, second = evaluate(scores, same, fold, FARS), evaluate(scores[order], same[order], fold[order], FARS)
    assert of_ranks(first) == of_ranks(second)
    assert (first.fold_accuracy, first.fold_threshold) == (second.fold_accuracy, second.fold_threshold)


@given(pairs(), st.sampled_from([0.25, 2.0, 8.0]))
def test_scale_of_scores_is_irrelevant(given_pairs: Pairs, scale: float) -> None:
    scores, same, fold = given_pairs
    first, second = evaluate(scores, same, fold, FARS), evaluate(scale * scores, same, fold, FARS)
    assert of_ranks(first) == of_ranks(second)
    assert first.fold_accuracy == second.fold_accuracy


@given(pairs())
def test_ranks_alone_decide_all_but_the_threshold(given_pairs: Pairs) -> None:
    scores, same, fold = given_pairs
    assert of_ranks(evaluate(scores, same, fold, FARS)) == of_ranks(evaluate(np.exp(3 * scores), same, fold, FARS))


@given(pairs())
def test_swapping_same_and_different_mirrors_the_curve(given_pairs: Pairs) -> None:
    scores, same, fold = given_pairs
    first, second = evaluate(scores, same, fold, FARS), evaluate(-scores, ~same, fold, FARS)
    assert first.auc == second.auc
    assert first.eer == pytest.approx(second.eer, abs=1e-12)
    np.testing.assert_allclose(second.roc.far, 1 - first.roc.tar[::-1], atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "same", "fold", "message"),
    [
        ([0.1, 0.2], [1, 0, 1], [0, 1], "one length"),
        ([0.1, np.nan], [1, 0], [0, 1], "1 of 2 scores are not finite"),
        ([0.1, 0.2], [1, 1], [0, 1], "2 pairs, 2 of the same person"),
        ([0.1, 0.2], [1, 0], [3, 3], "one fold"),
    ],
)
def test_unusable_pairs(scores: list[float], same: list[int], fold: list[int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate(scores, same, fold, FARS)
