"""What happens to a training image before the network sees it, by albumentations."""

import os

import numpy as np

from pipeline.params import Augment

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks a server for its newest version otherwise

import albumentations as A


class Augmenter:
    """The augmentation of `train.augment`, deterministic by the seed of a batch. One for each thread."""

    def __init__(self, params: Augment) -> None:
        self._transform = A.Compose([A.HorizontalFlip(p=params.horizontal_flip)])

    def __call__(self, images: list[np.ndarray], seed: int) -> np.ndarray:
        """Augment a batch.

        Args:
            images: each 112×112×3 uint8 RGB.
            seed: of this batch; the same images and seed give the same pixels.

        Returns:
            N×112×112×3 uint8, contiguous.
        """
        self._transform.set_random_seed(seed)
        return np.stack([self._transform(image=image)["image"] for image in images])
