"""Shrinking by area, against the definition in float64 and against OpenCV."""

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.align.area import shrunk


def shares(length: int, pixels: int) -> NDArray[np.float64]:
    """(pixels, length): how much of each of `pixels` new pixels each old one fills."""
    edges = np.arange(pixels + 1) * length / pixels
    old = np.arange(length)
    shared = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return np.clip(shared, 0, None) * pixels / length


@given(st.integers(1, 90), st.integers(1, 90), st.data())
def test_a_pixel_is_the_mean_of_its_area(height: int, width: int, data: st.DataObject) -> None:
    image = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 256, (height, width, 3), np.uint8)
    sizes = data.draw(st.lists(st.tuples(st.integers(1, height), st.integers(1, width)), max_size=3))
    for (rows, columns), small in zip(sizes, shrunk(image, sizes), strict=True):
        means = np.einsum("ry,yxc,kx->rkc", shares(height, rows), image.astype(float), shares(width, columns))
        assert small.shape == (rows, columns, 3)
        assert np.abs(small - means).max() < 0.51  # rounded to whole grey levels


def test_opencv_gives_the_same_at_the_scales_of_a_pyramid() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (250, 250, 3), np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3).astype(np.uint8, copy=False)
    sizes = [(side, side) for side in (250, 150, 107, 75, 54, 38, 27, 19, 14)]
    for size, small in zip(sizes, shrunk(image, sizes), strict=True):
        off = np.abs(small.astype(int) - cv2.resize(image, size, interpolation=cv2.INTER_AREA))
        assert off.max() <= 1
        assert (off > 0).mean() < 0.02  # where the mean lies just between two grey levels
