"""The bootstrap against lists that really repeat pairs, closed forms, and a simulation whose truth is known."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score, roc_curve

from stages.evaluate.uncertainty import Intervals, People, compare, intervals, mcnemar, people
from stages.evaluate.verification import EvaluationError, Metrics, Verification, evaluate

FARS = [0.1, 0.01]
Design = tuple[list[str], list[str], NDArray[np.bool_], NDArray[np.int_]]


def design(seed: int, folds: int, each: int, crowd: int) -> Design:
    """Names, truths and folds: `each` pairs of one person and of two in each fold, among `crowd` people of its own."""
    random = np.random.default_rng(seed)
    left, right, same, fold = [], [], [], []
    for f in range(folds):
        for k in range(2 * each):
            one, other = random.choice(crowd, 2, replace=False)
            other = one if k < each else other
            left.append(f"{f}-{one}/{k}")
            right.append(f"{f}-{other}/{k + 1000}")
            same.append(one == other)
            fold.append(f)
    return left, right, np.array(same), np.array(fold)


def apart(count: int, folds: int = 5) -> Design:
    """Pairs of which no two share a person, same and different in turn."""
    same = np.arange(count) % 2 == 0
    left = [f"{2 * k}/a" for k in range(count)]
    right = [f"{2 * k if same[k] else 2 * k + 1}/b" for k in range(count)]
    return left, right, same, np.arange(count) * folds // count


def known(pairs: Design) -> People:
    who = people(*pairs[:3])
    assert who is not None
    return who


def scores(pairs: Design, seed: int, of_person: float, of_pair: float = 0.15) -> NDArray[np.float64]:
    """Some people are hard: their own pairs score low, and those with others high."""
    who, same, random = known(pairs), pairs[2], np.random.default_rng(seed)
    person = random.normal(0, of_person, who.count)
    shared = np.where(same, 0.55 - 1.4 * person[who.left], person[who.left] + person[who.right])
    return shared + random.normal(0, of_pair, len(same))


def width(found: Intervals, figure: str) -> float:
    bounds = found.bounds[figure]
    assert bounds is not None
    return bounds[1] - bounds[0]


def alike(one: Metrics, other: Metrics) -> bool:
    return (one.folds, one.fold_accuracy, one.fold_threshold, one.figures) == (
        other.folds, other.fold_accuracy, other.fold_threshold, other.figures
    )  # fmt: skip


@pytest.mark.parametrize("digits", [8, 1])  # the latter: many ties
@pytest.mark.parametrize("seed", range(4))
def test_a_weighted_replicate_is_a_list_that_repeats_its_pairs(seed: int, digits: int) -> None:
    pairs = design(seed, 4, 40, 15)
    _, _, same, fold = pairs
    score = scores(pairs, seed, 0.1).round(digits)
    weight = np.random.default_rng(seed).poisson(0.8, len(same))
    weighted = Verification(score, same, fold, FARS).measure(weight)
    listed = np.repeat(np.arange(len(same)), weight)
    repeated = evaluate(score[listed], same[listed], fold[listed], [0.1])
    assert weighted.tar_at_far["0.1"] == repeated.tar_at_far["0.1"]
    assert weighted.tar_at_far["0.01"] is not None  # 160 pairs resolve it, whatever the replicate has of them
    assert alike(evaluate(score, same, fold, [0.1], weight), repeated)
    assert weighted.auc == pytest.approx(roc_auc_score(same, score, sample_weight=weight), abs=1e-12)
    far, tar, _ = roc_curve(same, score, sample_weight=weight, drop_intermediate=False)
    kept = np.append(True, (np.diff(far) > 1e-12) | (np.diff(tar) > 1e-12))  # it keeps points of no weight
    np.testing.assert_allclose(weighted.roc.far, far[kept], atol=1e-12)
    np.testing.assert_allclose(weighted.roc.tar, tar[kept], atol=1e-12)


def test_a_fold_that_is_not_drawn_has_no_part() -> None:
    pairs = design(1, 3, 20, 10)
    _, _, same, fold = pairs
    score = scores(pairs, 1, 0.1)
    kept = fold != 1
    assert alike(
        evaluate(score, same, fold, [0.1], kept.astype(int)), evaluate(score[kept], same[kept], fold[kept], [0.1])
    )


def test_people_by_name() -> None:
    who = people(["A_B/A_B_0001", "x/C/1"], ["A_B/A_B_0002", "A_B/A_B_0003"], np.array([True, False]))
    assert who is not None
    assert (who.left.tolist(), who.right.tolist(), who.count) == ([0, 1], [0, 0], 2)
    assert people(["1", "2"], ["3", "4"], np.array([True, False])) is None
    assert people(["a/1", "a/2"], ["a/3", "a/4"], np.array([True, False])) is None  # one folder, yet two people


def test_without_people_pairs_are_drawn() -> None:
    pairs = design(1, 4, 30, 10)
    measured = Verification(scores(pairs, 1, 0.1), *pairs[2:], FARS)
    assert intervals(measured, None, replicates=20).over == "pairs"
    assert intervals(measured, known(pairs), replicates=20).over == "identities"


def test_the_seed_decides() -> None:
    pairs = design(1, 4, 30, 10)
    measured = Verification(scores(pairs, 1, 0.1), *pairs[2:], FARS)
    first, again, other = (intervals(measured, known(pairs), replicates=30, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("over", ["identities", "pairs"])
def test_of_independent_pairs_the_width_is_that_of_the_textbook(over: str) -> None:
    """AUC by Hanley and McNeil's variance for given placements (DeLong); accuracy by the binomial distribution; TAR and
    EER by those of both rates and, as the threshold is of the same pairs, by the scores' densities where it lies.
    """
    pairs = apart(1000)
    _, _, same, fold = pairs
    of_same, of_different = norm(0.55, 0.3), norm(0, 0.3)
    score, random, chances = np.empty(1000), np.random.default_rng(3), (np.arange(500) + 0.5) / 500
    score[same], score[~same] = (kind.ppf(random.permutation(chances)) for kind in (of_same, of_different))
    found = intervals(
        Verification(score, same, fold, [0.1]), known(pairs) if over == "identities" else None, replicates=600
    )
    above = score[same][:, None] > score[~same]
    delong = above.mean(axis=1).var(ddof=1) / same.sum() + above.mean(axis=0).var(ddof=1) / (~same).sum()
    assert width(found, "auc") == pytest.approx(2 * 1.96 * math.sqrt(delong), rel=0.12)
    threshold = evaluate(score, same, fold, FARS).threshold
    right = (score >= threshold) == same
    assert width(found, "accuracy") == pytest.approx(2 * 1.96 * right.std() / math.sqrt(len(same)), rel=0.2)
    at = of_different.isf(0.1)
    tar, ratio = of_same.sf(at), of_same.pdf(at) / of_different.pdf(at)
    variance = (tar * (1 - tar) + ratio**2 * 0.1 * 0.9) / 500
    assert width(found, "tar_at_far_0.1") == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.2)
    eer = of_different.sf(0.55 / 2)  # there both densities are the same, so that it is the mean of two rates
    assert width(found, "eer") == pytest.approx(2 * 1.96 * math.sqrt(eer * (1 - eer) / 500 / 2), rel=0.2)


def test_dependent_pairs_are_covered_as_often_as_is_said() -> None:
    """120 people, some of them hard: 95 % of the intervals ought to have the truth, the mean of 300 data sets."""
    pairs = design(5, 2, 180, 60)
    _, _, same, fold = pairs
    who = known(pairs)

    def auc(seed: int) -> Verification:
        return Verification(scores(pairs, seed, 0.08), same, fold, [])

    truth = np.mean([roc_auc_score(same, scores(pairs, 1000 + seed, 0.08)) for seed in range(300)])
    covered = {"identities": 0, "pairs": 0}
    sets = 40
    for seed in range(sets):
        for over in (who, None):
            found = intervals(auc(seed), over, replicates=60)
            bounds = found.bounds["auc"]
            assert bounds is not None
            covered[found.over] += bounds[0] <= truth <= bounds[1]
    # Of 40, 95 % intervals miss 5 or fewer with a chance of 0.98; 120 people are few, and percentiles err a little.
    assert covered["identities"] >= sets - 5
    assert covered["pairs"] < sets - 5


def test_what_no_replicate_changes_is_not_bounded() -> None:
    pairs = apart(100)
    same = pairs[2]
    found = intervals(Verification(np.where(same, 0.7, 0.2), *pairs[2:], [0.1, 0.01]), known(pairs), replicates=20)
    assert set(found.bounds.values()) == {None}
    assert "50 different pairs" in found.unresolved["tar_at_far_0.01"]
    assert "0.02" in found.unresolved["tar_at_far_0.01"]
    assert "same in all 20 replicates" in found.unresolved["accuracy"]


def test_a_tar_whose_threshold_few_pairs_set_is_not_bounded() -> None:
    pairs = apart(1000)  # 500 different
    run = Verification(scores(pairs, 3, 0.0, 0.3), *pairs[2:], [0.01, 0.009, 0.001])
    for found in (
        intervals(run, known(pairs), replicates=20),
        compare(run, Verification(scores(pairs, 4, 0.0, 0.3), *pairs[2:], run.fars), None, replicates=20).difference,
    ):
        assert width(found, "tar_at_far_0.01") > 0
        assert found.bounds["tar_at_far_0.009"] is None
        assert found.unresolved["tar_at_far_0.009"] == (
            "500 different pairs: an interval needs 5 that the FAR accepts, which is 0.01 at least"
        )
        assert "the least FAR above 0" in found.unresolved["tar_at_far_0.001"]
    assert run.measure().tar_at_far["0.009"] is not None


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 3), (2, 9), (40, 11), (600, 700)])
def test_mcnemar_as_scipy(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_a_comparison_by_hand() -> None:
    same = [1, 0, 1, 0]
    a = Verification([0.9, 0.1, 0.9, 0.1], same, [0, 0, 1, 1], [0.5])
    b = Verification([0.9, 0.1, 0.2, 0.1], same, [0, 0, 1, 1], [0.5])  # fold 1 at 0.5: a pair is lost
    found = compare(a, b, None, replicates=50)
    assert (found.only_a, found.only_b, found.p_value) == (1, 0, 1.0)
    assert (found.a["accuracy"], found.b["accuracy"]) == (1.0, 0.75)
    assert found.verdict("LFW").startswith("no difference on LFW that these 4 pairs could show: B has -25.0 points")


def test_a_run_differs_in_nothing_from_itself() -> None:
    pairs = design(1, 4, 30, 10)
    run = Verification(scores(pairs, 1, 0.1), *pairs[2:], FARS)
    found = compare(run, run, known(pairs), replicates=20)
    assert set(found.difference.bounds.values()) == {None}
    assert found.verdict("LFW").startswith("no difference on LFW: both have the same accuracy")


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """B is A with some noise taken off: each interval has the other's figure, their difference's does not have 0."""
    pairs = design(2, 5, 100, 40)
    who = known(pairs)
    better, worse = scores(pairs, 2, 0.1), scores(pairs, 2, 0.1) + np.random.default_rng(9).normal(0, 0.13, 1000)
    a, b = (Verification(score, *pairs[2:], FARS) for score in (worse, better))
    found = compare(a, b, who, replicates=200)
    assert found.verdict("LFW").startswith("B is better on LFW: +")
    assert compare(b, a, who, replicates=200).verdict("LFW").startswith("A is better on LFW: +")
    apart_widths = math.hypot(*(width(intervals(run, who, replicates=200), "auc") for run in (a, b)))
    assert width(found.difference, "auc") < 0.8 * apart_widths


def test_other_pairs_are_refused() -> None:
    a = Verification([0.9, 0.1, 0.9, 0.1], [1, 0, 1, 0], [0, 0, 1, 1], [0.5])
    b = Verification([0.9, 0.1, 0.9, 0.1], [1, 0, 1, 0], [0, 1, 0, 1], [0.5])
    with pytest.raises(EvaluationError, match="differ in pairs, folds or FARs"):
        compare(a, b, None)
