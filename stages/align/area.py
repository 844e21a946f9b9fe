"""One photograph at many sizes, each pixel the mean of the area that falls onto it.

What cv2.INTER_AREA computes, which reads every pixel of the photograph anew for each size, however small. From sums
down its columns a size needs but the rows at its pixels' edges.
"""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray


def shrunk(image: NDArray[np.uint8], sizes: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.uint8]]:
    """The photograph, (height, width, 3), at each of the sizes (height, width), none larger than its own."""
    height, width = image.shape[:2]
    table = cv2.integral(image).reshape(height + 1, -1)
    sums = (table[:, 3:] - table[:, :-3]).astype(np.float32)  # of each column and channel, above each row
    for rows, columns in sizes:
        at = np.linspace(0, height, rows + 1)
        above = np.minimum(at.astype(np.intp), height - 1)
        edges, next_row = sums[above], sums[above + 1]
        next_row -= edges
        next_row *= (at - above).astype(np.float32)[:, None]
        edges += next_row
        strips = (edges[1:] - edges[:-1]).reshape(rows, width, 3)
        means = cv2.resize(strips, (columns, rows), interpolation=cv2.INTER_AREA) * np.float32(rows / height)
        yield np.rint(means, out=means).astype(np.uint8)
