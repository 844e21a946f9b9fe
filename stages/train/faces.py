"""From an aligned face's JPEG to the pixels that a network sees."""

from collections.abc import Callable, Iterable

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pipeline.errors import InputError

HEIGHT = 112
"""Of what a network sees, pixels."""


_ODD = 64
"""Bytes: what libjpeg-turbo and processors call aligned divides this."""
_MIRRORED = 8
"""Faces that are mirrored at once, so soon after they are decoded that they still lie in the nearest caches."""


class FaceError(InputError):
    """An aligned face that the network cannot take."""


def decode_face(jpeg: bytes, width: int) -> NDArray[np.uint8]:
    """An aligned face as a network sees it, 112×width×3 uint8 RGB: its middle, where alignment kept more.

    Raises:
        FaceError: the bytes are no JPEG, or one that is too small.
    """
    try:
        height, full_width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        pixels = unaligned((int(height), int(full_width), 3))
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=pixels)
    except ValueError as error:
        raise FaceError(f"{len(jpeg)} bytes that are no JPEG stand for an aligned face: {error}") from error
    return middle(pixels, width)


def middle(pixels: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """What a network sees of an aligned face, H×W×3: the 112×width in its middle.

    Raises:
        FaceError: it is smaller.
    """
    top, left = (pixels.shape[0] - HEIGHT) // 2, (pixels.shape[1] - width) // 2
    if min(top, left) < 0:
        raise FaceError(
            f"an aligned face of {pixels.shape[0]}×{pixels.shape[1]} pixels is too small for a network of "
            f"{HEIGHT}×{width}: train.backbone.width must not be more than align.face.width"
        )
    return pixels[top : top + HEIGHT, left : left + width]


def unaligned(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An uninitialised array to decode into, off by a byte from where arrays begin.

    libjpeg-turbo writes rows that begin at a multiple of 32 bytes past the processor's caches, so that whoever reads
    them next waits for memory; and so few bytes at a time are slow to write: aligned, a face takes half as long again.
    """
    size = int(np.prod(shape))
    memory = np.empty(size + 2 * _ODD, np.uint8)
    start = -memory.ctypes.data % _ODD + 1
    return memory[start : start + size].reshape(shape)


def decode_all(
    jpegs: Iterable[bytes | memoryview], pixels: NDArray[np.uint8], where: Callable[[int], str], mirrored: int = 0
) -> None:
    """Decode JPEGs into arrays of exactly their size, (n, H, W, 3) uint8 RGB, contiguous; mirror the first so many.

    Raises:
        FaceError: the bytes are no JPEG, or one of another size; the message begins with `where(i)` of the i-th.
    """
    decode, shape = simplejpeg.decode_jpeg, pixels.shape[1:]
    first, last = 0, min(_MIRRORED, mirrored)
    for i, (jpeg, place) in enumerate(zip(jpegs, pixels, strict=True), 1):
        try:
            decoded = decode(jpeg, "BGR" if i <= mirrored else "RGB", buffer=place)
        except ValueError as error:
            raise FaceError(
                f"{where(i - 1)}: {len(jpeg)} bytes that are no JPEG of {shape[0]}×{shape[1]}: {error}"
            ) from error
        if decoded.shape != shape:
            found = decoded.shape
            raise FaceError(f"{where(i - 1)}: a face of {found[0]}×{found[1]} pixels, not {shape[0]}×{shape[1]}")
        if i == last:
            mirror(pixels[first:last], swapped=True)
            first, last = last, min(last + _MIRRORED, mirrored)


def mirror(images: NDArray[np.uint8], *, swapped: bool = False) -> None:
    """Mirror images (n, height, width, 3), contiguous, in place: they lie one above the other as one.

    Args:
        swapped: they are BGR and become RGB. Reversing rows of bytes does both, in less than half of the time that
            reversing pixels takes.
    """
    width = images.shape[2]
    tall = images.reshape(-1, 3 * width) if swapped else images.reshape(-1, width, 3)
    cv2.flip(tall, 1, dst=tall)
