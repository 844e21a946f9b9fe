"""From shards to batches on the device, decoded and augmented ahead of the network."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.errors import InputError
from pipeline.executor import cores, keep_memory
from pipeline.params import BalancedSampling, Face, Machine, Train
from pipeline.tables import TableError
from stages.shard.reader import Rows, Split
from stages.train.augment import Draws, ImageAugmenter, crop, crop_and_flip, draw, flip_first
from stages.train.cache import device_cache, host_cache
from stages.train.faces import HEIGHT, FaceError, decode_into, unaligned
from stages.train.sampling import POOL_GROUPS, Balanced, Sampling, Uniform

log = logging.getLogger(__name__)

MAX_THREADS = MAX_PROCESSES = 16
CACHE_FOLDER = Path(".decoded")
SHARED_MEMORY = Path("/dev/shm")
"""Where processes hand batches over, on Linux; in a container it may be small."""
_PREFETCH = 2
"""Batches that a process makes ahead."""


@dataclass(frozen=True)
class Batch:
    """Images N×3×112×width uint8 in channels-last memory, labels N int64."""

    images: Tensor
    labels: Tensor

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU reads by itself."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, without waiting for the copy where it is a GPU."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Loader(IterableDataset[Batch]):
    """Endless augmented batches of a split.

    The batch of an iteration follows from seed and iteration alone: by uniform sampling every row comes exactly once
    an epoch, one epoch follows the other without a gap, and what an iteration gets does not depend on the number of
    threads or worker processes, or on the cache. Of each batch a rank takes its own equal share.

    Threads make batches ahead, or W processes of which each makes every W-th; batches arrive on the device.
    Behind a `DataLoader(loader, batch_size=None, num_workers=W)` they stay on the host.
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
        processes: int = 0,
        cache_folder: Path = CACHE_FOLDER,
    ) -> None:
        """Open it; with a cache, everything is decoded here.

        Args:
            face: what the faces are, from the index of the shards.
            params: section train of params.yaml; `batch` is that of all ranks together.
            rank: of `world` processes that train together.
            processes: that make batches; 0 for threads; see `loader_processes`.

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
        self._rank, self._world, self._processes = rank, world, processes
        self._cache, self._cache_folder = cache, cache_folder
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

    def __reduce__(self) -> tuple[Any, ...]:
        """For a process that makes batches on the host."""
        arguments = self._split, self._face, self._params, self._cache, self._rank, self._world, self._cache_folder
        return _elsewhere, (*arguments, self.state_dict())

    def __iter__(self) -> Generator[Batch]:
        """Batches from where it is on. To be closed, so that processes that make them end.

        Raises:
            FaceError: an image cannot be decoded; the message names it.
            TableError: a shard is not there or not readable.
            InputError: a process that makes batches has died.
        """
        worker = get_worker_info()
        if worker is not None:
            builder = _Builder(self, pin=False)
            for iteration in itertools.count(self._iteration + worker.id, worker.num_workers):
                yield builder.build(iteration)
        batches = self._by_processes() if self._processes else self._by_threads()
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - started
            self._iteration += 1
            yield batch.to(self._device)

    def _by_threads(self) -> Iterator[Batch]:
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
                yield ahead.popleft().result()

    def _by_processes(self) -> Iterator[Batch]:
        # Forked off a process that has only imported these: a fork of this one would not have its threads, but the
        # locks that they hold.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.deaf", __name__])
        others = set(multiprocessing.active_children())
        batches: Iterator[Batch | InputError] = iter(
            DataLoader(
                _Told(self),
                batch_size=None,
                num_workers=self._processes,
                prefetch_factor=_PREFETCH,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_begin_process,
                multiprocessing_context=context,
            )
        )
        processes = [process for process in multiprocessing.active_children() if process not in others]
        try:
            for batch in batches:
                if isinstance(batch, InputError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:  # a lost one shows as any of them
            if not wait([process.sentinel for process in processes], timeout=1):
                raise
            raise InputError(
                "a process that makes batches has died; where memory was short, lower machine.loaders, or set it to 0. "
                f"The same command goes on from the last checkpoint. ({error})"
            ) from error
        finally:
            del batches  # asks them to end, and waits for some seconds
            for process in processes:
                process.kill()


class _Told(IterableDataset["Batch | InputError"]):
    """A loader in a process of its own, from where an error comes as the last item: raised there, it would arrive with
    a traceback for its message.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> "Iterator[Batch | InputError]":
        try:
            yield from self._loader
        except InputError as error:
            yield error


def _elsewhere(
    split: Split,
    face: Face,
    params: Train,
    cache: Literal["none", "host"],
    rank: int,
    world: int,
    cache_folder: Path,
    state: dict[str, Any],
) -> Loader:
    cpu = torch.device("cpu")
    loader = Loader(split, face, params, cpu, cache=cache, rank=rank, world=world, cache_folder=cache_folder)
    loader.load_state_dict(state)
    return loader


def _begin_process(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as deaf.py has it; torch has changed that
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    keep_memory()


def _end_with_parent() -> None:
    """However that ends: torch watches only the process that this one was forked off, which waits for it in turn."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def loader_processes(machine: Machine, params: Train, device: torch.device, world: int) -> int:
    """How many processes make batches for each that trains: `machine.loaders`, or as many as it takes.

    Threads do where images are decoded and flipped. Much of what albumentations does holds Python's lock, so that many
    threads are little faster than one, and a GPU would wait for them.

    Raises:
        InputError: there is no room to hand over so many batches.
    """
    wanted = machine.loaders
    if wanted is None:
        slow = params.augment.by_image and device.type == "cuda"
        wanted = min(MAX_PROCESSES, cores()) if slow else 0
    if not wanted or not SHARED_MEMORY.is_dir():
        return wanted
    each = (_PREFETCH + 1) * (params.batch // world) * HEIGHT * params.backbone.width * 3
    free = shutil.disk_usage(SHARED_MEMORY).free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = free // each
    if wanted <= room:
        return wanted
    short = (
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but {wanted} processes need {wanted * each / 2**20:.0f} to "
        "hand batches over; enlarge it (docker run --shm-size)"
    )
    if machine.loaders is not None:
        raise InputError(f"machine.loaders: {short}, or lower machine.loaders")
    log.warning("%s; until then %s", short, f"{room} make them" if room else "threads make them, slowly")
    return room


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
