"""Non-maximum suppression against counting the pixels of each box, one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.align import nms as module
from stages.align.nms import Overlap, suppress

box = st.tuples(st.integers(-5, 12), st.integers(-5, 12), st.integers(0, 9), st.integers(0, 9))


def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    left, top, width, height = box
    return {(x, y) for x in range(left, left + width + 1) for y in range(top, top + height + 1)}


def by_counting(
    groups: list[int], boxes: list[tuple[int, int, int, int]], scores: list[float], threshold: float, overlap: str
) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-groups[i], scores[i], i), reverse=True):
        a = pixels(boxes[i])
        others = [pixels(boxes[k]) for k in kept if groups[k] == groups[i]]
        sizes = [len(a | b) if overlap == "union" else min(len(a), len(b)) for b in others]
        if all(len(a & b) / size <= threshold for b, size in zip(others, sizes, strict=True)):
            kept.append(i)
    return kept


@given(
    st.lists(
        st.tuples(box, st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0]), st.sampled_from([0, 0, 0, 7, 9])), max_size=40
    ),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.sampled_from(["union", "min"]),
    st.sampled_from([1, 3, 256]),
    st.sampled_from([0, 4, 64]),
    st.sampled_from([1, 256]),
)
def test_keeps_what_counting_pixels_keeps(
    scored: list[tuple[tuple[int, int, int, int], float, int]],
    threshold: float,
    overlap: Overlap,
    block: int,
    small: int,
    together: int,
) -> None:
    """With few and many boxes a group, whichever way the groups of that size go."""
    boxes, scores, groups = [b for b, _, _ in scored], [score for _, score, _ in scored], [g for _, _, g in scored]
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], float).reshape(-1, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_SMALL", small)
        patch.setattr(module, "_GROUPS", together)
        kept = suppress(np.array(groups, np.intp), corners, np.array(scores, np.float32), threshold, overlap)
    assert kept.tolist() == by_counting(groups, boxes, scores, threshold, overlap)
