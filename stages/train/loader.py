"""From shards to batches on the device, decoded and augmented ahead of the network."""

import functools
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
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
from stages.shard.reader import Encoded, Rows, Split
from stages.train.augment import Draws, ImageAugmenter, crop, crop_and_flip, draw
from stages.train.cache import device_cache, host_cache
from stages.train.faces import HEIGHT, decode_all, mirror, unaligned
from stages.train.sampling import POOL_GROUPS, Balanced, Sampling, Uniform

log = logging.getLogger(__name__)

MAX_THREADS = MAX_PROCESSES = 16
CACHE_FOLDER = Path(".decoded")
SHARED_MEMORY = Path("/dev/shm")
"""Where processes hand batches over, on Linux; in a container it may be small."""
_PREFETCH = 2
"""Batches that a process makes ahead."""
_PLANNED, _TOGETHER, _AT_ONCE = 4096, 512, 32
"""Images that are planned at a time, what little that takes being dear among the decoding of many; that a thread then
makes batches of; and that it crops and flips before the next, so that they stay in a processor's cache."""


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
    Behind a `DataLoader(loader, batch_size=None, num_workers=W)` they stay on the host, and whoever takes them has to
    count them: this object hands none of them out, so its `state_dict` stays where it was.
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
        """Where it is: the iteration whose batch it hands out next."""
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
            for plans in builder.plans(self._iteration + worker.id, step=worker.num_workers):
                yield from builder.build(plans, builder.memory(1))
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
        if self._on_device is None:
            most, together = threads + 2, max(1, _TOGETHER * self._world // self._params.batch)
        else:
            most, together = 2, 1  # they take its memory, too
        ahead: deque[Future[list[Batch]]] = deque()
        pool = ThreadPoolExecutor(threads, "loader")
        try:
            for plans in builder.plans(self._iteration, together=together):
                ahead.append(pool.submit(builder.build, plans, builder.memory(together)))
                if len(ahead) > most:
                    yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _by_processes(self) -> Iterator[Batch]:
        # Forked off a process that has only imported these: a fork of this one would not have its threads, but the
        # locks that they hold.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.deaf", __name__, *["albumentations"] * self._params.augment.by_image])
        others = set(multiprocessing.active_children())
        batches: Iterator[Batch | InputError] = iter(
            DataLoader(
                _Told(self),
                batch_size=None,
                num_workers=self._processes,
                prefetch_factor=_PREFETCH,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_begin_process,
                generator=torch.Generator(),  # or it would draw from torch's own, of which dropout draws, too
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


@dataclass(frozen=True)
class _Plan:
    """What this rank's share of a batch is made of."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    draws: Draws
    jpegs: Encoded | None
    """None with a cache."""


class _Builder:
    """Makes the batches of iterations: planned many at a time by a thread of its own, made some at a time by others."""

    def __init__(self, loader: Loader, *, pin: bool) -> None:
        self._of, self._pin = loader, pin
        self._share = loader._params.batch // loader._world
        self._rows = Rows(loader._split, 3 * POOL_GROUPS)
        self._local = threading.local()

    def plans(self, first: int, *, step: int = 1, together: int = 1) -> Iterator[list[_Plan]]:
        """Of every `step`-th iteration from `first` on, so many together; what comes next is planned meanwhile."""
        count = together * max(1, _PLANNED // (together * step * self._of._params.batch))
        with ThreadPoolExecutor(1, "planner") as planner:
            coming: deque[Future[list[_Plan]]] = deque()
            for start in itertools.count(first, count * step):
                coming.append(planner.submit(self._plan, range(start, start + count * step, step)))
                if len(coming) > 1:
                    plans = coming.popleft().result()
                    for i in range(0, count, together):
                        yield plans[i : i + together]

    def _plan(self, iterations: range) -> list[_Plan]:
        of, share = self._of, self._share
        params, cached = of._params, of._host is not None or of._on_device is not None
        if isinstance(of._sampling, Uniform) and not cached:
            for groups in of._sampling.pools(iterations.start * params.batch, 2):
                self._rows.expect(groups)
        places = np.array(iterations)[:, None] * params.batch + np.arange(of._rank * share, (of._rank + 1) * share)
        rows, laps = (each.reshape(-1, share) for each in of._sampling.rows(places.reshape(-1)))
        rows, draws = draw(params.augment, params.seed, laps, rows, of._face.size, params.backbone.width)
        jpegs, found = (None, of._labels[rows]) if cached else self._rows.read(rows.reshape(-1))
        labels = found.reshape(rows.shape).astype(np.int64)
        parts = [jpegs and jpegs[i : i + share] for i in range(0, rows.size, share)]
        return [_Plan(*plan) for plan in zip(rows, labels, draws, parts, strict=True)]

    def memory(self, batches: int) -> Tensor:
        """What so many batches are made in: as faces.unaligned; for a GPU, memory that it reads by itself.

        What goes to the GPU must be this very tensor, or a part of it, not another one over the same numpy array: by it
        torch knows not to give the memory to the next batch while the GPU still reads.

        Threads should not ask for it themselves: glibc has their memory from 64 MiB that go back to the system, page by
        page, as soon as all of them are free.
        """
        of = self._of
        shape = (batches * self._share, HEIGHT, of._params.backbone.width, 3)
        if of._on_device is not None:
            return torch.empty(0)
        if not self._pin:
            return torch.from_numpy(unaligned(shape))
        return torch.empty(int(np.prod(shape)) + 1, dtype=torch.uint8, pin_memory=True)[1:].view(shape)

    def build(self, plans: Sequence[_Plan], images: Tensor) -> list[Batch]:
        """What is planned, made in `images`."""
        of = self._of
        if of._on_device is not None:
            (plan,) = plans
            # not waiting for the copy, which comes after all that the training has queued
            rows = torch.from_numpy(plan.rows).to(of._on_device.device, non_blocking=True)
            faces = of._on_device.index_select(0, rows)
            images = crop_and_flip(faces, plan.draws, of._params.backbone.width)
        else:
            for plan, out in zip(plans, np.split(images.numpy(), len(plans)), strict=True):
                self._fill(out, plan)
        shares = images.permute(0, 3, 1, 2).split(self._share)
        return [Batch(share, torch.from_numpy(plan.labels)) for share, plan in zip(shares, plans, strict=True)]

    def _fill(self, out: NDArray[np.uint8], plan: _Plan) -> None:
        """Put what the network sees of a batch where it belongs."""
        of = self._of
        if of._host is None and of._face.size == out.shape[1:3]:
            assert plan.jpegs is not None
            decode_all(plan.jpegs, out, functools.partial(_name, of._split, plan.rows), plan.draws.flips)
        else:
            self._fill_by_parts(out, plan)
        if of._params.augment.by_image:
            if not hasattr(self._local, "augmenter"):
                self._local.augmenter = ImageAugmenter(of._params.augment, out.shape[2])
            self._local.augmenter(out, plan.draws.seed)

    def _fill_by_parts(self, out: NDArray[np.uint8], plan: _Plan) -> None:
        """The same from decoded faces, or of a part of each face."""
        of = self._of
        aside = unaligned((_AT_ONCE, *of._face.size, 3))
        for start in range(0, len(out), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            places, rows = out[some], plan.rows[some]
            faces = places if of._face.size == out.shape[1:3] else aside[: len(places)]
            if of._host is not None:
                np.take(of._host, rows, axis=0, out=faces, mode="clip")
            else:
                assert plan.jpegs is not None
                decode_all(plan.jpegs[some], faces, functools.partial(_name, of._split, rows))
            if faces is not places:
                for i, place in enumerate(places):
                    crop(faces[i], plan.draws, start + i, place)
            if start < plan.draws.flips:
                mirror(places[: plan.draws.flips - start])


def _name(split: Split, rows: NDArray[np.int64], i: int) -> str:
    return split.name(int(rows[i]))


def validation_batches(split: Split, face: Face, batch: int, width: int, device: torch.device) -> Iterator[Batch]:
    """Every validation example once, in the order of the files, as it is; the last batch may be smaller."""
    size = face.size
    top, left = (size[0] - HEIGHT) // 2, (size[1] - width) // 2
    rows = Rows(split, 2)

    def build(start: int) -> Batch:
        jpegs, labels = rows.read(np.arange(start, min(start + batch, len(split))))
        faces = unaligned((len(jpegs), *size, 3))
        decode_all(jpegs, faces, lambda i: split.name(start + i))
        seen = torch.from_numpy(np.ascontiguousarray(faces[:, top : top + HEIGHT, left : left + width]))
        images = (seen.pin_memory() if device.type == "cuda" else seen).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(labels.astype(np.int64)))

    with ThreadPoolExecutor(1, "validation") as pool:
        starts = range(0, len(split), batch)
        coming = pool.submit(build, 0) if len(split) else None
        for start in starts:
            assert coming is not None
            ready = coming.result()
            coming = pool.submit(build, start + batch) if start + batch < len(split) else None
            yield ready.to(device)
