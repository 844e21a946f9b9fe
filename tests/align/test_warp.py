"""Similarity transforms against scikit-image and against transforms that are known because we made them."""

from typing import Literal

import numpy as np
import pytest
import skimage.transform
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import Face
from stages.align.warp import TEMPLATE, centre_crop, cut, similarity, warp

FACE = Face(width=112, margin=0, quality=95)
PUBLISHED = (
    (30.2946, 51.6963),
    (65.5318, 51.5014),
    (48.0252, 71.7366),
    (33.5493, 92.3655),
    (62.7299, 92.2041),
)
"""x, y of eyes, nose and mouth corners in a face 96 pixels wide and 112 high, as SphereFace's release has them
(preprocess/code/face_align_demo.m); ArcFace's adds 8 to each x, for a face 112 wide."""


def test_the_template_is_the_published_one() -> None:
    np.testing.assert_allclose(TEMPLATE, np.add(PUBLISHED, (8, 0)), rtol=0, atol=1e-9)


def test_agrees_with_scikit_image_on_faces_that_fit_no_template_exactly() -> None:
    rng = np.random.default_rng(0)
    landmarks = 3 * TEMPLATE + rng.normal(0, 12, (50, 5, 2)) + rng.uniform(-500, 500, (50, 1, 2))
    expected = [skimage.transform.SimilarityTransform.from_estimate(face, TEMPLATE).params[:2] for face in landmarks]
    np.testing.assert_allclose(similarity(landmarks), expected, rtol=0, atol=1e-9)


@given(
    st.floats(0.1, 20),
    st.floats(-np.pi, np.pi),
    st.tuples(st.floats(-2000, 2000), st.floats(-2000, 2000)),
)
def test_recovers_any_rotation_scale_and_shift(scale: float, angle: float, shift: tuple[float, float]) -> None:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    to_photograph = np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]], [0, 0, 1]])
    landmarks = TEMPLATE @ to_photograph[:2, :2].T + to_photograph[:2, 2]
    matrix = similarity(landmarks[None])[0]
    # shifts of up to 2000 pixels, as seen at the template's scale, keep 10 digits
    np.testing.assert_allclose(matrix, np.linalg.inv(to_photograph)[:2], rtol=1e-9, atol=1e-8)


def test_never_mirrors_a_face() -> None:
    mirrored = TEMPLATE * (-1, 1)
    assert np.linalg.det(similarity(mirrored[None])[0, :, :2]) > 0


def test_landmarks_in_one_point_are_an_error() -> None:
    with pytest.raises(ValueError, match="coincide"):
        similarity(np.ones((1, 5, 2)))


def test_landmarks_on_the_template_leave_the_face_as_it_is() -> None:
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert (warp(face, similarity(TEMPLATE[None])[0], FACE) == face).all()


def test_a_shift_by_whole_pixels_moves_pixels_and_leaves_black() -> None:
    photograph = np.random.default_rng(0).integers(1, 256, (200, 150, 3), np.uint8)
    face = warp(photograph, similarity(TEMPLATE[None] + (60, 70))[0], FACE)
    assert (face[:, :90] == photograph[70:182, 60:150]).all()
    assert (face[:, 90:] == 0).all()


def test_what_lies_at_the_landmarks_comes_to_lie_at_the_template() -> None:
    # five blobs in a photograph, turned by 20 degrees and three times as large as the template
    turn = 3 * np.array([[np.cos(0.35), -np.sin(0.35)], [np.sin(0.35), np.cos(0.35)]])
    landmarks = TEMPLATE @ turn.T + (250, 40)
    y, x = np.mgrid[:500, :500]
    for landmark, wanted in zip(landmarks, TEMPLATE, strict=True):
        blob = 255 * np.exp(-((x - landmark[0]) ** 2 + (y - landmark[1]) ** 2) / (2 * 8**2))
        face = warp(np.repeat(blob[..., None], 3, axis=-1).astype(np.uint8), similarity(landmarks[None])[0], FACE)
        weight = face[..., 0] / face[..., 0].sum()
        centre = (weight * np.arange(112)).sum(), (weight.T * np.arange(112)).sum()
        np.testing.assert_allclose(centre, wanted, atol=0.05)


