"""Decoding against the pixels that were encoded, by OpenCV or Pillow."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.align.decode import UnreadableImage, decode, decode_reduced


def picture() -> NDArray[np.uint8]:
    """(48, 64, 3), smooth, so that JPEG changes it little, and different in every corner and channel."""
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x, 5 * y, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)


RGB = picture()
GREY = RGB[..., 0]


def encoded(pixels: NDArray[Any], file_format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


JPEG = encoded(RGB, "JPEG", quality=95)
NOISE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
LARGE_JPEG = encoded(NOISE, "JPEG", quality=95)
"""Nearly all of it is the picture, so that wherever it is cut, that is what is cut."""


def difference(content: bytes, expected: NDArray[Any]) -> float:
    decoded = decode(content)
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape
    return float(np.abs(decoded.astype(int) - expected).mean())


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(file_format: str) -> None:
    assert difference(encoded(RGB, file_format), RGB) == 0


@pytest.mark.parametrize("content", [JPEG, encoded(RGB, "JPEG", quality=95, progressive=True)])
def test_jpeg_is_what_opencv_reads(content: bytes) -> None:
    bgr = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert bgr is not None
    assert difference(content, bgr[..., ::-1]) < 1
    assert difference(content, RGB) < 4


def test_grey_becomes_three_equal_channels() -> None:
    expected = np.repeat(GREY[..., None], 3, axis=-1)
    assert difference(encoded(GREY, "PNG", "L"), expected) == 0
    assert difference(encoded(GREY, "JPEG", "L", quality=95), expected) < 2


def test_cmyk_becomes_rgb_and_not_its_negative() -> None:
    assert difference(encoded(RGB, "JPEG", "CMYK", quality=95), RGB) < 4
    assert difference(encoded(RGB, "TIFF", "CMYK"), RGB) == 0


def test_a_palette_becomes_its_colours() -> None:
    few = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30], [255, 255, 255]], np.uint8)
    pixels = few[np.arange(48 * 64).reshape(48, 64) % 4]
    paletted = Image.fromarray(pixels).quantize(4)
    for options in ({}, {"transparency": 0}):
        buffer = io.BytesIO()
        paletted.save(buffer, "PNG", **options)
        assert difference(buffer.getvalue(), pixels) == 0


def test_transparency_is_dropped() -> None:
    transparent = np.dstack([RGB, np.full(GREY.shape, 100, np.uint8)])
    assert difference(encoded(transparent, "PNG", "RGBA"), RGB) == 0


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    for name in (".png", ".tiff"):
        content = cv2.imencode(name, GREY.astype(np.uint16) * 257)[1].tobytes()
        assert difference(content, np.repeat(GREY[..., None], 3, axis=-1)) == 0
    colour = cv2.imencode(".png", RGB[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert difference(colour, RGB) == 0


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [  # of the stored picture, by EXIF 2.3, section 4.6.4
        (1, RGB),
        (2, RGB[:, ::-1]),
        (3, RGB[::-1, ::-1]),
        (4, RGB[::-1]),
        (5, RGB.transpose(1, 0, 2)),
        (6, np.rot90(RGB, -1)),
        (7, RGB[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(RGB, 1)),
    ],
)
def test_exif_rotation_is_undone(orientation: int, upright: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert difference(encoded(RGB, "JPEG", quality=95, exif=exif), upright) < 4
    assert difference(encoded(RGB, "PNG", exif=exif), upright) == 0
    # of a maker who is a number, and of a width below zero: a camera's fault, and none of the picture
    odd = struct.pack("<HHIf", 0x010F, 11, 1, 1.5), struct.pack("<HHIi", 0x0100, 9, 1, -5)
    tags = (*odd, struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0))
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(sorted(tags)) + bytes(4)
    assert difference(encoded(RGB, "JPEG", quality=95, exif=block), upright) < 4


def test_a_small_file_may_not_take_hours() -> None:
    content = encoded(RGB, "JPEG", quality=95, progressive=True)
    assert content.count(b"\xff\xda") == 10
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert difference(content[:-2] + 3 * scan + content[-2:], RGB) < 4
    with pytest.raises(UnreadableImage, match="too large: 1010 scans"):
        decode(content[:-2] + 1000 * scan + content[-2:])
    assert difference(content + 1000 * scan, RGB) < 4  # behind its end: of a film, say


def test_what_follows_the_end_of_a_jpeg_does_no_harm() -> None:
    assert (decode(JPEG + bytes(100)) == decode(JPEG)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "none of JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG, PNG"),
        (JPEG[:200], "broken image"),
        (LARGE_JPEG[: len(LARGE_JPEG) // 2], "truncated"),
        (LARGE_JPEG[: len(LARGE_JPEG) * 99 // 100], "truncated"),
        (encoded(NOISE, "JPEG", progressive=True)[:-500], "truncated"),
        (encoded(NOISE, "PNG")[:-500], "truncated"),
        (encoded(NOISE, "WEBP", lossless=True)[:-500], "broken image"),
        (encoded(np.zeros((9_500, 9_500), np.uint8), "PNG", "1"), "too large"),
        (encoded(np.zeros((1, 32_767), np.uint8), "PNG", "1"), "too large: 32767×1 pixels"),
        (encoded(GREY / np.float32(255), "TIFF", "F"), "range is unknown"),
        (encoded(GREY.astype(np.int32), "TIFF", "I"), "range is unknown"),
    ],
)
def test_unreadable_images_say_why(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        decode(content)


def test_random_damage_is_never_anything_but_unreadable() -> None:
    rng = np.random.default_rng(0)
    whole = [LARGE_JPEG, encoded(RGB, "PNG"), encoded(RGB, "GIF"), encoded(RGB, "WEBP"), encoded(RGB, "BMP")]
    unreadable = 0
    for number in range(500):
        damaged = bytearray(whole[number % len(whole)])
        for place in rng.integers(0, len(damaged), rng.integers(1, 20)):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode(bytes(damaged[: rng.integers(1, 2 * len(damaged))])).shape[2] == 3
        except UnreadableImage:
            unreadable += 1
    assert unreadable > 100


def pillow(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"restart_marker_rows": 1}])
def test_the_fast_way_gives_pillows_pixels(mode: str, options: dict[str, Any]) -> None:
    content = encoded(NOISE, "JPEG", mode, quality=80, **options)
    assert decode_reduced(content, lambda height, width: 1)[1] == 1
    assert (decode(content) == pillow(content)).all()


def test_what_the_fast_way_complains_of_is_left_to_pillow() -> None:
    """Bytes between two segments, which cameras leave there, do no harm."""
    content = JPEG[:2] + b"\xff\xfe\x00\x04ab" + JPEG[2:]  # a comment
    assert (decode(content) == pillow(JPEG)).all()
    assert (decode(JPEG + b"behind the end") == pillow(JPEG)).all()


@pytest.mark.parametrize("by", [1, 2, 4, 8])
def test_a_reduced_jpeg_is_the_mean_of_the_pixels_it_covers(by: int) -> None:
    y, x = np.mgrid[:400, :600]
    smooth = np.stack([x / 3, y / 2, 255 - x / 3], axis=-1).astype(np.uint8)
    seen: list[tuple[int, int]] = []

    def reduction(height: int, width: int) -> int:
        seen.append((height, width))
        return by

    pixels, reduced = decode_reduced(encoded(smooth, "JPEG", quality=95), reduction)
    assert seen == [(400, 600)]
    assert reduced == by
    means = smooth.reshape(400 // by, by, 600 // by, by, 3).mean(axis=(1, 3))
    assert pixels.shape == means.shape
    assert np.abs(pixels - means).max() < 5


def test_turned_and_other_files_are_never_reduced() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (encoded(RGB, "PNG"), encoded(RGB, "JPEG", exif=exif)):
        assert decode_reduced(content, lambda height, width: 8)[1] == 1
    exif[0x0112] = 1
    assert decode_reduced(encoded(RGB, "JPEG", exif=exif), lambda height, width: 8)[1] == 8
