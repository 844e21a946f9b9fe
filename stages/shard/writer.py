"""Writing shards in a global order that has nothing to do with the order of the aligned parts, in bounded memory.

Two passes, as an external sort has them. First the aligned parts are read once, some at a time, and what they hold is
written to a spill, ordered by where it goes. Then each group of shards collects its rows from all spills. Neither pass
holds more than MEMORY_BYTES of images, or one shard where that is larger, however many there are: with B bytes in all
there are B / MEMORY_BYTES spills, of as many batches each.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.executor import run_all
from pipeline.params import Machine

MEMORY_BYTES = 128 << 20
"""Images that a worker holds at once."""

_SPILL = pa.schema([("place", pa.int64()), ("image", pa.large_binary()), ("label", pa.int32())])


@dataclass(frozen=True)
class File:
    """A shard: its name, and which places of the global order it holds."""

    name: str
    start: int
    stop: int
    metadata: Mapping[str, str]


def shard_files(split: str, rows: int, start: int, shard_rows: int, metadata: Mapping[str, str]) -> list[File]:
    """The shards of a split that begins at place `start` of the global order."""
    count = -(-rows // shard_rows)
    return [
        File(
            f"{split}-{index:05d}-of-{count:05d}.parquet",
            start + index * shard_rows,
            start + min(rows, (index + 1) * shard_rows),
            metadata,
        )
        for index in range(count)
    ]


def write_shards(
    aligned: Path,
    out: Path,
    files: list[File],
    order: NDArray[np.intp],
    labels: NDArray[np.int32],
    row_group_rows: int,
    machine: Machine,
) -> list[str]:
    """Write rows of the aligned table as shards. What an interrupted call has done is not done again.

    Args:
        aligned: folder of the aligned table.
        out: folder of the shards; spills lie in its folder `.spill` meanwhile.
        files: the shards, which cover `order` from its first place to its last.
        order: indices into the whole aligned table, place by place.
        labels: the label of each row of the whole aligned table.
        row_group_rows: examples in a row group.

    Returns:
        The SHA-256 of each file.
    """
    place = np.full(len(labels), -1, np.int64)
    place[order] = np.arange(len(order))
    spill = out / ".spill"
    chunks = list(_chunks(tables.parts(aligned)))
    groups = _groups(files, sum(path.stat().st_size for chunk in chunks for path in chunk) / max(1, len(labels)))
    ends = np.asarray([group[-1].stop for group in groups])
    sizes = [sum(tables.rows(path) for path in chunk) for chunk in chunks]
    starts = np.cumsum([0, *sizes])
    spills = [(spill / f"{index:05d}.arrow").resolve() for index in range(len(chunks))]
    run_all(
        _spill,
        [
            ([path.resolve() for path in chunk], spills[i], place[slice(*starts[i : i + 2])], labels_of, ends)
            for i, chunk in enumerate(chunks)
            for labels_of in [labels[slice(*starts[i : i + 2])]]
            if not spills[i].exists()
        ],
        machine=machine,
        label="shuffling",
        unit="images",
        sizes=[size for i, size in enumerate(sizes) if not spills[i].exists()],
    )
    digests = run_all(
        _gather,
        [(spills, number, out.resolve(), group, row_group_rows) for number, group in enumerate(groups)],
        machine=machine,
        label="writing shards",
        unit="images",
        sizes=[group[-1].stop - group[0].start for group in groups],
    )
    shutil.rmtree(spill)
    return [digest for group in digests for digest in group]


def _chunks(paths: list[Path]) -> Iterator[list[Path]]:
    """Parts together, as many as fit into memory."""
    chunk: list[Path] = []
    size = 0
    for path in paths:
        if chunk and size + path.stat().st_size > MEMORY_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(path)
        size += path.stat().st_size
    yield chunk


def _groups(files: list[File], row_bytes: float) -> list[list[File]]:
    """Shards together, as many as fit into memory."""
    groups: list[list[File]] = [[]]
    for file in files:
        if groups[-1] and (file.stop - groups[-1][0].start) * row_bytes > MEMORY_BYTES:
            groups.append([])
        groups[-1].append(file)
    return groups


def _spill(
    paths: list[Path], target: Path, place: NDArray[np.int64], labels: NDArray[np.int32], ends: NDArray[np.int64]
) -> None:
    """Write the rows of some parts that have a place, ordered by it, a batch for each group of shards."""
    columns = [tables.read_table(path, tables.ALIGNED, ["image"])["image"].cast(pa.large_binary()) for path in paths]
    chunks = [chunk for column in columns for chunk in column.chunks]
    images = pa.chunked_array(chunks, pa.large_binary()).combine_chunks()  # of many, each `take` would do that anew
    del columns, chunks
    rows = np.argsort(place, kind="stable")
    rows = rows[place[rows] >= 0]
    bounds = np.searchsorted(place[rows], [0, *ends])
    with (
        tables.atomic(target) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, _SPILL) as to,
    ):
        for start, stop in pairwise(bounds.tolist()):
            some = rows[start:stop]
            taken = images.take(pa.array(some, pa.int64()))
            to.write_batch(pa.record_batch([pa.array(place[some]), taken, pa.array(labels[some])], schema=_SPILL))


def _gather(spills: list[Path], number: int, out: Path, files: list[File], row_group_rows: int) -> list[str]:
    """Write a group of shards from what each spill has for it."""
    if not all((out / file.name).exists() for file in files):
        batches = []
        for path in spills:
            with pa.memory_map(str(path)) as source:
                batches.append(pa.ipc.open_file(source).get_batch(number))
        table = pa.Table.from_batches(batches, _SPILL)
        rows = np.argsort(table["place"].to_numpy(), kind="stable")
        for file in files:
            some = rows[file.start - files[0].start : file.stop - files[0].start]
            shard = table.select(["image", "label"]).take(pa.array(some))
            tables.write_table(out / file.name, shard, tables.EXAMPLES, row_group_rows, file.metadata)
    return [tables.sha256_file(out / file.name) for file in files]
