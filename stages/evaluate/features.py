"""Which features of an embedded set make up what is compared: an image, or a video of many."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import tables
from stages.evaluate.verification import EvaluationError

KEYS = ["image_id", "identity", "video", "status"]


@dataclass(frozen=True)
class Frames:
    """Which rows of an aligned or embedded table make up which template."""

    names: list[str]
    """T image ids or videos."""
    template: list[NDArray[np.int64]]
    """For each part, for each row: which template it belongs to, or -1 when it is not used."""
    detected: NDArray[np.bool_]
    """T flags: at least one frame has a detected face."""


@dataclass(frozen=True)
class Block:
    """Features of some faces."""

    emb: NDArray[np.float32]
    """N×D, not normalised."""
    flip: NDArray[np.float32] | None
    """N×D, of the mirror images."""
    template: NDArray[np.int64]
    """N, which template a face belongs to."""


def choose_frames(
    folder: Path, names: list[str], schema: pa.Schema = tables.ALIGNED, *, by_image: bool = False
) -> Frames:
    """Find the frames of each named template: those with a detected face, or, where there is none, the centre crops.

    Args:
        folder: of an aligned or embedded table.
        names: image ids (stills) or videos, each once.
        schema: of the table.
        by_image: names are image ids even where there are videos.

    Raises:
        EvaluationError: a name is not in the table.
        TableError: the table cannot be read.
    """
    number = {name: i for i, name in enumerate(names)}  # pyarrow would hash all of them for each part anew
    template, status = [], []
    for path in tables.parts(folder):
        part = tables.read_table(path, schema, KEYS)
        key = part["image_id"] if by_image else pc.coalesce(part["video"], part["image_id"])
        template.append(np.array([number.get(name, -1) for name in key.to_pylist()], np.int64))
        status.append(np.asarray(part["status"].to_pylist(), object))

    def having(condition: str) -> NDArray[np.bool_]:
        flags = np.zeros(len(names) + 1, bool)  # the last stands for -1
        for index, of_row in zip(template, status, strict=True):
            flags[index[of_row == condition]] = True
        return flags[:-1]

    present = np.zeros(len(names), bool)
    for index in template:
        present[index[index >= 0]] = True
    if not present.all():
        absent = [name for name, there in zip(names, present, strict=True) if not there]
        raise EvaluationError(f"{folder}: {len(absent)} images or videos of the pairs are not there, as {absent[0]!r}")

    detected, fallback = having("detected"), having("fallback")
    use_fallback = np.append(fallback & ~detected, False)
    for index, of_row in zip(template, status, strict=True):
        used = (of_row == "detected") | ((of_row == "fallback") & use_fallback[index])
        index[~used] = -1
    return Frames(names, template, detected)


def blocks(embedded: Path, frames: Frames) -> Iterator[Block]:
    """The features of the frames, a part at a time."""
    for path, template in zip(tables.parts(embedded), frames.template, strict=True):
        rows = np.flatnonzero(template >= 0)
        if len(rows):
            table = tables.read_table(path, tables.EMBEDDED, ["emb", "flip"]).take(pa.array(rows))
            flip = matrix(table["flip"]) if table["flip"].null_count == 0 else None
            yield Block(matrix(table["emb"]), flip, template[rows])


def matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Lists of equal lengths, N×D; without nulls."""
    values = column.combine_chunks().drop_null()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
