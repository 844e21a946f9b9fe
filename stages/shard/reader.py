"""Reading shards as an endless stream of batches that follows from (seed, iteration) alone.

Nothing is remembered between iterations, so going on after an interruption needs no state but the iteration: the
place of any batch is computed, not replayed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.tables import EXAMPLES, TableError

POOL_GROUPS = 16
"""Row groups read at a time and shuffled together. The writer has shuffled all rows once already; this changes
their company from epoch to epoch."""


@dataclass(frozen=True)
class Group:
    """A row group of a shard, the unit of reading."""

    path: Path
    index: int
    rows: int


@dataclass(frozen=True)
class Example:
    """An encoded 112×112 JPEG and its label."""

    image: bytes
    label: int


def open_shards(folder: Path, split: str) -> list[Group]:
    """All row groups of a split, in order; an empty list where the split has no shards.

    Raises:
        TableError: a shard is missing or of another schema.
    """
    paths = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    groups = []
    for index, path in enumerate(paths):
        if path.name != f"{split}-{index:05d}-of-{len(paths):05d}.parquet":
            raise TableError(f"{path}: expected {split}-{index:05d}-of-{len(paths):05d}.parquet; a shard is missing")
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(EXAMPLES):
                raise TableError(f"{path}: has columns {file.schema_arrow.names}, expected {EXAMPLES.names}")
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        groups += [Group(path, i, rows) for i, rows in enumerate(sizes)]
    return groups


def batches_per_epoch(groups: list[Group], batch: int) -> int:
    """Whole batches in an epoch; the rows left over differ from epoch to epoch."""
    return sum(group.rows for group in groups) // batch


def read_batches(groups: list[Group], batch: int, seed: int, start: int = 0) -> Iterator[list[Example]]:
    """Endless batches from iteration `start` on; every epoch in an order of its own.

    In an epoch each row comes at most once. The batches from `start` on are those that a reader from 0 would give.

    Args:
        groups: of one split, from `open_shards`.
        batch: examples in a batch.
        seed: of the order.
        start: the first iteration wanted, from 0.

    Raises:
        TableError: the split has fewer rows than a batch.
    """
    steps = batches_per_epoch(groups, batch)
    if not steps:
        rows = sum(group.rows for group in groups)
        raise TableError(
            f"the split has {rows} examples, fewer than a batch of {batch}: lower train.batch or add images"
        )
    epoch, offset = divmod(start, steps)
    while True:
        waiting: list[Example] = []
        given = offset
        for example in _epoch(groups, np.random.default_rng([seed, epoch]), offset * batch):
            waiting.append(example)
            if len(waiting) == batch:
                yield waiting
                waiting = []
                given += 1
                if given == steps:
                    break
        epoch, offset = epoch + 1, 0


def read_in_order(groups: list[Group], batch: int) -> Iterator[list[Example]]:
    """Every row once, in the order of the files, the last batch possibly smaller: for validation."""
    waiting: list[Example] = []
    for group in groups:
        waiting += _examples([group])
        while len(waiting) >= batch:
            yield waiting[:batch]
            waiting = waiting[batch:]
    if waiting:
        yield waiting


def _epoch(groups: list[Group], rng: np.random.Generator, skip: int) -> Iterator[Example]:
    """One epoch's rows after the first `skip`, reading no row group that lies wholly before them."""
    order = [groups[i] for i in rng.permutation(len(groups))]
    for first in range(0, len(order), POOL_GROUPS):
        pool = order[first : first + POOL_GROUPS]
        rows = sum(group.rows for group in pool)
        permutation = rng.permutation(rows)
        if skip >= rows:
            skip -= rows
            continue
        examples = _examples(pool)
        for i in permutation[skip:]:
            yield examples[i]
        skip = 0


def _examples(groups: list[Group]) -> list[Example]:
    tables = [_open(group.path).read_row_group(group.index) for group in groups]
    table = pa.concat_tables(tables)
    return [
        Example(image, label)
        for image, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
    ]


@lru_cache(maxsize=64)
def _open(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True)
