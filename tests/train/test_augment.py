import numpy as np
import pytest
import torch

from stages.train.augment import ImageAugmenter, crop, crop_and_flip, draw, flip_first
from tests.samples import augment, face_like

ROWS, EPOCHS = np.arange(400), np.zeros(400, np.int64)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return np.stack([face_like(1, photo) for photo in range(400)])


def seen(faces: np.ndarray, width: int = 112, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    """The rows in the order of the batch, and what the network sees of them."""
    out = np.empty((len(faces), 112, width, 3), np.uint8)
    order, draws = draw(augment(**changes), 1, EPOCHS[: len(faces)], ROWS[: len(faces)], faces.shape[1:3], width)
    for i, row in enumerate(order.tolist()):
        crop(faces[row], draws, i, out[i])
    flip_first(out, draws.flips)
    return order, out


def test_flips_are_exact_and_as_often_as_asked(faces: np.ndarray) -> None:
    for share, least, most in (
        (0.5, 150, 250),
        (0.0, 0, 0),
        (1.0, 400, 400),
    ):  # five standard deviations of a fair coin
        order, out = seen(faces, horizontal_flip=share)
        assert sorted(order) == list(range(400))
        flipped = (out == faces[order][:, :, ::-1]).all(axis=(1, 2, 3))
        kept = (out == faces[order]).all(axis=(1, 2, 3))
        assert (flipped != kept).all()
        assert least <= flipped.sum() <= most


def test_shifts_are_even_over_what_is_allowed() -> None:
    _, draws = draw(augment(shift=3), 1, EPOCHS, ROWS, (128, 128), 112)
    for corner in (draws.top, draws.left):
        values, counts = np.unique(corner, return_counts=True)
        assert values.tolist() == list(range(5, 12))  # 8 is the middle
        assert counts.min() > 25  # of 57 on average


@pytest.mark.parametrize(("width", "size"), [(112, (120, 124)), (96, (120, 124)), (112, (112, 112))])
def test_a_device_sees_what_the_host_sees(width: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    faces = rng.integers(0, 256, (50, *size, 3), dtype=np.uint8)
    changes = {"shift": (size[0] - 112) // 2, "horizontal_flip": 0.5}
    order, out = seen(faces, width, **changes)
    _, draws = draw(augment(**changes), 1, EPOCHS[:50], ROWS[:50], size, width)
    assert (crop_and_flip(torch.from_numpy(faces[order]), draws, width).numpy() == out).all()
    for i, (row, top, left) in enumerate(zip(order, draws.top, draws.left, strict=True)):
        expected = faces[row, top : top + 112, left : left + width]
        assert (out[i] == (expected[:, ::-1] if i < draws.flips else expected)).all()


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
