"""MTCNN face detection (Zhang et al., "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", IEEE SPL 2016, arXiv 1604.02878) in torch, over batches of photographs.

Weights, pyramid, thresholds and box arithmetic are those of the authors' release, with its conventions: a box is
its first and last pixel, counted from 1; landmarks count from 0. The weights are read from the `mtcnn` package,
which itself is not imported, because that would import TensorFlow.

What is found in a photograph does not depend on what it is batched with: to the bit on a CPU, on a GPU within rounding.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import params
from stages.align.area import shrunk
from stages.align.nms import Overlap, suppress
from stages.align.warp import cut

Image = NDArray[np.uint8]
"""(height, width, 3) RGB."""

_CELL, _STRIDE = 12, 2
"""What P-Net sees of a scaled photograph at each of its outputs, and the distance between those, in pixels."""
_POOLS = {"pnet": (2, 0, 0), "rnet": (3, 3, 0, 0), "onet": (3, 3, 2, 0, 0)}
"""Side of the max pooling (stride 2) after each hidden layer; 0 where there is none."""
_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Pixels of scaled photographs in one forward pass of P-Net: on a CPU what its caches hold, on a GPU what fills it."""
_CROPS = {"cpu": {24: 64, 48: 32}, "cuda": {24: 4096, 48: 2048}}
"""Candidates in one forward pass of R-Net (24 pixels) and O-Net (48), for the same reasons."""
_GRAIN = 8
"""Photographs of similar size share a canvas, whose sides are multiples of this, in pixels. A photograph always gets
the same canvas, whether it shares it or not: on another, P-Net's last bits may differ."""


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


@dataclass(frozen=True)
class _Level:
    """A photograph of a batch at one scale of its pyramid."""

    owner: int
    scale: float
    pixels: Image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


