import colorsys
import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from stages.train.augment import ImageAugmenter, crop, crop_and_flip, draw
from stages.train.faces import mirror
from tests.samples import augment, face_like

ROWS, LAPS = np.arange(400)[None], np.zeros((1, 400), np.int64)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return np.stack([face_like(1, photo) for photo in range(400)])


def seen(faces: np.ndarray, width: int = 112, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    """The rows in the order of the batch, and what the network sees of them."""
    out = np.empty((len(faces), 112, width, 3), np.uint8)
    rows, laps = ROWS[:, : len(faces)], LAPS[:, : len(faces)]
    (order,), (draws,) = draw(augment(**changes), 1, laps, rows, faces.shape[1:3], width)
    for i, row in enumerate(order.tolist()):
        crop(faces[row], draws, i, out[i])
    if draws.flips:
        mirror(out[: draws.flips])
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


def test_batches_drawn_together_are_those_drawn_one_by_one() -> None:
    params, rows, laps = augment(shift=2, horizontal_flip=0.5, blur=0.5), ROWS.reshape(8, 50), LAPS.reshape(8, 50)
    order, draws = draw(params, 1, laps, rows, (120, 120), 112)
    for i in range(8):
        (own_order,), (own,) = draw(params, 1, laps[i : i + 1], rows[i : i + 1], (120, 120), 112)
        assert (order[i] == own_order).all()
        assert draws[i] == own


def test_each_image_has_a_seed_of_its_own_in_each_lap() -> None:
    """Of 2^32; two of 1,200 are alike with a probability of 1 in 6,000."""
    rows, laps = np.repeat(ROWS, 3, axis=0), np.arange(3)[:, None] + LAPS
    _, draws = draw(augment(blur=0.1), 1, laps, rows, (112, 112), 112)
    assert len({seed for each in draws for seed in each.seed}) == 1200


def test_reversed_bytes_are_a_mirror_image_of_other_colours(faces: np.ndarray) -> None:
    swapped = np.ascontiguousarray(faces[:5, ..., ::-1])
    mirror(swapped, swapped=True)
    assert (swapped == faces[:5, :, ::-1]).all()


def test_shifts_are_even_over_what_is_allowed() -> None:
    _, (draws,) = draw(augment(shift=3), 1, LAPS, ROWS, (128, 128), 112)
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
    _, (draws,) = draw(augment(**changes), 1, LAPS[:, :50], ROWS[:, :50], size, width)
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


SEEDS = [7919 * number for number in range(150)]


def changed_by(name: str, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All images with one change; what is drawn for each follows from `SEEDS` and is the same for any images."""
    out = images.copy()
    ImageAugmenter(augment(**{name: 1.0}), images.shape[2])(out, SEEDS[: len(images)])
    return out


def enlarged(part: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Linear interpolation between the middles of pixels; the outermost stand for what is beyond them."""
    for axis, (old, new) in enumerate(zip(part.shape[:2], size, strict=True)):
        at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
        below = np.minimum(at.astype(int), old - 2)
        share = (at - below).reshape([-1 if axis == own else 1 for own in range(3)])
        part = part.take(below, axis) * (1 - share) + part.take(below + 1, axis) * share
    return part


@pytest.mark.parametrize("width", [112, 96])
def test_crop_is_a_part_of_the_image_enlarged(faces: np.ndarray, width: int) -> None:
    """Which part, a ramp tells; it has 60 to 100 % of the area, and is at most a tenth wider or narrower than all."""
    ramp = np.zeros((40, 112, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 2 * np.arange(width), 2 * np.arange(112)[:, None]
    told = changed_by("crop", ramp).astype(float)
    out = changed_by("crop", faces[:40, :, :width])
    shares, corners = [], set()
    for i in range(40):
        place = []
        for values, size in ((told[i, 56, :, 0], width), (told[i, :, 48, 1], 112)):
            inside = np.arange(4, size - 4)
            slope, start = np.polyfit(inside + 0.5, values[4:-4] / 2 + 0.5, 1)
            place += [round(start), round(size * slope)]
        left, wide, top, high = place
        shares.append(wide * high / (112 * width))
        corners.add((left, top))
        assert 0.9 - 0.015 <= wide / high * 112 / width <= 1.1 + 0.015  # sides are whole pixels
        assert 0 <= left <= width - wide
        assert 0 <= top <= 112 - high
        expected = enlarged(faces[i, top : top + high, left : left + wide].astype(float), (112, width))
        assert np.abs(out[i] - expected).max() <= 1
    assert 0.59 <= min(shares) < 0.67
    assert 0.93 < max(shares) <= 1
    assert len(corners) > 30


def reduced(size: int, scale: float) -> NDArray[np.float64]:
    """By which a line of so many pixels is multiplied: means over 1 / scale of them, the last over what is left; as
    cv2.resize has it, where it is given a factor and not a size.
    """
    edges = np.minimum(np.arange(round(size * scale) + 1) / scale, size)[:, None]
    parts = (np.minimum(edges[1:], np.arange(size) + 1) - np.maximum(edges[:-1], np.arange(size))).clip(0)
    return parts / parts.sum(axis=1, keepdims=True)


def test_low_resolution_is_means_enlarged(faces: np.ndarray) -> None:
    """At which scale, a line of black and white tells."""
    line = np.random.default_rng(0).choice([0, 255], 112)
    probe = np.broadcast_to(line[:, None].astype(np.uint8), (len(SEEDS), 112, 112, 3))
    told, out = changed_by("low_resolution", probe)[:, 50, :, 0].astype(float), changed_by("low_resolution", faces[:40])
    scales, both = [], []
    for count in range(11, 79):
        again = enlarged(np.eye(count)[..., None], (112, count))[..., 0]
        some = np.linspace(count - 0.499, count + 0.499, 41) / 112
        scales += some.tolist()
        both += [again @ reduced(112, scale) for scale in some]
    lines = np.stack(both) @ line
    found = [int(((lines - row) ** 2).sum(axis=1).argmin()) for row in told]
    for face, seen_of, which in zip(faces[:40], out, found, strict=False):
        expected = np.einsum("yi,xj,ijc->yxc", both[which], both[which], face.astype(float), optimize=True)
        assert np.abs(seen_of - expected).max() <= 2
    assert 0.149 <= min(scales[which] for which in found) < 0.18
    assert 0.57 < max(scales[which] for which in found) <= 0.601


def test_colour_changes_by_as_much_as_is_said() -> None:
    """Brightness multiplies a grey, contrast what two greys are apart, saturation what the channels of a colour are.
    None of them changes its hue, and the hue changes none of them.
    """
    grey, two, brown = (np.full((len(SEEDS), 112, 112, 3), value, np.uint8) for value in (120, 50, (150, 90, 50)))
    two[:, 56:] = 160
    brightness = changed_by("colour", grey)[:, 0, 0, 0] / 120
    greys = changed_by("colour", two)[:, :, 0, 0].astype(float)
    contrast = (greys[:, -1] - greys[:, 0]) / 110 / brightness
    browns = changed_by("colour", brown)[:, 0, 0].astype(float)
    saturation = (browns.max(axis=1) - browns.min(axis=1)) / 100 / brightness / contrast
    for factors, within in ((brightness, 0.02), (contrast, 0.04), (saturation, 0.06)):  # four changes, each rounded
        assert 0.7 - within < factors.min() < 0.75
        assert 1.25 < factors.max() < 1.3 + within
    hues = np.array([colorsys.rgb_to_hsv(*each)[0] for each in browns]) - colorsys.rgb_to_hsv(150, 90, 50)[0]
    assert -0.02 - 0.01 < hues.min() < -0.016  # OpenCV has hue in 180 steps
    assert 0.013 < hues.max() < 0.02 + 0.01


def test_blur_is_a_gaussian(faces: np.ndarray) -> None:
    """Of which sigma, an edge tells; scipy's, with the image mirrored about its outermost pixels, is the same."""
    edge = np.zeros((len(SEEDS), 112, 112, 3), np.uint8)
    edge[:, :, 56:] = 255
    told, out = changed_by("blur", edge), changed_by("blur", faces[:40])
    sigmas, line = np.linspace(0.4, 2.5, 421), edge[0, 0, :, 0].astype(float)
    profiles = np.stack([gaussian_filter1d(line, sigma, mode="mirror") for sigma in sigmas])
    found = [float(sigmas[((profiles - row) ** 2).sum(axis=1).argmin()]) for row in told[:, 50, :, 0]]
    for face, seen_of, sigma in zip(faces[:40], out, found, strict=False):
        expected = gaussian_filter(face.astype(float), (sigma, sigma, 0), mode="mirror")
        assert np.abs(seen_of - expected).max() <= 2
    assert 0.48 <= min(found) < 0.6
    assert 1.9 < max(found) <= 2.02


def compressed(face: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encoded and decoded by Pillow."""
    file = io.BytesIO()
    Image.fromarray(face).save(file, "jpeg", quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened)


def test_jpeg_is_a_compression_at_one_quality(faces: np.ndarray) -> None:
    found = []
    for face, out in zip(faces[:40], changed_by("jpeg", faces[:40]), strict=True):
        qualities = [each for each in range(10, 101) if (compressed(face, each) == out).all()]
        assert len(qualities) == 1
        found += qualities
    assert 20 <= min(found) < 28
    assert 82 < max(found) <= 90
    assert len(set(found)) > 20
