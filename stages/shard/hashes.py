"""Perceptual hashes of faces, and which of them are near each other, one of them mirrored perhaps."""

import functools
import math
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline import tables
from pipeline.progress import progress

_SIDE = 16
BITS = _SIDE * _SIDE
"""Of a hash. The usual 64 do not tell aligned faces apart, which all have their eyes in the same place."""
WORDS = BITS // 64
_CANDIDATES = 1 << 16
"""Pairs that are compared at a time: their memory fits a core's cache."""
_EQUAL = (1, 2, 3)
"""In how many sets of bits hashes are equal that are compared: one of these."""
_SORTING = 3
"""How many pairs are compared in the time that a hash takes to be sorted by a key."""


def perceptual_hash(face: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The DCT hash of a face, and that of its mirror image: the signs, against their median, of its lowest frequencies.

    As pHash has it (Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010), but of 16×16
    instead of 8×8 frequencies, and of the face as it is, neither blurred nor reduced first. In the mirror image every
    other frequency across has the other sign.

    Args:
        face: H×W uint8, grey.

    Returns:
        (2, 4) uint64, 256 bits each.
    """
    down, across = (_waves(side) for side in face.shape)
    low = down @ face.astype(np.float64) @ across.T
    both = np.stack([low, low * (-1.0) ** np.arange(_SIDE)]).reshape(2, BITS)
    return np.packbits(both > np.median(both, axis=1, keepdims=True), axis=1).view(np.uint64)


@functools.cache
def _waves(side: int) -> NDArray[np.float64]:
    """(16, side) the slowest waves of the DCT-II over so many pixels."""
    return np.cos(np.pi / side * np.outer(np.arange(_SIDE), np.arange(side) + 0.5))


def hash_part(path: Path) -> NDArray[np.uint64]:
    """(rows, 2, 4) hashes of a part of the aligned table; zeros for a row without an image."""
    images = tables.read_table(path, tables.ALIGNED, ["image"])["image"]
    hashes = np.zeros((len(images), 2, WORDS), np.uint64)
    for row, image in enumerate(images):
        if image.is_valid:
            hashes[row] = perceptual_hash(simplejpeg.decode_jpeg(image.as_py(), "GRAY")[:, :, 0])
    return hashes


def near_pairs(
    hashes: NDArray[np.uint64], group: NDArray[np.integer | np.bool_], distance: int, label: str = "near duplicates"
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of different groups whose hashes differ in at most `distance` bits, as they are or one of them mirrored.

    Of any `distance + k` sets of bits two such hashes are equal in k at least (the pigeonhole principle, as in
    multi-index hashing, Norouzi et al., CVPR 2012), so only hashes that are equal in some k sets are compared: those
    sorted by these bits, each with what lies between the end of its group and the end of the equal ones. The more
    hashes there are, the larger is the k that takes the least time.

    Args:
        hashes: (n, 2, 4) uint64, each as it is and mirrored.
        group: (n,).
        label: what the progress bar says.

    Yields:
        Batches of pairs, as two arrays of indices, (m,) each; the one of the lower group first, and a pair as often as
        there are k sets in which hashes of the two are equal. None takes more memory than _CANDIDATES or n need.
    """
    count = len(hashes)
    hashes = np.concatenate([hashes[:, 0], hashes[:, 1]])
    group = np.tile(np.unique(group, return_inverse=True)[1].astype(np.uint64), 2)
    k, width = _plan(group, distance)
    # neighbouring frequencies are alike; bits drawn from everywhere make more even sets
    drawn = np.array_split(np.random.default_rng(0).permutation(BITS), distance + k)
    sets = [_chosen(hashes, bits[:width]) for bits in drawn]
    words, beside = np.ascontiguousarray(hashes.T), np.uint64(_length(group))
    total = math.comb(len(sets), k)
    for equal in progress(combinations(sets, k), total=total, label=label, unit="sets of bits"):
        key = np.zeros(len(hashes), np.uint64)
        for part in equal:
            key = key << np.uint64(width) | part
        key = key << beside | group
        order = np.argsort(key)
        word = words[0, order]
        for first, second in _candidates(*_runs(key[order], beside)):
            bits = np.bitwise_count(word[first] ^ word[second])
            few = np.flatnonzero(bits <= distance)  # by which most are told already
            one, other, bits = order[first[few]], order[second[few]], bits[few]
            for later in words[1:]:
                bits = bits + np.bitwise_count(later[one] ^ later[other])
                few = np.flatnonzero(bits <= distance)
                one, other, bits = one[few], other[few], bits[few]
            yield one % count, other % count


def _plan(group: NDArray[np.uint64], distance: int) -> tuple[int, int]:
    """The k of near_pairs, and the most bits of a set that are looked at: a key and a group share 64 bits.

    By the time that it would take if bits were drawn by a coin: by each key all hashes are sorted, and the pairs
    compared that are equal in its bits.
    """
    n, room = len(group), 64 - _length(group)
    pairs = (n**2 - int((np.bincount(group.astype(np.intp)) ** 2).sum())) / 2

    def cost(k: int) -> float:
        bits = k * min(BITS / (distance + k), room // k)
        return math.comb(distance + k, k) * (_SORTING * n + pairs / 2**bits)

    k = min(_EQUAL, key=cost)
    return k, min(-(-BITS // (distance + k)), room // k)


def _length(group: NDArray[np.uint64]) -> int:
    """How many bits the largest group has."""
    return int(group.max(initial=0)).bit_length()


def _chosen(hashes: NDArray[np.uint64], bits: NDArray[np.intp]) -> NDArray[np.uint64 | np.uint32 | np.uint16]:
    """(n,) up to 64 of the bits of each hash, in as small a type as holds them."""
    key, one = np.zeros(len(hashes), np.uint64), np.uint64(1)
    for word, shift in zip(*divmod(bits, 64), strict=True):
        key = key << one | hashes[:, word] >> np.uint64(shift) & one
    return key.astype(np.uint16 if len(bits) <= 16 else np.uint32 if len(bits) <= 32 else np.uint64)


def _runs(key: NDArray[np.uint64], beside: np.uint64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each place in the order of keys, whose last `beside` bits are the group: where its group ends, and its key."""
    new_group = np.append(key[1:] != key[:-1], True)
    key = key >> beside
    new_key = np.append(key[1:] != key[:-1], True)
    ends = (np.flatnonzero(new) + 1 for new in (new_group, new_key))
    starts, stops = (np.repeat(end, np.diff(end, prepend=0)) for end in ends)
    return starts, stops


def _candidates(
    starts: NDArray[np.intp], stops: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Each place with all from its start to before its stop, in batches of _CANDIDATES, or of one place."""
    places = np.flatnonzero(stops > starts)
    starts, counts = starts[places], (stops - starts)[places]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(places):
        before = ends[begin] - counts[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + _CANDIDATES, side="right")))
        some = slice(begin, end)
        first = np.repeat(places[some], counts[some])
        # each place's own count from zero, moved to its start
        second = np.arange(len(first)) + np.repeat(starts[some] + before - (ends - counts)[some], counts[some])
        yield first, second
        begin = end


def bits_apart(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """In how many bits hashes (..., 2, 4) differ, broadcast against each other, as they are or one of them mirrored."""
    least = np.uint16(BITS)
    for mine, theirs in product(range(2), repeat=2):
        words = zip(np.moveaxis(one[..., mine, :], -1, 0), np.moveaxis(other[..., theirs, :], -1, 0), strict=True)
        least = np.minimum(least, sum(np.bitwise_count(a ^ b).astype(np.uint16) for a, b in words))
    return np.asarray(least)
