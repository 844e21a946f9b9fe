"""Which photographs of a training set are copies, of each other and of those of evaluation sets: two kinds of copy.

Neither kind ever holds all pairs of copies, of which a thousand copies of one photograph have half a million.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stages.shard.hashes import bits_apart, near_pairs

Rows = NDArray[np.intp]
_CELLS = 1 << 20
"""Distances that are held at a time."""


class Found(NamedTuple):
    """For each of some rows, (n,), what it is a copy of."""

    of: Rows
    """A row of the training set or a photograph of an evaluation set; −1 for no copy."""
    distance: NDArray[np.int32]
    """Bits of 256; −1 where none counts."""


class Copies(Protocol):
    """A kind of copy."""

    def among(self, rows: Rows, others: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `others`, which ascend, that each row is a copy of and that bears its identity."""

    def evaluated(self, rows: Rows) -> Found:
        """The first photograph of an evaluation set that each row is a copy of."""

    def contradicting(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, which ascend, that each is a copy of and that bears another identity."""

    def better(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, of one identity the best first, that each is a copy of, and that is none itself."""


class Equal:
    """The same bytes."""

    def __init__(self, ours: pa.ChunkedArray, theirs: list[pa.ChunkedArray]) -> None:
        """From the SHA-256 of each photograph of the training set and of the evaluation sets."""
        chunks = [chunk for column in (ours, *theirs) for chunk in column.chunks]
        everything = pa.chunked_array(chunks, pa.string()).cast(pa.large_string())  # they may be of more than 2 GiB
        contents = pc.unique(everything)
        self._content = pc.index_in(everything, value_set=contents).to_numpy()
        self._ours, self._contents = len(ours), len(contents)

    def among(self, rows: Rows, others: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `others`, which ascend, that each row is a copy of and that bears its identity."""
        people = int(identity.max(initial=0)) + 1
        theirs, first = np.unique(self._content[others] * people + identity[others], return_index=True)
        ours = self._content[rows] * people + identity[rows]
        place = np.searchsorted(theirs, ours)
        there = np.append(theirs, -1)[place] == ours
        return self._found(np.where(there, np.append(others[first], -1)[place], -1))

    def apart(self, rows: Rows, identity: NDArray[np.intp]) -> Rows:
        """Of `rows`, which ascend, those that stand for all of their copies: the first, and the first of another
        identity.

        What is near one of them is near all, and one of these two bears another identity than it, if any does.
        """
        content = self._content[rows]
        first = self._first(content, rows)[content]
        other = identity[first] != identity[rows]
        stands = np.zeros(len(identity), bool)
        stands[first] = stands[self._first(content[other], rows[other])[content[other]]] = True
        return np.flatnonzero(stands)

    def evaluated(self, rows: Rows) -> Found:
        """The first photograph of an evaluation set that each row is a copy of."""
        theirs = self._content[self._ours :]
        return self._found(self._first(theirs, np.arange(len(theirs)))[self._content[rows]])

    def contradicting(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, which ascend, that each is a copy of and that bears another identity."""
        content = self._content[rows]
        first = self._first(content, rows)[content]
        other = identity[first] != identity[rows]
        return self._found(np.where(other, first, self._first(content[other], rows[other])[content]))

    def better(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, of one identity the best first, that each is a copy of, and that is none itself."""
        content = self._content[rows]  # equal ones bear one identity: contradictions are gone
        first = self._first(content, rows)[content]
        return self._found(np.where(first == rows, -1, first))

    def _first(self, content: NDArray[np.intp], numbers: Rows) -> Rows:
        """For each content the number of the first that has it; −1 for none."""
        first = np.full(self._contents, -1)
        first[content[::-1]] = numbers[::-1]  # of several assignments the last one stays
        return first

    @staticmethod
    def _found(of: Rows) -> Found:
        return Found(of, np.full(len(of), -1, np.int32))


@dataclass(frozen=True)
class Near:
    """Faces whose perceptual hashes differ in few bits, as they are or one of them mirrored."""

    ours: NDArray[np.uint64]
    """(rows, 2, 4), of the training set."""
    theirs: NDArray[np.uint64]
    """(photographs, 2, 4), of the evaluation sets."""
    bits: int
    """In how many they may differ."""

    def among(self, rows: Rows, others: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `others`, which ascend, that each row is near and that bears its identity."""
        of = np.full(len(rows), -1)
        others = others[np.argsort(identity[others], kind="stable")]
        some = np.flatnonzero(np.isin(identity[rows], identity[others]))
        for places in _by_identity(some, identity[rows]):
            bounds = (np.searchsorted(identity[others], identity[rows[places[0]]], side) for side in ("left", "right"))
            theirs = others[slice(*bounds)]
            size = max(1, _CELLS // len(theirs))
            for block in (places[start : start + size] for start in range(0, len(places), size)):
                near = bits_apart(self.ours[rows[block], None], self.ours[None, theirs]) <= self.bits
                of[block] = np.where(near.any(axis=1), theirs[near.argmax(axis=1)], -1)
        return self._found(rows, of, self.ours)

    def evaluated(self, rows: Rows) -> Found:
        """The first photograph of an evaluation set that each row is near."""
        n = len(rows)
        of = np.full(n, len(self.theirs))
        hashes = np.concatenate([self.ours[rows], self.theirs])
        whose = np.arange(len(hashes)) >= n
        for ours, theirs in near_pairs(hashes, whose, self.bits, "near duplicates of test sets"):
            np.minimum.at(of, ours, theirs - n)
        return self._found(rows, np.where(of < len(self.theirs), of, -1), self.theirs)

    def contradicting(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, which ascend, that each is near and that bears another identity."""
        of = np.full(len(rows), len(rows))
        for one, other in near_pairs(self.ours[rows], identity[rows], self.bits):
            np.minimum.at(of, one, other)
            np.minimum.at(of, other, one)
        return self._found(rows, np.append(rows, -1)[of], self.ours)

    def better(self, rows: Rows, identity: NDArray[np.intp]) -> Found:
        """The first of `rows`, of one identity the best first, that each is near, and that is none itself."""
        of = np.full(len(rows), -1)
        for places in _by_identity(np.arange(len(rows)), identity[rows]):
            first = _first_kept(self.ours[rows[places]], self.bits)
            of[places] = np.where(first < 0, -1, rows[places[first]])
        return self._found(rows, of, self.ours)

    def _found(self, rows: Rows, of: Rows, hashes: NDArray[np.uint64]) -> Found:
        copies = of >= 0
        distance = np.full(len(rows), -1, np.int32)
        distance[copies] = bits_apart(self.ours[rows[copies]], hashes[of[copies]])
        return Found(of, distance)


def _by_identity(places: Rows, identity: NDArray[np.intp]) -> list[Rows]:
    """Some places, those of one identity together; in the order that they had."""
    order = places[np.argsort(identity[places], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    return [group for group in groups if len(group)]


def _first_kept(hashes: NDArray[np.uint64], bits: int) -> Rows:
    """Each hash is kept that is not near one kept before: for each the first such one; −1 for those kept.

    Blocks of hashes are compared with all that are kept, then among themselves.
    """
    of = np.full(len(hashes), -1)
    kept = np.empty(0, np.intp)
    size = max(1, _CELLS // max(1, len(hashes)))
    for start in range(0, len(hashes), size):
        block = np.arange(start, min(start + size, len(hashes)))
        if len(kept):
            near = bits_apart(hashes[block, None], hashes[None, kept]) <= bits
            copies = near.any(axis=1)
            of[block[copies]] = kept[near[copies].argmax(axis=1)]
            block = block[~copies]
        near = np.triu(bits_apart(hashes[block, None], hashes[None, block]) <= bits, 1)
        for place in np.flatnonzero(near.any(axis=1)).tolist():
            if of[block[place]] < 0:
                copies = near[place] & (of[block] < 0)
                of[block[copies]] = block[place]
        kept = np.append(kept, block[of[block] < 0])
    return of
