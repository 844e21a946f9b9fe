import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from pipeline.tables import TableError
from stages.shard.reader import Rows, Shards, Split
from stages.shard.verify import verify
from tests.samples import HERE, face_like, jpeg, shard_section, write_shards


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), [9, 7, 8], shard_section())


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "shards"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def everything(split: Split) -> dict[bytes, int]:
    images, labels = Rows(split, 2).read(np.arange(len(split)))
    return {bytes(image): label for image, label in zip(images, labels.tolist(), strict=True)}


def test_any_rows_in_any_order(made: Path) -> None:
    split = Shards(str(made)).split("train")
    assert len(split) == 9 - 2 + 7 - 2 + 8 - 2
    rows = Rows(split, 1)
    some = np.random.default_rng(0).permutation(len(split))
    images, labels = rows.read(some)
    again, _ = rows.read(some[::-1])
    assert [*images] == [*again][::-1]
    assert (labels == split.labels[some]).all()
    expected = {jpeg(face_like(label, photo)): label for label, count in enumerate((9, 7, 8)) for photo in range(count)}
    assert everything(split) | everything(Shards(str(made)).split("val")) == expected


def test_threads_may_share_it(tmp_path: Path) -> None:
    made = write_shards(tmp_path, [40] * 10, shard_section(shard_rows=64, row_group_rows=2))
    split = Shards(str(made)).split("train")
    expected = [split.read(group) for group in range(split.groups)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(split.read, [*range(split.groups)] * 5))
    assert all(table.equals(expected[i % split.groups]) for i, table in enumerate(found))


def test_an_address_is_as_good_as_a_folder(made: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in made.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    there, here = Shards("memory://bucket"), Shards(str(made))
    assert everything(there.split("train")) == everything(here.split("train"))
    assert there.identities().equals(here.identities())
    assert there.hashes() == here.hashes()


def test_a_row_is_named(made: Path) -> None:
    assert Shards(str(made)).split("train").name(13).endswith("train-00001-of-00003.parquet, row 5")


def test_what_is_missing_or_strange_is_named(folder: Path) -> None:
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(TableError, match=r"train-00001-of-00003\.parquet: no such file"):
        Shards(str(folder)).split("train").read(2)
    (folder / "train-00000-of-00003.parquet").write_bytes((folder / "train-00002-of-00003.parquet").read_bytes())
    with pytest.raises(TableError, match="row group 1 has not the 4 rows"):
        Shards(str(folder)).split("train").read(1)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 0}))
    with pytest.raises(TableError, match="format 0, but this code reads 1"):
        Shards(str(folder))
    (folder / "index.json").write_text("{}")
    with pytest.raises(TableError, match="not the index of shards"):
        Shards(str(folder))
    with pytest.raises(TableError, match="dvc repro shard"):
        Shards(str(folder / "nowhere"))


def test_verify_finds_nothing_wrong(made: Path) -> None:
    assert verify(made, HERE).rows == 24


def test_verify_names_every_fault(folder: Path) -> None:
    import pyarrow as pa

    from pipeline.tables import EXAMPLES, write_table

    (folder / "train-00001-of-00003.parquet").write_bytes(b"PAR1")
    bad = [{"image": b"\xff\xd8 no picture", "label": 0}, {"image": jpeg(face_like(0, 0)[:96]), "label": 0}]
    write_table(folder / "val-00000-of-00001.parquet", pa.Table.from_pylist(bad, EXAMPLES), EXAMPLES, 4)
    write_table(folder / "val-00007-of-00008.parquet", pa.Table.from_pylist(bad, EXAMPLES), EXAMPLES, 4)
    (folder / "dropped.parquet").unlink()
    with pytest.raises(TableError) as caught:
        verify(folder, HERE)
    for part in (
        "7 faults",
        "train-00001-of-00003.parquet: not a readable Parquet file",
        "val-00000-of-00001.parquet: 2 rows, but index.json says 6",
        "val-00000-of-00001.parquet: its SHA-256 is not what index.json says",
        "val-00000-of-00001.parquet: row 0: not a readable JPEG",
        "val-00000-of-00001.parquet: row 1: 112×96 pixels, not 112×112",
        "val-00007-of-00008.parquet: not in index.json",
        "dropped.parquet: missing",
    ):
        assert part in str(caught.value)


def test_verify_counts_labels(folder: Path) -> None:
    """Files that are what the index says, but not what labels.parquet says."""
    from pipeline.tables import LABELS, read_table, sha256_file, write_table

    labels = read_table(folder / "labels.parquet", LABELS).to_pylist()
    labels[1]["train"] += 1
    import pyarrow as pa

    write_table(folder / "labels.parquet", pa.Table.from_pylist(labels, LABELS), LABELS)
    index = json.loads((folder / "index.json").read_text())
    index["tables"]["labels.parquet"] = sha256_file(folder / "labels.parquet")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(TableError, match="id001 has 6 images in train, but the shards have 5"):
        verify(folder, HERE)
