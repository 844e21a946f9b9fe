import csv
import hashlib
import io
import logging
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import stages.download.run
from pipeline import tables
from pipeline.errors import InputError
from pipeline.params import Archive, Local, Synthetic
from stages.download import synthetic
from stages.download.errors import DamagedError, SourceError
from stages.download.run import run
from tests.work import HERE

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(1)
FACES = {f"{who}/{number:03d}.jpg": RNG.bytes(900 + number) for who in ("0000045", "0000099") for number in range(1, 8)}
LFW = {f"{who}/{who}_{number:04d}.jpg": RNG.bytes(700) for who in ("Ann", "Bob", "Cy") for number in (1, 2)}
YTF = {f"{who}/{v}/{v}.{n}.jpg": RNG.bytes(500) for who in ("Ann", "Bob") for v in (0, 3) for n in (1, 10, 2)}
PAIRS = "2\t1\nAnn\t1\t2\nAnn\t1\tBob\t2\nCy\t1\t2\nCy\t1\tBob\t1\n"
SPLITS = "1, 1, Ann/0, Ann/3, 1\n2, 2, Ann/0, Bob/3, 0\n"


def zipped(path: Path, tree: dict[str, bytes], top: str = "CASIA-WebFace/") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in tree.items():
            file.writestr(top + name, content)
    return path


def tarred(path: Path, tree: dict[str, bytes], top: str = "lfw/") -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in tree.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def unpacked(path: Path, tree: dict[str, bytes]) -> Path:
    for name, content in tree.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def archive(location: object, pairs: object = None, sha256: str | None = None) -> Archive:
    return Archive(
        source="archive",
        watch=[],
        location=str(location),
        sha256=sha256,
        pairs=None if pairs is None else str(pairs),
        pairs_sha256=None,
    )


def folder(location: object, pairs: object = None) -> Local:
    pairs = None if pairs is None else str(pairs)
    return Local(source="folder", watch=[], location=str(location), pairs=pairs, pairs_sha256=None)


