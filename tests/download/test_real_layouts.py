"""Real archives as their hosts serve them, where they are at hand; against a reading of them by other means."""

import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import tables
from pipeline.params import Archive
from stages.download.run import run
from tests.work import HERE

FACES = Path(__file__).parents[2].parent / "shared" / "faces"
pytestmark = pytest.mark.skipif(not FACES.exists(), reason="no real photographs beside the repository")


def photographs(set_name: str, archive: Path) -> list[tuple[str, str, str | None, int | None]]:
    """Image id, identity, video and frame by the names in an archive, which are `.../<identity>/<video>/<video>.15.jpg`
    in YouTube Faces and `.../<identity>/<image>.jpg` elsewhere.
    """
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            names = zipped.namelist()
    else:
        with tarfile.open(archive) as tarred:
            names = tarred.getnames()
    rows: list[tuple[str, str, str | None, int | None]] = []
    for name in (name.removesuffix(".jpg") for name in names if name.endswith(".jpg")):
        *_, identity, video, image = name.split("/")
        if set_name == "ytf":
            rows.append((f"{identity}/{video}/{image}", identity, f"{identity}/{video}", int(image.split(".")[1])))
        else:
            rows.append((f"{video}/{image}", video, None, None))
    return rows


def listed(set_name: str, path: Path) -> list[tuple[Any, ...]]:
    """Fold, left, right and whether they are the same person, of each line of a pair list."""
    lines = path.read_text().splitlines()
    if set_name == "ytf":
        fields = (line.split(", ") for line in lines)
        return [(int(split) - 1, left, right, same == "1") for split, _, left, right, same in fields]
    each = int(lines[0].split("\t")[1])
    pairs: list[tuple[Any, ...]] = []
    for i, (name, *others) in enumerate(line.split("\t") for line in lines[1:]):
        first, other, second = others if len(others) == 3 else (others[0], name, others[1])
        image, against = f"{name}/{name}_{first:0>4}", f"{other}/{other}_{second:0>4}"
        pairs.append((i // (2 * each), image, against, len(others) == 2))
    return pairs


@pytest.mark.parametrize(
    ("set_name", "archive", "pairs"),
    [
        ("train", "CASIA-WebFace.zip", None),
        ("lfw", "lfw.tgz", "pairs.txt"),
        ("ytf", "YouTubeFaces.tar.gz", "splits.txt"),
    ],
)
def test_real_archives(set_name: str, archive: str, pairs: str | None, tmp_path: Path) -> None:
    source = Archive(
        source="archive",
        watch=[],
        location=str(FACES / archive),
        sha256=None,
        pairs=pairs and str(FACES / pairs),
        pairs_sha256=None,
    )
    run(set_name, source, tmp_path / "raw", HERE)
    rows = tables.read_parts(tmp_path / "raw", tables.RAW, ["image_id", "identity", "video", "frame"]).to_pylist()
    assert sorted(tuple(row.values()) for row in rows) == sorted(photographs(set_name, FACES / archive))
    if pairs:
        table = pq.read_table(tmp_path / "raw" / "pairs.parquet").to_pylist()
        assert [tuple(row.values()) for row in table] == listed(set_name, FACES / pairs)
