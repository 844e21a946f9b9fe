"""Which faces are copies of one another: equal or nearly equal perceptual hashes."""

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
    hashes: NDArray[np.uint64], distance: int, ours: int | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """All pairs of hashes that differ in at most `distance` bits, and of which one at least is ours.

    Two such hashes are equal in at least one of any `distance + 1` groups of bits (the pigeonhole principle, as in
    multi-index hashing, Norouzi et al., CVPR 2012), so only pairs with an equal group are compared.

    Args:
        hashes: (n, 4) uint64.
        ours: how many of the first are; all by default.

    Returns:
        Pairs (m, 2), the smaller index first, ascending; and their distances (m,).
    """
    bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, BITS // 8), axis=1)
    # neighbouring frequencies are alike; bits drawn from everywhere make more even groups
    groups = np.array_split(np.random.default_rng(0).permutation(BITS), distance + 1)
    found = [np.empty((0, 2), np.intp)]
    for group in progress(groups, total=len(groups), label="near duplicates", unit="groups of bits"):
        packed = np.packbits(bits[:, group[:64]], axis=1)
        key = np.zeros((len(hashes), 8), np.uint8)
        key[:, : packed.shape[1]] = packed
        found.append(
            _equal_and_near(key.view(np.uint64)[:, 0], hashes, distance, len(hashes) if ours is None else ours)
        )
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs, _distances(hashes, pairs[:, 0], pairs[:, 1])


def _equal_and_near(key: NDArray[np.uint64], hashes: NDArray[np.uint64], distance: int, ours: int) -> NDArray[np.intp]:
    """Pairs with equal keys whose hashes are near: sorted by key, each of ours is compared with the next, the one
    after, ...

    The sort is stable: of equal keys ours come first, and of a pair the smaller index.
    """
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    found = []
    first, step = np.flatnonzero(order < ours), 1
    while len(first):
        first = first[: np.searchsorted(first, len(key) - step)]
        first = first[ordered[first] == ordered[first + step]]
        left, right = order[first], order[first + step]
        near = _distances(hashes, left, right) <= distance
        found.append(np.stack([left[near], right[near]], axis=1))
        step += 1
    return np.concatenate(found) if found else np.empty((0, 2), np.intp)


def _distances(hashes: NDArray[np.uint64], left: NDArray[np.intp], right: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1, dtype=np.intp)
