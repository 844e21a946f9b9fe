"""What became of a set: metrics.json, rejected.csv, and a page of figures and sheets of pictures to look at."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg
from numpy.typing import NDArray

from pipeline import pages, tables
from pipeline.params import Align
from stages.align.decode import UnreadableImage, decode
from stages.align.warp import TEMPLATE, similarity

log = logging.getLogger(__name__)

_STATUSES = ("detected", "fallback", "no_face", "unreadable")
_REJECTED = ("no_face", "unreadable")
_LOOKS = ("smaller", "rotated", "equalised")
_LOGGED = 20
"""Rejected images that the log names; the list on disk has all."""
_SAMPLE, _WORST, _FEW = 60, 30, 24
"""Pictures on a sheet: of a random sample, of the worst by some number, of whole photographs."""
_SIDE = 160
"""Longer side of a whole photograph on the page, pixels."""
_CHOSEN, _OTHER = (46, 194, 126), (237, 92, 60)
"""RGB of the box of the chosen face and of the others."""


@dataclass(frozen=True)
class Picture:
    """A picture on a sheet."""

    uri: str
    number: str
    name: str


@dataclass(frozen=True)
class Sheet:
    """A section of the page; faces or whole photographs."""

    title: str
    text: str
    pictures: list[Picture]
    whole: bool = False


def write_page(raw: Path, aligned: Path, folder: Path, params: Align, *, evaluation: bool) -> dict[str, Any]:
    """Write metrics.json, rejected.csv and index.html of an aligned set.

    Only the pictures on the page are read, however large the set is.

    Args:
        raw: folder of the raw table, whose rows are those of the aligned one.
        aligned: folder of the aligned table; its name is the set's.
        folder: where the three go.

    Returns:
        The content of metrics.json: counts; the share detected; and as quantiles, null where no face was found, score,
        size of the face in pixels of the photograph, and residual (root mean square distance of its five landmarks to
        the template, in pixels of the aligned face).

    Raises:
        TableError: a table is absent or incomplete.
    """
    columns = [name for name in tables.ALIGNED.names if name not in ("image", "sha256", "video", "frame")]
    table = tables.read_parts(aligned, tables.ALIGNED, columns)
    detected = np.flatnonzero(pc.equal(table["status"], "detected").to_numpy())
    found = table.take(detected)
    score, size, residual = found["score"].to_numpy(), _sizes(found), _residuals(found)
    metrics = _metrics(table, score, size, residual)
    with tables.atomic(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    _list_rejected(aligned.name, table, metrics, folder / "rejected.csv")

    pages.render(
        Path(__file__).parent / "page.html.j2",
        folder / "index.html",
        name=aligned.name,
        metrics=metrics,
        evaluation=evaluation,
        params=params,
        charts=_charts(score, size, residual) if len(found) else {},
        sheets=_sheets(table, detected, score, residual, raw, aligned),
        unreadable=table.filter(pc.equal(table["status"], "unreadable")).slice(0, _WORST).to_pylist(),
    )
    return metrics


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.float64]:
    """A column of lists of `width` numbers as (n, width)."""
    return np.asarray(pc.list_flatten(column).to_numpy(), np.float64).reshape(-1, width)


def _sizes(found: pa.Table) -> NDArray[np.float64]:
    """(n,) mean of width and height of the chosen face's box."""
    boxes = _matrix(found["box"], 4)
    return (boxes[:, 2:] - boxes[:, :2] + 1).mean(axis=1)


def _residuals(found: pa.Table) -> NDArray[np.float64]:
    """(n,) root mean square distance of the five landmarks to the template, once they are aligned."""
    landmarks = _matrix(found["landmarks"], 10).reshape(-1, 5, 2)
    if not len(landmarks):
        return np.empty(0)
    matrices = similarity(landmarks)
    aligned = np.einsum("nij,nkj->nki", matrices[:, :, :2], landmarks) + matrices[:, None, :, 2]
    return np.sqrt(((aligned - TEMPLATE) ** 2).sum(axis=2).mean(axis=1))


