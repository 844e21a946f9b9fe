"""Perceptual hashes of faces, and which of them are near each other."""

from collections.abc import Iterator
from pathlib import Path

import imagehash
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline import tables
from pipeline.progress import progress

_SIDE = 16
BITS = _SIDE * _SIDE
"""Of a hash. The usual 64 do not tell aligned faces apart, which all have their eyes in the same place."""
_WORDS = BITS // 64
_CANDIDATES = 1 << 16
"""Pairs that are compared at a time: their memory fits a core's cache."""


def perceptual_hash(face: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The DCT hash of a face: the signs, against their median, of its 16×16 lowest frequencies.

    Args:
        face: H×W uint8, grey.

    Returns:
        (4,) uint64, the 256 bits.
    """
    bits = imagehash.phash(Image.fromarray(face), hash_size=_SIDE).hash
    return np.packbits(bits).view(np.uint64)


def hash_part(path: Path) -> NDArray[np.uint64]:
    """(rows, 4) hashes of a part of the aligned table; zeros for a row without an image."""
    images = tables.read_table(path, tables.ALIGNED, ["image"])["image"]
    hashes = np.zeros((len(images), _WORDS), np.uint64)
    for row, image in enumerate(images):
        if image.is_valid:
            hashes[row] = perceptual_hash(simplejpeg.decode_jpeg(image.as_py(), "GRAY")[:, :, 0])
    return hashes


def near_pairs(
    hashes: NDArray[np.uint64], group: NDArray[np.integer | np.bool_], distance: int, label: str = "near duplicates"
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Pairs of hashes of different groups that differ in at most `distance` bits.

    Two such hashes are equal in at least one of any `distance + 1` sets of bits (the pigeonhole principle, as in
    multi-index hashing, Norouzi et al., CVPR 2012), so only hashes that are equal in a set are compared: those sorted
    by these bits, each with what lies between the end of its group and the end of the equal ones.

    Args:
        hashes: (n, 4) uint64.
        group: (n,).
        label: what the progress bar says.

    Yields:
        Batches of pairs, as two arrays of indices, (m,) each; the one of the lower group first, and a pair as often as
        there are sets in which its hashes are equal. None takes more memory than _CANDIDATES or n need.
    """
    # neighbouring frequencies are alike; bits drawn from everywhere make more even sets
    sets = np.array_split(np.random.default_rng(0).permutation(BITS), distance + 1)
    for bits in progress(sets, total=len(sets), label=label, unit="sets of bits"):
        key = _key(hashes, bits)
        order = np.lexsort((group, key))
        starts, stops = _runs(key[order], group[order])
        words = np.ascontiguousarray(hashes[order].T)
        for first, second in _candidates(starts, stops):
            near = _near(words, first, second, distance)
            yield order[first[near]], order[second[near]]


def _key(hashes: NDArray[np.uint64], bits: NDArray[np.intp]) -> NDArray[np.uint64]:
    """(n,) up to 64 of the bits of each hash."""
    key, one = np.zeros(len(hashes), np.uint64), np.uint64(1)
    for word, shift in zip(*divmod(bits[:64], 64), strict=True):
        key = key << one | hashes[:, word] >> np.uint64(shift) & one
    return key


def _runs(key: NDArray[np.uint64], group: NDArray[np.integer | np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of each place in the order of keys, and of groups among equal keys: where its group ends, and where its key."""
    new_key = np.append(key[1:] != key[:-1], True)
    new_group = new_key | np.append(group[1:] != group[:-1], True)
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


def _near(
    words: NDArray[np.uint64], first: NDArray[np.intp], second: NDArray[np.intp], distance: int
) -> NDArray[np.intp]:
    """Which pairs differ in at most `distance` bits: most are told by the first of their words."""
    near = np.arange(len(first))
    bits = np.zeros(len(first), np.uint16)
    for word in words:
        bits = bits + np.bitwise_count(word[first[near]] ^ word[second[near]])
        few = bits <= distance
        near, bits = near[few], bits[few]
    return near


def bits_apart(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """In how many bits hashes (..., 4) differ, broadcast against each other."""
    bits = np.bitwise_count(one[..., 0] ^ other[..., 0]).astype(np.uint16)
    for word in range(1, _WORDS):
        bits += np.bitwise_count(one[..., word] ^ other[..., word])
    return bits
