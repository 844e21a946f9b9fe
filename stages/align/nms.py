"""Greedy non-maximum suppression, with the pixel-counting overlaps of MTCNN, for many photographs at once."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Overlap = Literal["union", "min"]

_SMALL = 64
"""Groups of up to so many boxes are suppressed together: one after the other, they would cost more in calls than in
arithmetic."""
_BLOCK = 256
"""Boxes of a larger group whose overlaps are computed at once: bounds memory to `_BLOCK` × n."""
_GROUPS = 256
"""Small groups that are suppressed together: bounds memory to `_GROUPS` × `_SMALL`²."""


def suppress(
    groups: NDArray[np.integer],
    boxes: NDArray[np.float64],
    scores: NDArray[np.float32],
    threshold: float,
    overlap: Overlap,
) -> NDArray[np.intp]:
    """Boxes that overlap no better box of their group by more than `threshold`.

    Args:
        groups: (n,) boxes of different groups, such as photographs, do not suppress each other.
        boxes: (n, 4) left, top, right, bottom; first and last pixel, so a box is right − left + 1 wide.
        scores: (n,); of equal scores the last counts as better, as in the original.
        threshold: largest overlap that two kept boxes may have.
        overlap: intersection over union, or over the smaller of both areas.

    Returns:
        Indices of the kept boxes, sorted by group, then best first.
    """
    order = np.lexsort((-np.arange(len(groups)), -scores, groups))
    boxes = boxes[order]
    _, first, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    kept = np.zeros(len(order), dtype=bool)
    for start, size in zip(first[sizes > _SMALL], sizes[sizes > _SMALL], strict=True):
        kept[start : start + size] = _one(boxes[start : start + size], threshold, overlap)
    low = 0
    for high in (*(h for h in (1, 8, 16, 32) if h < _SMALL), _SMALL):  # groups of like size, so that little is padded
        alike = np.flatnonzero((sizes > low) & (sizes <= high))
        for some in np.split(alike, range(_GROUPS, len(alike), _GROUPS)):
            places = first[some, None] + np.arange(high)
            there = np.arange(high) < sizes[some, None]
            places = np.where(there, places, 0)
            kept[places[there]] = _many(boxes[places], there, threshold, overlap)[there]
        low = high
    return order[kept]


def _one(boxes: NDArray[np.float64], threshold: float, overlap: Overlap) -> NDArray[np.bool_]:
    """(n,) which of (n, 4) boxes, best first, are kept."""
    kept = np.zeros(len(boxes), dtype=bool)
    left = np.arange(len(boxes))
    while len(left):
        block = left[:_BLOCK]
        near = _overlaps(boxes[block], boxes[left], overlap) > threshold
        alive = np.ones(len(left), dtype=bool)
        for i, index in enumerate(block):
            if alive[i]:
                kept[index] = True
                alive &= ~near[i]
        left = left[_BLOCK:][alive[_BLOCK:]]
    return kept


def _many(
    boxes: NDArray[np.float64], there: NDArray[np.bool_], threshold: float, overlap: Overlap
) -> NDArray[np.bool_]:
    """(g, n) which of (g, n, 4) boxes, best first in each group, are kept; `there` (g, n) says which are any."""
    alive = there.copy()
    count = boxes.shape[1]
    if count > 1:
        near = np.triu(_overlaps(boxes, boxes, overlap) > threshold, k=1)
        for i in range(count - 1):
            alive &= ~(near[:, i] & alive[:, i, None])
    return alive


def _overlaps(a: NDArray[np.float64], b: NDArray[np.float64], overlap: Overlap) -> NDArray[np.float64]:
    """Overlap of each box of `a` (..., m, 4) with each of `b` (..., n, 4): (..., m, n), 0 to 1."""

    def shared(axis: int) -> Any:
        low = np.maximum(a[..., :, None, axis], b[..., None, :, axis])
        high = np.minimum(a[..., :, None, axis + 2], b[..., None, :, axis + 2])
        return np.maximum(high - low + 1, 0)

    both = shared(0) * shared(1)
    area_a, area_b = ((box[..., 2] - box[..., 0] + 1) * (box[..., 3] - box[..., 1] + 1) for box in (a, b))
    if overlap == "min":
        return both / np.minimum(area_a[..., :, None], area_b[..., None, :])
    return both / (area_a[..., :, None] + area_b[..., None, :] - both)
