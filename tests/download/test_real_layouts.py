"""Real archives as their hosts serve them, where they are at hand."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline import tables
from pipeline.params import Archive
from stages.download.run import run
from tests.work import HERE

FACES = Path(__file__).parents[2].parent / "shared" / "faces"
pytestmark = pytest.mark.skipif(not FACES.exists(), reason="no real photographs beside the repository")


@pytest.mark.parametrize(
    ("set_name", "archive", "pairs", "counts"),
    [
        ("train", "CASIA-WebFace.zip", None, (10_800, 389, 0, 0, 0)),
        ("lfw", "lfw.tgz", "pairs.txt", (4_554, 2_505, 0, 3_600, 6)),
        ("ytf", "YouTubeFaces.tar.gz", "splits.txt", (3_370, 205, 674, 836, 6)),
    ],
)
def test_real_archives(set_name: str, archive: str, pairs: str | None, counts: tuple[int, ...], tmp_path: Path) -> None:
    source = Archive(
        source="archive",
        watch=[],
        location=str(FACES / archive),
        sha256=None,
        pairs=pairs and str(FACES / pairs),
        pairs_sha256=None,
    )
    run(
        set_name,
        source,
        tmp_path / "raw",
        HERE,
    )
    rows = tables.read_parts(tmp_path / "raw", tables.RAW, ["image_id", "identity", "video"])
    found = [len(rows["image_id"].unique()), len(rows["identity"].unique()), len(rows["video"].drop_null().unique())]
    if pairs:
        table = pq.read_table(tmp_path / "raw" / "pairs.parquet")
        found += [len(table), len(table["fold"].unique())]
    assert (*found, 0, 0)[:5] == counts
    assert len(rows) == counts[0]
