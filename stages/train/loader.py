"""From encoded examples to batches on the device: decoding and augmenting ahead of the network, in threads."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.executor import cores
from pipeline.params import Augment
from stages.shard.reader import Example, Group, read_batches, read_in_order
from stages.train.augment import Augmenter
from stages.train.model import decode_face

MAX_THREADS = 8


@dataclass(frozen=True)
class Batch:
    """Images N×3×112×width uint8 in channels-last memory, labels N int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copy where it is a GPU."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


def training_batches(
    groups: list[Group], batch: int, seed: int, augment: Augment, width: int, device: torch.device, start: int = 0
) -> Iterator[Batch]:
    """Endless augmented batches from iteration `start` on; they follow from seed and iteration alone."""
    local = threading.local()

    def build(iteration: int, examples: list[Example]) -> Batch:
        if not hasattr(local, "augmenter"):
            local.augmenter = Augmenter(augment)
        batch_seed = int(np.random.default_rng([seed, iteration]).integers(2**32))
        return _batch(local.augmenter([decode_face(e.image, width) for e in examples], batch_seed), examples, device)

    threads = min(MAX_THREADS, cores())
    stream = enumerate(read_batches(groups, batch, seed, start), start)
    ahead: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        for iteration, examples in stream:
            ahead.append(pool.submit(build, iteration, examples))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result().to(device)


def validation_batches(groups: list[Group], batch: int, width: int, device: torch.device) -> Iterator[Batch]:
    """Every validation example once, as it is."""
    for examples in read_in_order(groups, batch):
        yield _batch(np.stack([decode_face(e.image, width) for e in examples]), examples, device).to(device)


def _batch(images: np.ndarray, examples: list[Example], device: torch.device) -> Batch:
    result = Batch(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([e.label for e in examples], dtype=torch.int64)
    )
    if device.type == "cuda":
        return Batch(result.images.pin_memory(), result.labels.pin_memory())
    return result
