"""MTCNN's networks in torch: on a GPU, and on a CPU for which there are no compiled ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stages.align.area import crops, shrunk
from stages.align.networks import (
    NO_CELLS,
    OUTPUTS,
    POOLS,
    SIDES,
    Cells,
    Image,
    Layer,
    Level,
    batches,
    joined,
    layers,
    probability,
)

_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Pixels of scaled photographs in one forward pass of P-Net: on a CPU what its caches hold, on a GPU what fills it."""
_CROPS = {"cpu": {"rnet": 64, "onet": 32}, "cuda": {"rnet": 4096, "onet": 2048}}
"""Candidates in one forward pass of R-Net and O-Net, for the same reasons."""
_GRAIN = 8
"""Photographs of similar size share a canvas, whose sides are multiples of this, in pixels. A photograph always gets
the same canvas, whether it shares it or not: on another, P-Net's last bits may differ."""


class TorchNetworks:
    """What `Networks` says, on a device: "cpu" or "cuda"."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._networks = {name: _network(layers(name)).to(self._device) for name in POOLS}

    def cells(self, images: Sequence[Image], levels: Sequence[Level], threshold: float) -> Cells:
        """See `Networks`."""
        found = [NO_CELLS]
        for height, width, some in batches(levels, _GRAIN, _PIXELS[self._device.type]):
            canvas = np.zeros((len(some), height, width, 3), np.float32)
            for own, (owner, rows, columns) in zip(canvas, (levels[i] for i in some), strict=True):
                own[:rows, :columns] = shrunk(images, np.array([owner]), rows, columns)[0]
            cells = self._likely_cells(canvas, np.array([levels[i][1:] for i in some]), threshold)
            found.append(replace(cells, level=some[cells.level]))
        return joined(found)

    def look(
        self, name: str, images: Sequence[Image], owners: NDArray[np.intp], boxes: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See `Networks`."""
        side, step = SIDES[name], _CROPS[self._device.type][name]
        network = self._networks[name]
        found = [np.empty((0, OUTPUTS[name]), np.float32)]
        for i in range(0, len(owners), step):
            seen = crops(images, owners[i : i + step], boxes[i : i + step], side, side)
            count = len(seen)
            if self._device.type == "cpu":  # where the last bits may depend on how many there are
                seen = np.concatenate([seen, np.zeros((step - count, *seen.shape[1:]), np.float32)])
            with _exact():
                found.append(network(self._input(seen)).flatten(1)[:count].cpu().numpy())
        return np.concatenate(found)

    def _likely_cells(self, canvas: NDArray[np.float32], sizes: NDArray[np.intp], threshold: float) -> Cells:
        """P-Net's outputs of at least that score on canvases (n, h, w, 3), whose pictures have `sizes` (n, 2); nothing
        beyond those changes what is within.
        """
        with _exact():
            out, likely = self._maps(canvas, sizes)
            which, y, x = (likely >= threshold).nonzero(as_tuple=True)
            each = (which, torch.stack([x, y], dim=1), likely[which, y, x], out[which, :4, y, x])
            return Cells(*(part.cpu().numpy() for part in each))

    def _maps(self, canvas: NDArray[np.float32], sizes: NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs (n, 6, h', w') and face probabilities (n, h', w'), which are zero beyond the sizes."""
        network = self._networks["pnet"]
        filled = bool((sizes == canvas.shape[1:3]).all())
        maps = network[:2](self._input(canvas))
        if not filled:
            _fence(maps, torch.from_numpy(sizes).to(self._device) - 2)
        out = network[2:](maps)
        likely = _probability(out)
        if not filled:
            likely = likely.masked_fill(self._beyond(-(-(sizes - 2) // 2) - 4, out), 0)
        return out, likely

    def _beyond(self, sizes: NDArray[np.intp], maps: torch.Tensor) -> torch.Tensor:
        """(n, h, w) what of maps (n, c, h, w) lies beyond the sizes (n, 2)."""
        height, width = torch.from_numpy(sizes).to(self._device)[:, :, None].unbind(1)
        rows, columns = (torch.arange(length, device=self._device) for length in maps.shape[2:])
        return (rows >= height)[:, :, None] | (columns >= width)[:, None, :]

    def _input(self, pixels: NDArray[np.float32]) -> torch.Tensor:
        """(n, h, w, 3) as (n, 3, h, w), in the memory order that convolutions like best."""
        return torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)


@contextmanager
def _exact() -> Iterator[None]:
    """Without gradients, and without TF32, which cuDNN's convolutions use by default: it would move landmarks and flip
    close decisions.
    """
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def _probability(out: torch.Tensor) -> torch.Tensor:
    """Softmax over the last two channels, (not a face, a face), of a face.

    On a CPU by numpy: the last bits of torch's exponential depend on where in the array an element stands.
    """
    if out.device.type == "cpu":
        return torch.from_numpy(probability(out[:, -2:].movedim(1, -1).numpy()))
    return 1 / (1 + (out[:, -2] - out[:, -1]).exp())


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


def _network(trained: Sequence[Layer]) -> nn.Sequential:
    """(n, 3, h, w) to (n, channels, h', w')."""
    modules: list[nn.Module] = []
    for layer in trained:
        side, _, before, after = layer.kernel.shape
        convolution = _Convolution(before, after, side)
        convolution.weight = nn.Parameter(torch.from_numpy(layer.kernel.transpose(3, 2, 0, 1).copy()))
        convolution.bias = nn.Parameter(torch.from_numpy(layer.bias))
        modules.append(convolution)
        if layer.slope is not None:
            modules.append(nn.PReLU(after))
            modules[-1].weight = nn.Parameter(torch.from_numpy(layer.slope))
        if layer.pool:
            modules.append(nn.MaxPool2d(layer.pool, stride=2, ceil_mode=True))
    return nn.Sequential(*modules).eval().to(memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
