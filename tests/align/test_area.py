"""Resizing by area, against the definition in float64 and against OpenCV."""

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.align.area import crops

pytestmark = pytest.mark.usefixtures("both")
each_engine = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same for all examples


def shares(length: int, pixels: int) -> NDArray[np.float64]:
    """(pixels, length): how much of each of `pixels` new pixels each old one fills."""
    edges = np.arange(pixels + 1) * length / pixels
    old = np.arange(length)
    shared = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return np.clip(shared, 0, None) * pixels / length


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def one(
    image: NDArray[np.uint8], box: tuple[int, ...], rows: int, columns: int, *, rounded: bool
) -> NDArray[np.float64]:
    """What a box becomes, in grey levels."""
    made = crops([image], np.zeros(1, np.intp), np.array([box]), rows, columns, rounded=rounded)
    assert made.shape == (1, rows, columns, 3)
    assert made.dtype == np.float32
    return made[0].astype(np.float64) * 128 + 127.5


@each_engine
@given(st.integers(1, 90), st.integers(1, 90), st.data())
def test_a_pixel_is_the_mean_of_its_area(height: int, width: int, data: st.DataObject) -> None:
    image = noise(height, width, data.draw(st.integers(0, 9)))
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    means = np.einsum("ry,yxc,kx->rkc", shares(height, rows), image.astype(float), shares(width, columns))
    box = (0, 0, width, height)
    np.testing.assert_allclose(one(image, box, rows, columns, rounded=False), means, atol=2e-3)
    whole = one(image, box, rows, columns, rounded=True)
    assert (whole == np.rint(whole)).all()
    np.testing.assert_allclose(whole, means, atol=0.51)


@each_engine
@given(st.integers(1, 60), st.integers(-40, 40), st.integers(-40, 40), st.sampled_from([24, 48]), st.integers(1, 50))
def test_a_square_may_grow_and_is_black_beyond_the_photograph(
    length: int, left: int, top: int, side: int, size: int
) -> None:
    image = noise(size, 31)
    wide = np.pad(image, ((100, 100), (100, 100), (0, 0)))
    inside = wide[100 + top : 100 + top + length, 100 + left : 100 + left + length].astype(float)
    means = np.einsum("ry,yxc,kx->rkc", shares(length, side), inside, shares(length, side))
    made = one(image, (left, top, left + length, top + length), side, side, rounded=False)
    np.testing.assert_allclose(made, means, atol=2e-3)


def test_opencv_gives_the_same_at_the_scales_of_a_pyramid() -> None:
    image = cv2.GaussianBlur(noise(250, 250), (0, 0), 3).astype(np.uint8, copy=False)
    for side in (250, 150, 107, 75, 54, 38, 27, 19, 14):
        made = one(image, (0, 0, 250, 250), side, side, rounded=True)
        off = np.abs(made - cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
        assert off.max() <= 1
        assert (off > 0).mean() < 0.02  # where the mean lies just between two grey levels


def test_opencv_gives_the_same_of_squares() -> None:
    image = noise(80, 80)
    for side in (11, 24, 31, 47, 48, 80):
        expected = cv2.resize(image[:side, :side].astype(np.float32), (48, 48), interpolation=cv2.INTER_AREA)
        np.testing.assert_allclose(one(image, (0, 0, side, side), 48, 48, rounded=False), expected, atol=2e-3)


def test_boxes_are_of_their_photographs_whatever_is_beside_them() -> None:
    images = [noise(40, 50, 1), np.asfortranarray(noise(70, 20, 2)), noise(33, 33, 3)]
    owners = np.array([2, 0, 0, 1])
    boxes = np.array([(0, 0, 30, 30), (5, 5, 20, 20), (-3, 9, 40, 52), (1, 2, 19, 20)])
    together = crops(images, owners, boxes, 24, 24, rounded=False)
    for made, owner, box in zip(together, owners, boxes, strict=True):
        alone = crops([images[owner]], np.zeros(1, np.intp), box[None], 24, 24, rounded=False)[0]
        assert made.tobytes() == alone.tobytes()


@pytest.mark.parametrize("box", [(5, 0, 5, 10), (0, 7, 10, 3)])
def test_an_empty_box_is_refused(box: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="empty"):
        one(noise(20, 20), box, 24, 24, rounded=False)


@pytest.mark.parametrize("image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))])
def test_what_is_no_photograph_is_refused(image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        one(image, (0, 0, 5, 5), 24, 24, rounded=False)
