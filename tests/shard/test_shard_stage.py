import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct

from pipeline.errors import InputError
from pipeline.params import Params, Shard
from pipeline.tables import ALIGNED, DROPPED, LABELS, VAL_PAIRS, TableError, part_path, read_table, write_table
from stages.shard import __main__ as command
from stages.shard import reader, writer
from stages.shard import run as shard
from tests.samples import FACE, face_like, jpeg, shard_section, write_aligned
from tests.work import HERE

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

    def dying(spills: list[Path], number: int, out: Path, *rest: Any) -> object:
        if number == 3:
            raise KeyboardInterrupt
        written.append(number)
        return gather(spills, number, out, *rest)

    def here(function: Callable[..., object], tasks: list[tuple[object, ...]], **_: object) -> list[object]:
        return [function(*task) for task in tasks]

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
    shards = reader.Shards(str(tmp_path / "shards"))
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
    assert about["align.template"][2] == [56.0252, 71.7366]  # the nose, as published
    assert about["shard"]["seed"] == 3
    assert metadata[b"split"] == b"train"
    images = [f"id{identity:03d}/{photo:04d}" for identity in range(2) for photo in range(12)]
    lines = "".join(f"{hashlib.sha256(image.encode()).hexdigest()}  {image}\n" for image in images)
    assert about["photographs"] == hashlib.sha256(lines.encode()).hexdigest()
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert index["photographs"] == about["photographs"]


def test_shards_of_before_their_photographs_were_named_are_read(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 12])
    run(tmp_path)
    path = tmp_path / "shards" / "index.json"
    index = json.loads(path.read_text())
    del index["photographs"]
    path.write_text(json.dumps(index))
    assert reader.Shards(str(tmp_path / "shards")).index.photographs is None


def test_a_link_in_place_of_the_shards_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="shards: is a symbolic link"):
        run(tmp_path)


def test_an_incomplete_table_is_named(tmp_path: Path) -> None:
    write_aligned(tmp_path / "aligned", [12, 12])
    (tmp_path / "aligned" / "part-00001.parquet").unlink()
    with pytest.raises(TableError, match=r"part-00001\.parquet: missing"):
        run(tmp_path)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(TableError, match="dvc repro"):
        run(tmp_path / "nowhere")


Row = tuple[str, int | None, int, float]
"""Image id, which picture (None for a photograph without a face), JPEG quality, side of the face in its photograph."""


