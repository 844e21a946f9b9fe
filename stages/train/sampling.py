"""Which example stands at which place of the endless stream that training reads.

It is computed from (seed, place), never remembered: going on after an interruption needs no state but the place, and
ranks and workers, however many, each take their places of the same stream.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

POOL_GROUPS = 16
"""Row groups read at a time and shuffled together. The writer has shuffled all rows once already; this changes
their company from epoch to epoch."""


class Sampling(Protocol):
    """An endless stream of examples."""

    def rows(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows at some places, in increasing order, and the lap of each; a row comes once a lap."""
        ...


class Uniform:
    """Every row once an epoch, in an order of the epoch's own; one epoch follows the other without a gap.

    An epoch is a random order of row groups, taken POOL_GROUPS at a time and shuffled together, so that reading needs
    no more than a pool at hand.
    """

    def __init__(self, starts: NDArray[np.int64], seed: int) -> None:
        """Over row groups, of which each begins at a row of `starts`; its last entry is the number of rows."""
        self._starts, self._seed = starts, seed
        self._sizes = np.diff(starts)
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._pool = lru_cache(maxsize=4)(self._pool_of)

    def rows(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows at some places, in increasing order, and the lap of each: the epoch."""
        epochs, offsets = np.divmod(places, self._starts[-1])
        rows = np.empty_like(places)
        done = 0
        while done < len(places):
            epoch, offset = int(epochs[done]), offsets[done]
            _, ends = self._order(epoch)
            pool = int(np.searchsorted(ends, offset, side="right"))
            first = ends[pool - 1] if pool else 0
            stop = int(np.searchsorted(places, places[done] - offset + ends[pool]))
            rows[done:stop] = self._pool(epoch, pool)[offsets[done:stop] - first]
            done = stop
        return rows, epochs

    def pools(self, place: int, count: int) -> Iterator[list[int]]:
        """The row groups of the pool that `place` is in, and of those that follow, `count` in all."""
        epoch, offset = divmod(place, int(self._starts[-1]))
        order, ends = self._order(epoch)
        pool = int(np.searchsorted(ends, offset, side="right"))
        for _ in range(count):
            yield order[pool * POOL_GROUPS : (pool + 1) * POOL_GROUPS].tolist()
            pool += 1
            if pool == len(ends):
                epoch, pool = epoch + 1, 0
                order, ends = self._order(epoch)

    def _order_of(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """An epoch's order of row groups, and where each pool of them ends."""
        order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._sizes))
        ends = np.cumsum(self._sizes[order])
        last = np.minimum(np.arange(POOL_GROUPS, len(order) + POOL_GROUPS, POOL_GROUPS), len(order)) - 1
        return order, ends[last]

    def _pool_of(self, epoch: int, pool: int) -> NDArray[np.int64]:
        groups = self._order(epoch)[0][pool * POOL_GROUPS : (pool + 1) * POOL_GROUPS]
        rows = np.concatenate([np.arange(self._starts[group], self._starts[group + 1]) for group in groups])
        return np.random.default_rng([self._seed, epoch, 1, pool]).permutation(rows)


class Balanced:
    """P identities, K images of each, and so on: every identity as likely as any other, however many images it has.

    A round is a random order of the identities, P at a time; those left over when fewer than P remain wait for
    another round, so that no identity is in a batch twice. Each comes with K of its images, in a random order of their
    own which begins anew once it is used up: the next lap of that identity.
    """

    def __init__(self, labels: NDArray[np.int32], identities: int, images: int, seed: int) -> None:
        """Over all rows, by their labels; `identities` is P, `images` is K.

        Raises:
            InputError: there are fewer than P identities.
        """
        self._images, self._seed = images, seed
        order = np.argsort(labels, kind="stable")
        self._of = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
        if len(self._of) < identities:
            raise InputError(
                f"train.sampling.identities: {identities}, but the training split has only {len(self._of)} identities"
            )
        self._turns = len(self._of) // identities * identities
        self._round = lru_cache(maxsize=2)(self._round_of)
        self._lap = lru_cache(maxsize=1024)(self._lap_of)

    def rows(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows at some places, and the lap of each: its identity's."""
        found = [self._row(*divmod(place, self._images)) for place in places.tolist()]
        rows, laps = np.asarray(found, np.int64).reshape(-1, 2).T
        return rows, laps

    def _row(self, turn: int, image: int) -> tuple[int, int]:
        """The row of the image-th image of the turn-th identity, and its lap."""
        number, place = divmod(turn, self._turns)
        identity = int(self._round(number)[place])
        lap, which = divmod(number * self._images + image, len(self._of[identity]))
        return int(self._of[identity][self._lap(identity, lap)[which]]), lap

    def _round_of(self, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, number, 2]).permutation(len(self._of))

    def _lap_of(self, identity: int, lap: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, identity, lap, 3]).permutation(len(self._of[identity]))


def uniforms(seed: int, laps: NDArray[np.int64], rows: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Random numbers that belong to an example in a lap, whoever asks for them and when.

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on (seed, lap, row, draw).

    Returns:
        (rows, draws) in [0, 1).
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) + _GOLDEN)
        for part in (laps[:, None], rows[:, None], np.arange(draws)[None]):
            state = _mix(state + (part.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    mantissa: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64)
    return mantissa * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = np.asarray(x ^ (x >> np.uint64(31)))
    return mixed
