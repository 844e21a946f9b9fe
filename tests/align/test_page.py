"""The page, the metrics and the list of rejections against numbers made by hand or by scikit-image."""

import base64
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

import stages.align.page
from pipeline import tables
from pipeline.params import Align, load_params
from stages.align.decode import decode
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


def residuals(points: np.ndarray) -> list[float]:
    """Of landmarks (n, 5, 2), by scikit-image."""
    found = []
    for own in points.astype(np.float64):
        transform = skimage.transform.SimilarityTransform.from_estimate(own, TEMPLATE)
        found.append(np.sqrt(((transform(own) - TEMPLATE) ** 2).sum(axis=1).mean()))
    return found


def section(page: str, title: str) -> str:
    return page.split(title)[1].split("</section>")[0]


def test_the_numbers_are_those_of_the_rows(tmp_path: Path) -> None:
    metrics, _ = made(tmp_path, ROWS)
    counts = ("images", "detected", "fallback", "no_face", "unreadable", "several_faces")
    assert [metrics[name] for name in counts] == [41, 38, 0, 2, 1, 1]
    assert metrics["looks"] == {"smaller": 0, "rotated": 1, "equalised": 0}
    assert metrics["detected_share"] == pytest.approx(38 / 41, abs=1e-6)
    assert metrics["score"]["median"] == pytest.approx(0.9 + 18.5 / 1000, abs=1e-4)
    assert metrics["face_size"]["median"] == pytest.approx(40 + 18.5)
    expected = residuals(LANDMARKS[:38])
    for name, value in (("median", np.median(expected)), ("p95", np.quantile(expected, 0.95))):
        assert metrics["residual"][name] == pytest.approx(value, abs=1e-3)
    assert metrics["residual"]["max"] == pytest.approx(max(expected), abs=1e-3)


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
    assert "p/36" in section(page, "Possible wrong picks")
    assert "rotated, 0.937" in page
    assert "<b>bold" not in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert re.findall(r"<b>([\d.]+)</b>", section(page, "Lowest scores"))[:3] == ["0.900", "0.901", "0.902"]
    farthest = [float(value) for value in re.findall(r"<b>([\d.]+) px</b>", section(page, "Farthest"))]
    assert farthest == pytest.approx(sorted(residuals(LANDMARKS[:38]), reverse=True)[:30], abs=0.051)


def test_of_several_faces_the_page_shows_first_where_another_is_largest_beside_the_chosen_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen one green, the others red."""
    monkeypatch.setattr(stages.align.page, "_charts", lambda *_: {})  # they take their time

    def square(left: float, side: float) -> list[float]:
        return [left, left, left + side - 1, left + side - 1]

    rows = [
        detected(0, box=square(5, 80), faces=2, others=square(60, 40)),  # a quarter of its area
        detected(1),
        detected(2, box=square(5, 40), faces=3, others=square(90, 10) + square(50, 50)),  # more
        detected(3, box=square(5, 80), faces=2, others=square(40, 70)),  # the largest of all, but less beside it
        {"status": "no_face", "faces": 0},
    ]
    shown = section(made(tmp_path, rows)[1], "Possible wrong picks")
    assert re.findall(r'title="([^"]+)"', shown) == ["p/2", "p/3", "p/0"]
    first = decode(base64.b64decode(re.findall(r"base64,([^\"]+)", shown)[0])).astype(int)
    assert first.shape == (160, 160, 3)
    for left, side, mine, other in ((5, 40, 1, 0), (50, 50, 0, 1)):
        row, start, end = (round(at * 160 / 112) for at in (left, left, left + side - 1))
        edge = first[row, start:end].mean(axis=0)
        assert edge[mine] > edge[other] + 60


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