@pytest.mark.parametrize("scale", [1.6, 2, 2.4, 3.7, 11.3])
def test_a_large_face_is_reduced_without_moving_it_and_with_its_noise_averaged(scale: float) -> None:
    """Bilinear and the mean over an area both keep a slope as it is, to the pixel; of noise a mean leaves less."""
    angle = 0.35
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_photograph = np.column_stack([turn, (60 * scale, 13.3 * scale)])
    side = int(180 * scale)
    y, x = np.mgrid[:side, :side] / side
    slope = np.stack([40 + 170 * x, 210 - 170 * y, 40 + 80 * (x + y)], axis=-1)
    matrix = similarity((TEMPLATE @ turn.T + to_photograph[:, 2])[None])[0]
    v, u = np.mgrid[:112, :112]
    x, y = (to_photograph @ np.stack([u.ravel(), v.ravel(), np.ones(112**2)])).reshape(2, 112, 112)
    expected = np.stack([40 + 170 * x / side, 210 - 170 * y / side, 40 + 80 * (x + y) / side], axis=-1)
    inside = (np.minimum(x, y) > 0) & (np.maximum(x, y) < side - 1 - scale)
    assert inside.mean() > 0.9
    smooth = warp(slope.round().astype(np.uint8), matrix, FACE)
    assert np.abs(smooth - expected)[inside].max() <= 1.5
    rng = np.random.default_rng(0)
    noisy = warp((slope + rng.normal(0, 20, slope.shape)).clip(0, 255).astype(np.uint8), matrix, FACE)
    # what is left of it is less than twice that of a mean over all of the scale² pixels
    assert np.std((noisy - expected)[inside]) < 20 * min(1, 2 / scale)


@pytest.mark.parametrize("shape", [(250, 250), (1, 1), (3, 4000), (640, 480)])
def test_centre_crop_of_any_shape(shape: tuple[int, int]) -> None:
    assert centre_crop(np.full((*shape, 3), 7, np.uint8), FACE).shape == (112, 112, 3)
    with_margin = Face(width=96, margin=10, quality=95)
    assert centre_crop(np.full((*shape, 3), 7, np.uint8), with_margin).shape == (132, 116, 3)


@pytest.mark.parametrize("make", ["warp", "centre_crop"])
def test_the_papers_width_and_a_margin_are_the_middle_and_the_surroundings_of_the_same_face(make: str) -> None:
    y, x = np.mgrid[:250, :250]
    photograph = (127 + 60 * np.sin(x / 9) + 60 * np.cos(y / 7))[..., None].repeat(3, axis=2).astype(np.uint8)
    matrix = similarity(1.17 * TEMPLATE[None] + (60, 50))[0]

    def face(width: Literal[96, 112], margin: int) -> np.ndarray:
        size = Face(width=width, margin=margin, quality=95)
        pixels = warp(photograph, matrix, size) if make == "warp" else centre_crop(photograph, size)
        assert pixels.shape == (112 + 2 * margin, width + 2 * margin, 3)
        return pixels.astype(int)

    plain = face(112, 0)
    # the centre crop is cut on whole pixels of the photograph: half a pixel of this pattern is some grey levels
    tolerance = 1 if make == "warp" else 12
    assert np.abs(face(96, 0) - plain[:, 8:-8]).max() <= tolerance
    assert np.abs(face(112, 16)[16:-16, 16:-16] - plain).max() <= tolerance


@given(*[st.integers(-20, 40)] * 2, *[st.integers(1, 30)] * 2)
def test_a_cut_is_black_outside_the_image(left: int, top: int, width: int, height: int) -> None:
    image = np.random.default_rng(0).integers(1, 256, (20, 25, 3), np.uint8)
    padded = np.pad(image, ((60, 60), (60, 60), (0, 0)))
    expected = padded[60 + top : 60 + top + height, 60 + left : 60 + left + width]
    assert (cut(image, left, top, left + width, top + height) == expected).all()


@pytest.mark.parametrize(
    ("height", "width", "centre"), [(250, 250, (125, 117.5)), (400, 250, (125, 188)), (250, 400, (200, 117.5))]
)
def test_centre_crop_holds_what_the_template_covers_of_an_lfw_photograph(
    height: int, width: int, centre: tuple[float, float]
) -> None:
    """53 % of the shorter side, around the middle across and 47 % down, cut on whole pixels of the photograph."""
    y, x = np.mgrid[:height, :width] + 0.5
    # a slope tells which column and row each pixel comes from
    slopes = np.stack([255 * x / width, 255 * y / height, np.zeros_like(x)], axis=-1)
    crop = centre_crop(slopes.astype(np.uint8), FACE).astype(float) + 0.5
    for channel, (length, middle) in enumerate(zip((width, height), centre, strict=True)):
        seen = crop.mean(axis=channel)[:, channel] * length / 255
        assert seen.mean() == pytest.approx(middle, abs=1)
        assert (seen[56:].mean() - seen[:56].mean()) / 56 == pytest.approx(0.53 * 250 / 112, rel=0.01)
