from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.params import Shard
from pipeline.tables import LABELS, TableError, read_table
from stages.shard import run, writer
from tests.samples import face_like, jpeg, write_aligned

PARAMS = Shard(seed=3, min_images=2, val_fraction=0.25, shard_rows=8, row_group_rows=3)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_face_once_with_its_label(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 1, 9, 4], rejected=3)
    run(tmp_path / "aligned", tmp_path / "shards", PARAMS)
    expected = {jpeg(face_like(0, photo)): 0 for photo in range(3, 12)}
    expected |= {jpeg(face_like(2, photo)): 1 for photo in range(9)}
    expected |= {jpeg(face_like(3, photo)): 2 for photo in range(4)}
    found: list[tuple[bytes, int]] = []
    val = 0
    for path in (tmp_path / "shards").glob("*-of-*.parquet"):
        table = pq.read_table(path)
        found += zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True)
        val += len(table) if path.name.startswith("val") else 0
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert all(rows == 3 for rows in groups[:-1])
        assert sum(groups) <= 8
    assert len(found) == len(expected) == 22
    assert dict(found) == expected
    assert val == 9 // 4 + 9 // 4 + 4 // 4
    labels = read_table(tmp_path / "shards" / "labels.parquet", LABELS).to_pylist()
    assert [(row["label"], row["images"]) for row in labels] == [(0, 9), (None, 1), (1, 9), (2, 4)]


def test_same_bytes_again_and_in_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aligned(tmp_path / "aligned", [20, 20, 20])
    run(tmp_path / "aligned", tmp_path / "one", PARAMS)
    run(tmp_path / "aligned", tmp_path / "two", PARAMS)
    monkeypatch.setattr(writer, "MEMORY_BYTES", 1)  # one shard a pass
    run(tmp_path / "aligned", tmp_path / "three", PARAMS)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


def test_classes_are_mixed_in_every_shard(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [40] * 4, part_rows=16)
    run(tmp_path / "aligned", tmp_path / "shards", PARAMS.model_copy(update={"shard_rows": 30}))
    for path in (tmp_path / "shards").glob("train-*"):
        assert len(np.unique(pq.read_table(path)["label"].to_numpy())) == 4


def test_an_incomplete_table_is_named(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 12])
    (tmp_path / "aligned" / "part-00001.parquet").unlink()
    with pytest.raises(TableError, match=r"part-00001\.parquet: missing"):
        run(tmp_path / "aligned", tmp_path / "shards", PARAMS)
    with pytest.raises(TableError, match="dvc repro"):
        run(tmp_path / "nowhere", tmp_path / "shards", PARAMS)
