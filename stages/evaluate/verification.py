"""Verification metrics of scored pairs, in plain numpy, all of them exact and O(n log n).

A pair is accepted as "same person" when its score reaches the threshold: `score >= threshold`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import InputError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


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


def evaluate(scores: ArrayLike, same: ArrayLike, fold: ArrayLike, fars: Sequence[float]) -> Metrics:
    """Measure scored pairs by the protocol of LFW, view 2 (Huang et al., 2007).

    Args:
        scores: N similarities, higher for more alike.
        same: N truths, whether both sides show the same person.
        fold: N fold numbers; folds may differ in size and balance.
        fars: false accept rates at which the true accept rate is wanted.

    Raises:
        EvaluationError: lengths differ, a score is not finite, there is one fold only, or the pairs are all of
            one kind.
    """
    score, truth, part = np.asarray(scores, np.float64), np.asarray(same, np.bool_), np.asarray(fold)
    _check(score, truth, part)
    order = np.argsort(score, kind="stable")
    score, truth, part = score[order], truth[order], part[order]

    folds = [int(number) for number in np.unique(part)]
    thresholds, accuracies = [], []
    for number in folds:
        held_out = part == number
        threshold = best_threshold(score[~held_out], truth[~held_out])
        thresholds.append(threshold)
        accuracies.append(float(np.mean((score[held_out] >= threshold) == truth[held_out])))

    false, true = _accepted(score, truth)
    return Metrics(
        folds=tuple(folds),
        fold_accuracy=tuple(accuracies),
        fold_threshold=tuple(thresholds),
        auc=_area(false, true),
        eer=_equal_error_rate(false, true),
        tar_at_far={str(far): _tar_at(far, false, true) for far in fars},
        roc=Roc(far=false / false[-1], tar=true / true[-1]),
        pairs=len(score),
    )


def best_threshold(score: Floats, same: Flags) -> float:
    """The threshold that decides most of the given pairs rightly.

    Every way to cut the pairs in two is tried: between each two neighbouring distinct scores (at their midpoint), at
    the lowest score (all accepted) and just above the highest (none accepted). Of several cuts equally good the
    middle one is taken, the lower of two: the median varies least from fold to fold.

    Args:
        score: N scores in increasing order.
        same: N truths.
    """
    last = np.flatnonzero(np.append(np.diff(score) > 0, True))  # of each run of equal scores
    distinct = score[last]
    rejected_same = np.append(0, np.cumsum(same)[last])  # below each cut
    rejected_different = np.append(0, np.cumsum(~same)[last])
    right = rejected_different + (rejected_same[-1] - rejected_same)
    best = np.flatnonzero(right == right.max())
    cut = best[(len(best) - 1) // 2]
    if cut == 0:
        return float(distinct[0])
    if cut == len(distinct):
        return float(np.nextafter(distinct[-1], np.inf))
    below, above = distinct[cut - 1], distinct[cut]
    middle = below + (above - below) / 2
    return float(middle if middle > below else above)  # neighbouring floats have nothing between them


def _check(score: Floats, same: Flags, fold: NDArray) -> None:
    if not (score.ndim == 1 and score.shape == same.shape == fold.shape):
        raise EvaluationError(
            f"scores, same and fold must be of one length, not {score.shape}, {same.shape}, {fold.shape}"
        )
    if not np.isfinite(score).all():
        raise EvaluationError(f"{np.count_nonzero(~np.isfinite(score))} of {len(score)} scores are not finite numbers")
    if same.all() or not same.any():
        raise EvaluationError(f"{len(same)} pairs, {np.count_nonzero(same)} of the same person: needs both kinds")
    if len(np.unique(fold)) < 2:
        raise EvaluationError("all pairs are in one fold: a threshold needs at least one other to be chosen on")


def _accepted(score: Floats, same: Flags) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """False and true accepts as the threshold falls past each distinct score, from none; scores increase."""
    last = np.flatnonzero(np.append(np.diff(score[::-1]) < 0, True))
    return np.append(0, np.cumsum(~same[::-1])[last]), np.append(0, np.cumsum(same[::-1])[last])


def _area(false: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """The chance that a same pair scores above a different pair, ties counted half: counted in whole numbers."""
    doubled = int(np.sum(np.diff(false) * (true[1:] + true[:-1])))
    return doubled / (2 * int(false[-1]) * int(true[-1]))


def _equal_error_rate(false: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Where the ROC polyline (linear between neighbouring points) meets FAR = 1 - TAR; there is one such point."""
    far, frr = false / false[-1], 1 - true / true[-1]
    after = int(np.argmax(far >= frr))
    gap_before, gap_after = frr[after - 1] - far[after - 1], far[after] - frr[after]
    share = gap_before / (gap_before + gap_after)
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def _tar_at(far: float, false: NDArray[np.int64], true: NDArray[np.int64]) -> float | None:
    """The highest TAR at a threshold that accepts no more than `far` of the different pairs."""
    # the decimal as written, not its binary neighbour: 0.29 of 100 pairs is 29, though 0.29 * 100 < 29
    allowed = int(Fraction(str(far)) * int(false[-1]))
    if allowed < 1:
        return None
    return float(true[np.searchsorted(false, allowed, side="right") - 1] / true[-1])
