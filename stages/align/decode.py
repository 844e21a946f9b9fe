"""From a photograph's bytes to pixels, or a reason why there are none."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What is tried. Pillow knows more, which photographs do not come in and whose readers are less well worn."""
_MAX_SIDE = 32_766
"""The longest side that OpenCV can warp, pixels."""
_MAX_SCANS = 500
"""Of a JPEG; progressive ones have ten. Each takes a pass over all of its pixels, and a hundred bytes may be one."""
_SCAN = b"\xff\xda"
"""What a scan of a JPEG begins with, and nothing in it is."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""What any part of a JPEG begins with, restarts within a scan excepted."""
_ORIENTATION = 0x0112
"""EXIF's tag."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation (EXIF 2.32, 4.6.4 A)."""
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow raises on broken files."""


class UnreadableImage(ValueError):
    """The bytes are no photograph that can be used; the message says why."""


def decode(content: bytes) -> NDArray[np.uint8]:
    """Decode an image file to (height, width, 3) uint8 RGB, upright as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is dropped; of several frames the first counts.
    JPEG goes by libjpeg-turbo itself where that takes it without a complaint, everything else by Pillow, which gives
    the same pixels in twice the time. (Not by OpenCV, which fills the missing part of a truncated JPEG with grey.)

    Raises:
        UnreadableImage: empty, not an image, truncated or otherwise broken, or too large: above 89 million pixels
            (Pillow's limit against decompression bombs), 32,766 on a side, or 500 scans.
    """
    return decode_reduced(content, lambda height, width: 1)[0]


def decode_reduced(content: bytes, reduction: Callable[[int, int], int]) -> tuple[NDArray[np.uint8], int]:
    """As `decode`, but a JPEG may come at a half, a quarter or an eighth of its size, in a fraction of the time.

    Args:
        reduction: from height and width to by how much the image may be reduced: 1, 2, 4 or 8.

    Returns:
        The pixels, and by how much they are reduced: 1 for other formats and for JPEG with an EXIF orientation. Pixel 0
        of a reduced image covers the first so many of the image.

    Raises:
        UnreadableImage: as `decode`.
    """
    if not content:
        raise UnreadableImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF data and the like, which do no harm
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if max(image.size) > _MAX_SIDE:
                    raise UnreadableImage(f"too large: {image.width}×{image.height} pixels")
                if content.count(_SCAN) > _MAX_SCANS and (scans := _scans(content)) > _MAX_SCANS:
                    raise UnreadableImage(f"too large: {scans} scans")
                if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
                    raise UnreadableImage("floating-point or 32-bit samples, whose range is unknown")
                if image.format == "JPEG" and image.mode in ("RGB", "L") and _upright(image):
                    by = reduction(image.height, image.width)
                    fast = _jpeg(content, -(-image.height // by), -(-image.width // by))
                    if fast is not None:
                        return fast, by
                return _rgb(_turned(image)), 1
        except UnreadableImage:
            raise
        except Image.UnidentifiedImageError:
            raise UnreadableImage(f"none of {', '.join(FORMATS)}, or broken from the start") from None
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"too large: {error}") from error
        except _FAILURES as error:
            raise UnreadableImage(f"broken image: {error}") from error


def _scans(content: bytes) -> int:
    """How many scans a JPEG has, up to its end: what follows, a film for one, is none of it; 0 for other formats."""
    scans, at = 0, 2
    while content.startswith(b"\xff\xd8") and (marker := _MARKER.search(content, at)):
        if marker[1] == b"\xd9":
            break
        scans += marker[1] == b"\xda"
        at = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
    return scans


def _upright(image: Image.Image) -> bool:
    return "exif" not in image.info or image.getexif().get(_ORIENTATION, 1) not in _TURNS


def _turned(image: Image.Image) -> Image.Image:
    """Upright. Not by Pillow's exif_transpose, which writes the EXIF data anew and fails where a tag of it is odd."""
    image.load()  # before what it says: PNG and TIFF have it behind the pixels
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _jpeg(content: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """A JPEG's pixels at the least size that is not below height × width, or None where the decoder complains of
    anything: then Pillow is to say what it is.
    """
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return pixels


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit grey to 255 instead of scaling it
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may hold colours only for what is not transparent
    return np.asarray(image.convert("RGB"))