def picture(number: int, quality: int) -> bytes:
    """A picture of broad patches, 112×112 RGB, that is like no other number's but mirrored its negative's, as JPEG."""
    patches = np.random.default_rng([7, abs(number)]).integers(0, 256, (16, 16, 3), np.uint8)
    pixels = Image.fromarray(patches if number >= 0 else patches[:, ::-1]).resize((112, 112), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def bits_apart(one: bytes, other: bytes) -> int:
    """Of the signs of the 16×16 lowest frequencies of both pictures, less their medians, by scipy; the least, as one or
    the other may be mirrored.
    """

    def signs(content: bytes) -> list[NDArray[np.bool_]]:
        image = Image.open(io.BytesIO(content))
        image.draft("L", image.size)  # as the file has it, not by way of RGB
        pixels = np.asarray(image, float)
        low = [dct(dct(seen, axis=0), axis=1)[:16, :16] for seen in (pixels, pixels[:, ::-1])]
        return [np.asarray(each > np.median(each)) for each in low]

    return min(int((a != b).sum()) for a in signs(one) for b in signs(other))


def write_rows(folder: Path, *parts: list[Row]) -> Path:
    """An aligned table; an image's identity is its id up to the first slash."""
    for index, part in enumerate(parts):
        rows = []
        for image_id, number, quality, side in part:
            found = number is not None
            image = picture(number, quality) if number is not None else None
            rows.append(
                {
                    "image_id": image_id,
                    "identity": image_id.partition("/")[0],
                    "sha256": hashlib.sha256(image or image_id.encode()).hexdigest(),
                    "status": "detected" if found else "no_face",
                    "image": image,
                    "box": [10.0, 20.0, 10 + 0.8 * side, 20 + 1.2 * side] if found else None,
                }
            )
        write_table(part_path(folder, index), pa.Table.from_pylist(rows, schema=ALIGNED), ALIGNED)
    return folder


def test_copies_and_people_of_evaluation_sets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind once, by images that lie in several parts; numbers name pictures, and all but equal ones are far apart.

    Of copies the one with the larger face comes second, where it would go if sizes were not minded.
    """
    for module in (shard, writer):
        monkeypatch.setattr(module, "run_all", lambda function, tasks, **_: [function(*task) for task in tasks])
    train = write_rows(
        tmp_path / "aligned",
        [
            ("0001/none", None, 0, 0),
            ("0001/small", 0, 95, 40),
            ("0001/large", 0, 95, 90),
            ("0001/near small", 1, 95, 50),
            ("0001/near large", 1, 10, 51),
        ],
        [
            ("0002/in lfw", 2, 95, 80),
            ("0002/near in ytf", -3, 10, 80),
            ("0002/of two", 4, 95, 80),
            ("0002/near of two", 5, 95, 80),
            ("0002/own", 6, 95, 80),
            ("0003/of two", 4, 95, 80),
            ("0003/near of two", -5, 10, 80),
        ],
        [("0003/own", 7, 95, 80), ("0004/named", 8, 95, 80), ("0004/in lfw", 9, 95, 80)],
    )
    evaluation = {
        "lfw": write_rows(
            tmp_path / "lfw",
            [("Ann/none", None, 0, 0), ("Ann/1", 9, 95, 80)],
            [("Ann/2", 2, 95, 80), ("Jose_Nunez/1", 20, 95, 80)],
        ),
        "ytf": write_rows(tmp_path / "ytf", [("Bob/1", 30, 95, 80), ("Bob/2", 3, 95, 80)]),
    }
    names = tmp_path / "names.txt"
    names.write_text("0001 Cy\n0004 José Núñez\n")
    params = shard_section(
        {"duplicates": True, "near_duplicates": 24, "same_names": True, "names": str(names)},
        validation={"by": "image", "share": 0.5, "pairs": 0},
    )
    shard.run(train, evaluation, tmp_path / "shards", tmp_path / "report", params, FACE, HERE)

    far = {number: bits_apart(picture(abs(number), 95), picture(number, 10)) for number in (1, -3, -5)}
    assert all(0 < bits <= 24 for bits in far.values())
    dropped = read_table(tmp_path / "shards" / "dropped.parquet", DROPPED)
    assert [tuple(row.values()) for row in dropped.to_pylist()] == [
        ("0001/none", "0001", "no_face", None, None),
        ("0001/small", "0001", "duplicate", "0001/large", None),
        ("0001/near small", "0001", "near_duplicate", "0001/near large", far[1]),
        ("0002/in lfw", "0002", "evaluated_photograph", "lfw: Ann/2", None),
        ("0002/near in ytf", "0002", "evaluated_near", "ytf: Bob/2", far[-3]),
        ("0002/of two", "0002", "contradiction", "0003/of two", None),
        ("0002/near of two", "0002", "contradiction_near", "0003/near of two", far[-5]),
        ("0003/of two", "0003", "contradiction", "0002/of two", None),
        ("0003/near of two", "0003", "contradiction_near", "0002/near of two", far[-5]),
        ("0004/named", "0004", "evaluated_name", "lfw: Jose_Nunez", None),
        ("0004/in lfw", "0004", "evaluated_name", "lfw: Jose_Nunez", None),
    ]
    written = [pq.read_table(path)["image"] for path in (tmp_path / "shards").glob("*-of-*.parquet")]
    expected = [picture(number, quality) for number, quality in ((0, 95), (1, 10), (6, 95), (7, 95))]
    assert sorted(image.as_py() for images in written for image in images) == sorted(expected)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "lfw: Ann/2" in page
    assert "ytf: Bob/2" in page


def test_the_stage_minds_lfw_ytf_and_the_probes(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(command, "run", lambda *arguments: given.extend(arguments))
    command.main(params)
    data = Path("data")
    assert given == [
        data / "aligned" / "train",
        {name: data / "aligned" / name for name in ("lfw", "ytf", "probes")},
        data / "shards",
        Path("reports/shard"),
        params.shard,
        params.align.face,
        params.machine,
    ]
