"""How sure the figures are: bootstrap over identities, and two runs compared on the same pairs.

Pairs that share a person are not independent. So people are drawn with replacement, and a pair counts as often as its
people were drawn: a pair of one person as often as that person, a pair of two people as often as the product of the
two (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007; Owen and Eckles, ibid. 6, 2012; for face
verification Fogliato, Patil and Perona, Confidence intervals for error rates in 1:1 matching tasks, IJCV 2024).

No such bootstrap is exact (McCullagh, Bernoulli 6, 2000), and this one errs on the side of caution: the variance of a
product of two counts is 1 + 1 + 1, so that what is peculiar to a pair of two people counts three times, though once is
right, and intervals come out too wide, most where pairs share few people, as LFW's do. We therefore take off twice the
variance that drawing couples (the two people of such a pair, as one) would show, as multi-way clustered variances take
off their intersection (Cameron, Gelbach and Miller, JBES 29, 2011): what is left of the variance of a mean is the sum
of covariances over all pairs that share a person (Aronow, Samii and Assenova, Political Analysis 23, 2015). The
percentiles are drawn in towards the figure accordingly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.evaluate.verification import Counts, EvaluationError, Flags, Floats, Metrics, Verification, most_accepted

REPLICATES = 1000
SEED = 1
LEVEL = 95
"""Of the intervals, per cent."""
LEAST_ACCEPTED: int = 5
"""Different pairs that a FAR has to accept for its TAR to get an interval. Where one sets the threshold, resampling
hardly moves it, and intervals come out too narrow (benchmarks/evaluate.py, `coverage`)."""

Draw = Callable[[], Counts]
"""Weights of a replicate, (N,) whole numbers."""
Measure = Callable[[Counts], Floats]


@dataclass(frozen=True)
class People:
    """Who is on the pairs, by number."""

    left: NDArray[np.intp]
    right: NDArray[np.intp]
    names: list[str]

    @property
    def count(self) -> int:
        """How many they are."""
        return len(self.names)


@dataclass(frozen=True)
class Intervals:
    """95 % percentile intervals of the figures of `Metrics.figures`."""

    over: str
    """What was drawn: identities, or pairs where it is not known who is on them."""
    bounds: dict[str, tuple[float, float] | None]
    """By figure; None where there is no such figure, or where replicates say nothing or too little about it."""
    unresolved: dict[str, str]
    """Why one is None."""


def people(left: Sequence[str], right: Sequence[str], same: Flags) -> People | None:
    """Who is on the pairs, by their names: what lies before the last slash, as in `Aaron_Peirsol/Aaron_Peirsol_0001`.

    None where names have no slash, or where that contradicts what the pairs say of being the same person.
    """
    whom = [name.rpartition("/")[0] for name in (*left, *right)]
    if not all(whom):
        return None
    names, code = np.unique(whom, return_inverse=True)
    one, other = code[: len(same)], code[len(same) :]
    return People(one, other, names.tolist()) if np.array_equal(one == other, same) else None


def intervals(pairs: Verification, who: People | None, *, replicates: int = REPLICATES, seed: int = SEED) -> Intervals:
    """Bootstrap all figures of scored pairs; thresholds are chosen anew in each replicate.

    Args:
        pairs: the scored pairs.
        who: who is on them; None where that is not known: then pairs are drawn, as if they were independent, and the
            intervals are too narrow where they are not.
        replicates: how many.
        seed: of the draws; the same gives the same intervals.
    """
    metrics = pairs.measure()

    def measure(weight: Counts) -> Floats:
        return _figures(pairs.measure(weight))

    return _bounds(metrics, _figures(metrics), measure, pairs, who, replicates, seed)


def unbounded(replicates: int) -> str:
    """Why a figure that no replicate changes has no interval."""
    return f"the same in all {replicates:,} replicates, which therefore bound nothing"


@dataclass(frozen=True)
class Comparison:
    """What B has over A, of two runs on the same pairs."""

    a: dict[str, float | None]
    b: dict[str, float | None]
    """Figures of the two."""
    difference: Intervals
    """Of B's figures less A's."""
    only_a: int
    """Pairs that A alone decides rightly."""
    only_b: int
    p_value: float
    """McNemar's, exact and two-sided: had both the same chance to be the one that is right."""
    pairs: int

    @property
    def differences(self) -> dict[str, float | None]:
        """B's figures less A's; None where there is none."""
        both = ((name, self.a[name], self.b[name]) for name in self.a)
        return {name: None if a is None or b is None else b - a for name, a, b in both}

    def verdict(self, title: str) -> str:
        """One sentence: which is better on the protocol, by accuracy."""
        bounds, difference = self.difference.bounds["accuracy"], self.differences["accuracy"]
        if bounds is None or difference is None:
            return f"no difference on {title}: both have the same accuracy however its {self.pairs:,} pairs are drawn"
        gain, (low, high) = 100 * difference, (100 * bound for bound in bounds)
        if low > 0:
            return f"B is better on {title}: {gain:+.1f} points, 95% interval {low:.1f} to {high:.1f}"
        if high < 0:
            return f"A is better on {title}: {-gain:+.1f} points, 95% interval {-high:.1f} to {-low:.1f}"
        return (
            f"no difference on {title} that these {self.pairs:,} pairs could show: B has {gain:+.1f} points, "
            f"95% interval {low:.1f} to {high:.1f}"
        )


