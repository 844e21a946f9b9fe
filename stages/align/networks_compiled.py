"""MTCNN's networks on a CPU, in C++ (kernels.cpp)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stages.align import kernels
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

_PIXELS = 1 << 16
"""Pixels of scaled photographs in one pass of P-Net, and"""
_CROPS = {"rnet": 64, "onet": 16}
"""candidates in one of the others: few enough for what lies between two layers to stay in the caches."""


class CompiledNetworks:
    """What `Networks` says, on a CPU, by one thread. `kernels.library` must be there."""

    def __init__(self) -> None:
        self._networks = {name: [CompiledLayer(layer) for layer in layers(name)] for name in POOLS}

    def cells(self, images: Sequence[Image], levels: Sequence[Level], threshold: float) -> Cells:
        """See `Networks`."""
        found = [NO_CELLS]
        for height, width, some in batches(levels, 1, _PIXELS):
            out = self._run("pnet", shrunk(images, np.array([levels[i].owner for i in some]), height, width))
            likely = probability(out[..., -2:])
            which, y, x = (likely >= threshold).nonzero()
            places = np.stack([x, y], axis=1)
            found.append(Cells(some[which], places, likely[which, y, x], out[which, y, x, :4]))
        return joined(found)

    def look(
        self, name: str, images: Sequence[Image], owners: NDArray[np.intp], boxes: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """See `Networks`."""
        side, step = SIDES[name], _CROPS[name]
        found = [np.empty((0, OUTPUTS[name]), np.float32)]
        for i in range(0, len(owners), step):
            seen = crops(images, owners[i : i + step], boxes[i : i + step], side, side)
            found.append(self._run(name, seen)[:, 0, 0])
        return np.concatenate(found)

    def _run(self, name: str, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        for layer in self._networks[name]:
            maps = layer(maps)
        return maps


class CompiledLayer:
    """A `Layer`, from maps (n, h, w, in) to (n, h', w', out)."""

    def __init__(self, layer: Layer) -> None:
        self._kernel, _, self._in, self.channels = layer.kernel.shape
        self._pool = layer.pool or 1
        self._weights = _packed(layer.kernel)
        self._minimal = _packed(_transformed(layer.kernel)) if is_minimal(layer) else None
        beyond = (0, -self.channels % kernels.LANES)
        self._bias = np.pad(layer.bias, beyond)
        self._slope = np.pad(np.ones_like(layer.bias) if layer.slope is None else layer.slope, beyond)
        self._bias_and_slope = self._bias.ctypes.data, self._slope.ctypes.data

    def __call__(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply it.

        Raises:
            ValueError: the maps are not float32 in one piece, not of `in` channels, or smaller than the kernel.
        """
        library = kernels.library()
        assert library is not None
        count, height, width, channels = maps.shape
        fit = channels == self._in and min(height, width) >= self._kernel
        if not fit or maps.dtype != np.float32 or not maps.flags.c_contiguous:
            raise ValueError(f"no maps of {self._in} float32 channels, in one piece, for a kernel of {self._kernel}")
        stride = 1 if self._pool == 1 else 2
        rows, columns = (max(0, -(-(side - self._kernel + 1 - self._pool) // stride)) + 1 for side in (height, width))
        out, result = kernels.room(count, rows, columns, self.channels)
        minimal = None if height == width == self._kernel else self._minimal
        library.layer(
            maps.ctypes.data,
            count,
            height,
            width,
            self._kernel,
            self._in,
            self.channels,
            (self._weights if minimal is None else minimal).ctypes.data,
            *self._bias_and_slope,
            minimal is not None,
            self._pool,
            out.ctypes.data,
        )
        return result


def is_minimal(layer: Layer) -> bool:
    """Whether minimal filtering saves more in multiplications than its transformations take."""
    return layer.kernel.shape[0] == 3 and layer.kernel.shape[2] >= 16


def _transformed(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(3, 3, in, out) weights as minimal filtering F(2×2, 3×3) wants them: (4, 4, in, out)."""
    g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    return np.einsum("ai,bj,ijcd->abcd", g, g, kernel.astype(np.float64)).astype(np.float32)


def _packed(kernel: NDArray[np.float32]) -> NDArray[np.float32]:
    """(side, side, in, out) weights in the order in which kernels.cpp reads them."""
    kernel = np.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -kernel.shape[-1] % kernels.LANES)))
    blocks = np.split(kernel, range(2 * kernels.LANES, kernel.shape[-1], 2 * kernels.LANES), axis=-1)
    return np.concatenate([block.ravel() for block in blocks])
