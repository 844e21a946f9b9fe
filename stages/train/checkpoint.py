"""Checkpoints: everything training needs to go on as if it had never stopped."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.tables import atomic

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training: of one set of parameters, data and code.

    Args:
        root: folder of all trainings' checkpoints.
        key: fingerprint of all that decides the outcome; a training with another key has a folder of its own.
        kept: how many of the newest stay.
    """

    def __init__(self, root: Path, key: str, kept: int) -> None:
        self.folder = root / key[:16]
        self._kept = kept
        others = [path.name for path in root.glob("*") if path != self.folder]
        if others:
            log.info("%s: also holds unfinished trainings of other parameters, data or code: %s", root, others)

    def save(self, iteration: int, state: dict[str, Any]) -> None:
        """Write `iteration-NNNNNNNN.pt` atomically, then delete all but the newest `kept`.

        Args:
            iteration: iterations done.
            state: nested dicts and lists of tensors, numbers and strings.
        """
        with atomic(self.folder / f"iteration-{iteration:08d}.pt") as path:
            torch.save(state, path)
        for old in self._paths()[: -self._kept]:
            old.unlink()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """(iterations done, state on the CPU) of the newest readable checkpoint; None where there is none.

        Loading never unpickles code.
        """
        for path in reversed(self._paths()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
                log.warning("%s: not readable (%s); trying the one before", path, type(error).__name__)
                continue
            log.info("%s: going on from here", path)
            return int(path.stem.removeprefix("iteration-")), state
        return None

    def clear(self) -> None:
        """Delete them all: the training is finished and its model written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("iteration-*.pt"))
