import numpy as np
import pytest
import torch

from stages.train.augment import Draws, ImageAugmenter, draw, place, place_all
from tests.samples import augment, face_like

ROWS, EPOCHS = np.arange(400), np.zeros(400, np.int64)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return np.stack([face_like(1, photo) for photo in range(400)])


def seen(faces: np.ndarray, width: int = 112, **changes: object) -> np.ndarray:
    out = np.empty((len(faces), 112, width, 3), np.uint8)
    placed(faces, draw(augment(**changes), 1, EPOCHS, ROWS, faces.shape[1:3], width), out)
    return out


def placed(faces: np.ndarray, draws: Draws, out: np.ndarray) -> None:
    for i, face in enumerate(faces):
        place(face, draws, i, out[i])


def test_flips_are_exact_and_as_often_as_asked(faces: np.ndarray) -> None:
    for share, least, most in (
        (0.5, 150, 250),
        (0.0, 0, 0),
        (1.0, 400, 400),
    ):  # five standard deviations of a fair coin
        out = seen(faces, horizontal_flip=share)
        flipped = (out == faces[:, :, ::-1]).all(axis=(1, 2, 3))
        kept = (out == faces).all(axis=(1, 2, 3))
        assert (flipped != kept).all()
        assert least <= flipped.sum() <= most


def test_shifts_are_even_over_what_is_allowed() -> None:
    draws = draw(augment(shift=3), 1, EPOCHS, ROWS, (128, 128), 112)
    for corner in (draws.top, draws.left):
        values, counts = np.unique(corner, return_counts=True)
        assert values.tolist() == list(range(5, 12))  # 8 is the middle
        assert counts.min() > 25  # of 57 on average


@pytest.mark.parametrize(("width", "size"), [(112, (120, 124)), (96, (120, 124)), (112, (112, 112))])
def test_a_device_sees_what_the_host_sees(width: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (50, *size, 3), dtype=np.uint8)
    shift = (size[0] - 112) // 2
    draws = draw(augment(shift=shift, horizontal_flip=0.5), 1, EPOCHS[:50], ROWS[:50], size, width)
    out = np.empty((50, 112, width, 3), np.uint8)
    placed(faces, draws, out)
    assert (place_all(torch.from_numpy(faces), draws, width).numpy() == out).all()
    for face, pixels, top, left, flip in zip(faces, out, draws.top, draws.left, draws.flip, strict=True):
        expected = face[top : top + 112, left : left + width]
        assert (pixels == (expected[:, ::-1] if flip else expected)).all()


@pytest.mark.parametrize("name", ["crop", "low_resolution", "colour", "blur", "jpeg"])
def test_each_change_by_itself(faces: np.ndarray, name: str) -> None:
    seeds = [7919 * number for number in range(60)]
    out = faces[:60].copy()
    ImageAugmenter(augment(**{name: 0.5}), 112)(out, seeds)
    changed = (out != faces[:60]).any(axis=(1, 2, 3))
    assert 10 <= changed.sum() <= 50  # of 60 at one half: five standard deviations
    again = faces[:60].copy()
    ImageAugmenter(augment(**{name: 0.5}), 112)(again[::-1], seeds[::-1])  # in another order
    assert (again == out).all()
    other = faces[:60].copy()
    ImageAugmenter(augment(**{name: 0.5}), 112)(other, [seed + 1 for seed in seeds])
    assert (other != out).any()
    if name == "low_resolution":
        detail = np.abs(np.diff(out[changed].astype(float), axis=2)).mean()
        assert detail < 0.7 * np.abs(np.diff(faces[:60][changed].astype(float), axis=2)).mean()
    if name == "colour":
        assert np.abs(out[changed].mean(axis=(1, 2)) - faces[:60][changed].mean(axis=(1, 2))).max() > 10
