"""The decoded training set: faces as uint8, in memory that processes share, or on a GPU."""

import errno
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import tables
from pipeline.errors import InputError
from pipeline.executor import cores, memory
from pipeline.progress import bar
from stages.shard.reader import Split
from stages.train.faces import decode_all, unaligned

log = logging.getLogger(__name__)

_SHARE = 0.9
"""Of the memory there is, at most so much is taken."""


def host_cache(split: Split, size: tuple[int, int], folder: Path) -> NDArray[np.uint8]:
    """The faces of a split, (rows, height, width, 3) uint8 RGB, as a file mapped into memory.

    All processes that map it share the same pages. It stays: another training on the same shards, or one that goes on
    after an interruption, has nothing to decode. Those of other shards go, and what one that was killed has left.

    Raises:
        InputError: memory, or the disk, is too small for it.
        FaceError: an image that cannot be decoded; the message names it.
    """
    shape = (len(split), *size, 3)
    _check_room(int(np.prod(shape)), memory(), "host")
    path = folder / f"{tables.fingerprint(split.hashes, size)}.uint8"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if not path.exists():
            for other in folder.glob("*.uint8*"):  # unfinished ones, too: who holds the lock is the only one who writes
                other.unlink()
            with tables.atomic(path) as temporary:
                _allocate(temporary, int(np.prod(shape)))
                decoded = np.memmap(temporary, np.uint8, "r+", shape=shape)
                _decode(split, lambda start, faces: np.copyto(decoded[start : start + len(faces)], faces), size)
                decoded.flush()
    return np.memmap(path, np.uint8, "r", shape=shape)


def device_cache(split: Split, size: tuple[int, int], device: torch.device) -> Tensor:
    """The same on a device.

    Raises:
        InputError: its memory is too small for it.
        FaceError: an image that cannot be decoded; the message names it.
    """
    shape = (len(split), *size, 3)
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()
    _check_room(int(np.prod(shape)), room, "device")
    cache = torch.empty(shape, dtype=torch.uint8, device=device)
    _decode(split, lambda start, faces: cache[start : start + len(faces)].copy_(torch.from_numpy(faces)), size)
    return cache


def _check_room(needed: int, room: int, name: str) -> None:
    if needed > _SHARE * room:
        raise InputError(
            f"machine.cache: {name} needs {needed / 1e9:.1f} GB for the decoded faces, and there are "
            f"{room / 1e9:.1f} GB; set it to none"
        )


def _allocate(path: Path, size: int) -> None:
    """Make a file of so many bytes that has its room on the disk: who writes to a map of one that has none is killed by
    a signal, without a word, once the disk is full.
    """
    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif size > free:  # macOS has no such call
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(
                f"{path.parent}: machine.cache: host needs {size / 1e9:.1f} GB here for the decoded faces, and "
                f"{free / 1e9:.1f} GB are free ({error.strerror}): make room, put a link to a folder elsewhere in its "
                "place, or set machine.cache to none"
            ) from error


def _decode(split: Split, put: Callable[[int, NDArray[np.uint8]], object], size: tuple[int, int]) -> None:
    def one(group: int) -> int:
        images = split.read(group)["image"]
        faces = unaligned((len(images), *size, 3))
        start = int(split.starts[group])
        decode_all(images.to_pylist(), faces, lambda i: split.name(start + i))
        put(start, faces)
        return len(faces)

    with (
        bar(total=len(split), label="decoding into memory", unit="images") as shown,
        ThreadPoolExecutor(cores()) as pool,
    ):
        for count in pool.map(one, range(split.groups)):
            shown.update(count)
