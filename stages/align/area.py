"""Parts of photographs at other sizes, each pixel the mean of the area that falls onto it: what MTCNN looks at."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from stages.align import kernels
from stages.align.warp import cut


def crops(
    images: Sequence[NDArray[np.uint8]],
    owners: NDArray[np.intp],
    boxes: NDArray[np.int64],
    height: int,
    width: int,
    *,
    rounded: bool = False,
) -> NDArray[np.float32]:
    """What lies in boxes, black outside the photographs, by cv2.INTER_AREA's rule.

    Args:
        images: (height, width, 3) RGB each.
        owners: (n,) index of each box's photograph.
        boxes: (n, 4) left, top, right, bottom: the first pixel, counted from 0, and the one after the last. Squares, or
            what does not grow in either direction.
        height: of what they become, as
        width: is, pixels.
        rounded: to whole grey levels.

    Returns:
        (n, height, width, 3), (v − 127.5) / 128 of each grey level v.

    Raises:
        ValueError: a box is empty, or a photograph is not (height, width, 3) uint8.
    """
    if (boxes[:, 2:] <= boxes[:, :2]).any():
        raise ValueError("a box is empty")
    used = {owner: index for index, owner in enumerate(dict.fromkeys(owners.tolist()))}
    some = [np.ascontiguousarray(images[owner]) for owner in used]
    which = [used[owner] for owner in owners.tolist()]
    if any(image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 for image in some):
        raise ValueError("photographs must be (height, width, 3) uint8")
    out, result = kernels.room(len(owners), height, width, 3)
    library = kernels.library()
    if library is None:
        for picture, index, (left, top, right, bottom) in zip(result, which, boxes.tolist(), strict=True):
            source = cut(some[index], left, top, right, bottom)
            source = source if rounded else source.astype(np.float32)
            picture[:] = cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA)
        result -= 127.5
        result *= 1 / 128
        return result
    places = np.array([image.ctypes.data for image in some], np.uintp)[which]
    sizes = np.array([image.shape[:2] for image in some], np.int64).reshape(-1, 2)[which]
    boxes = np.ascontiguousarray(boxes, np.int64)
    library.crops(
        places.ctypes.data,
        sizes.ctypes.data,
        boxes.ctypes.data,
        len(owners),
        height,
        width,
        rounded,
        out.ctypes.data,
    )
    return result


def shrunk(
    images: Sequence[NDArray[np.uint8]], owners: NDArray[np.intp], height: int, width: int
) -> NDArray[np.float32]:
    """Whole photographs at a size not above theirs, rounded to grey levels: (n, height, width, 3), as `crops`."""
    boxes = np.array([(0, 0, *images[owner].shape[1::-1]) for owner in owners], np.int64)
    return crops(images, owners, boxes, height, width, rounded=True)