def _metrics(
    table: pa.Table, score: NDArray[np.float32], size: NDArray[np.float64], residual: NDArray[np.float64]
) -> dict[str, Any]:
    statuses, looks = Counter(table["status"].to_pylist()), Counter(table["look"].to_pylist())

    def quantiles(values: NDArray[np.floating], digits: int, **shares: float) -> dict[str, float] | None:
        if not len(values):
            return None
        return {name: round(float(np.quantile(values, share)), digits) for name, share in shares.items()}

    return {
        "images": len(table),
        **{name: statuses[name] for name in _STATUSES},
        "several_faces": int(pc.sum(pc.greater(table["faces"], 1)).as_py() or 0),
        "looks": {name: looks[name] for name in _LOOKS},
        "detected_share": round(statuses["detected"] / max(1, len(table)), 6),
        "score": quantiles(score, 4, p01=0.01, p05=0.05, median=0.5),
        "face_size": quantiles(size, 1, p05=0.05, median=0.5, p95=0.95),
        "residual": quantiles(residual, 3, median=0.5, p95=0.95, max=1.0),
    }


def _list_rejected(name: str, table: pa.Table, metrics: dict[str, Any], listing: Path) -> None:
    """List on disk what has no aligned image, and log the counts and the first of those."""
    rejected = table.filter(pc.is_in(table["status"], pa.array(_REJECTED))).to_pylist()
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["image_id", "status", "detail"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rejected)
    with tables.atomic(listing) as path:
        path.write_text(lines.getvalue(), encoding="utf-8")
    counts = {key: metrics[key] for key in ("images", *_STATUSES, "several_faces")} | {
        f"found by the look {look}": count for look, count in metrics["looks"].items() if count
    }
    log.info("%s: %s", name, ", ".join(f"{key} {count:,}" for key, count in counts.items()))
    for row in rejected[:_LOGGED]:
        log.info("rejected: %s: %s", row["image_id"], row["detail"] or "no face found")
    if rejected:
        log.info("%d rejected in all, listed in %s", len(rejected), listing)


def _sheets(
    table: pa.Table,
    detected: NDArray[np.intp],
    score: NDArray[np.float32],
    residual: NDArray[np.float64],
    raw: Path,
    aligned: Path,
) -> list[Sheet]:
    """The sheets of the page, without empty ones."""
    names = table["image_id"]
    look = np.asarray(table["look"].to_pylist(), object)
    status = np.asarray(table["status"].to_pylist(), object)
    scores, residuals = dict(zip(detected, score, strict=True)), dict(zip(detected, residual, strict=True))

    def faces(title: str, text: str, rows: NDArray[np.intp], number: Callable[[int], str]) -> Sheet:
        shown = tables.read_images(aligned, tables.ALIGNED, rows)
        return Sheet(
            title,
            text,
            [Picture(pages.data_uri(shown[row]), number(row), names[row].as_py()) for row in rows.tolist()],
        )

    def photographs(title: str, text: str, rows: NDArray[np.intp], number: Callable[[int], str]) -> Sheet:
        shown = tables.read_images(raw, tables.RAW, rows)
        pictures = [Picture(_photograph(shown[r], table, r), number(r), names[r].as_py()) for r in rows.tolist()]
        return Sheet(title, text, pictures, whole=True)

    sample = np.sort(np.random.default_rng(0).permutation(detected)[:_SAMPLE])
    doubtful = _doubtful(table, detected)[:_FEW]
    later = np.flatnonzero(np.isin(look, _LOOKS))[:_FEW]
    sheets = [
        faces("A sample", "Aligned faces drawn at random, with their scores.", sample, lambda r: f"{scores[r]:.3f}"),
        faces(
            "Lowest scores",
            "The faces that O-Net was least certain of.",
            detected[np.argsort(score, kind="stable")[:_WORST]],
            lambda r: f"{scores[r]:.3f}",
        ),
        faces(
            "Farthest from the template",
            "Pixels between the five landmarks and the template: profiles, grimaces, and wrong landmarks.",
            detected[np.argsort(-residual, kind="stable")[:_WORST]],
            lambda r: f"{residuals[r]:.1f} px",
        ),
        photographs(
            "Possible wrong picks",
            "Photographs with several faces: the chosen one green, the others red. First those in which another face "
            "is largest beside the chosen one.",
            doubtful,
            lambda r: f"{table['faces'][r].as_py()} faces",
        ),
        photographs(
            "Found by a later look",
            "Nothing was found in them at first.",
            later,
            lambda r: f"{look[r]}, {scores[r]:.3f}",
        ),
        photographs("No face found", "Left out.", np.flatnonzero(status == "no_face")[:_FEW], lambda r: ""),
        photographs(
            "Cropped from the centre",
            "No face was found; every pair of the protocol counts.",
            np.flatnonzero(status == "fallback")[:_FEW],
            lambda r: "",
        ),
    ]
    return [sheet for sheet in sheets if sheet.pictures]


