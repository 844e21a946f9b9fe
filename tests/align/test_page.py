"""The page, the metrics and the list of rejections against numbers made by hand or by scikit-image."""

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import skimage.transform

from pipeline import tables
from pipeline.params import Align, load_params
from stages.align.page import write_page
from stages.align.warp import TEMPLATE
from tests.conftest import ROOT
from tests.samples import face_like, jpeg

PARAMS = load_params(ROOT / "params.yaml").align
RNG = np.random.default_rng(0)
LANDMARKS = (TEMPLATE * 1.4 + (20, 30) + RNG.normal(0, 3, (40, 5, 2))).astype(np.float32)
JPEG = jpeg(face_like(1, 1))


def detected(i: int, **changes: Any) -> dict[str, Any]:
    size = 40 + i
    row = {
        "status": "detected",
        "image": JPEG,
        "box": [10.0, 20.0, 10.0 + size - 1, 20.0 + size - 1],
        "landmarks": LANDMARKS[i % 40].ravel().tolist(),
        "score": 0.9 + i / 1000,
        "look": "first",
        "faces": 1,
        "others": [],
    }
    return row | changes


def write(folder: Path, rows: list[dict[str, Any]], part_rows: int = 16) -> tuple[Path, Path]:
    """A raw and an aligned table of these rows."""
    raw, aligned = folder / "raw" / "train", folder / "aligned" / "train"
    for start in range(0, len(rows), part_rows):
        some = [
            {"image_id": f"p/{start + i}", "identity": "p", "sha256": hashlib.sha256(JPEG).hexdigest()} | row
            for i, row in enumerate(rows[start : start + part_rows])
        ]
        index = start // part_rows
        aligned_table = pa.Table.from_pylist(some, tables.ALIGNED)
        tables.write_table(tables.part_path(aligned, index), aligned_table, tables.ALIGNED)
        raw_table = pa.Table.from_pylist([row | {"image": JPEG} for row in some], tables.RAW)
        tables.write_table(tables.part_path(raw, index), raw_table, tables.RAW)
    return raw, aligned


def made(folder: Path, rows: list[dict[str, Any]], params: Align = PARAMS) -> tuple[dict[str, Any], str]:
    raw, aligned = write(folder, rows)
    report = folder / "report" / "train"
    metrics = write_page(raw, aligned, report, params, evaluation=False)
    assert json.loads((report / "metrics.json").read_text()) == metrics
    return metrics, (report / "index.html").read_text()


ROWS = [
    *(detected(i) for i in range(36)),
    detected(36, faces=2, others=[50.0, 60.0, 149.0, 159.0]),
    detected(37, look="rotated"),
    {"status": "no_face", "faces": 0},
    {"status": "unreadable", "detail": "empty file <script>"},
    {"status": "no_face", "faces": 0, "image_id": "<b>bold</b>"},
]


def test_the_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    metrics, _ = made(tmp_path, ROWS)
    counts = ("images", "detected", "fallback", "no_face", "unreadable", "several_faces")
    assert [metrics[name] for name in counts] == [41, 38, 0, 2, 1, 1]
    assert metrics["looks"] == {"smaller": 0, "rotated": 1, "equalised": 0}
    assert metrics["detected_share"] == pytest.approx(38 / 41, abs=1e-6)
    assert metrics["score"]["median"] == pytest.approx(0.9 + 18.5 / 1000, abs=1e-4)
    assert metrics["face_size"]["median"] == pytest.approx(40 + 18.5)
    residuals = []
    for points in LANDMARKS[:38].astype(np.float64):
        transform = skimage.transform.SimilarityTransform.from_estimate(points, TEMPLATE)
        residuals.append(np.sqrt(((transform(points) - TEMPLATE) ** 2).sum(axis=1).mean()))
    for name, value in (("median", np.median(residuals)), ("p95", np.quantile(residuals, 0.95))):
        assert metrics["residual"][name] == pytest.approx(value, abs=1e-3)
    assert metrics["residual"]["max"] == pytest.approx(max(residuals), abs=1e-3)


def test_every_rejection_is_listed(tmp_path: Path) -> None:
    made(tmp_path, ROWS)
    with (tmp_path / "report" / "train" / "rejected.csv").open(newline="") as file:
        listed = [(row["image_id"], row["status"], row["detail"]) for row in csv.DictReader(file)]
    assert listed == [
        ("p/38", "no_face", ""),
        ("p/39", "unreadable", "empty file <script>"),
        ("<b>bold</b>", "no_face", ""),
    ]


def test_the_page_shows_each_kind_and_opens_offline(tmp_path: Path) -> None:
    _, page = made(tmp_path, ROWS)
    for title in ("A sample", "Lowest scores", "Farthest", "Possible wrong picks", "Found by a later look", "No face"):
        assert title in page
    assert "92.68%" in page  # 38 of 41
    assert "p/36" in page.split("Possible wrong picks")[1].split("</section>")[0]
    assert "rotated, 0.937" in page
    assert "<b>bold" not in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    lowest = page.split("Lowest scores")[1].split("</section>")[0]
    assert re.findall(r"<b>([\d.]+)</b>", lowest)[:3] == ["0.900", "0.901", "0.902"]


def test_the_same_table_gives_the_same_page(tmp_path: Path) -> None:
    assert made(tmp_path / "a", ROWS)[1] == made(tmp_path / "b", ROWS)[1]


def test_a_set_without_any_face(tmp_path: Path) -> None:
    metrics, page = made(tmp_path, [{"status": "no_face", "faces": 0}] * 3)
    assert metrics["score"] is metrics["residual"] is metrics["face_size"] is None
    assert metrics["detected_share"] == 0
    assert "0.00%" in page


def test_the_page_does_not_grow_with_the_set(tmp_path: Path) -> None:
    large = [row for _ in range(12) for row in ROWS]
    small_page, large_page = made(tmp_path / "small", ROWS * 3)[1], made(tmp_path / "large", large)[1]
    assert len(large_page) < 1.2 * len(small_page)
