"""Verification metrics of scored pairs, in plain numpy, all of them exact and O(n log n).

A pair is accepted as "same person" when its score reaches the threshold: `score >= threshold`. Pairs may be counted
more than once, or not at all, which is what a bootstrap asks for (`stages.evaluate.uncertainty`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import InputError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]


class EvaluationError(InputError):
    """Pairs, images or model cannot be evaluated; the message says which and why."""


@dataclass(frozen=True)
class Roc:
    """Points of the ROC curve, one a distinct score, from all rejected (0, 0) to all accepted (1, 1)."""

    far: Floats
    """False accept rate, increasing."""
    tar: Floats
    """True accept rate, increasing."""


@dataclass(frozen=True)
class Metrics:
    """What a set of scored pairs says about a model."""

    folds: tuple[int, ...]
    fold_accuracy: tuple[float, ...]
    """Share of each fold's pairs decided rightly, by a threshold chosen without them."""
    fold_threshold: tuple[float, ...]
    auc: float
    eer: float
    tar_at_far: dict[str, float | None]
    """By FAR as written in params.yaml; None where the different pairs are too few to resolve it."""
    unresolved: dict[str, str]
    """Why a figure is None, by its name in `figures`."""
    roc: Roc
    pairs: int

    @property
    def accuracy(self) -> float:
        """Mean over folds, each of the same weight."""
        return float(np.mean(self.fold_accuracy))

    @property
    def accuracy_std(self) -> float:
        """Standard deviation over folds (ddof=1)."""
        return float(np.std(self.fold_accuracy, ddof=1))

    @property
    def accuracy_se(self) -> float:
        """Standard error of the mean, as LFW asks for: `accuracy_std / sqrt(folds)`."""
        return self.accuracy_std / len(self.fold_accuracy) ** 0.5

    @property
    def threshold(self) -> float:
        """Mean of the folds' thresholds."""
        return float(np.mean(self.fold_threshold))

    @property
    def figures(self) -> dict[str, float | None]:
        """Those that intervals and comparisons are about, by name: `accuracy`, `auc`, `eer`, `tar_at_far_0.001`, ..."""
        rates = {f"tar_at_far_{far}": tar for far, tar in self.tar_at_far.items()}
        return {"accuracy": self.accuracy, "auc": self.auc, "eer": self.eer} | rates


def evaluate(
    scores: ArrayLike, same: ArrayLike, fold: ArrayLike, fars: Sequence[float], weight: ArrayLike | None = None
) -> Metrics:
    """Measure scored pairs by the protocol of LFW, view 2 (Huang et al., 2007).

    Args:
        scores: N similarities, higher for more alike. Or F×N, where they depend on what a fold may know of the others
            (`stages.evaluate.scoring`): row f, of the f-th fold in increasing order, has its own pairs' scores and
            those that its threshold is chosen on. AUC, EER and TAR@FAR are of each pair's score in its own fold's row.
        same: N truths, whether both sides show the same person.
        fold: N fold numbers; folds may differ in size and balance.
        fars: false accept rates at which the true accept rate is wanted.
        weight: N whole numbers, how often each pair counts; once each where absent.

    Raises:
        EvaluationError: lengths differ, a score is not finite, there is one fold only, or the pairs are all of
            one kind.
    """
    return Verification(scores, same, fold, fars).measure(weight)


