"""MTCNN face detection (Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", IEEE SPL 2016, arXiv 1604.02878) in torch, over batches of photographs.

Weights, pyramid, thresholds and box arithmetic are those of the authors' release, with its conventions: a box is
its first and last pixel, counted from 1; landmarks count from 0. The weights are read from the `mtcnn` package,
which itself is not imported, because that would import TensorFlow.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.align.nms import Overlap, nms

Image = NDArray[np.uint8]
"""(height, width, 3) RGB."""

_CELL, _STRIDE = 12, 2
"""What P-Net sees of a scaled photograph at each of its outputs, and the distance between those, in pixels."""
_POOLS = {"pnet": (2, 0, 0), "rnet": (3, 3, 0, 0), "onet": (3, 3, 2, 0, 0)}
"""Side of the max pooling (stride 2) after each hidden layer; 0 where there is none."""
_PIXELS = 1 << 20
"""Pixels of scaled photographs in one forward pass of P-Net: bounds its memory to some 100 MB."""
_CROPS = 128
"""Candidates in one forward pass of R-Net or O-Net."""


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

    def suppressed(self, threshold: float, overlap: Overlap) -> "_Candidates":
        """What non-maximum suppression in each photograph leaves: sorted by photograph, then best first."""
        kept = [np.empty(0, np.intp)]
        for owner in np.unique(self.owner):
            own = np.flatnonzero(self.owner == owner)
            kept.append(own[nms(self.boxes[own], self.scores[own], threshold, overlap)])
        return self.take(np.concatenate(kept))

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
        min_face: smallest face looked for, in pixels.
        factor: ratio of neighbouring pyramid scales (the original: 0.709, which halves the area).
        thresholds: face probability that P-, R- and O-Net must give (the original: 0.6, 0.7, 0.7).
        device: where the networks run: "cpu" or "cuda".
    """

    def __init__(self, min_face: int, factor: float, thresholds: tuple[float, float, float], device: str) -> None:
        self._min_face = min_face
        self._factor = factor
        self._thresholds = thresholds
        self._device = torch.device(device)
        self._pnet, self._rnet, self._onet = (_network(name).to(self._device) for name in _POOLS)

    def detect(self, images: Sequence[Image]) -> list[Faces]:
        """Find the faces in each photograph, (height, width, 3) uint8 RGB, of any mixture of sizes.

        What is found in one does not depend on the others, except for rounding in the last bits.
        """
        # TF32, which cuDNN convolutions use by default, would move landmarks and flip close decisions.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            squares = self._propose(images)
            seen = self._look(self._rnet, self._thresholds[1], 24, images, squares)
            squares = seen.suppressed(0.7, "union").calibrated().squared()
            seen = self._look(self._onet, self._thresholds[2], 48, images, squares)
        return _faces(seen, len(images))

    def _propose(self, images: Sequence[Image]) -> _Candidates:
        """P-Net over the pyramid of each photograph; photographs of one size go together."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.shape[:2], []).append(index)
        found = [_NOTHING]
        for (height, width), indices in by_size.items():
            for scale in _scales(min(height, width), self._min_face, self._factor):
                size = int(np.ceil(width * scale)), int(np.ceil(height * scale))
                step = max(1, _PIXELS // (size[0] * size[1]))
                for start in range(0, len(indices), step):
                    some = indices[start : start + step]
                    scaled = [cv2.resize(images[i], size, interpolation=cv2.INTER_AREA) for i in some]
                    found.append(self._cells(np.stack(scaled), np.array(some), scale).suppressed(0.5, "union"))
        # Here alone the original takes a box for one pixel less wide than elsewhere.
        return _join(found).suppressed(0.7, "union").calibrated(extra=0).squared()

    def _cells(self, scaled: NDArray[Any], owners: NDArray[np.intp], scale: float) -> _Candidates:
        """P-Net's candidates in photographs (n, h, w, 3) scaled by `scale`, in pixels of the originals."""
        out = self._pnet(_input(scaled, self._device))
        probability = _probability(out)
        image, y, x = (probability >= self._thresholds[0]).nonzero(as_tuple=True)
        cell = torch.stack([x, y], dim=1).cpu().numpy() * _STRIDE
        return _Candidates(
            owner=owners[image.cpu().numpy()],
            boxes=np.trunc(np.hstack([cell + 1, cell + _CELL]) / scale),
            scores=probability[image, y, x].cpu().numpy(),
            outputs=out[image, :4, y, x].cpu().numpy(),
        )

    def _look(
        self, net: nn.Module, threshold: float, side: int, images: Sequence[Image], candidates: _Candidates
    ) -> _Candidates:
        """Those of the candidates that R-Net or O-Net, looking at side × side pixels, takes for faces."""
        seen = [_NOTHING]
        for start in range(0, len(candidates.owner), _CROPS):
            some = candidates.take(np.arange(start, min(start + _CROPS, len(candidates.owner))))
            pairs = zip(some.owner, some.boxes.astype(int), strict=True)
            out = net(_input(np.stack([_crop(images[i], box, side) for i, box in pairs]), self._device)).flatten(1)
            scores = _probability(out).cpu().numpy()
            judged = replace(some, scores=scores, outputs=out[:, :-2].cpu().numpy())
            seen.append(judged.take(np.flatnonzero(scores > threshold)))
        return _join(seen)


