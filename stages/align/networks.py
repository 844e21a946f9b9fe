"""MTCNN's three networks as the authors trained them, and what the cascade asks of them.

The weights are read from the `mtcnn` package, which itself is not imported, because that would import TensorFlow.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import joblib
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""(height, width, 3) RGB."""

CELL, STRIDE = 12, 2
"""What P-Net sees of a scaled photograph at each of its outputs, and the distance between those, in pixels."""
POOLS = {"pnet": (2, 0, 0), "rnet": (3, 3, 0, 0), "onet": (3, 3, 2, 0, 0)}
"""Side of the max pooling (stride 2) after each hidden layer; 0 where there is none."""
SIDES = {"rnet": 24, "onet": 48}
"""What R-Net and O-Net look at, pixels."""
OUTPUTS = {"rnet": 6, "onet": 16}
"""How much they say of it."""


class Level(NamedTuple):
    """A photograph of a batch at one size of its pyramid."""

    owner: int
    height: int
    width: int


@dataclass(frozen=True)
class Cells:
    """What P-Net takes for faces."""

    level: NDArray[np.intp]
    """(n,) index of the level."""
    places: NDArray[np.intp]
    """(n, 2) x, y of the output, of which one is `STRIDE` pixels of the level from the next."""
    scores: NDArray[np.float32]
    """(n,)"""
    outputs: NDArray[np.float32]
    """(n, 4) offsets of the corners, in widths and heights of the box."""


NO_CELLS = Cells(np.empty(0, np.intp), np.empty((0, 2), np.intp), np.empty(0, np.float32), np.empty((0, 4), np.float32))


def joined(parts: Sequence[Cells]) -> Cells:
    """One after the other."""
    return Cells(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(NO_CELLS)))


def batches(levels: Sequence[Level], grain: int, pixels: int) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
    """Levels that share a canvas whose sides are multiples of `grain`: its height and width, and their indices, so many
    that their canvases have about `pixels` together.
    """
    sharing: dict[tuple[int, int], list[int]] = {}
    for index, level in enumerate(levels):
        height, width = (-(-side // grain) * grain for side in (level.height, level.width))
        sharing.setdefault((height, width), []).append(index)
    for (height, width), members in sharing.items():
        step = max(1, pixels // (height * width))
        for i in range(0, len(members), step):
            yield height, width, np.array(members[i : i + step])


class Networks(Protocol):
    """P-, R- and O-Net on a device. What they say of a photograph does not depend on the others of a call: to the bit
    on a CPU, on a GPU within rounding.
    """

    def cells(self, images: Sequence[Image], levels: Sequence[Level], threshold: float) -> Cells:
        """P-Net's outputs of at least that score; those of a level from left to right, from its top downwards."""
        ...

    def look(
        self, name: str, images: Sequence[Image], owners: NDArray[np.intp], boxes: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """What R-Net ("rnet") or O-Net ("onet") says of boxes.

        Args:
            owners: (n,) index of each box's photograph.
            boxes: (n, 4) left, top, right, bottom: the first pixel, counted from 0, and the one after the last. What
                lies outside the photograph is black.

        Returns:
            (n, 6 or 16): four offsets, O-Net's ten landmark coordinates, and two logits: not a face, a face.
        """
        ...


class Layer(NamedTuple):
    """A convolution without padding, then PReLU, then max pooling with stride 2 whose last windows may reach beyond the
    edge.
    """

    kernel: NDArray[np.float32]
    """(side, side, in, out)"""
    bias: NDArray[np.float32]
    """(out,)"""
    slope: NDArray[np.float32] | None
    """(out,), or no PReLU."""
    pool: int
    """Side of the pooling, or 0 for none."""


def layers(name: str) -> list[Layer]:
    """The layers of "pnet", "rnet" or "onet", from (n, h, w, 3) pixels, −1 to 1, to (n, h', w', channels), channels
    being 4 corner offsets, 10 landmark coordinates (O-Net only) and 2 logits. Dense layers are convolutions over all
    there is, which computes the same; the heads are one.

    Raises:
        FileNotFoundError: the `mtcnn` package is not installed, or has its weights elsewhere.
    """
    arrays = _weights(name)
    pools = POOLS[name]
    hidden, heads = arrays[: 3 * len(pools)], arrays[3 * len(pools) :]
    found: list[Layer] = []
    channels = 3
    for pool, kernel, bias, slope in zip(pools, hidden[0::3], hidden[1::3], hidden[2::3], strict=True):
        found.append(Layer(_convolution(kernel, channels), bias, slope.reshape(-1), pool))
        channels = len(bias)
    head = _convolution(np.concatenate(heads[0::2], axis=-1), channels)
    return [*found, Layer(head, np.concatenate(heads[1::2]), None, 0)]


def _weights(name: str) -> list[NDArray[np.float32]]:
    """Kernel, bias and PReLU slope of each hidden layer, then kernel and bias of each head."""
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


def _convolution(kernel: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """(height, width, in, out) as it is, or of (in, out) of a dense layer over a flattened square map."""
    if kernel.ndim == 2:
        # the original is column-major: its maps are flattened by width first, then height, then channel
        side = round((len(kernel) / channels) ** 0.5)
        kernel = kernel.reshape(side, side, channels, -1).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(kernel)


def probability(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over the last axis, (…, 2): not a face, a face; of a face, (…)."""
    with np.errstate(over="ignore"):  # no face at all: 1 / (1 + ∞)
        return np.asarray(1 / (1 + np.exp(logits[..., 0] - logits[..., 1])), np.float32)
