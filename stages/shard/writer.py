"""Writing shards in a global order that has nothing to do with the order of the aligned parts, in bounded memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.progress import bar
from pipeline.tables import ALIGNED, EXAMPLES, parts, read_table, write_table

MEMORY_BYTES = 1 << 30
"""Images held at once. CASIA-WebFace, aligned, is about three times as much, and so read three times."""


def write_shards(
    aligned: Path, out: Path, split: str, rows: np.ndarray, labels: np.ndarray, shard_rows: int, row_group_rows: int
) -> int:
    """Write `rows` of the aligned table, in this order, as `<split>-NNNNN-of-NNNNN.parquet`.

    As many shards as fit into MEMORY_BYTES are filled at a time, each time reading through the aligned parts once.

    Args:
        aligned: folder of the aligned table.
        out: folder of the shards.
        split: train or val.
        rows: indices into the whole aligned table, in their new order.
        labels: the label of each row of the whole aligned table, int32.
        shard_rows: examples in a shard.
        row_group_rows: examples in a row group.

    Returns:
        How many shards were written.
    """
    count = -(-len(rows) // shard_rows)
    if not count:
        return 0
    paths = parts(aligned)
    mean_bytes = sum(path.stat().st_size for path in paths) / len(labels)
    at_once = max(1, int(MEMORY_BYTES / (mean_bytes * shard_rows)))
    with bar(total=count, label=f"writing {split} shards", unit="shards") as shown:
        for first in range(0, count, at_once):
            wanted = rows[first * shard_rows : (first + at_once) * shard_rows]
            images = _gather(paths, wanted)
            for index in range(first, min(first + at_once, count)):
                chunk = slice((index - first) * shard_rows, (index - first + 1) * shard_rows)
                table = pa.table({"image": images[chunk], "label": labels[wanted[chunk]]}, schema=EXAMPLES)
                write_table(out / f"{split}-{index:05d}-of-{count:05d}.parquet", table, EXAMPLES, row_group_rows)
                shown.update()
    return count


def _gather(paths: list[Path], wanted: np.ndarray) -> list[bytes]:
    """The images of the wanted rows, in the order wanted."""
    images: list[bytes] = [b""] * len(wanted)
    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    for offset, column in _image_columns(paths):
        low, high = np.searchsorted(ascending, [offset, offset + len(column)])
        picked = column.take(pa.array(ascending[low:high] - offset))
        for position, image in zip(order[low:high], picked, strict=True):
            images[position] = image.as_py()
    return images


def _image_columns(paths: list[Path]) -> Iterator[tuple[int, pa.Array]]:
    offset = 0
    for path in paths:
        column = pc.cast(read_table(path, ALIGNED, ["image"])["image"].combine_chunks(), pa.large_binary())
        yield offset, column
        offset += len(column)