class Detector:
    """The cascade of P-Net, R-Net and O-Net.

    Args:
        settings: `max_side` is not looked at: photographs are taken as they are.
        device: where the networks run: "cpu" or "cuda".
    """

    def __init__(self, settings: params.Detector, device: str) -> None:
        self._settings = settings
        self._device = torch.device(device)
        self._pnet, self._rnet, self._onet = (_network(name).to(self._device) for name in _POOLS)

    def detect(self, images: Sequence[Image]) -> list[Faces]:
        """Find the faces in each photograph, (height, width, 3) uint8 RGB, of any mixture of sizes."""
        _, between, after_rnet, after_onet = self._settings.overlaps
        # TF32, which cuDNN convolutions use by default, would move landmarks and flip close decisions.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            # Here alone the original takes a box for one pixel less wide than elsewhere.
            squares = self._propose(images).suppressed(between, "union").calibrated(extra=0).squared()
            seen = self._look(self._rnet, self._settings.thresholds[1], 24, images, squares)
            squares = seen.suppressed(after_rnet, "union").calibrated().squared()
            seen = self._look(self._onet, self._settings.thresholds[2], 48, images, squares)
        return _faces(seen, len(images), after_onet)

    def _propose(self, images: Sequence[Image]) -> _Candidates:
        """P-Net over the pyramid of each photograph."""
        levels = [level for i, image in enumerate(images) for level in self._pyramid(i, image)]
        found, groups = [_NOTHING], [np.empty(0, np.intp)]
        for (height, width), members in _canvases(levels).items():
            step = max(1, _PIXELS[self._device.type] // (height * width))
            for start in range(0, len(members), step):
                some = members[start : start + step]
                candidates, which = self._cells([levels[i] for i in some], height, width)
                found.append(candidates)
                groups.append(np.array(some)[which])
        return _join(found).suppressed(self._settings.overlaps[0], "union", np.concatenate(groups))

    def _pyramid(self, owner: int, image: Image) -> Iterator[_Level]:
        """Scales from the one that makes the smallest face a P-Net cell to the last that leaves a whole cell."""
        shorter = min(image.shape[:2])
        scale = _CELL / max(self._settings.min_face, self._settings.min_face_share * shorter)
        scales = []
        while shorter * scale >= _CELL:
            scales.append(scale)
            scale *= self._settings.factor
        height, width = (np.ceil(np.multiply(side, scales)).astype(int).tolist() for side in image.shape[:2])
        for scale, pixels in zip(scales, shrunk(image, zip(height, width, strict=True)), strict=True):
            yield _Level(owner, scale, pixels)

    def _cells(self, levels: Sequence[_Level], height: int, width: int) -> tuple[_Candidates, NDArray[np.intp]]:
        """P-Net's candidates in some levels on canvases of (height, width), in pixels of the photographs; and the
        level that each comes from.
        """
        canvas = np.zeros((len(levels), height, width, 3), np.uint8)
        for own, level in zip(canvas, levels, strict=True):
            own[: level.size[0], : level.size[1]] = level.pixels
        out, probability = self._pnet_maps(canvas, np.array([level.size for level in levels]))
        which, y, x = (probability >= self._settings.thresholds[0]).nonzero(as_tuple=True)
        cell = torch.stack([x, y], dim=1).cpu().numpy() * _STRIDE
        scores, outputs = probability[which, y, x].cpu().numpy(), out[which, :4, y, x].cpu().numpy()
        owners, scales = np.array([level.owner for level in levels]), np.array([level.scale for level in levels])
        index = which.cpu().numpy()
        boxes = np.trunc(np.hstack([cell + 1, cell + _CELL]) / scales[index, None])
        return _Candidates(owners[index], boxes, scores, outputs), index

    def _pnet_maps(self, canvas: NDArray[np.uint8], sizes: NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
        """P-Net's outputs (n, 6, h', w') and face probabilities (n, h', w') on canvases (n, h, w, 3), whose photographs
        have `sizes` (n, 2): beyond those the probability is zero, and nothing beyond them changes what is within.
        """
        filled = bool((sizes == canvas.shape[1:3]).all())
        maps = self._pnet[:2](_input(canvas, self._device))
        if not filled:
            _fence(maps, torch.from_numpy(sizes).to(self._device) - 2)
        out = self._pnet[2:](maps)
        probability = _probability(out)
        if not filled:
            probability = probability.masked_fill(self._beyond(-(-(sizes - 2) // 2) - 4, out)[:, 0], 0)
        return out, probability

    def _beyond(self, sizes: NDArray[np.intp], maps: torch.Tensor) -> torch.Tensor:
        """(n, 1, h, w) what of maps (n, c, h, w) lies beyond the sizes (n, 2)."""
        height, width = torch.from_numpy(sizes).to(self._device)[:, :, None].unbind(1)
        rows, columns = (torch.arange(length, device=self._device) for length in maps.shape[2:])
        return ((rows >= height)[:, :, None] | (columns >= width)[:, None, :])[:, None]

    def _look(
        self, net: nn.Module, threshold: float, side: int, images: Sequence[Image], candidates: _Candidates
    ) -> _Candidates:
        """Those of the candidates that R-Net or O-Net, looking at side × side pixels, takes for faces."""
        seen = [_NOTHING]
        step = _CROPS[self._device.type][side]
        for start in range(0, len(candidates.owner), step):
            some = candidates.take(np.arange(start, min(start + step, len(candidates.owner))))
            crops = np.zeros((step if self._device.type == "cpu" else len(some.owner), side, side, 3), np.float32)
            for crop, owner, box in zip(crops, some.owner, some.boxes.astype(int).tolist(), strict=False):
                _crop(images[owner], box, crop)
            out = net(_input(crops, self._device)).flatten(1)[: len(some.owner)]
            scores = _probability(out).cpu().numpy()
            judged = replace(some, scores=scores, outputs=out[:, :-2].cpu().numpy())
            seen.append(judged.take(np.flatnonzero(scores > threshold)))
        return _join(seen)


def _canvases(levels: Sequence[_Level]) -> dict[tuple[int, int], list[int]]:
    """Levels, by index, that share a canvas (height, width)."""
    canvases: dict[tuple[int, int], list[int]] = {}
    for index, level in enumerate(levels):
        height, width = (-(-side // _GRAIN) * _GRAIN for side in level.size)
        canvases.setdefault((height, width), []).append(index)
    return canvases


_NOTHING = _Candidates(np.empty(0, np.intp), np.empty((0, 4)), np.empty(0, np.float32), np.empty((0, 4), np.float32))


def _join(candidates: Sequence[_Candidates]) -> _Candidates:
    some = [part for part in candidates if len(part.owner)] or [_NOTHING]
    return _Candidates(
        *(np.concatenate([getattr(part, name) for part in some]) for name in ("owner", "boxes", "scores", "outputs"))
    )


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


def _crop(image: Image, box: Sequence[int], out: NDArray[np.float32]) -> None:
    """What lies in a box, black where that is outside the photograph, resized to `out`, (side, side, 3).

    Not rounded to whole grey levels: that would move landmarks by some hundredths of a pixel.
    """
    left, top, right, bottom = box  # counted from 1, the last one included
    crop = cut(image, left - 1, top - 1, right, bottom).astype(np.float32)
    cv2.resize(crop, out.shape[1::-1], dst=out, interpolation=cv2.INTER_AREA)


def _input(pixels: NDArray[Any], device: torch.device) -> torch.Tensor:
    """(n, h, w, 3), 0 to 255, as (n, 3, h, w) float32, −1 to 1, in the memory order that convolutions like best."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).sub(127.5).mul_(0.0078125)


def _probability(out: torch.Tensor) -> torch.Tensor:
    """Softmax over the last two channels, (not a face, a face), of a face.

    On a CPU with numpy's exponential: the last bits of torch's depend on where in the array an element stands.
    """
    difference = out[:, -2] - out[:, -1]
    if difference.device.type != "cpu":
        return 1 / (1 + difference.exp())
    with np.errstate(over="ignore"):  # no face at all: 1 / (1 + ∞)
        return 1 / (1 + torch.from_numpy(np.exp(difference.contiguous().numpy())))


def _fence(maps: torch.Tensor, sizes: torch.Tensor) -> None:
    """Put a line of −∞ below and right of what maps (n, c, h, w) hold of the sizes (n, 2), where there is room: of
    windows of two that reach across the edge, max pooling then takes what is within.
    """
    height, width = sizes.unbind(1)
    low, narrow = torch.nonzero(height < maps.shape[2])[:, 0], torch.nonzero(width < maps.shape[3])[:, 0]
    maps[low, :, height[low]] = -torch.inf
    maps[narrow, :, :, width[narrow]] = -torch.inf


class _Convolution(nn.Conv2d):
    """Without padding; on a CPU always by oneDNN. Left to itself, torch computes one small photograph by other means
    than several, with other last bits.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(n, in, h, w) to (n, out, h − kernel + 1, w − kernel + 1)."""
        if input.device.type == "cpu" and torch.backends.mkldnn.is_available():
            return torch.mkldnn_convolution(input, self.weight, self.bias, (0, 0), (1, 1), (1, 1), 1)
        return super().forward(input)


class _MaxPool(nn.Module):
    """Max pooling with stride 2 whose last windows may reach beyond the edge.

    What torch's own computes, which looks for the places of the maxima too and takes four times as long on a CPU.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self._side = side

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(n, c, h, w) to (n, c, ⌈(h − side) / 2⌉ + 1, ⌈(w − side) / 2⌉ + 1)."""
        for axis in (2, 3):
            count = -(-(maps.shape[axis] - self._side) // 2) + 1
            slices = [maps[(slice(None),) * axis + (slice(i, None, 2),)] for i in range(self._side)]
            whole = [part.narrow(axis, 0, count) for part in slices if part.shape[axis] >= count]
            maps = torch.maximum(whole[0], whole[1]) if len(whole) > 1 else whole[0].clone()
            for part in whole[2:]:
                torch.maximum(maps, part, out=maps)
            for part in slices[len(whole) :]:  # of the last window, this is beyond the edge
                inside = maps.narrow(axis, 0, count - 1)
                torch.maximum(inside, part.narrow(axis, 0, count - 1), out=inside)
        return maps


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
            layers.append(_MaxPool(pool))
    layers.append(_convolution(np.concatenate(heads[0::2], axis=-1), np.concatenate(heads[1::2]), channels))
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]


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
    path = Path(package.submodule_search_locations[0]) / "assets" / "weights" / f"{name}.lz4"
    # joblib reads pickles: safe here, as the file is as much installed code as any of the package. By its path it would
    # close the file before lz4 has done with it, which Python 3.13 tells of.
    with path.open("rb") as file:
        weights: list[NDArray[np.float32]] = joblib.load(file)
    return weights


def _convolution(kernel: NDArray[np.float32], bias: NDArray[np.float32], channels: int) -> nn.Module:
    """A layer from a kernel (height, width, in, out), or (in, out) of a dense layer over a flattened square map."""
    if kernel.ndim == 2:
        # the original is column-major: its maps are flattened by width first, then height, then channel
        side = round((len(kernel) / channels) ** 0.5)
        kernel = kernel.reshape(side, side, channels, -1).transpose(1, 0, 2, 3)
    layer = _Convolution(channels, len(bias), kernel.shape[:2])
    layer.weight = nn.Parameter(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    layer.bias = nn.Parameter(torch.from_numpy(bias))
    return layer


def _prelu(slope: NDArray[np.float32]) -> nn.PReLU:
    layer = nn.PReLU(slope.size)
    layer.weight = nn.Parameter(torch.from_numpy(slope.reshape(-1)))
    return layer
