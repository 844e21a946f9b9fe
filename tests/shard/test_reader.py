import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tables import EXAMPLES, TableError, write_table
from stages.shard.reader import Example, batches_per_epoch, open_shards, read_batches, read_in_order


def write(folder: Path, sizes: list[int], row_group_rows: int) -> None:
    number = 0
    for index, size in enumerate(sizes):
        rows = [{"image": str(number + i).encode(), "label": number + i} for i in range(size)]
        number += size
        path = folder / f"train-{index:05d}-of-{len(sizes):05d}.parquet"
        write_table(path, pa.Table.from_pylist(rows, schema=EXAMPLES), EXAMPLES, row_group_rows)


def labels(batches: list[list[Example]]) -> list[int]:
    return [example.label for batch in batches for example in batch]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    row_group_rows=st.integers(1, 20),
    batch=st.integers(1, 16),
    start=st.integers(0, 40),
    seed=st.integers(0, 5),
)
def test_laws_of_the_stream(sizes: list[int], row_group_rows: int, batch: int, start: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), sizes, row_group_rows)
        groups = open_shards(Path(folder), "train")
        steps = batches_per_epoch(groups, batch)
        assert steps == sum(sizes) // batch
        assert labels(list(read_in_order(groups, batch))) == list(range(sum(sizes)))
        if not steps:
            with pytest.raises(TableError, match="fewer than a batch"):
                next(read_batches(groups, batch, seed))
            return
        whole = list(islice(read_batches(groups, batch, seed), start + 2 * steps))
        assert all(len(b) == batch and all(e.image == str(e.label).encode() for e in b) for b in whole)
        for epoch in range(len(whole) // steps):
            # exactly once: no row twice, and no more rows left out than a batch cannot hold
            assert max(Counter(labels(whole[epoch * steps : (epoch + 1) * steps])).values()) == 1
        # going on from anywhere is going on from the start
        assert list(islice(read_batches(groups, batch, seed, start), 2 * steps)) == whole[start:]


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    write(tmp_path, [64], 8)
    groups = open_shards(tmp_path, "train")
    first, second = (labels([b]) for b in islice(read_batches(groups, 64, 1), 2))
    (other,) = islice(read_batches(groups, 64, 2), 1)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert first != labels([other])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, [8, 8, 8], 4)
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(TableError, match="a shard is missing"):
        open_shards(tmp_path, "train")
    assert open_shards(tmp_path, "val") == []