_NOTHING = _Candidates(np.empty(0, np.intp), np.empty((0, 4)), np.empty(0, np.float32), np.empty((0, 4), np.float32))


def _join(candidates: Sequence[_Candidates]) -> _Candidates:
    some = [part for part in candidates if len(part.owner)] or [_NOTHING]
    return _Candidates(
        *(np.concatenate([getattr(part, name) for part in some]) for name in ("owner", "boxes", "scores", "outputs"))
    )


def _faces(seen: _Candidates, count: int) -> list[Faces]:
    """The faces in each of `count` photographs, of what O-Net has accepted."""
    # O-Net gives five x, then five y
    points = seen.outputs[:, 4:].reshape(-1, 2, 5).transpose(0, 2, 1)
    landmarks = (seen.boxes[:, None, :2] - 1 + points * seen.extent()[:, None]).reshape(-1, 10).astype(np.float32)
    final = replace(seen.calibrated(), outputs=landmarks).suppressed(0.7, "min")
    each = [final.take(np.flatnonzero(final.owner == i)) for i in range(count)]
    return [Faces(own.boxes.astype(np.float32), own.scores, own.outputs.reshape(-1, 5, 2)) for own in each]


def _scales(shorter: int, min_face: int, factor: float) -> list[float]:
    """Scales of the pyramid: from the one that makes `min_face` a P-Net cell to the last that leaves a whole cell."""
    scales = []
    scale = _CELL / min_face
    while shorter * scale >= _CELL:
        scales.append(scale)
        scale *= factor
    return scales


def _crop(image: Image, box: NDArray[np.int_], side: int) -> NDArray[np.float32]:
    """What lies in a box, black where that is outside the photograph, resized to (side, side, 3).

    Not rounded to whole grey levels: that would move landmarks by some hundredths of a pixel.
    """
    left, top, right, bottom = box - (1, 1, 0, 0)  # counted from 0, the last one excluded
    x, y = max(left, 0), max(top, 0)
    inside = image[y : max(bottom, 0), x : max(right, 0)]
    crop = np.zeros((bottom - top, right - left, 3), np.float32)
    crop[y - top : y - top + inside.shape[0], x - left : x - left + inside.shape[1]] = inside
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32, copy=False)


def _input(pixels: NDArray[Any], device: torch.device) -> torch.Tensor:
    """(n, h, w, 3), 0 to 255, as (n, 3, h, w) float32, −1 to 1, in the memory order that convolutions like best."""
    return (torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() - 127.5) * 0.0078125


def _probability(out: torch.Tensor) -> torch.Tensor:
    """Softmax over the last two channels, (not a face, a face)."""
    return out[:, -2:].softmax(dim=1)[:, 1]


def _network(name: str) -> nn.Sequential:
    """P-, R- or O-Net: (n, 3, h, w) to (n, channels, h', w'), channels being 4 corner offsets, 10 landmark coordinates
    (O-Net only) and 2 logits. Dense layers are convolutions over all there is, which computes the same.
    """
    arrays = _weights(name)
    pools = _POOLS[name]
    hidden, heads = arrays[: 3 * len(pools)], arrays[3 * len(pools) :]
    layers: list[nn.Module] = []
    channels = 3
    for pool, kernel, bias, slope in zip(pools, hidden[0::3], hidden[1::3], hidden[2::3], strict=True):
        layers += [_convolution(kernel, bias, channels), _prelu(slope)]
        channels = len(bias)
        if pool:
            layers.append(nn.MaxPool2d(pool, stride=2, ceil_mode=True))
    layers.append(_convolution(np.concatenate(heads[0::2], axis=-1), np.concatenate(heads[1::2]), channels))
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _weights(name: str) -> list[NDArray[np.float32]]:
    """Kernel, bias and PReLU slope of each hidden layer, then kernel and bias of each head.

    Raises:
        FileNotFoundError: the `mtcnn` package is not installed, or has its weights elsewhere.
    """
    package = importlib.util.find_spec("mtcnn")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "the package mtcnn, whose weights are needed, is not installed: pip install mtcnn==1.0.0"
        )
    # joblib reads pickles: safe here, as the file is as much installed code as any of the package
    weights: list[NDArray[np.float32]] = joblib.load(
        Path(package.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4"
    )
    return weights


def _convolution(kernel: NDArray[np.float32], bias: NDArray[np.float32], channels: int) -> nn.Conv2d:
    """A layer from a kernel (height, width, in, out), or (in, out) of a dense layer over a flattened square map."""
    if kernel.ndim == 2:
        # the original is column-major: its maps are flattened by width first, then height, then channel
        side = round((len(kernel) / channels) ** 0.5)
        kernel = kernel.reshape(side, side, channels, -1).transpose(1, 0, 2, 3)
    layer = nn.Conv2d(channels, len(bias), kernel.shape[:2])
    layer.weight = nn.Parameter(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    layer.bias = nn.Parameter(torch.from_numpy(bias))
    return layer


def _prelu(slope: NDArray[np.float32]) -> nn.PReLU:
    layer = nn.PReLU(slope.size)
    layer.weight = nn.Parameter(torch.from_numpy(slope.reshape(-1)))
    return layer
