"""MTCNN face detection (Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", IEEE SPL 2016, arXiv 1604.02878), over batches of photographs.

Weights, pyramid, thresholds and box arithmetic are those of the authors' release, with its conventions: a box is
its first and last pixel, counted from 1; landmarks count from 0.

What is found in a photograph does not depend on what it is batched with: to the bit on a CPU, on a GPU within rounding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline import params
from stages.align import kernels
from stages.align.networks import CELL, STRIDE, Image, Level, Networks, probability
from stages.align.networks_compiled import CompiledNetworks
from stages.align.nms import Overlap, suppress


@dataclass(frozen=True)
class Faces:
    """The faces in a photograph, best first."""

    boxes: NDArray[np.float32]
    """(n, 4) left, top, right, bottom in pixels: the first and the last, counted from 1."""
    scores: NDArray[np.float32]
    """(n,) O-Net's face probability."""
    landmarks: NDArray[np.float32]
    """(n, 5, 2) x, y of left eye, right eye, nose, left and right mouth corner as seen in the photograph; pixels
    counted from 0."""


@dataclass(frozen=True)
class _Candidates:
    """Boxes in the photographs of a batch, and what the last network said of them."""

    owner: NDArray[np.intp]
    """(n,) index of the photograph."""
    boxes: NDArray[np.float64]
    """(n, 4)"""
    scores: NDArray[np.float32]
    """(n,)"""
    outputs: NDArray[np.float32]
    """(n, 4 or 14) offsets of the corners and, from O-Net, landmarks, in widths and heights of the box; in the end
    (n, 10), landmarks in pixels."""

    def take(self, indices: NDArray[np.intp]) -> "_Candidates":
        return _Candidates(self.owner[indices], self.boxes[indices], self.scores[indices], self.outputs[indices])

    def suppressed(self, threshold: float, overlap: Overlap, groups: NDArray[np.intp] | None = None) -> "_Candidates":
        """What non-maximum suppression leaves in each group, by default each photograph, best first."""
        return self.take(
            suppress(self.owner if groups is None else groups, self.boxes, self.scores, threshold, overlap)
        )

    def calibrated(self, extra: int = 1) -> "_Candidates":
        """Boxes moved by the network's offsets."""
        return replace(self, boxes=self.boxes + self.outputs[:, :4] * np.tile(self.extent(extra), 2))

    def squared(self) -> "_Candidates":
        """Squares around the boxes' centres, as long as their longer sides, on whole pixels."""
        extent = self.extent(0)
        side = extent.max(axis=1, keepdims=True, initial=0)
        corner = self.boxes[:, :2] + extent / 2 - side / 2
        return replace(self, boxes=np.trunc(np.hstack([corner, corner + side])))

    def extent(self, extra: int = 1) -> NDArray[np.float64]:
        """(n, 2) widths and heights; `extra` is 1 where the last pixel belongs to the box."""
        return self.boxes[:, 2:] - self.boxes[:, :2] + extra


class Detector:
    """The cascade of P-Net, R-Net and O-Net.

    Args:
        settings: `max_side` is not looked at: photographs are taken as they are.
        device: where the networks run: "cpu" or "cuda".
    """

    def __init__(self, settings: params.Detector, device: str) -> None:
        self._settings = settings
        self._networks = _networks(device)

    def detect(self, images: Sequence[Image]) -> list[Faces]:
        """Find the faces in each photograph, (height, width, 3) uint8 RGB, of any mixture of sizes."""
        _, between, after_rnet, after_onet = self._settings.overlaps
        # Here alone the original takes a box for one pixel less wide than elsewhere.
        squares = self._propose(images).suppressed(between, "union").calibrated(extra=0).squared()
        seen = self._look("rnet", self._settings.thresholds[1], images, squares)
        squares = seen.suppressed(after_rnet, "union").calibrated().squared()
        seen = self._look("onet", self._settings.thresholds[2], images, squares)
        return _faces(seen, len(images), after_onet)

    def _propose(self, images: Sequence[Image]) -> _Candidates:
        """P-Net over the pyramid of each photograph."""
        pyramids = [list(self._pyramid(i, image)) for i, image in enumerate(images)]
        scales = np.array([scale for pyramid in pyramids for scale, _ in pyramid])
        levels = [level for pyramid in pyramids for _, level in pyramid]
        cells = self._networks.cells(images, levels, self._settings.thresholds[0])
        first = cells.places * STRIDE
        boxes = np.trunc(np.hstack([first + 1, first + CELL]) / scales[cells.level, None])
        owners = np.array([level.owner for level in levels], np.intp)[cells.level]
        found = _Candidates(owners, boxes, cells.scores, cells.outputs)
        return found.suppressed(self._settings.overlaps[0], "union", cells.level)

    def _pyramid(self, owner: int, image: Image) -> Iterator[tuple[float, Level]]:
        """Scales from the one that makes the smallest face a P-Net cell to the last that leaves a whole cell."""
        height, width = image.shape[:2]
        scale = CELL / max(self._settings.min_face, self._settings.min_face_share * min(height, width))
        while min(height, width) * scale >= CELL:
            yield scale, Level(owner, math.ceil(height * scale), math.ceil(width * scale))
            scale *= self._settings.factor

    def _look(self, name: str, threshold: float, images: Sequence[Image], candidates: _Candidates) -> _Candidates:
        """Those of the candidates that R-Net or O-Net takes for faces."""
        candidates = candidates.take(np.flatnonzero((candidates.extent() >= 1).all(axis=1)))  # what has any pixels
        boxes = candidates.boxes.astype(np.int64) - [1, 1, 0, 0]  # counted from 1, the last pixel included
        outputs = self._networks.look(name, images, candidates.owner, boxes)
        scores = probability(outputs[:, -2:])
        judged = replace(candidates, scores=scores, outputs=outputs[:, :-2])
        return judged.take(np.flatnonzero(scores > threshold))


def _networks(device: str) -> Networks:
    if device == "cpu" and kernels.library() is not None:
        return CompiledNetworks()
    from stages.align.networks_torch import TorchNetworks  # importing torch takes seconds

    return TorchNetworks(device)


def _faces(seen: _Candidates, count: int, threshold: float) -> list[Faces]:
    """The faces in each of `count` photographs, of what O-Net has accepted."""
    # O-Net gives five x, then five y
    points = seen.outputs[:, 4:].reshape(-1, 2, 5).transpose(0, 2, 1)
    landmarks = (seen.boxes[:, None, :2] - 1 + points * seen.extent()[:, None]).reshape(-1, 10).astype(np.float32)
    final = replace(seen.calibrated(), outputs=landmarks).suppressed(threshold, "min")
    each = np.split(np.arange(len(final.owner)), np.searchsorted(final.owner, np.arange(1, count)))[:count]
    return [
        Faces(final.boxes[own].astype(np.float32), final.scores[own], final.outputs[own].reshape(-1, 5, 2))
        for own in each
    ]