class Verification:
    """Scored pairs, sorted once, to be measured under many weights."""

    def __init__(self, scores: ArrayLike, same: ArrayLike, fold: ArrayLike, fars: Sequence[float]) -> None:
        """Arguments and errors are those of `evaluate`."""
        score, truth, part = np.asarray(scores, np.float64), np.asarray(same, np.bool_), np.asarray(fold)
        _check(score, truth, part)
        self.folds, row = np.unique(part, return_inverse=True)
        by_fold = np.broadcast_to(score, (len(self.folds), len(truth)))
        own = by_fold[row, np.arange(len(truth))]
        self._all = _Sorted.of(own, truth, np.arange(len(truth)))
        self._chosen_on = [
            _Sorted.of(by_fold[f], truth, np.flatnonzero(part != number)) for f, number in enumerate(self.folds)
        ]
        self._held_out = [_Sorted.of(own, truth, np.flatnonzero(part == number)) for number in self.folds]
        self.score, self.same, self.fold, self.fars = own, truth, part, tuple(fars)
        different = int(np.count_nonzero(~truth))
        self._unresolved = {
            f"tar_at_far_{far}": f"{different:,} different pairs: the least FAR above 0 that they can show is "
            f"{1 / different:.2g}"
            for far in self.fars
            if most_accepted(far, different) < 1
        }

    def measure(self, weight: ArrayLike | None = None) -> Metrics:
        """The metrics, each pair counted `weight` times (once each where absent), as if the list repeated it so often.

        A fold of which nothing is left has no part in the accuracy.

        Args:
            weight: N whole numbers; some of each kind must count, and some in two folds.
        """
        times = np.ones(len(self.same), np.int64) if weight is None else np.asarray(weight, np.int64)
        folds, thresholds, accuracies = [], [], []
        for number, chosen_on, held_out in zip(self.folds.tolist(), self._chosen_on, self._held_out, strict=True):
            score, same, count = held_out.counted(times)
            if not len(count):
                continue
            threshold = best_threshold(*chosen_on.counted(times))
            folds.append(number)
            thresholds.append(threshold)
            accuracies.append(float(count @ ((score >= threshold) == same) / count.sum()))
        false, true = _accepted(*self._all.counted(times))
        return Metrics(
            folds=tuple(folds),
            fold_accuracy=tuple(accuracies),
            fold_threshold=tuple(thresholds),
            auc=_area(false, true),
            eer=_equal_error_rate(false, true),
            tar_at_far={
                str(far): None if f"tar_at_far_{far}" in self._unresolved else _tar_at(far, false, true)
                for far in self.fars
            },
            unresolved=self._unresolved,
            roc=Roc(far=false / false[-1], tar=true / true[-1]),
            pairs=int(times.sum()),
        )

    def decided(self, metrics: Metrics) -> Flags:
        """N flags: the pair is decided rightly by its fold's threshold, as the accuracy counts it."""
        threshold = np.asarray(metrics.fold_threshold)[np.searchsorted(metrics.folds, self.fold)]
        return (self.score >= threshold) == self.same


@dataclass(frozen=True)
class _Sorted:
    """Some of the pairs in increasing order of score."""

    score: Floats
    same: Flags
    pair: NDArray[np.intp]

    @classmethod
    def of(cls, score: Floats, same: Flags, pairs: NDArray[np.intp]) -> "_Sorted":
        ordered = pairs[np.argsort(score[pairs], kind="stable")]
        return cls(score[ordered], same[ordered], ordered)

    def counted(self, times: Counts) -> tuple[Floats, Flags, Counts]:
        """Score, truth and count of those that count."""
        count = times.take(self.pair)
        kept = np.flatnonzero(count)  # with take, several times as fast as by flags
        return self.score.take(kept), self.same.take(kept), count.take(kept)


