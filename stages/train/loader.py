"""From shards to batches on the device, decoded and augmented ahead of the network."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.errors import InputError
from pipeline.executor import cores
from pipeline.params import BalancedSampling, Face, Train
from pipeline.tables import TableError
from stages.shard.reader import Rows, Split
from stages.train.augment import Draws, ImageAugmenter, crop, crop_and_flip, draw, flip_first
from stages.train.cache import device_cache, host_cache
from stages.train.faces import HEIGHT, FaceError, decode_into, unaligned
from stages.train.sampling import POOL_GROUPS, Balanced, Sampling, Uniform

MAX_THREADS = 16
CACHE_FOLDER = Path(".decoded")


@dataclass(frozen=True)
class Batch:
    """Images N×3×112×width uint8 in channels-last memory, labels N int64."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copy where it is a GPU."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Loader(IterableDataset[Batch]):
    """Endless augmented batches of a split.

    The batch of an iteration follows from seed and iteration alone: by uniform sampling every row comes exactly once
    an epoch, one epoch follows the other without a gap, and what an iteration gets does not depend on the number of
    threads or worker processes, or on the cache. Of each batch a rank takes its own equal share.

    Iterated by itself, threads decode ahead and batches arrive on the device. Behind a `DataLoader(loader,
    batch_size=None, num_workers=W)` each worker process makes every W-th batch, and they stay on the host.
    """

    def __init__(
        self,
        split: Split,
        face: Face,
        params: Train,
        device: torch.device,
        *,
        cache: Literal["none", "host", "device"] = "none",
        rank: int = 0,
        world: int = 1,
        cache_folder: Path = CACHE_FOLDER,
    ) -> None:
        """Open it; with a cache, everything is decoded here.

        Args:
            face: what the faces are, from the index of the shards.
            params: section train of params.yaml; `batch` is that of all ranks together.
            rank: of `world` processes that train together.

        Raises:
            TableError: the split has fewer rows than a batch.
            InputError: the faces are too small, the ranks cannot share a batch equally, or there is no room for the
                cache.
        """
        if len(split) < params.batch:
            raise TableError(
                f"the training split has {len(split)} examples, fewer than a batch of {params.batch}: lower "
                "train.batch or add images"
            )
        if params.batch % world:
            raise InputError(f"train.batch: {params.batch} cannot be shared equally by {world} processes")
        room = min(face.size[0] - HEIGHT, face.size[1] - params.backbone.width)
        if room < 2 * params.augment.shift:
            raise InputError(
                f"train.augment.shift: {params.augment.shift} pixels around what a network of "
                f"{HEIGHT}×{params.backbone.width} sees are more than the faces of {face.size[0]}×{face.size[1]} "
                "have: raise align.face.margin, or lower the shift or train.backbone.width"
            )
        self._split, self._face, self._params, self._device = split, face, params, device
        self._rank, self._world = rank, world
        self._sampling: Sampling
        if isinstance(params.sampling, BalancedSampling):
            balanced = params.sampling
            self._sampling = Balanced(split.labels, balanced.identities, balanced.images, params.seed)
        else:
            self._sampling = Uniform(split.starts, params.seed)
        self._host = host_cache(split, face.size, cache_folder) if cache == "host" else None
        self._on_device = device_cache(split, face.size, device) if cache == "device" else None
        self._labels = split.labels if cache != "none" else np.empty(0, np.int32)
        self._iteration = 0
        self.waited = 0.0
        """Seconds that whoever iterates has waited for batches, so far."""

    @property
    def batches_per_epoch(self) -> float:
        """Iterations in which every row comes once."""
        return len(self._split) / self._params.batch

    def state_dict(self) -> dict[str, Any]:
        """Where it is: the iteration whose batch comes next."""
        return {"iteration": self._iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader, with any number of threads, workers or ranks, was."""
        self._iteration = int(state["iteration"])

    def __iter__(self) -> Iterator[Batch]:
        """Batches from where it is on."""
        worker = get_worker_info()
        if worker is not None:
            builder = _Builder(self, pin=False)
            iteration = self._iteration + worker.id
            while True:
                yield builder.build(iteration)
                iteration += worker.num_workers
        builder = _Builder(self, pin=self._device.type == "cuda")
        threads = min(MAX_THREADS, cores())
        most = 2 * threads if self._on_device is None else 2  # batches that take its memory, too
        ahead: deque[Future[Batch]] = deque()
        submitted = self._iteration
        with ThreadPoolExecutor(threads, "loader") as pool:
            while True:
                while len(ahead) <= most:
                    builder.read_ahead(submitted)
                    ahead.append(pool.submit(builder.build, submitted))
                    submitted += 1
                started = time.perf_counter()
                batch = ahead.popleft().result()
                self.waited += time.perf_counter() - started
                self._iteration += 1
                yield batch.to(self._device)


class _Builder:
    """Makes the batch of any iteration; its threads share what has been read."""

    def __init__(self, loader: Loader, *, pin: bool) -> None:
        self._of, self._pin = loader, pin
        self._rows = Rows(loader._split, 3 * POOL_GROUPS)
        self._local = threading.local()

    def read_ahead(self, iteration: int) -> None:
        """Have what the iteration reads on its way, and what comes after that."""
        sampling = self._of._sampling
        if isinstance(sampling, Uniform) and self._of._host is None and self._of._on_device is None:
            for groups in sampling.pools(iteration * self._of._params.batch, 2):
                self._rows.expect(groups)

    def build(self, iteration: int) -> Batch:
        """This rank's share of the iteration's batch."""
        of = self._of
        params, size = of._params, of._face.size
        share = params.batch // of._world
        start = iteration * params.batch + of._rank * share
        rows, epochs = of._sampling.rows(start, start + share)
        width = params.backbone.width
        rows, draws = draw(params.augment, params.seed, epochs, rows, size, width)
        if of._on_device is not None:
            faces = of._on_device.index_select(0, torch.from_numpy(rows).to(of._on_device.device))
            return _batch(crop_and_flip(faces, draws, width), of._labels[rows])
        shape = (share, HEIGHT, width, 3)
        images = _pinned(shape) if self._pin else torch.from_numpy(unaligned(shape))
        out = images.numpy()
        labels = self._fill(out, rows, draws)
        flip_first(out, draws.flips)
        if params.augment.by_image:
            if not hasattr(self._local, "augmenter"):
                self._local.augmenter = ImageAugmenter(params.augment, width)
            self._local.augmenter(out, draws.seed)
        return _batch(images, labels)

    def _fill(self, out: NDArray[np.uint8], rows: NDArray[np.int64], draws: Draws) -> NDArray[np.int32]:
        """Put what the network sees of some rows where it belongs; their labels."""
        of = self._of
        whole = of._face.size == out.shape[1:3]
        if of._host is not None:
            if whole:
                np.take(of._host, rows, axis=0, out=out, mode="clip")
            else:
                for i, row in enumerate(rows.tolist()):
                    crop(of._host[row], draws, i, out[i])
            return of._labels[rows]
        images, labels = self._rows.read(rows)
        aside = unaligned((*of._face.size, 3))
        for i, image in enumerate(images):
            try:
                decode_into(image, out[i] if whole else aside)
            except FaceError as error:
                raise FaceError(f"{of._split.name(int(rows[i]))}: {error}") from error
            if not whole:
                crop(aside, draws, i, out[i])
        return labels


def validation_batches(split: Split, face: Face, batch: int, width: int, device: torch.device) -> Iterator[Batch]:
    """Every validation example once, in the order of the files, as it is; the last batch may be smaller."""
    size = face.size
    top, left = (size[0] - HEIGHT) // 2, (size[1] - width) // 2
    rows = Rows(split, 2)

    def build(start: int) -> Batch:
        images, labels = rows.read(np.arange(start, min(start + batch, len(split))))
        faces = unaligned((len(images), *size, 3))
        for i, image in enumerate(images):
            decode_into(image, faces[i])
        seen = torch.from_numpy(np.ascontiguousarray(faces[:, top : top + HEIGHT, left : left + width]))
        return _batch(seen.pin_memory() if device.type == "cuda" else seen, labels)

    with ThreadPoolExecutor(1, "validation") as pool:
        starts = range(0, len(split), batch)
        coming = pool.submit(build, 0) if len(split) else None
        for start in starts:
            assert coming is not None
            ready = coming.result()
            coming = pool.submit(build, start + batch) if start + batch < len(split) else None
            yield ready.to(device)


def _pinned(shape: tuple[int, ...]) -> Tensor:
    """As faces.unaligned, in memory that a GPU reads by itself.

    What goes to the GPU must be this very tensor, not another one over the same numpy array: by it torch knows not to
    give the memory to the next batch while the GPU still reads.
    """
    size = int(np.prod(shape))
    return torch.empty(size + 1, dtype=torch.uint8, pin_memory=True)[1:].view(shape)


def _batch(images: Tensor, labels: NDArray[np.int32]) -> Batch:
    return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))
