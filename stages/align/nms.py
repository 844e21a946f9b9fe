"""Greedy non-maximum suppression, with the pixel-counting overlaps of MTCNN."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Overlap = Literal["union", "min"]

_BLOCK = 256
"""Boxes whose overlaps are computed at once: bounds memory to `_BLOCK` × n however many boxes there are."""


def nms(boxes: NDArray[np.float64], scores: NDArray[np.float32], threshold: float, overlap: Overlap) -> list[int]:
    """Boxes that overlap no better box by more than `threshold`.

    Args:
        boxes: (n, 4) left, top, right, bottom; first and last pixel, so a box is right − left + 1 wide.
        scores: (n,); of equal scores the last counts as better, as in the original.
        threshold: largest overlap that two kept boxes may have.
        overlap: intersection over union, or over the smaller of both areas.

    Returns:
        Indices of the kept boxes, best first.
    """
    left = np.argsort(scores, kind="stable")[::-1]
    kept: list[int] = []
    while len(left):
        block = left[:_BLOCK]
        near = _overlaps(boxes[block], boxes[left], overlap) > threshold
        alive = np.ones(len(left), dtype=bool)
        for i, index in enumerate(block):
            if alive[i]:
                kept.append(int(index))
                alive &= ~near[i]
        left = left[_BLOCK:][alive[_BLOCK:]]
    return kept


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64], overlap: Overlap) -> NDArray[np.float64]:
    """Overlap of each box of `a` (m, 4) with each of `b` (n, 4): (m, n), 0 to 1."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=-1)
    area_a, area_b = (np.prod(box[:, 2:] - box[:, :2] + 1, axis=1) for box in (a, b))
    if overlap == "min":
        return shared / np.minimum(area_a[:, None], area_b)
    return shared / (area_a[:, None] + area_b - shared)
