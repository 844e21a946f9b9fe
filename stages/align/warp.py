"""From five landmarks to the aligned face: similarity transform and bilinear warp."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.params import Face

SIDE = 112
"""Side of an aligned face in pixels."""
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""(5, 2) x, y in the aligned face, pixels: left eye, right eye, nose, left and right mouth corner as seen in the image.
SphereFace's template for 112×96 (Liu et al., CVPR 2017), moved by 8 to the right, as the field uses it."""


def similarity(landmarks: NDArray[np.floating]) -> NDArray[np.float64]:
    """The rotation, scale and shift that bring each face's landmarks closest to the template, by least squares.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991; in the
    plane, with points as complex numbers, it is the linear regression template = a · landmark + b.

    Args:
        landmarks: (n, 5, 2) x, y in pixels.

    Returns:
        (n, 2, 3) float64 matrices from photograph to aligned face.

    Raises:
        ValueError: the five landmarks of a face coincide.
    """
    source = landmarks[..., 0].astype(np.float64) + 1j * landmarks[..., 1].astype(np.float64)
    target = TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
    centred = source - source.mean(axis=1, keepdims=True)
    spread = (np.abs(centred) ** 2).sum(axis=1)
    if not (spread > 0).all():
        raise ValueError("the five landmarks of a face coincide: no similarity transform can be found")
    a = (centred.conj() * (target - target.mean())).sum(axis=1) / spread
    b = target.mean() - a * source.mean(axis=1)
    return np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=1).reshape(-1, 2, 3)


def warp(image: NDArray[np.uint8], matrix: NDArray[np.float64], face: Face) -> NDArray[np.uint8]:
    """The aligned face of a photograph (height, width, 3) by a (2, 3) matrix from `similarity`.

    Bilinear; black where the face reaches beyond the photograph. A face of twice the size or more is reduced by areas
    first: between so few of its pixels bilinear would choose, and take their noise and fine patterns along.

    Returns:
        (112 + 2·margin, width + 2·margin, 3).
    """
    shifted = matrix.copy()
    shifted[:, 2] += (face.width - SIDE) / 2 + face.margin, face.margin
    size = face.width + 2 * face.margin, SIDE + 2 * face.margin
    by = int(1 / np.hypot(*matrix[:, 0]))
    if by > 1:
        image, shifted = _reduced(image, shifted, size, by)
    aligned = cv2.warpAffine(image, shifted, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return aligned.astype(np.uint8, copy=False)


def _reduced(
    image: NDArray[np.uint8], matrix: NDArray[np.float64], size: tuple[int, int], by: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """What `matrix` brings into an image of `size` (width, height), reduced by a whole number, and its matrix then."""
    back = np.linalg.inv(matrix[:, :2])
    corners = np.array([[-1, -1], [size[0], -1], [-1, size[1]], size])
    seen = (corners - matrix[:, 2]) @ back.T
    first = np.floor(seen.min(axis=0) / by).astype(int) - 1
    last = np.ceil(seen.max(axis=0) / by).astype(int) + 2
    (left, top), (right, bottom) = (first * by).tolist(), (last * by).tolist()
    small = cv2.resize(cut(image, left, top, right, bottom), (last - first).tolist(), interpolation=cv2.INTER_AREA)
    # pixel u of it is the mean of `by` pixels around first · by + u · by + (by − 1) / 2
    origin = first * by + (by - 1) / 2
    reduced = np.column_stack([matrix[:, :2] * by, matrix[:, :2] @ origin + matrix[:, 2]])
    return small.astype(np.uint8, copy=False), reduced


def cut(image: NDArray[np.uint8], left: int, top: int, right: int, bottom: int) -> NDArray[np.uint8]:
    """The rectangle of an image from pixel (left, top) to before (right, bottom), black where that is outside."""
    x, y = max(left, 0), max(top, 0)
    inside = image[y : max(bottom, 0), x : max(right, 0)]
    if inside.shape[:2] == (bottom - top, right - left):
        return inside
    padded = np.zeros((bottom - top, right - left, 3), np.uint8)
    padded[y - top : y - top + inside.shape[0], x - left : x - left + inside.shape[1]] = inside
    return padded


_CROP, _HEIGHT = 0.53, 0.47
"""Side of the square that `centre_crop` cuts, as a share of the photograph's shorter side, and how far down its centre
lies. It is what the template covers of an LFW photograph: 132 of 250 pixels, 117 from the top (medians over 200)."""


def centre_crop(image: NDArray[np.uint8], face: Face) -> NDArray[np.uint8]:
    """What stands in for the aligned face where an evaluation set has a photograph without a detected one.

    The face lies in it as in an aligned one if the photograph is framed as LFW's are; of the same size as from `warp`.
    """
    height, width = image.shape[:2]
    pixel = _CROP * min(height, width) / SIDE  # of the aligned face, in those of the photograph
    size = face.width + 2 * face.margin, SIDE + 2 * face.margin
    across, down = (max(1, round(length * pixel)) for length in size)
    left, top = (width - across) // 2, int(_HEIGHT * height - down / 2)
    crop = cut(image, left, top, left + across, top + down)
    resized = cv2.resize(crop, size, interpolation=cv2.INTER_AREA if pixel > 1 else cv2.INTER_LINEAR)
    return resized.astype(np.uint8, copy=False)
