"""The faces in a photograph: a first look, further ones where that finds nothing, and the choice among several."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import params
from stages.align.mtcnn import Detector, Faces, Image


@dataclass(frozen=True)
class Found:
    """The faces in a photograph, in its own pixels, and which look found them."""

    faces: Faces
    look: str
    """first, or a name of `align.looks`; the first where nothing was found."""


def find(photographs: Sequence[Image], settings: params.Align, device: str) -> list[Found]:
    """Find the faces in each photograph, (height, width, 3) uint8 RGB, of any mixture of sizes.

    Detection sees photographs reduced to `max_side`; boxes and landmarks are those of the photographs as given.
    """
    detector = settings.detector
    reduced = [_reduced(photograph, detector.max_side) for photograph in photographs]
    found = [Found(faces, "first") for faces in _detector(detector, device).detect(reduced)]
    for look in settings.looks:
        left = [i for i, own in enumerate(found) if not len(own.faces.scores)]
        for i, faces in zip(left, _LOOKS[look]([reduced[i] for i in left], detector, device), strict=True):
            if len(faces.scores):
                found[i] = Found(faces, look)
    triples = zip(found, photographs, reduced, strict=True)
    return [replace(own, faces=_enlarged(own.faces, whole, seen)) for own, whole, seen in triples]


def choose(boxes: NDArray[np.floating], height: int, width: int, rule: str) -> int:
    """Which of several faces in a photograph of that size is the one it is of.

    Args:
        boxes: (n, 4) left, top, right, bottom; first and last pixel, counted from 1.
        rule: `centre`, nearest to the photograph's centre (SphereFace's choice); `largest`, by area; `weighted`,
            largest area − 2 d², d being the distance to the centre in pixels (the field's usual compromise).

    Returns:
        Its index; of equals the first, which is the most certain face.
    """
    offsets = (boxes[:, :2] + boxes[:, 2:] - np.array([width + 1, height + 1])) / 2
    distances = (offsets**2).sum(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    merit = {"centre": -distances, "largest": areas, "weighted": areas - 2 * distances}[rule]
    return int(merit.argmax())


@functools.cache
def _detector(settings: params.Detector, device: str) -> Detector:
    """The detector of this process, which all of its parts share."""
    return Detector(settings, device)


def _smaller(images: Sequence[Image], settings: params.Detector, device: str) -> Iterator[Faces]:
    half = {"min_face": max(12, settings.min_face // 2), "min_face_share": settings.min_face_share / 2}
    yield from _detector(settings.model_copy(update=half), device).detect(images)


def _turned(images: Sequence[Image], settings: params.Detector, device: str) -> Iterator[Faces]:
    """Turned by 90° to the left and to the right; of both, the one with the most certain face."""
    left, right = (
        _detector(settings, device).detect([np.ascontiguousarray(np.rot90(image, turns)) for image in images])
        for turns in (1, 3)
    )
    for image, a, b in zip(images, left, right, strict=True):
        turns, faces = (1, a) if max(a.scores, default=0.0) >= max(b.scores, default=0.0) else (3, b)
        yield _turned_back(faces, image.shape[0], image.shape[1], turns)


def _turned_back(faces: Faces, height: int, width: int, turns: int) -> Faces:
    """Faces of np.rot90(image, turns), turns 1 or 3, in the pixels of the image of that size."""

    def back(points: NDArray[np.float32]) -> NDArray[np.float32]:
        x, y = points[..., 0], points[..., 1]
        return np.stack([width - 1 - y, x] if turns == 1 else [y, height - 1 - x], axis=-1)

    corners = back(faces.boxes.reshape(-1, 2, 2) - 1) + 1
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return replace(faces, boxes=boxes, landmarks=back(faces.landmarks))


def _equalised(images: Sequence[Image], settings: params.Detector, device: str) -> Iterator[Faces]:
    def equalise(image: Image) -> Image:
        luminance = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
        luminance[..., 0] = cv2.equalizeHist(np.ascontiguousarray(luminance[..., 0]))
        return cv2.cvtColor(luminance, cv2.COLOR_YCrCb2RGB).astype(np.uint8, copy=False)

    yield from _detector(settings, device).detect([equalise(image) for image in images])


_LOOKS: dict[str, Callable[[Sequence[Image], params.Detector, str], Iterator[Faces]]] = {
    "smaller": _smaller,
    "rotated": _turned,
    "equalised": _equalised,
}


def _reduced(photograph: Image, max_side: int) -> Image:
    """The photograph, its longer side at most `max_side`."""
    height, width = photograph.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return photograph
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(photograph, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _enlarged(faces: Faces, photograph: Image, reduced: Image) -> Faces:
    """Faces of a reduced photograph in pixels of the photograph."""
    if photograph.shape == reduced.shape or not len(faces.scores):
        return faces
    return scaled(faces, np.array(photograph.shape[1::-1]) / reduced.shape[1::-1])


def scaled(faces: Faces, factors: NDArray[np.float64]) -> Faces:
    """Faces in pixels of a picture enlarged by `factors`, (2,) of x and y.

    Pixel centres lie at whole numbers, pixel 0 of landmarks being pixel 1 of boxes.
    """
    boxes = (faces.boxes - 0.5) * np.tile(factors, 2) + 0.5
    landmarks = (faces.landmarks + 0.5) * factors - 0.5
    return replace(faces, boxes=boxes.astype(np.float32), landmarks=landmarks.astype(np.float32))
