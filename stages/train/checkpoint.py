"""Checkpoints: everything training needs to go on as if it had never stopped.

One is a file `iteration-NNNNNNNN.pt` of what all ranks have alike, and a file of each rank with what is its own (its
class centres, for one), `iteration-NNNNNNNN.rank-RR-of-WW.pt`. The first is written last: without it, there is no
checkpoint. `made_by.json` beside them says which training it is.
"""

import json
import logging
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, BinaryIO

import torch

from pipeline.errors import InputError
from pipeline.tables import atomic, fingerprint, remove_leftovers
from stages.train.ranks import ALONE, Ranks, agreed, failing_together

log = logging.getLogger(__name__)

_FILE = re.compile(r"iteration-(\d{8})(\.rank-\d+-of-\d+)?\.pt")
_FOLDER = re.compile(r"[0-9a-f]{16}")
_MADE_BY = "made_by.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies on the disk, on the CPU."""

    iteration: int
    """Iterations done."""
    common: dict[str, Any]
    """What all ranks had alike."""
    own: list[dict[str, Any]]
    """What each rank had for itself; large tensors are mapped, not read, as long as anything holds them."""


@dataclass(frozen=True)
class Other:
    """What another training has left."""

    folder: Path
    iteration: int
    """Of its newest checkpoint."""
    made_by: dict[str, Any]
    """All that decides its outcome, by name; empty where it does not say."""

    @property
    def run_id(self) -> str | None:
        """Of its MLflow run; None where it had none, or its newest checkpoint cannot be read."""
        try:
            found: str | None = _read(_whole(self.folder, self.iteration), mapped=True)["run_id"]
        except (InputError, OSError):
            return None
        return found


