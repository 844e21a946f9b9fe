"""What happens to a training image before the network sees it.

All of it follows from (seed, lap, row) alone, whoever does it and when; and by any sampling a row comes once a lap, so
that each time something else befalls it. A flip (the paper's only augmentation) and a shift are done here, to whole
batches, on the CPU or on a GPU alike; the rest by albumentations, image by image:

crop            a part of 60 to 100 % of the area, at most a tenth wider or narrower than it is, enlarged again
low_resolution  reduced to 15 to 60 % of its side and enlarged again
colour          brightness, contrast and saturation by up to 30 %, hue by up to 2 %
blur            Gaussian, of sigma 0.5 to 2 pixels
jpeg            at a quality of 20 to 90
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.params import Augment
from stages.train.faces import HEIGHT
from stages.train.sampling import uniforms

if TYPE_CHECKING:
    import albumentations

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks a server for its newest version otherwise


@dataclass(frozen=True)
class Draws:
    """What befalls each image of a batch."""

    flips: int
    """The first so many are mirrored: together, so that it takes few calls."""
    top: list[int]
    left: list[int]
    """Corner of what the network sees in the aligned face, pixels."""
    seed: list[int]
    """For albumentations."""


def draw(
    params: Augment,
    seed: int,
    laps: NDArray[np.int64],
    rows: NDArray[np.int64],
    size: tuple[int, int],
    width: int,
) -> tuple[NDArray[np.int64], list[Draws]]:
    """The draws of some batches, of faces of `size` (height, width) for a network that sees 112×width of them.

    Args:
        laps: (batches, examples), as `rows`: what Sampling gives with them.

    Returns:
        The rows in their new order, in each batch those to be mirrored first; and what befalls them in that order.
    """
    u, drawn = np.zeros((*rows.shape, 4)), 4 if params.shift or params.by_image else 1
    u[..., :drawn] = uniforms(seed, laps.reshape(-1), rows.reshape(-1), drawn).reshape(*rows.shape, drawn)
    flip = u[..., 0] < params.horizontal_flip
    order = np.argsort(~flip, axis=1, kind="stable")
    u = np.take_along_axis(u, order[..., None], axis=1)
    steps = 2 * params.shift + 1
    top, left = (np.floor(u[..., i] * steps).astype(np.int64) - params.shift for i in (1, 2))
    draws = zip(
        flip.sum(axis=1).tolist(),
        (top + (size[0] - HEIGHT) // 2).tolist(),
        (left + (size[1] - width) // 2).tolist(),
        np.floor(u[..., 3] * 2**32).astype(np.int64).tolist(),
        strict=True,
    )
    return np.take_along_axis(rows, order, axis=1), [Draws(*each) for each in draws]


class ImageAugmenter:
    """Crop, low resolution, colour, blur and JPEG, by albumentations. One for each thread."""

    def __init__(self, params: Augment, width: int) -> None:
        """For images of 112×width pixels."""
        self._transforms = _transforms(width)
        self._shares = np.array([params.crop, params.low_resolution, params.colour, params.blur, params.jpeg])

    def __call__(self, images: NDArray[np.uint8], seeds: list[int]) -> None:
        """Change images (n, 112, width, 3) uint8 RGB in place; the same images and seeds give the same pixels.

        What befalls an image is drawn here, not by A.Compose, which costs as much for an image that it leaves alone.
        """
        drawn = uniforms(0, np.asarray(seeds), np.zeros(len(seeds), np.int64), len(self._transforms))
        for i, which in np.argwhere(drawn < self._shares).tolist():
            transform = self._transforms[which]
            transform.set_random_seed(seeds[i] + which)
            images[i] = transform(image=images[i])["image"]


def _transforms(width: int) -> "list[albumentations.BasicTransform]":
    import albumentations as A  # here, for it takes most of a second, and not all who load batches augment

    class Jpeg(A.ImageCompression):
        """That of RGB images: albumentations hands them to OpenCV, which takes them to be BGR."""

        def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
            """Compress an image of RGB."""
            return super().apply(img[..., ::-1], **params)[..., ::-1]

    resize = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}
    colour = {"brightness": (0.7, 1.3), "contrast": (0.7, 1.3), "saturation": (0.7, 1.3), "hue": (-0.02, 0.02)}
    return [
        A.RandomResizedCrop((HEIGHT, width), scale=(0.6, 1), ratio=_ratio(width), p=1),
        A.Downscale((0.15, 0.6), resize, p=1),
        A.ColorJitter(**colour, p=1),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.5, 2), p=1),
        Jpeg(quality_range=(20, 90), p=1),
    ]


def _ratio(width: int) -> tuple[float, float]:
    return 0.9 * width / HEIGHT, 1.1 * width / HEIGHT


def crop(face: NDArray[np.uint8], draws: Draws, i: int, out: NDArray[np.uint8]) -> None:
    """What the network sees of the i-th face (H, W, 3), into its own array `out` (112, width, 3)."""
    top, left = draws.top[i], draws.left[i]
    out[:] = face[top : top + out.shape[0], left : left + out.shape[1]]


def crop_and_flip(faces: Tensor, draws: Draws, width: int) -> Tensor:
    """Both for a batch of faces (n, H, W, 3), on the device where it lies: (n, 112, width, 3)."""
    if tuple(faces.shape[1:3]) != (HEIGHT, width):
        top, left = (torch.tensor(x).to(faces.device, non_blocking=True) for x in (draws.top, draws.left))
        rows = (top[:, None] + torch.arange(HEIGHT, device=faces.device))[:, :, None]
        columns = (left[:, None] + torch.arange(width, device=faces.device))[:, None, :]
        faces = faces[torch.arange(len(faces), device=faces.device)[:, None, None], rows, columns]
    return torch.cat([faces[: draws.flips].flip(2), faces[draws.flips :]])