def listed(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def begun(out: Path) -> Path:
    """Where an interrupted run has left its parts."""
    (unfinished,) = out.with_name(f".{out.name}.unfinished").iterdir()
    return unfinished


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def expected(tree: dict[str, bytes]) -> dict[str, list[Any]]:
    """The raw table of stills, from its definition."""
    return {
        "image_id": [name.removesuffix(".jpg") for name in tree],
        "identity": [name.split("/")[0] for name in tree],
        "video": [None] * len(tree),
        "frame": [None] * len(tree),
        "image": list(tree.values()),
        "sha256": [hashlib.sha256(image).hexdigest() for image in tree.values()],
    }


def test_photographs_come_through_untouched(tmp_path: Path) -> None:
    tree = FACES | {"0000099/100.png": b""}  # an empty file is a row: align says what is wrong with it
    run("train", archive(zipped(tmp_path / "casia.zip", tree)), tmp_path / "raw" / "train", HERE)
    assert tables.read_parts(tmp_path / "raw" / "train", tables.RAW).to_pydict() == {
        **expected(tree),
        "image_id": [*expected(FACES)["image_id"], "0000099/100"],
    }
    assert not (tmp_path / "raw" / ".train.unfinished").exists()


def test_lfw_from_an_archive_and_from_a_folder_are_the_same(tmp_path: Path) -> None:
    pairs = listed(tmp_path / "pairs.txt", PAIRS)
    run("lfw", archive(tarred(tmp_path / "lfw.tgz", LFW), pairs), tmp_path / "raw" / "archive", HERE)
    run("lfw", folder(unpacked(tmp_path / "lfw", LFW), pairs), tmp_path / "raw" / "folder", HERE)
    assert content(tmp_path / "raw" / "archive") == content(tmp_path / "raw" / "folder")
    assert tables.read_parts(tmp_path / "raw" / "folder", tables.RAW).to_pydict() == expected(LFW)
    assert tables.read_table(tmp_path / "raw" / "folder" / "pairs.parquet", tables.PAIRS).to_pylist() == [
        {"fold": 0, "left": "Ann/Ann_0001", "right": "Ann/Ann_0002", "same": True},
        {"fold": 0, "left": "Ann/Ann_0001", "right": "Bob/Bob_0002", "same": False},
        {"fold": 1, "left": "Cy/Cy_0001", "right": "Cy/Cy_0002", "same": True},
        {"fold": 1, "left": "Cy/Cy_0001", "right": "Bob/Bob_0001", "same": False},
    ]


def test_videos_have_frames(tmp_path: Path) -> None:
    source = archive(
        tarred(tmp_path / "ytf.tar.gz", YTF, "YouTubeFaces/frame_images_DB/"), listed(tmp_path / "s.txt", SPLITS)
    )
    run("ytf", source, tmp_path / "raw", HERE)
    rows = tables.read_parts(tmp_path / "raw", tables.RAW, ["image_id", "identity", "video", "frame"])
    assert rows.to_pydict() == {
        "image_id": [name.removesuffix(".jpg") for name in YTF],
        "identity": ["Ann"] * 6 + ["Bob"] * 6,
        "video": ["Ann/0"] * 3 + ["Ann/3"] * 3 + ["Bob/0"] * 3 + ["Bob/3"] * 3,
        "frame": [1, 10, 2] * 4,
    }
    assert pq.read_table(tmp_path / "raw" / "pairs.parquet")["right"].to_pylist() == ["Ann/3", "Bob/3"]


def test_a_part_ends_by_rows_or_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {f"{who}/{n}.jpg": b"x" * size for who in "ab" for n, size in enumerate((10, 10, 10, 10, 25, 30, 1))}
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    monkeypatch.setattr(tables, "PART_BYTES", 30)
    run("train", archive(zipped(tmp_path / "a.zip", tree)), tmp_path / "raw", HERE)
    images = [pq.read_table(path)["image"].to_pylist() for path in tables.parts(tmp_path / "raw")]
    assert [[len(image) for image in part] for part in images] == [
        [10, 10, 10],
        [10, 25],
        [30],
        [1, 10, 10],
        [10, 10, 25],
        [30],
        [1],
    ]


@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_a_killed_run_goes_on_with_the_first_missing_part(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    source: Archive | Local = archive(zipped(tmp_path / "a.zip", FACES))
    if kind == "folder":
        source = folder(unpacked(tmp_path / "faces", FACES))
    run("train", source, tmp_path / "whole", HERE)
    written: list[str] = []
    write_part = stages.download.run._write_part

    def killed_at_the_third(path: Path, rows: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_part(path, rows)

    monkeypatch.setattr(stages.download.run, "_write_part", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run("train", source, tmp_path / "raw", HERE)
    before = {path.name: path.stat().st_mtime_ns for path in sorted(begun(tmp_path / "raw").iterdir())}
    monkeypatch.setattr(stages.download.run, "_write_part", write_part)
    run("train", source, tmp_path / "raw", HERE)
    assert list(before) == written == ["part-00000.parquet", "part-00001.parquet"]
    assert {name: (tmp_path / "raw" / name).stat().st_mtime_ns for name in before} == before
    assert content(tmp_path / "raw") == content(tmp_path / "whole")


def test_what_another_archive_began_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    path = zipped(tmp_path / "a.zip", {**FACES, "more/0000099/008.jpg": b"of another person"})
    with pytest.raises(SourceError, match="two folders"):
        run("train", archive(path), tmp_path / "raw", HERE)
    assert len(tables.parts(begun(tmp_path / "raw"))) == 4
    changed = {name: image[::-1] for name, image in FACES.items()}
    run("train", archive(zipped(path, changed)), tmp_path / "raw", HERE)
    assert tables.read_parts(tmp_path / "raw", tables.RAW).to_pydict() == expected(changed)


def test_from_an_address_nothing_fetched_stays_behind(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 2)
    host.files["lfw.tgz"] = tarred(tmp_path / "lfw.tgz", LFW).read_bytes()
    host.files["pairs.txt"] = PAIRS.replace("Bob\t2", "Bob\t9").encode()
    host.drops = [10, 1_000_000, 300]  # the pairs, the rest of them, the archive
    source = archive(host.address("lfw.tgz"), host.address("pairs.txt"))
    downloads = tmp_path / "downloads"
    with pytest.raises(SourceError, match=r"Bob_0009 \(line 3\)"):
        run("lfw", source, tmp_path / "raw", HERE, downloads)
    assert not (begun(tmp_path / "raw") / "pairs.parquet").exists()
    host.files["pairs.txt"] = PAIRS.encode()
    next(downloads.glob("*-pairs.txt")).unlink()
    before = (begun(tmp_path / "raw") / "part-00000.parquet").stat().st_mtime_ns
    run("lfw", source, tmp_path / "raw", HERE, downloads)
    assert (tmp_path / "raw" / "part-00000.parquet").stat().st_mtime_ns == before
    assert tables.read_parts(tmp_path / "raw", tables.RAW).to_pydict() == expected(LFW)
    assert [path for path in downloads.iterdir() if path.suffix != ".lock"] == []
    assert [request[0] for request in host.requests].count("lfw.tgz") == 2  # the dropped one and its rest


def test_a_link_in_place_of_the_set_is_refused_before_anything_is_fetched(host: Any, tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(tmp_path)
    with pytest.raises(InputError, match="raw: is a symbolic link"):
        run("train", archive(host.address("a.zip")), tmp_path / "raw", HERE, tmp_path / "downloads")
    assert host.requests == []


@pytest.mark.parametrize("broken", ["lfw.tgz", "pairs.txt"])
def test_a_damaged_download_is_fetched_again_by_the_next_run(broken: str, host: Any, tmp_path: Path) -> None:
    whole = {"lfw.tgz": tarred(tmp_path / "lfw.tgz", LFW).read_bytes(), "pairs.txt": PAIRS.encode()}
    source = archive(host.address("lfw.tgz"), host.address("pairs.txt"))
    downloads = tmp_path / "downloads"
    host.files |= whole | {broken: whole[broken][:-9]}
    with pytest.raises(DamagedError):
        run("lfw", source, tmp_path / "raw", HERE, downloads)
    assert not list(downloads.glob(f"*-{broken}"))
    host.files |= whole
    run("lfw", source, tmp_path / "raw", HERE, downloads)
    assert tables.read_parts(tmp_path / "raw", tables.RAW).to_pydict() == expected(LFW)


def test_a_damaged_file_that_is_the_one_meant_stays(host: Any, tmp_path: Path) -> None:
    damaged = zipped(tmp_path / "a.zip", FACES).read_bytes()[:-30]
    host.files["a.zip"] = damaged
    source = archive(host.address("a.zip"), sha256=hashlib.sha256(damaged).hexdigest())
    for location in (source, archive(tmp_path / "mine.zip")):
        (tmp_path / "mine.zip").write_bytes(damaged)
        with pytest.raises(DamagedError):
            run("train", location, tmp_path / "raw", HERE, tmp_path / "downloads")
    assert (tmp_path / "mine.zip").exists()
    assert len(list((tmp_path / "downloads").glob("*-a.zip"))) == 1


def test_who_waits_for_another_process_fetches_anew(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host.files |= {"lfw.tgz": tarred(tmp_path / "lfw.tgz", LFW).read_bytes(), "pairs.txt": PAIRS.encode()}
    source = archive(host.address("lfw.tgz"), host.address("pairs.txt"))
    write_part = stages.download.run._write_part

    deadline = time.monotonic() + 50

    def once_the_other_waits(path: Path, rows: Any) -> None:
        while "another process is writing here" not in caplog.text:
            assert time.monotonic() < deadline, "the other does not wait"
            time.sleep(0.01)
        write_part(path, rows)

    monkeypatch.setattr(stages.download.run, "_write_part", once_the_other_waits)
    with ThreadPoolExecutor(2) as both:
        runs = [both.submit(run, "lfw", source, tmp_path / "raw", HERE, tmp_path / "downloads") for _ in range(2)]
        for each in runs:
            each.result(60)
    assert tables.read_parts(tmp_path / "raw", tables.RAW).to_pydict() == expected(LFW)


def test_what_was_read_and_skipped_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = {**YTF, "readme.txt": b"", "Ann/.DS_Store": b"", "__MACOSX/Ann/0/._0.1.jpg": b"", "Ann/Ann.mat": b""}
    source = folder(unpacked(tmp_path / "ytf", tree), listed(tmp_path / "splits.txt", SPLITS))
    (tmp_path / "ytf" / "Ann" / "9").symlink_to(tmp_path / "ytf" / "Ann" / "0")
    with caplog.at_level(logging.INFO):
        run("ytf", source, tmp_path / "raw", HERE)
    assert "ytf: 12 images, 2 identities, 4 videos, 2 pairs" in caplog.messages
    assert [(record.levelname, record.message) for record in caplog.records[-4:]] == [
        ("INFO", "ytf: passed over 2 hidden files, as 'Ann/.DS_Store'"),
        ("INFO", "ytf: passed over 2 files that are no images, as 'Ann/Ann.mat'"),
        ("WARNING", "ytf: passed over 1 links, which are not followed, as 'Ann/9'"),
        ("WARNING", f"ytf: {tmp_path / 'raw' / 'passed_over.csv'} lists what was passed over"),
    ]


def test_photographs_that_are_not_read_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = {**FACES, "0000045/1.heic": b"x", "0000045/2.heic": b"x", "cover.jpg": b"x", "\x1b[2J.txt": b"x"}
    run("train", folder(unpacked(tmp_path / "faces", tree)), tmp_path / "raw", HERE)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "train: passed over 2 photographs of a kind that is not read (.heic), as '0000045/1.heic'",
        "train: passed over 1 images outside <identity>/<image>.jpg, as 'cover.jpg'",
        f"train: {tmp_path / 'raw' / 'passed_over.csv'} lists what was passed over",
    ]
    assert "\x1b" not in caplog.text


def test_a_folder_of_links_is_called_what_it_is(tmp_path: Path) -> None:
    faces = unpacked(tmp_path / "faces", FACES)
    (tmp_path / "links").mkdir()
    for person in faces.iterdir():
        (tmp_path / "links" / person.name).symlink_to(person)
    with pytest.raises(SourceError, match=r"no images; .*, found 2 links, which are not followed, as '0000045'$"):
        run("train", folder(tmp_path / "links"), tmp_path / "raw", HERE)


def test_what_cannot_be_a_row_is_passed_over_counted_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a tar, which may hold any name and hard links; the rest of the set is as it is without them."""
    monkeypatch.setattr(tables, "PART_BYTES", 1 << 20)
    latin = "0000045/\udce9.jpg"  # as Python reads the byte 0xe9
    odd = {"0000045/001.png": b"x", "0000045/002.JPG": b"y", latin: b"x", "a/\x1b[2J.jpg": b"x", "../a/1.jpg": b"x"}
    odd |= {"0000099/large.jpg": bytes((1 << 20) + 1)}
    path = tarred(tmp_path / "faces.tgz", FACES | odd)
    with tarfile.open(tmp_path / "faces.tar", "w") as file, tarfile.open(path) as given:
        for member in given:
            file.addfile(member, given.extractfile(member))
        link = tarfile.TarInfo("lfw/0000099/link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "lfw/0000045/001.jpg"
        file.addfile(link)
    run("train", archive(tmp_path / "faces.tar"), tmp_path / "raw", HERE)
    assert tables.read_parts(tmp_path / "raw", tables.RAW).to_pydict() == expected(FACES)
    with (tmp_path / "raw" / "passed_over.csv").open(newline="") as listing:
        rows = list(csv.DictReader(listing))
    twice = "photographs whose image id (folder and name without extension) is that of an earlier one"
    assert [(row["name"], row["reason"]) for row in rows] == [
        ("'lfw/0000045/001.png'", twice),
        ("'lfw/0000045/002.JPG'", twice),
        ("'lfw/0000045/\\udce9.jpg'", "photographs whose names are not UTF-8"),
        ("'lfw/a/\\x1b[2J.jpg'", "photographs whose names have control characters"),
        ("'lfw/../a/1.jpg'", "photographs at absolute paths or ones with `..`"),
        ("'lfw/0000099/large.jpg'", "files of more than 1 MiB, which are no photographs"),
        (
            "'lfw/0000099/link.jpg'",
            "hard links to other members, which are not read (`tar --hard-dereference` packs the photographs)",
        ),
    ]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings[0] == f"train: passed over 2 {twice}, as 'lfw/0000045/001.png'"
    assert warnings[-1] == f"train: {tmp_path / 'raw' / 'passed_over.csv'} lists what was passed over"
    assert len(warnings) == 7
    assert "\x1b" not in caplog.text


def test_no_photograph_passed_over_no_list_of_them(tmp_path: Path) -> None:
    run(
        "train",
        archive(zipped(tmp_path / "a.zip", FACES | {"readme.txt": b"", "a/.x.jpg": b""})),
        tmp_path / "raw",
        HERE,
    )
    assert list(content(tmp_path / "raw")) == ["part-00000.parquet"]


def test_a_set_may_be_shared_out_and_strangers_may_lie_anywhere(tmp_path: Path) -> None:
    shares = {f"{share}/{who}/{share}1.jpg": b"x" for share in ("train", "val") for who in ("a", "b")}
    run("train", archive(zipped(tmp_path / "a.zip", shares)), tmp_path / "train", HERE)
    assert tables.read_parts(tmp_path / "train", tables.RAW)["identity"].to_pylist() == ["a", "b", "a", "b"]
    strangers = {"0/x/1.jpg": b"x", "1/x/2.jpg": b"x"}
    run("distractors", archive(zipped(tmp_path / "d.zip", strangers)), tmp_path / "distractors", HERE)
    assert tables.read_parts(tmp_path / "distractors", tables.RAW)["image_id"].to_pylist() == ["x/1", "x/2"]


def test_people_called_nearly_alike_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["Jos\u00e9", "Jose\u0301", "John", "john", "a", "a ", "b", "B", "c"]
    path = zipped(tmp_path / "a.zip", {f"{name}/1.jpg": b"x" for name in names})
    run("train", archive(path), tmp_path / "raw", HERE)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == [
        "train: identities that differ only in case, spaces or Unicode's forms are different people, 4 times: "
        "'B' and 'b'; 'John' and 'john'; 'Jose\\u0301' and 'Jos\\xe9'; and 1 more. If they are the same, "
        "give them one folder"
    ]
    assert len(tables.read_parts(tmp_path / "raw", tables.RAW)["identity"].unique()) == 9


@pytest.mark.parametrize(
    ("set_name", "tree", "message"),
    [
        ("train", {}, "{}: no images; expected .../<identity>/<image>.jpg, found no files"),
        (
            "ytf",
            {"a/1.mat": b"", "b/readme": b"", "c/d/e.txt": b"", "f/g": b""},
            "{}: no images; expected .../<identity>/<video>/<frame number>.jpg, found 4 files that are no images, "
            "as 'CASIA-WebFace/a/1.mat'",
        ),
        (
            "train",
            {"1.jpg": b"", "2.jpg": b""},
            "{}: only one identity, CASIA-WebFace; training needs at least 2. Expected .../<identity>/<image>.jpg, "
            "found CASIA-WebFace/1.jpg",
        ),
        (
            "train",
            {"Alice/phone/1.jpg": b"", "Cy/camera/1.jpg": b"", "Bob/phone/1.jpg": b""},
            "{}: CASIA-WebFace/Alice/phone/1.jpg and CASIA-WebFace/Bob/phone/1.jpg lie in two folders called phone, "
            "which would be one person. Give each person one folder, of a name that no other has: "
            ".../<identity>/<image>.jpg",
        ),
        (
            "train",
            {"../a/1.jpg": b"", "../b/1.jpg": b""},
            "{}: no images; expected .../<identity>/<image>.jpg, found 2 photographs at absolute paths or ones with "
            "`..`, as 'CASIA-WebFace/../a/1.jpg'",
        ),
        (
            "lfw",
            {"Ann/Ann_0001.jpg": b""},
            "PAIRS: names 5 that {} lacks: Ann/Ann_0002 (line 2), Bob/Bob_0002 (line 3), Cy/Cy_0001 (line 4) and "
            "2 more",
        ),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_and_nothing_looks_finished(
    set_name: str, tree: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    path, out = zipped(tmp_path / "a.zip", tree), tmp_path / "raw"
    pairs = {"train": None, "lfw": listed(tmp_path / "p", PAIRS), "ytf": listed(tmp_path / "s", SPLITS)}[set_name]
    with pytest.raises(SourceError) as caught:
        run(set_name, archive(path, pairs), out, HERE)
    assert str(caught.value) == message.format(path).replace("PAIRS", str(pairs))
    assert begun(out).exists()
    assert not list(out.iterdir())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        run("train", folder(tmp_path / "faces"), tmp_path / "raw", HERE)
    assert str(caught.value) == (
        f"{tmp_path / 'faces'}: no such folder; set download.train.location in params.yaml to where it is"
    )
    (tmp_path / "faces").write_bytes(b"PK")
    with pytest.raises(
        SourceError, match=r"faces: a file, not a folder; for an archive, set download\.train\.source to"
    ):
        run("train", folder(tmp_path / "faces"), tmp_path / "raw", HERE)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    text = (ROOT / "pipeline/recipes/quickstart.yaml").read_text()
    start, end = text.index("  lfw:"), text.index("  ytf:")
    lfw = (
        "  lfw:\n    source: archive\n    watch: [faces/lfw.tgz, pairs.txt]\n    location: faces/lfw.tgz\n"
        "    sha256: null\n    pairs: pairs.txt\n    pairs_sha256: null\n"
    )
    (tmp_path / "params.yaml").write_text(text[:start] + lfw + text[end:])
    (tmp_path / "pairs.txt").write_text(PAIRS)
    done = subprocess.run(
        [sys.executable, "-m", "stages.download", "lfw"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: faces/lfw.tgz: no such file; set download.lfw.location in params.yaml to where it is\n"
    )


def test_procedural_faces_are_rendered_part_by_part_on_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "PART_ROWS", 4)
    source = Synthetic(
        source="synthetic", watch=[], seed=5, identities=4, images=3, videos=1, folds=2, pairs=2, size=64
    )
    out = tmp_path / "raw"
    run("lfw", source, out, HERE)
    photographs = synthetic.photographs(source, "lfw")
    rows = tables.read_parts(out, tables.RAW)
    assert rows["image_id"].to_pylist() == [photograph.image_id for photograph in photographs]
    assert rows["image"].to_pylist() == synthetic.render_part(source, photographs)
    assert tables.read_table(out / "pairs.parquet", tables.PAIRS).equals(synthetic.protocol(source, "lfw"))

    # back to what a killed run leaves: some of the parts
    before = content(out)
    assert list(before) == ["pairs.parquet", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    key = tables.fingerprint("lfw", source.model_dump(exclude={"watch"}), code=(stages.download.run.CODE,))
    kept = tables.part_path(out, 1)
    before_it = kept.stat().st_mtime_ns
    for path in (tables.part_path(out, 0), tables.part_path(out, 2), out / "pairs.parquet"):
        path.unlink()
    (tmp_path / ".raw.unfinished").mkdir()
    out.rename(tmp_path / ".raw.unfinished" / key)
    run("lfw", source, out, HERE.model_copy(update={"workers": 2}))
    assert content(out) == before
    assert kept.stat().st_mtime_ns == before_it
