"""Photographs made of scikit-image's astronaut (NASA, public domain), the same wherever they are made."""

import cv2
import numpy as np
import skimage.data
from numpy.typing import NDArray

FACE_CENTRE = (226.0, 118.0)
"""x, y of the face in the astronaut photograph."""


def scenes() -> dict[str, NDArray[np.uint8]]:
    """(height, width, 3) uint8 RGB by name."""
    astronaut = skimage.data.astronaut()
    return {
        "whole": astronaut,
        "cut by the border": np.ascontiguousarray(astronaut[88:400, 196:456]),
        "a group": group(astronaut),
    }


def group(astronaut: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Six copies of the face, of different size (about 35 to 150 pixels) and roll, over a part of the photograph."""
    canvas = np.ascontiguousarray(np.tile(astronaut[300:500, :380], (3, 2, 1))[:480])
    for x, y, scale, angle in (
        (120, 140, 1.0, 0),
        (330, 130, 0.8, 15),
        (500, 110, 0.5, -20),
        (640, 100, 0.4, 5),
        (200, 370, 1.3, -10),
        (520, 340, 0.65, 25),
    ):
        matrix = np.array(cv2.getRotationMatrix2D(FACE_CENTRE, angle, scale), np.float64)
        matrix[:, 2] += (x - FACE_CENTRE[0], y - FACE_CENTRE[1])
        warped = cv2.warpAffine(astronaut, matrix, (760, 480), flags=cv2.INTER_AREA)
        half = int(90 * scale)
        square = slice(max(y - half, 0), y + half), slice(max(x - half, 0), x + half)
        canvas[square] = warped[square]
    return canvas
