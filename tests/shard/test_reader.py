import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipeline.errors import InputError
from pipeline.tables import EXAMPLES, TableError, write_table
from stages.shard import reader
from stages.shard.reader import File, Place, Rows, Shards, Split
from stages.shard.verify import verify
from tests.samples import face_like, jpeg, shard_section, write_shards
from tests.work import HERE


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


class Fetched(AbstractBufferedFile):
    """A file of which each byte is asked for."""

    made: list["Fetched"]
    fetched = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.made.append(self)

    def _fetch_range(self, start: int, end: int) -> bytes:
        Fetched.fetched += end - start
        with Path(self.path.removeprefix("fetched://")).open("rb") as file:
            file.seek(start)
            return file.read(end - start)


class Elsewhere(AbstractFileSystem):
    """Files behind addresses that stay whole, as those of http do."""

    protocol = "fetched"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": Path(path.removeprefix("fetched://")).stat().st_size, "type": "file"}

    def _open(self, path: Any, mode: Any = "rb", block_size: Any = None, *rest: Any, **options: Any) -> Fetched:
        return Fetched(self, path, mode, block_size, **options)


@pytest.fixture
def elsewhere() -> type[Fetched]:
    fsspec.register_implementation("fetched", Elsewhere, clobber=True)
    Fetched.made, Fetched.fetched = [], 0
    return Fetched


def test_of_an_address_only_what_is_read_is_fetched_and_files_are_closed(
    tmp_path: Path, elsewhere: type[Fetched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_OPEN", 2)
    rng = np.random.default_rng(0)
    files = [File(name=f"{number}.parquet", rows=64, sha256="") for number in range(5)]
    for file in files:
        columns = {"image": [rng.bytes(30_000) for _ in range(64)], "label": np.arange(64, dtype=np.int32)}
        write_table(tmp_path / file.name, pa.table(columns, EXAMPLES), EXAMPLES, 8)
    there, here = (Split(Place.of(f"{kind}{tmp_path}"), files, 8) for kind in ("fetched://", ""))
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(40), 2)).tolist()
    size = 0
    for group in groups:
        table = there.read(group)
        assert table.equals(here.read(group))
        size += table.nbytes
        assert sum(not file.closed for file in elsewhere.made) <= 2
    tails = len(elsewhere.made) * (64 << 10)  # of each file that is opened, pyarrow reads so much from its end
    assert size < elsewhere.fetched < 1.01 * size + tails


def test_addresses_stay_whole(made: Path, elsewhere: type[Fetched]) -> None:
    for address in (f"fetched://{made}", f"fetched://{made}/"):
        there = Shards(address)
        assert everything(there.split("train")) == everything(Shards(str(made)).split("train"))
        assert there.split("train").name(0) == f"fetched://{made}/train-00000-of-00003.parquet, row 0"
        assert there.identities().num_rows == 3


def test_an_address_that_cannot_be_read_is_told_with_what_it_takes(tmp_path: Path, elsewhere: type[Fetched]) -> None:
    for address, problem in (
        ("s4://me:secret@bucket/shards", r"s4://bucket/shards: .*\(Protocol not known: s4\); train\.data is"),
        ("gs://bucket/shards", r"^gs://bucket/shards: .*install gcsfs.*train\.data is a folder, or an address"),
        (f"fetched://{tmp_path}", rf"^fetched://{tmp_path}/index\.json: no such file; `dvc repro shard`"),
        ("http://127.0.0.1:1/shards", r"^http://127\.0\.0\.1:1/shards/index\.json: cannot be read: Client\w+: Cannot"),
    ):
        with pytest.raises(InputError, match=problem):
            Shards(address)


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


def test_damage_is_named(folder: Path) -> None:
    path = folder / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    page = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place, problem in ((page, "row group 1 cannot be read: OSError"), (footer, "cannot be read: OSError")):
        path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
        with pytest.raises(TableError, match=rf"^{path}: {problem}: "):
            Shards(str(folder)).split("train").read(3)
    path.write_bytes(b"PAR1")
    with pytest.raises(TableError, match=rf"^{path}: cannot be read: ArrowInvalid: "):
        _ = Shards(str(folder)).split("train").labels


def test_verify_finds_nothing_wrong(made: Path, tmp_path: Path) -> None:
    """At an address: a folder in an archive."""
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", made.parent)
    assert verify(f"zip://shards::{archive}", HERE).rows == 24


def test_verify_names_every_fault(folder: Path) -> None:
    (folder / "train-00001-of-00003.parquet").write_bytes(b"PAR1")
    bad = [{"image": b"\xff\xd8 no picture", "label": 0}, {"image": jpeg(face_like(0, 0)[:96]), "label": 0}]
    write_table(folder / "val-00000-of-00001.parquet", pa.Table.from_pylist(bad, EXAMPLES), EXAMPLES, 4)
    write_table(folder / "val-00007-of-00008.parquet", pa.Table.from_pylist(bad, EXAMPLES), EXAMPLES, 4)
    (folder / "dropped.parquet").unlink()
    with pytest.raises(TableError) as caught:
        verify(str(folder), HERE)
    for part in (
        "7 faults",
        "train-00001-of-00003.parquet: cannot be read: ArrowInvalid",
        "val-00000-of-00001.parquet: 2 rows, but index.json says 6",
        "val-00000-of-00001.parquet: its SHA-256 is not what index.json says",
        "val-00000-of-00001.parquet: row 0: not a readable JPEG",
        "val-00000-of-00001.parquet: row 1: 112×96 pixels, not 112×112",
        "val-00007-of-00008.parquet: not in index.json",
        "dropped.parquet: no such file",
    ):
        assert part in str(caught.value)


def test_verify_where_no_list_of_files_is_to_be_had(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As from a host that hands out files alone: all else is looked at, and told."""

    def refused(place: Place, pattern: str) -> set[str]:
        raise TableError(f"{place.shown(pattern)}: cannot be read: 403")

    monkeypatch.setattr(Place, "names", refused)
    assert verify(str(folder), HERE).rows == 24
    assert "*-of-*.parquet: cannot be read: 403; so files that are not in index.json go unnoticed" in caplog.text
    (folder / "dropped.parquet").unlink()
    with pytest.raises(TableError, match=r"1 faults\n.*dropped\.parquet: no such file"):
        verify(str(folder), HERE)


def test_verify_counts_labels(folder: Path) -> None:
    """Files that are what the index says, but not what labels.parquet says."""
    from pipeline.tables import LABELS, read_table, sha256_file

    labels = read_table(folder / "labels.parquet", LABELS).to_pylist()
    labels[1]["train"] += 1
    write_table(folder / "labels.parquet", pa.Table.from_pylist(labels, LABELS), LABELS)
    index = json.loads((folder / "index.json").read_text())
    index["tables"]["labels.parquet"] = sha256_file(folder / "labels.parquet")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(TableError, match="id001 has 6 images in train, but the shards have 5"):
        verify(str(folder), HERE)