def _doubtful(table: pa.Table, detected: NDArray[np.intp]) -> NDArray[np.intp]:
    """Photographs with several faces, the largest of the others being largest beside the chosen one first."""
    several = detected[pc.greater(table["faces"].take(detected), 1).to_numpy()]
    if not len(several):
        return several
    some = table.select(["box", "others"]).take(several)
    chosen, others = (_areas(some[name].combine_chunks()) for name in ("box", "others"))
    ends = np.cumsum(pc.list_value_length(some["others"]).to_numpy() // 4)
    largest = np.maximum.reduceat(others, np.append(0, ends[:-1]))
    return several[np.argsort(-largest / chosen, kind="stable")]


def _areas(boxes: pa.ListArray) -> NDArray[np.float64]:
    """Of boxes, in lists of four numbers each."""
    found = boxes.flatten().to_numpy().astype(np.float64).reshape(-1, 4)
    areas: NDArray[np.float64] = (found[:, 2:] - found[:, :2] + 1).prod(axis=1)
    return areas


def _photograph(content: bytes, table: pa.Table, row: int) -> str:
    """A photograph, reduced, with the boxes of its faces, as the address of an `<img>`."""
    try:
        image = decode(content)
    except UnreadableImage:  # it was readable a moment ago; a picture is no reason to end a run
        image = np.zeros((_SIDE, _SIDE, 3), np.uint8)
    scale = _SIDE / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    boxes = np.reshape((table["box"][row].as_py() or []) + (table["others"][row].as_py() or []), (-1, 4))
    for i, (left, top, right, bottom) in reversed(list(enumerate((boxes * scale).round().astype(int).tolist()))):
        cv2.rectangle(small, (left, top), (right, bottom), _OTHER if i else _CHOSEN, 2)
    return pages.data_uri(simplejpeg.encode_jpeg(small.astype(np.uint8, copy=False), 80, "RGB", "420"))


@mpl.rc_context(pages.STYLE)
def _charts(score: NDArray[np.float32], size: NDArray[np.float64], residual: NDArray[np.float64]) -> dict[str, str]:
    """Histograms, as SVG by caption."""
    charts = {}
    for caption, values, label, log_counts in (
        ("Score of the chosen face", score, "O-Net's probability", True),
        ("Size of the chosen face", size, "pixels of the photograph", False),
        ("Distance of the five landmarks to the template", residual, "pixels of the aligned face", True),
    ):
        figure, plot = pages.axes()
        plot.hist(values.astype(np.float64), bins=50, color=pages.SAME)  # fp32 may not tell 50 edges apart
        plot.set(xlabel=label, ylabel="photographs", yscale="log" if log_counts else "linear")
        charts[caption] = pages.to_svg(figure, caption.split()[0].lower())
    return charts