def compare(
    a: Verification, b: Verification, who: People | None, *, replicates: int = REPLICATES, seed: int = SEED
) -> Comparison:
    """Compare two runs on the same pairs, in the same order: each replicate counts the pairs of both alike.

    Raises:
        EvaluationError: the pairs differ in truth or fold, or the FARs differ.
    """
    if not (np.array_equal(a.same, b.same) and np.array_equal(a.fold, b.fold) and a.fars == b.fars):
        raise EvaluationError("the runs differ in pairs, folds or FARs: only what was measured alike can be compared")
    of_a, of_b = a.measure(), b.measure()

    def measure(weight: Counts) -> Floats:
        return _figures(b.measure(weight)) - _figures(a.measure(weight))

    right_a, right_b = a.decided(of_a), b.decided(of_b)
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    return Comparison(
        a=of_a.figures,
        b=of_b.figures,
        difference=_bounds(of_a, _figures(of_b) - _figures(of_a), measure, a, who, replicates, seed),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        pairs=of_a.pairs,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's test, exact: the two-sided p-value of pairs that just one of two runs decides rightly.

    Twice the smaller tail of the binomial distribution with chance 1/2, at most 1 (McNemar, Psychometrika 12, 1947).
    """
    count = only_a + only_b
    tail = ways = 1  # in whole numbers: ways to choose k of the count
    for k in range(min(only_a, only_b)):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def _figures(metrics: Metrics) -> Floats:
    return np.array([np.nan if value is None else value for value in metrics.figures.values()])


def _over(who: People | None) -> str:
    return "pairs" if who is None else "identities"


def _bounds(
    figures: Metrics,
    value: Floats,
    measure: Measure,
    pairs: Verification,
    who: People | None,
    replicates: int,
    seed: int,
) -> Intervals:
    """The intervals around `value`, of what `measure` makes of the replicates' weights."""
    random = np.random.default_rng(seed)
    draw = _drawn_pairs(len(pairs.same), random) if who is None else _drawn_people(who, pairs.same, random)
    drawn = _replicates(measure, draw, pairs, replicates)
    low, high = np.percentile(drawn, [50 - LEVEL / 2, 50 + LEVEL / 2], axis=0)
    if who is not None:
        couples = _replicates(measure, _drawn_couples(who, pairs.same, random), pairs, replicates).var(axis=0)
        excess = 2 * np.divide(couples, drawn.var(axis=0), out=np.zeros_like(couples), where=couples > 0)
        narrowed = np.sqrt(np.clip(1 - excess, 1 / 3, 1))  # a third, were all of it peculiar to pairs of two people
        low, high = value + narrowed * (low - value), value + narrowed * (high - value)
    bounds: dict[str, tuple[float, float] | None] = {}
    unresolved = _too_few(pairs) | figures.unresolved
    for k, name in enumerate(figures.figures):
        bounds[name] = None
        if name in unresolved:
            continue
        if np.ptp(drawn[:, k]) == 0:
            unresolved[name] = unbounded(replicates)
        else:
            bounds[name] = float(low[k]), float(high[k])
    return Intervals(_over(who), bounds, unresolved)


def _too_few(pairs: Verification) -> dict[str, str]:
    """Why TARs have no interval, at FARs that accept less than `LEAST_ACCEPTED` different pairs."""
    different = int(np.count_nonzero(~pairs.same))
    return {
        f"tar_at_far_{far}": f"{different:,} different pairs: an interval needs {LEAST_ACCEPTED} that the FAR accepts, "
        f"which is {LEAST_ACCEPTED / different:.2g} at least"
        for far in pairs.fars
        if most_accepted(far, different) < LEAST_ACCEPTED
    }


def _replicates(measure: Measure, draw: Draw, pairs: Verification, replicates: int) -> Floats:
    """Figures of each replicate; weights under which nothing can be measured are drawn again."""
    found: list[Floats] = []
    while len(found) < replicates:
        weight = draw()
        counted = weight > 0
        if len(np.unique(pairs.same[counted])) == 2 and len(np.unique(pairs.fold[counted])) > 1:
            found.append(measure(weight))
    return np.array(found)


def _drawn_pairs(count: int, random: np.random.Generator) -> Draw:
    return lambda: _with_replacement(count, random)


def _drawn_people(who: People, same: Flags, random: np.random.Generator) -> Draw:
    def draw() -> Counts:
        times = _with_replacement(who.count, random)
        return times.take(who.left) * np.where(same, 1, times.take(who.right))

    return draw


def _drawn_couples(who: People, same: Flags, random: np.random.Generator) -> Draw:
    """Pairs of two people by couple; those of one person stay as they are."""
    ordered = np.sort(np.stack([who.left, who.right])[:, ~same], axis=0)
    couples, code = np.unique(ordered[0] * who.count + ordered[1], return_inverse=True)

    def draw() -> Counts:
        weight = np.ones(len(same), np.int64)
        weight[~same] = _with_replacement(len(couples), random).take(code)
        return weight

    return draw


def _with_replacement(count: int, random: np.random.Generator) -> Counts:
    """How often each of `count` is drawn, in as many draws."""
    return np.bincount(random.integers(count, size=count), minlength=count)
