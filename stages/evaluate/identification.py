"""MegaFace's protocol (Kemelmacher-Shlizerman et al., The MegaFace Benchmark, CVPR 2016): people among strangers.

Each probe looks for one mate at a time, another photograph of the same person, in a gallery of that mate and so many
distractors, photographs of strangers. Of the distractors' scores no more is kept than the best of each probe and the
best of all, which is all that ranks and false accept rates ask for; so it takes the time of the matrix product, and
memory that does not grow with their number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.evaluate.verification import EvaluationError

RANKS = 100
"""Ranks are told up to this one; what is beyond is RANKS + 1."""
_BLOCK = {"cpu": 1024, "cuda": 1 << 15}
"""Distractors at a time: on a CPU their scores stay in its caches."""


@dataclass(frozen=True)
class Identification:
    """What became of every probe and mate."""

    counts: tuple[int, ...]
    """C numbers of distractors."""
    person: NDArray[np.intp]
    """(M,) whose the probe and its mate are, for each ordered pair of them."""
    score: NDArray[np.float32]
    """(M,) the mate's cosine to the probe."""
    rank: NDArray[np.int32]
    """(C, M) of the mate in the gallery, from 1, at most RANKS + 1. A distractor that scores as high, to the rounding
    of fp32, comes first."""
    fars: tuple[float, ...]
    highest: NDArray[np.float64]
    """(C, F) the greatest impostor score that a false accept rate rejects, and as much more as fp32 may have rounded it
    by; NaN where impostors are too few for it."""
    probes: int
    """P, with and without mates: all meet the distractors."""

    def identified(self, within: int = 1) -> NDArray[np.float64]:
        """(C,) share of pairs whose mate has at most this rank."""
        return np.asarray((self.rank <= within).mean(axis=1))

    def impostors(self) -> list[int]:
        """(C) comparisons of a probe with a stranger."""
        return [self.probes * count for count in self.counts]

    def true_accept_rates(self) -> NDArray[np.float64]:
        """(C, F) share of mates that score above all but `far` of the impostors; NaN where these are too few."""
        above = self.score.astype(np.float64) > self.highest[:, :, None]
        return np.where(np.isnan(self.highest), np.nan, above.mean(axis=2))

    def intervals(self, replicates: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """95 % percentile intervals of rank-1 (C, 2) and TAR (C, F, 2), by a bootstrap over people with mates.

        All pairs of a person are drawn together, as they depend on each other; thresholds stay as they are. NaN where
        there is no such rate, and where all replicates have the same one, which therefore bound nothing.
        """
        names, person = np.unique(self.person, return_inverse=True)
        people = len(names)
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(people, np.full(people, 1 / people), replicates).astype(np.float64)
        pairs = drawn @ np.bincount(person)

        def bounds(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
            shares = drawn @ np.bincount(person, hits) / pairs
            return np.quantile(shares, (0.025, 0.975)) if np.ptp(shares) else np.full(2, np.nan)

        first = np.stack([bounds(rank == 1) for rank in self.rank])
        above = self.score.astype(np.float64) > self.highest[:, :, None]
        rates = np.stack([[bounds(hits) for hits in of_count] for of_count in above])
        return first, np.where(np.isnan(self.highest)[:, :, None], np.nan, rates)


def identify(
    probes: NDArray[np.float32],
    people: NDArray[np.integer],
    distractors: Iterable[NDArray[np.float32]],
    counts: Sequence[int],
    fars: Sequence[float],
    device: torch.device,
) -> Identification:
    """Look for every mate of every probe among strangers.

    Exact, but for the rounding of fp32 products, whatever the order or size of the blocks. Scores that differ by no
    more than that rounding, 4 √D 2⁻²⁴, count as equal, and so against us: features that are all alike get no credit.

    Args:
        probes: P×D unit vectors.
        people: P, who is on them. One without another photograph has no mate, but meets the distractors.
        distractors: n×D unit vectors at a time. Galleries have the first so many.
        counts: how many, increasing.
        fars: false accept rates over all comparisons of probes with distractors. That of a rate keeps rate · P ·
            counts[-1] numbers.
        device: where products are computed.

    Raises:
        EvaluationError: no two probes show one person, vectors are not finite, lengths differ, counts do not increase,
            or there are too few distractors.
    """
    if len(people) != len(probes):
        raise EvaluationError(f"{len(probes)} probes, but {len(people)} people on them")
    if not counts or list(counts) != sorted(set(counts)) or counts[0] < 1:
        raise EvaluationError(f"numbers of distractors must increase from 1 on, not {list(counts)}")
    people = np.unique(people, return_inverse=True)[1].reshape(-1)
    if not np.isfinite(probes).all():
        raise EvaluationError("probes: features that are not finite numbers")
    looking, mate = _pairs(people)
    if not len(looking):
        raise EvaluationError(f"{len(people)} probes: no two of them show one person, so that there are no mates")
    on_device = torch.from_numpy(np.ascontiguousarray(probes, np.float32)).to(device)
    scores = _mates(on_device, looking, mate)
    rounding = 4 * probes.shape[1] ** 0.5 * 2.0**-24
    best = torch.full((len(probes), RANKS), -torch.inf, device=device)
    highest = _Highest(_rejected(max(fars, default=0), len(probes) * counts[-1]), device)
    ranks, limits, seen = [], [], 0
    for block, stop in _until(distractors, counts, _BLOCK[device.type]):
        if not np.isfinite(block).all():
            raise EvaluationError("distractors: features that are not finite numbers")
        found = on_device @ torch.from_numpy(np.ascontiguousarray(block, np.float32)).to(device).T
        best = _merged(best, found)
        highest.add(found)
        seen += len(block)
        if stop:
            ranks.append(_ranks(best, scores - rounding, looking))
            limits.append([highest.limit(far, len(probes) * seen) + rounding for far in fars])
    if len(ranks) < len(counts):
        raise EvaluationError(f"evaluate.megaface.distractors: {counts[len(ranks)]}, but there are only {seen}")
    return Identification(
        counts=tuple(counts),
        person=people[looking].astype(np.intp),
        score=scores.cpu().numpy(),
        rank=np.stack(ranks),
        fars=tuple(fars),
        highest=np.array(limits, np.float64).reshape(len(counts), len(fars)),
        probes=len(probes),
    )


def _pairs(people: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Each photograph with each other one of its person, in order; people are numbered."""
    of_person = np.argsort(people, kind="stable")
    sizes = np.bincount(people)
    size, first = sizes[people], (np.cumsum(sizes) - sizes)[people]
    looking = np.repeat(np.arange(len(people)), size)
    within = np.arange(len(looking)) - np.repeat(np.cumsum(size) - size, size)
    mate = of_person[np.repeat(first, size) + within]
    other = looking != mate
    return looking[other], mate[other]


def _mates(probes: Tensor, looking: NDArray[np.intp], mate: NDArray[np.intp]) -> Tensor:
    """(M,) cosines of pairs of probes, a few at a time."""
    step = 1 << 14
    return torch.cat(
        [(probes[looking[i : i + step]] * probes[mate[i : i + step]]).sum(dim=1) for i in range(0, len(looking), step)]
    )


def _until(
    blocks: Iterable[NDArray[np.float32]], counts: Sequence[int], most: int
) -> Iterator[tuple[NDArray[np.float32], bool]]:
    """Pieces of the blocks, of at most so many rows, and whether one ends at a count; none beyond the last count."""
    seen, stops = 0, iter(counts)
    stop = next(stops)
    for block in blocks:
        while len(block):
            size = min(len(block), most, stop - seen)
            seen += size
            yield block[:size], seen == stop
            block = block[size:]
            if seen == stop:
                following = next(stops, None)
                if following is None:
                    return
                stop = following


def _merged(best: Tensor, found: Tensor) -> Tensor:
    """The greatest RANKS of each row of both, greatest first."""
    rows = (found.amax(dim=1) > best[:, -1]).nonzero()[:, 0]
    if len(rows):
        both = torch.cat([best[rows], found[rows]], dim=1)
        best[rows] = both.topk(best.shape[1], dim=1).values
    return best


def _ranks(best: Tensor, scores: Tensor, looking: NDArray[np.intp]) -> NDArray[np.int32]:
    """(M,) one more than how many distractors score at least as high as the mate."""
    step, ranks = 1 << 14, []
    for i in range(0, len(looking), step):
        ahead = best[looking[i : i + step]] >= scores[i : i + step, None]
        ranks.append(1 + ahead.sum(dim=1, dtype=torch.int32))
    return torch.cat(ranks).cpu().numpy()


def _rejected(far: float, impostors: int) -> int:
    """How many impostor scores, the greatest first, a false accept rate accepts at most, and the one it rejects."""
    return int(Fraction(str(far)) * impostors) + 1  # the decimal as written, not its binary neighbour


class _Highest:
    """The greatest `count` of all numbers that were added."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._least = -torch.inf
        self._kept: list[Tensor] = [torch.empty(0, device=device)]
        self._size = 0

    def add(self, found: Tensor) -> None:
        some = found[found > self._least]
        self._kept.append(some)
        self._size += len(some)
        if self._size > 2 * self._count + (1 << 16):
            self._reduce()

    def limit(self, far: float, impostors: int) -> float:
        """The greatest score that `far` of so many impostors rejects; NaN where that accepts none."""
        rejected = _rejected(far, impostors)
        if rejected < 2:
            return float("nan")
        self._reduce()
        return float(self._kept[0][rejected - 1])

    def _reduce(self) -> None:
        every = torch.cat(self._kept)
        self._kept = [every.topk(min(self._count, len(every))).values]
        self._size = len(self._kept[0])
        if self._size == self._count:
            self._least = float(self._kept[0][-1])
