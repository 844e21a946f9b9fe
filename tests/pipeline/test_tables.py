import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.tables import (
    EXAMPLES,
    LABELS,
    TableError,
    atomic,
    fingerprint,
    made_by,
    part_path,
    parts,
    read_images,
    read_parts,
    read_table,
    resumable,
    rows,
    write_table,
)


def table(start: int, count: int) -> pa.Table:
    examples = [{"image": bytes([i % 256]) * 10, "label": i} for i in range(start, start + count)]
    return pa.Table.from_pylist(examples, schema=EXAMPLES)


def test_parts_come_back_in_order_and_whole(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        write_table(part_path(tmp_path, index), table(10 * index, 10), EXAMPLES)
    assert read_parts(tmp_path, EXAMPLES)["label"].to_pylist() == list(range(30))
    assert read_parts(tmp_path, EXAMPLES, ["label"]).column_names == ["label"]


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 20 rows, in parts of 7, 1 and 12."""
    folder = tmp_path_factory.mktemp("table")
    for index, (start, count) in enumerate(((0, 7), (7, 1), (8, 12))):
        write_table(part_path(folder, index), table(start, count), EXAMPLES)
    return folder


@given(st.lists(st.integers(0, 19), max_size=8))
def test_images_of_some_rows_are_those_of_the_whole_table(in_parts: Path, numbers: list[int]) -> None:
    whole = [row["image"] for row in table(0, 20).to_pylist()]
    assert read_images(in_parts, EXAMPLES, numbers) == {number: whole[number] for number in numbers}


def test_same_table_same_bytes_and_images_uncompressed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table(tmp_path / name, table(0, 50), EXAMPLES, row_group_rows=20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    metadata = pq.ParquetFile(tmp_path / "a").metadata
    assert metadata.num_row_groups == 3
    assert metadata.row_group(0).column(0).compression == "UNCOMPRESSED"


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no part"):
        parts(tmp_path)
    write_table(part_path(tmp_path, 1), table(0, 1), EXAMPLES)
    with pytest.raises(TableError, match=r"part-00000\.parquet: missing"):
        parts(tmp_path)
    for index in (99_999, 100_000):
        part_path(tmp_path, index).touch()
    with pytest.raises(TableError, match=r"part-00000\.parquet: missing, though part-100000\.parquet is there"):
        parts(tmp_path)
    with pytest.raises(TableError, match="expected"):
        read_table(part_path(tmp_path, 1), LABELS)
    part_path(tmp_path, 1).write_bytes(b"half a file")
    for read in (rows, made_by, lambda path: read_table(path, EXAMPLES)):
        with pytest.raises(TableError, match=r"part-00001\.parquet: not a readable Parquet file: "):
            read(part_path(tmp_path, 1))
    with pytest.raises(TableError, match="no such file"):
        read_table(tmp_path / "absent.parquet", EXAMPLES)


def test_only_what_the_graph_makes_may_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, own in (("reports/lfw", False), ("mine", True), ("reports-of-mine", True)):
        damaged = tmp_path / folder / "scores.parquet"
        damaged.parent.mkdir(parents=True)
        damaged.write_text("precious")
        for path in (damaged, damaged.relative_to(tmp_path)):
            for problem, named in (("not a readable", path), ("no such file", path.with_name("absent.parquet"))):
                with pytest.raises(TableError, match=problem) as error:
                    rows(named)
                assert ("dvc repro" in str(error.value)) != own


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def little_space(size: int) -> Iterator[None]:
    """No file may become larger than so many bytes: the system then refuses as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_refuses_names_the_file(tmp_path: Path) -> None:
    big = pa.Table.from_pylist([{"image": bytes(50_000), "label": 0}], schema=EXAMPLES)
    with little_space(10_000), pytest.raises(OSError, match=rf"File too large: '{tmp_path}/part\.parquet'$"):
        write_table(tmp_path / "part.parquet", big, EXAMPLES)
    refused = pytest.raises(OSError, match=rf"File too large: '{tmp_path}/page'$")
    with little_space(10_000), refused, atomic(tmp_path / "page") as temporary:
        temporary.write_bytes(bytes(50_000))
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic(tmp_path / "page"):
        (tmp_path / "nowhere").read_bytes()
    assert not list(tmp_path.iterdir())


def interrupted(folder: Path, key: str, label: int) -> bool:
    """Write one part and be killed; whether an earlier run's was there."""
    with pytest.raises(KeyboardInterrupt), resumable(folder, key) as unfinished:  # noqa: PT012
        there = part_path(unfinished, 0).exists()
        write_table(part_path(unfinished, 0), table(label, 1), EXAMPLES)
        (unfinished / ".part-00001.parquet.99.tmp").write_text("half")
        raise KeyboardInterrupt
    return there


def test_resumable_keeps_unfinished_work_of_the_same_key_only(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert [interrupted(folder, key, 0) for key in "aab"] == [False, True, False]
    with resumable(folder, "b") as unfinished:
        assert [path.name for path in unfinished.iterdir()] == ["part-00000.parquet"]
        (unfinished / "train").mkdir()
        (unfinished / "train" / ".part-00000.parquet.99.tmp").write_text("by a worker that was killed")
    assert not list((folder / "train").iterdir())
    (folder / "train").rmdir()
    assert [path.name for path in folder.iterdir()] == ["part-00000.parquet"]
    with resumable(folder, "b") as unfinished:  # finished: whoever runs it again wants it anew
        assert not list(unfinished.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_a_finished_folder_stays_until_its_successor_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with resumable(folder, "a") as unfinished:
        write_table(part_path(unfinished, 0), table(0, 2), EXAMPLES)
    interrupted(folder, "b", 7)
    assert read_parts(folder, EXAMPLES)["label"].to_pylist() == [0, 1]


def test_parts_of_a_version_checked_out_meanwhile_are_not_taken_for_ours(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    interrupted(folder, "a", 7)
    for index in range(3):  # as `dvc checkout` does
        write_table(part_path(folder, index), table(index, 1), EXAMPLES)
    with resumable(folder, "a") as unfinished:
        assert read_parts(unfinished, EXAMPLES)["label"].to_pylist() == [7]
    assert read_parts(folder, EXAMPLES)["label"].to_pylist() == [7]


def _hold(folder: Path) -> None:
    with resumable(folder, "a") as unfinished:
        part_path(unfinished, 0).touch()
        time.sleep(60)


def test_a_killed_writer_frees_the_folder_and_leaves_its_parts(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path / "out",))
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.unfinished/*/part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with resumable(tmp_path / "out", "a") as unfinished:
        assert part_path(unfinished, 0).exists()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_that_ends_between_removing_the_old_folder_and_cleaning_up_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    """Whether just before or just after the new folder gets its name: the next run ends as any other."""
    folder, replace = tmp_path / "out", Path.replace
    with resumable(folder, "a") as unfinished:
        write_table(part_path(unfinished, 0), table(0, 2), EXAMPLES)

    def dying(path: Path, target: Path) -> Path:
        if target != folder:
            return replace(path, target)
        if renamed:
            replace(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(KeyboardInterrupt), resumable(folder, "b") as unfinished:
        write_table(part_path(unfinished, 0), table(7, 1), EXAMPLES)
    assert folder.exists() == renamed
    monkeypatch.setattr(Path, "replace", replace)
    with resumable(folder, "b") as unfinished:
        assert part_path(unfinished, 0).exists() != renamed  # what was finished, but not there yet, is kept
        write_table(part_path(unfinished, 0), table(7, 1), EXAMPLES)
    assert read_parts(folder, EXAMPLES)["label"].to_pylist() == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_cannot_be_replaced_which_is_said_before_the_work(tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with (
        pytest.raises(InputError, match=rf"{tmp_path}/out: is a symbolic link, .*; put a folder there"),
        resumable(tmp_path / "out", "a"),
    ):
        pytest.fail("the work was begun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_fingerprint_sees_values_and_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"1")
    one = fingerprint({"a": 1, "b": 2}, code=(tmp_path,))
    assert one == fingerprint({"b": 2, "a": 1}, code=(tmp_path,))
    assert one != fingerprint({"a": 1, "b": 3}, code=(tmp_path,))
    (tmp_path / "a.py").write_text("x = 2")
    assert one != fingerprint({"a": 1, "b": 2}, code=(tmp_path,))
