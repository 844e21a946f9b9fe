"""From five landmarks to the 112×112 face: similarity transform and bilinear warp."""

import cv2
import numpy as np
from numpy.typing import NDArray

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


def warp(image: NDArray[np.uint8], matrix: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The aligned face (112, 112, 3) of a photograph (height, width, 3) by a (2, 3) matrix from `similarity`.

    Bilinear; black where the face reaches beyond the photograph.
    """
    face = cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    return face.astype(np.uint8, copy=False)


_CROP, _HEIGHT = 0.53, 0.47
"""Side of the square that `centre_crop` cuts, as a share of the photograph's shorter side, and how far down its centre
lies. It is what the template covers of an LFW photograph: 132 of 250 pixels, 117 from the top (medians over 200)."""


def centre_crop(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What stands in for the aligned face where an evaluation set has a photograph without a detected one.

    The square (112, 112, 3) in which the face lies as in an aligned one if the photograph is framed as LFW's are.
    """
    height, width = image.shape[:2]
    side = max(1, round(_CROP * min(height, width)))
    top, left = int(_HEIGHT * height - side / 2), (width - side) // 2
    crop = image[top : top + side, left : left + side]
    face = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA if side > SIDE else cv2.INTER_LINEAR)
    return face.astype(np.uint8, copy=False)
