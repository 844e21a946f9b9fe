import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.params import Shard
from pipeline.tables import DROPPED, LABELS, VAL_PAIRS, TableError, read_table
from stages import shard
from stages.shard import writer
from tests.samples import FACE, HERE, face_like, jpeg, shard_section, write_aligned

PARAMS = shard_section(
    {"min_images": 2}, seed=3, validation={"by": "image", "share": 0.25, "pairs": 0}, row_group_rows=3
)


def run(folder: Path, out: str = "shards", params: Shard = PARAMS, workers: int = 1) -> dict[str, bytes]:
    machine = HERE.model_copy(update={"workers": workers})
    shard.run(folder / "aligned", {}, folder / out, folder / "report", params, FACE, machine)
    return {path.name: path.read_bytes() for path in sorted((folder / out).iterdir())}


def test_every_face_once_with_its_label(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 1, 9, 4], rejected=3)
    run(tmp_path)
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
    dropped = read_table(tmp_path / "shards" / "dropped.parquet", DROPPED).to_pylist()
    assert [(row["image_id"], row["reason"]) for row in dropped] == [
        ("id000/0000", "no_face"),
        ("id000/0001", "no_face"),
        ("id000/0002", "no_face"),
        ("id001/0000", "few_images"),
    ]
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert (metrics["images"], metrics["identities"], metrics["train"], metrics["val"]) == (26, 3, 17, 5)
    assert {reason: n for reason, n in metrics["dropped"].items() if n} == {"no_face": 3, "few_images": 1}
    assert "id001" in (tmp_path / "report" / "index.html").read_text()


def test_same_bytes_again_in_less_memory_and_by_more_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aligned(tmp_path / "aligned", [20, 20, 20])
    one = run(tmp_path)
    assert run(tmp_path, "again") == one
    monkeypatch.setattr(writer, "MEMORY_BYTES", 1)  # a spill a part, and a group of shards a shard
    assert run(tmp_path, "small") == one
    assert run(tmp_path, "two", workers=2) == one


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_aligned(tmp_path / "aligned", [20, 20, 20])
    one = run(tmp_path)
    monkeypatch.setattr(writer, "MEMORY_BYTES", 1)
    gather, written = writer._gather, []

    def dying(spills: list[Path], number: int, out: Path, *rest: object) -> object:
        if number == 3:
            raise KeyboardInterrupt
        written.append(number)
        return gather(spills, number, out, *rest)  # type: ignore[arg-type]

    def here(function: object, tasks: list[tuple[object, ...]], **_: object) -> list[object]:
        return [function(*task) for task in tasks]  # type: ignore[operator]

    monkeypatch.setattr(writer, "run_all", here)
    monkeypatch.setattr(writer, "_gather", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "cut")
    assert not list((tmp_path / "cut").iterdir())
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".cut.unfinished/*/*.parquet")}
    assert len(kept) == 3
    monkeypatch.setattr(writer, "_gather", gather)
    assert run(tmp_path, "cut") == one
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == time for name, time in kept.items())


def test_classes_are_mixed_in_every_shard(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [40] * 4, part_rows=16)
    run(tmp_path, params=PARAMS.model_copy(update={"shard_rows": 30}))
    for path in (tmp_path / "shards").glob("train-*"):
        assert len(np.unique(pq.read_table(path)["label"].to_numpy())) == 4


def test_pairs_of_people_who_are_not_trained_on(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [6] * 8)
    run(tmp_path, params=shard_section(validation={"by": "identity", "share": 0.25, "pairs": 20}))
    shards = shard.reader.Shards(str(tmp_path / "shards"))
    trained, kept_back = (set(shards.split(name).labels) for name in ("train", "val"))
    assert (trained, kept_back) == (set(range(6)), {6, 7})
    pairs, labels = shards.val_pairs(), shards.split("val").labels
    assert pairs is not None
    assert pairs.schema == VAL_PAIRS
    same = labels[pairs["left"].to_numpy()] == labels[pairs["right"].to_numpy()]
    assert (same == pairs["same"].to_numpy()).all()


def test_a_shard_says_what_it_is(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 12])
    run(tmp_path)
    metadata = pq.read_metadata(tmp_path / "shards" / "train-00000-of-00003.parquet").metadata
    about = json.loads(metadata[b"cosface"])
    assert about["align.face"] == {"width": 112, "margin": 0, "quality": 95}
    assert about["shard"]["seed"] == 3
    assert metadata[b"split"] == b"train"


def test_an_incomplete_table_is_named(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 12])
    (tmp_path / "aligned" / "part-00001.parquet").unlink()
    with pytest.raises(TableError, match=r"part-00001\.parquet: missing"):
        run(tmp_path)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(TableError, match="dvc repro"):
        run(tmp_path / "nowhere")