class Checkpoints:
    """The checkpoints of one training: of one set of parameters, data and code.

    Args:
        root: folder of all trainings' checkpoints, which all ranks see.
        made_by: all that decides the outcome, by name, as JSON has it; a training by anything else has a folder of its
            own.
        kept: how many of the newest stay.
        ranks: who trains together.
    """

    def __init__(self, root: Path, made_by: Mapping[str, Any], kept: int, ranks: Ranks = ALONE) -> None:
        self.folder = root / fingerprint(dict(made_by))[:16]
        self._made_by, self._kept, self._ranks = dict(made_by), kept, ranks

    def save(self, iteration: int, common: dict[str, Any], own: dict[str, Any]) -> None:
        """Write a checkpoint, atomically as a whole, then delete all but the newest `kept`. Every rank calls it.

        Args:
            iteration: iterations done.
            common: nested dicts and lists of tensors, numbers and strings; that of the first rank is written.
            own: likewise, of this rank.

        Raises:
            InputError: not all ranks share the folder.
            OSError: the system refuses, for want of space for one; the checkpoints before stay. (An InputError with its
                message on ranks that it did not refuse anything.)
        """
        ranks = self._ranks
        with failing_together(ranks):
            _write(self._own(iteration, ranks.rank, ranks.size), own)
        with failing_together(ranks):
            if ranks.first:
                self._complete(iteration, common)

    def _complete(self, iteration: int, common: dict[str, Any]) -> None:
        """Write what makes a checkpoint of the ranks' files, and delete older ones."""
        size = self._ranks.size
        for path in (self._own(iteration, rank, size) for rank in range(size)):
            if not path.exists():
                raise InputError(f"{path}: not here, where another process has written it: {_SHARE}")
        made_by = self.folder / _MADE_BY
        if not made_by.exists():
            with atomic(made_by) as temporary:
                temporary.write_text(json.dumps(self._made_by, indent=2, sort_keys=True) + "\n")
        _write(self._whole(iteration), common | {"ranks": size})
        self._delete_but([other for other in _iterations(self.folder) if other <= iteration][-self._kept :])

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is not damaged, by any number of ranks; None where there is none.

        Every rank calls it; the first decides. Damaged ones get other names, `.damaged`, and stay. Loading never
        unpickles code.

        Raises:
            InputError: all that there are are damaged, one cannot be loaded, or not all ranks share the folder.
            OSError: the system refuses to read one.
        """
        ranks, iteration = self._ranks, 0
        with failing_together(ranks):
            if ranks.first:
                iteration = self._choose()
        (iteration,) = agreed(ranks, iteration)
        if not iteration:
            return None
        with failing_together(ranks):
            found = self._load(iteration)
        if ranks.first:
            log.info("%s: going on from here", self._whole(iteration))
        return found

    def others(self) -> list[Other]:
        """What other trainings have left in the same root."""
        folders = [path for path in self.folder.parent.glob("*") if path != self.folder and path.is_dir()]
        return [
            Other(path, max(_iterations(path), default=0), _read_made_by(path))
            for path in sorted(folders)
            if _FOLDER.fullmatch(path.name)
        ]

    def delete_others(self) -> None:
        """Delete what other trainings have left in the same root: this one has ended, and its outcome is written."""
        for folder in self.folder.parent.glob(f"*{_DELETED}"):  # what a kill has left of this
            rmtree(folder)
        for other in self.others():
            # half deleted under its own name it would be damaged
            rmtree(other.folder.rename(other.folder.with_name(f"{other.folder.name}{_DELETED}")))

    def _choose(self) -> int:
        """The iteration of the newest checkpoint that is whole; 0 where there is none."""
        there = _iterations(self.folder)
        remove_leftovers(self.folder)
        self._delete_but(there)  # files of checkpoints that never became whole
        damaged: list[int] = []
        problems: list[str] = []
        for iteration in reversed(there):
            problem = self._damage(iteration)
            if not problem:
                break
            log.warning("%s; trying the one before", problem)
            damaged.append(iteration)
            problems.append(problem)
        else:
            if problems:
                raise InputError(
                    f"{self.folder}: none of its checkpoints can be used; to train from the beginning, delete the "
                    f"folder ({'; '.join(problems)})"
                )
            return 0
        for path, of in self._files():
            if of in damaged:
                path.rename(path.with_name(f"{path.name}.damaged"))
        return iteration

    def _damage(self, iteration: int) -> str:
        """What is wrong with a checkpoint, and in which file; empty where nothing is."""
        path = self._whole(iteration)
        if problem := _damage(path):
            return problem
        size = _read(path, mapped=True)["ranks"]
        return next(filter(None, (_damage(self._own(iteration, rank, size)) for rank in range(size))), "")

    def _load(self, iteration: int) -> Checkpoint:
        try:
            # Not mapped, for some of it becomes part of the training, which would hold the file, deleted or not
            common = _read(self._whole(iteration), mapped=False)
            size = common.pop("ranks")
            own = [_read(self._own(iteration, rank, size), mapped=True) for rank in range(size)]
        except FileNotFoundError as error:
            raise InputError(f"{error.filename}: not here, where the first process has read it: {_SHARE}") from error
        return Checkpoint(iteration, common, own)

    def _whole(self, iteration: int) -> Path:
        return _whole(self.folder, iteration)

    def _own(self, iteration: int, rank: int, size: int) -> Path:
        return self.folder / f"iteration-{iteration:08d}.rank-{rank:02d}-of-{size:02d}.pt"

    def _files(self) -> list[tuple[Path, int]]:
        """All files of checkpoints and their iterations; what makes it one comes first."""
        found = ((path, _FILE.fullmatch(path.name)) for path in self.folder.glob("iteration-*"))
        return sorted(((path, int(match[1])) for path, match in found if match), key=lambda each: len(each[0].name))

    def _delete_but(self, kept: list[int]) -> None:
        for path, iteration in self._files():
            if iteration not in kept:
                path.unlink(missing_ok=True)


def _whole(folder: Path, iteration: int) -> Path:
    """What makes a checkpoint of the files of its ranks."""
    return folder / f"iteration-{iteration:08d}.pt"


_DELETED = ".deleted"
_SHARE = "all processes of a training, on whatever machine, must see the same folder of checkpoints"


def _iterations(folder: Path) -> list[int]:
    """Of a folder's checkpoints, increasing."""
    found = (_FILE.fullmatch(path.name) for path in folder.glob("iteration-*.pt"))
    return sorted(int(match[1]) for match in found if match and not match[2])


def _read_made_by(folder: Path) -> dict[str, Any]:
    try:
        made_by: dict[str, Any] = json.loads((folder / _MADE_BY).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return made_by


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write a file that ends with a checksum of all that comes before, which torch passes over."""
    with atomic(path) as temporary, temporary.open("w+b") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own, over that of the system
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        size = file.tell()
        file.seek(0)
        file.write(_checksum(file, size))


def _read(path: Path, *, mapped: bool) -> dict[str, Any]:
    """What a file that is not damaged holds.

    Raises:
        InputError: torch cannot load it all the same: memory is short, for one.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise InputError(f"{path}: is not damaged, but cannot be loaded; nothing was deleted ({said})") from error
    return state


def _damage(path: Path) -> str:
    """What is wrong with a file, by its checksum; empty where nothing is. (torch does not look at those of zip files.)

    It takes as long as reading and half a second or so a GB.
    """
    try:
        with path.open("rb") as file:
            size = max(path.stat().st_size - _CHECKSUM, 0)
            whole = _checksum(file, size) == file.read()
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return "" if whole else f"{path}: damaged, not what was written"


_CHECKSUM = 4
"""Bytes."""


def _checksum(file: BinaryIO, size: int) -> bytes:
    """CRC-32 of the next `size` bytes of a file, or of what there is."""
    value = 0
    while piece := file.read(min(size, 1 << 20)):
        value, size = zlib.crc32(piece, value), size - len(piece)
    return value.to_bytes(_CHECKSUM)