def best_threshold(score: Floats, same: Flags, weight: Counts | None = None) -> float:
    """The threshold that decides most of the given pairs rightly.

    Every way to cut the pairs in two is tried: between each two neighbouring distinct scores (at their midpoint), at
    the lowest score (all accepted) and just above the highest (none accepted). Of several cuts equally good the
    middle one is taken, the lower of two: the median varies least from fold to fold.

    Args:
        score: N scores in increasing order.
        same: N truths.
        weight: N whole numbers from 1, how often each counts; once each where absent.
    """
    last = _last_of_equals(score)
    distinct = score[last]
    # With each cut further up, a different pair more is decided rightly, or a same pair less.
    change = (1 - 2 * same.astype(np.int64)) * (1 if weight is None else weight)
    right = np.append(0, np.cumsum(change)[last])
    best = np.flatnonzero(right == right.max())
    return _threshold(distinct, int(best[(len(best) - 1) // 2]))


def threshold_at(far: float, score: Floats, same: Flags) -> float | None:
    """The threshold at which TAR@FAR is measured: the lowest that accepts no more than `far` of the different pairs.

    Args:
        far: above 0 and below 1.
        score: N scores in any order.
        same: N truths.

    Returns:
        The middle between two pairs' scores; None where the different pairs are too few to resolve `far`.
    """
    different = np.sort(score[~same])[::-1]
    allowed = most_accepted(far, len(different))
    if allowed < 1:
        return None
    distinct = np.unique(score)
    return _threshold(distinct, int(np.searchsorted(distinct, different[allowed], side="right")))


def _threshold(distinct: Floats, cut: int) -> float:
    """What cuts distinct scores, in increasing order, in two: below are `cut` of them."""
    if cut == 0:
        return float(distinct[0])
    if cut == len(distinct):
        return float(np.nextafter(distinct[-1], np.inf))
    below, above = distinct[cut - 1], distinct[cut]
    middle = below + (above - below) / 2
    return float(middle if middle > below else above)  # neighbouring floats have nothing between them


def _check(score: Floats, same: Flags, fold: NDArray) -> None:
    folds = len(np.unique(fold))
    if not (same.ndim == 1 and same.shape == fold.shape and score.shape in (same.shape, (folds, len(same)))):
        raise EvaluationError(
            f"scores, same and fold must be of one length, not {score.shape}, {same.shape}, {fold.shape}"
        )
    if not np.isfinite(score).all():
        raise EvaluationError(f"{np.count_nonzero(~np.isfinite(score))} of {score.size} scores are not finite numbers")
    if same.all() or not same.any():
        raise EvaluationError(f"{len(same)} pairs, {np.count_nonzero(same)} of the same person: needs both kinds")
    if folds < 2:
        raise EvaluationError("all pairs are in one fold: a threshold needs at least one other to be chosen on")


def _last_of_equals(ordered: Floats) -> NDArray[np.intp]:
    """Where each run of equal scores ends."""
    return np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)


def _accepted(score: Floats, same: Flags, weight: Counts) -> tuple[Counts, Counts]:
    """False and true accepts as the threshold falls past each distinct score, from none; scores increase."""
    last = _last_of_equals(score[::-1])
    all_accepted = np.cumsum(weight[::-1])[last]
    true = np.cumsum((weight * same)[::-1])[last]
    return np.append(0, all_accepted - true), np.append(0, true)


def _area(false: Counts, true: Counts) -> float:
    """The chance that a same pair scores above a different pair, ties counted half: counted in whole numbers."""
    doubled = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return doubled / (2 * int(false[-1]) * int(true[-1]))


def _equal_error_rate(false: Counts, true: Counts) -> float:
    """Where the ROC polyline (linear between neighbouring points) meets FAR = 1 - TAR; there is one such point."""
    far, frr = false / false[-1], 1 - true / true[-1]
    after = int(np.argmax(far >= frr))
    gap_before, gap_after = frr[after - 1] - far[after - 1], far[after] - frr[after]
    share = gap_before / (gap_before + gap_after)
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def _tar_at(far: float, false: Counts, true: Counts) -> float:
    """The highest TAR at a threshold that accepts no more than `far` of the different pairs."""
    allowed = most_accepted(far, int(false[-1]))
    return float(true[np.searchsorted(false, allowed, side="right") - 1] / true[-1])


def most_accepted(far: float, different: int) -> int:
    """How many of the different pairs may be accepted at a FAR."""
    # the decimal as written, not its binary neighbour: 0.29 of 100 pairs is 29, though 0.29 * 100 < 29
    return int(Fraction(str(far)) * different)
