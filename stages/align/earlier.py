"""What earlier runs have aligned and need not be aligned again.

Every part of the aligned table carries, in its metadata, the fingerprint of the parameters and the code that made it. A
row may be taken over wherever it lies if that fingerprint is today's and the photograph's SHA-256 is the same: the
table itself says so, whatever has happened to its folder since. Rows that nothing needs any more go.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables

COPIED = ["image_id", "identity", "video", "frame", "sha256"]
"""Columns that are the raw table's."""

Rows = Mapping[Path, list[tuple[int, int]]]
"""For each earlier part, (row of the new part, row of the earlier one) of what it provides."""


@dataclass(frozen=True)
class Earlier:
    """Rows that may be taken over: SHA-256 of the photograph, part and row of each."""

    files: list[Path]
    sha256: pa.ChunkedArray
    file: np.ndarray
    row: np.ndarray

    def of(self, sources: Sequence[Path]) -> Iterator[Rows]:
        """What it provides of each of some parts of the raw table."""
        columns = [tables.read_table(source, tables.RAW, ["sha256"])["sha256"] for source in sources]
        wanted = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
        # all at once: each look-up makes a hash table of all there is
        places = pc.index_in(wanted, value_set=self.sha256).fill_null(-1).to_numpy()
        for start, stop in pairwise(np.cumsum([0, *map(len, columns)]).tolist()):
            provided: dict[Path, list[tuple[int, int]]] = defaultdict(list)
            for row, place in enumerate(places[start:stop].tolist()):
                if place >= 0:
                    provided[self.files[self.file[place]]].append((row, int(self.row[place])))
            yield provided


def is_done(source: Path, target: Path, made_by: str) -> bool:
    """Whether a part of the aligned table is what would be made of a part of the raw one."""
    if not target.exists() or _made_by(target) != made_by:
        return False
    now = tables.read_table(source, tables.RAW, COPIED).combine_chunks()
    try:
        was = tables.read_table(target, tables.ALIGNED, COPIED).combine_chunks()
    except tables.TableError:
        return False
    return bool(was.equals(now))


def _made_by(path: Path) -> str | None:
    """The fingerprint of a part; None for a damaged one, which is as good as not there."""
    try:
        return tables.made_by(path)
    except tables.TableError:
        return None


def set_aside(folder: Path, aside: Path, keep: set[Path], made_by: str) -> Earlier:
    """Move the parts that are not to be kept from `folder` to `aside`; say which rows there can be taken over."""
    aside.mkdir(exist_ok=True)
    for path in set(folder.iterdir()) - keep:
        if path.suffix == ".parquet" and _made_by(path) == made_by:
            path.replace(aside / f"{tables.sha256_file(path)}.parquet")
        else:
            path.unlink()  # of other parameters, damaged, or the temporary file of a killed run
    files = [path for path in sorted(aside.glob("*.parquet")) if _made_by(path) == made_by]
    columns = [tables.read_table(path, tables.ALIGNED, ["sha256"])["sha256"] for path in files]
    lengths = [len(column) for column in columns]
    return Earlier(
        files=files,
        sha256=pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()),
        file=np.repeat(np.arange(len(files)), lengths),
        row=np.concatenate([np.arange(length) for length in [0, *lengths]]),
    )
