"""Checkpoints: everything training needs to go on as if it had never stopped.

One is a file `iteration-NNNNNNNN.pt` of what all ranks have alike, and a file of each rank with what is its own (its
class centres, for one), `iteration-NNNNNNNN.rank-RR-of-WW.pt`. The first is written last: without it, there is no
checkpoint.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.tables import atomic
from stages.train.ranks import ALONE, Ranks, agreed, barrier

log = logging.getLogger(__name__)

_WHOLE = re.compile(r"iteration-(\d{8})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it lies on the disk, on the CPU."""

    iteration: int
    """Iterations done."""
    common: dict[str, Any]
    """What all ranks had alike."""
    own: list[dict[str, Any]]
    """What each rank had for itself; large tensors are mapped, not read."""


class Checkpoints:
    """The checkpoints of one training: of one set of parameters, data and code.

    Args:
        root: folder of all trainings' checkpoints, which all ranks see.
        key: fingerprint of all that decides the outcome; a training with another key has a folder of its own.
        kept: how many of the newest stay.
        ranks: who trains together.
    """

    def __init__(self, root: Path, key: str, kept: int, ranks: Ranks = ALONE) -> None:
        self.folder = root / key[:16]
        self._kept, self._ranks = kept, ranks
        others = [path.name for path in root.glob("*") if path != self.folder]
        if others and ranks.first:
            log.info("%s: also holds unfinished trainings of other parameters, data or code: %s", root, others)

    def save(self, iteration: int, common: dict[str, Any], own: dict[str, Any]) -> None:
        """Write a checkpoint, atomically as a whole, then delete all but the newest `kept`. Every rank calls it.

        Args:
            iteration: iterations done.
            common: nested dicts and lists of tensors, numbers and strings; that of the first rank is written.
            own: likewise, of this rank.
        """
        self._write(self._own(iteration, self._ranks.rank, self._ranks.size), own)
        barrier(self._ranks)
        if self._ranks.first:
            self._write(self.folder / f"iteration-{iteration:08d}.pt", common | {"ranks": self._ranks.size})
            there = self._iterations()
            later = [other for other in there if other > iteration]  # which could not be read, or this were none
            for old in [*there[: len(there) - len(later)][: -self._kept], *later]:
                # what makes it one goes first
                for path in sorted(self.folder.glob(f"iteration-{old:08d}.*"), key=lambda path: len(path.name)):
                    path.unlink()
        barrier(self._ranks)

    def newest(self) -> Checkpoint | None:
        """The newest readable checkpoint, by any number of ranks; None where there is none. Every rank calls it.

        Loading never unpickles code.
        """
        for iteration in reversed(self._iterations()):
            path = self.folder / f"iteration-{iteration:08d}.pt"
            try:
                common = _load(path)
                size = common.pop("ranks")
                own = [_load(path := self._own(iteration, rank, size)) for rank in range(size)]
                problem = ""
            except MemoryError:
                raise
            except Exception as error:  # of a damaged one, anything
                problem = type(error).__name__
            # What one cannot read, nobody goes on from
            if agreed(self._ranks, int(bool(problem)))[0]:
                log.warning("%s: not readable (%s); trying the one before", path, problem or "by another rank")
                continue
            log.info("%s: going on from here", self.folder / f"iteration-{iteration:08d}.pt")
            return Checkpoint(iteration, common, own)
        return None

    def clear(self) -> None:
        """Delete them all: the training is finished and its model written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own(self, iteration: int, rank: int, size: int) -> Path:
        return self.folder / f"iteration-{iteration:08d}.rank-{rank:02d}-of-{size:02d}.pt"

    def _iterations(self) -> list[int]:
        found = (_WHOLE.fullmatch(path.name) for path in self.folder.glob("iteration-*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        with atomic(path) as temporary:
            torch.save(state, temporary)


def _load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state
