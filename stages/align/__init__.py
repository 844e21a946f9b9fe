"""align: photographs become 112×112 faces, the five landmarks of each where the template has them.

bytes       decode.py   pixels, or why there are none
pixels      mtcnn.py    faces with landmarks (nms.py: one box a face)
landmarks   warp.py     the aligned face
"""

import csv
import functools
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.executor import choose_device, cores, run_all
from pipeline.params import Align, Machine
from stages.align.decode import UnreadableImage, decode
from stages.align.mtcnn import Detector, Faces
from stages.align.warp import centre_crop, similarity, warp

log = logging.getLogger(__name__)

_CODE = Path(__file__).parent
_COPIED = ["image_id", "identity", "video", "frame", "sha256"]
_STATUSES = ("detected", "fallback", "no_face", "unreadable")
_REJECTED = ("no_face", "unreadable")
_SHOWN = 20
"""Rejected images that the log names; the list on disk has all."""
_BATCH_IMAGES, _BATCH_PIXELS = 64, 1 << 24
"""A batch closes at either: memory stays bounded however large the photographs are."""
_GPU_WORKERS = 8
"""Most processes that share a GPU: each holds some 500 MB of it."""


def run(raw: Path, out: Path, params: Align, machine: Machine, *, evaluation: bool, report: Path) -> dict[str, int]:
    """Align every photograph of a set; a part for each part, a row for each row, in the same order.

    A run that was interrupted goes on from the first missing part.

    Args:
        raw: folder of the raw table.
        out: folder of the aligned table.
        evaluation: whether a photograph without a face is centre-cropped (`fallback`), so that every pair of a
            protocol is compared, instead of left without an image (`no_face`).
        report: where the counts go as JSON; beside it, `<name>-rejected.csv` lists what has no aligned image.

    Returns:
        The counts: images, each status, and several_faces, the photographs with more than one.

    Raises:
        TableError: the raw table is absent or incomplete.
        InputError: a GPU was asked for and is not there.
    """
    device = choose_device(machine.device).type
    workers = machine.workers or cores()
    sources = tables.parts(raw)
    hashes = [tables.sha256_file(path) for path in sources]
    key = tables.fingerprint(params.model_dump(), evaluation, hashes, code=(_CODE,))
    with tables.resumable(out, key):
        tasks = [(source, out / source.name, params, evaluation, device) for source in sources]
        missing = [task for task in tasks if not task[1].exists()]
        run_all(
            _align_part,
            missing,
            workers=min(workers, _GPU_WORKERS) if device == "cuda" else workers,
            label=f"align {raw.name}",
            unit="parts",
        )
    return _report(tables.read_parts(out, tables.ALIGNED, ["image_id", "status", "faces", "detail"]), report)


def _align_part(source: Path, target: Path, params: Align, evaluation: bool, device: str) -> None:
    """One part of the raw table to one of the aligned table."""
    raw = tables.read_table(source, tables.RAW)
    detector = _detector(params.min_face, params.factor, params.thresholds, device)
    contents = (content.as_py() for content in raw["image"])
    rows = list(_align(contents, detector, params, evaluation))
    found = pa.Table.from_pylist(rows, pa.schema([field for field in tables.ALIGNED if field.name not in _COPIED]))
    columns = [(raw if name in _COPIED else found)[name] for name in tables.ALIGNED.names]
    tables.write_table(target, pa.table(columns, schema=tables.ALIGNED), tables.ALIGNED)


@functools.cache
def _detector(min_face: int, factor: float, thresholds: tuple[float, float, float], device: str) -> Detector:
    """The detector of this process, which all of its parts share."""
    return Detector(min_face, factor, thresholds, device)


def _align(contents: Iterable[bytes], detector: Detector, params: Align, evaluation: bool) -> Iterator[dict[str, Any]]:
    """For each encoded photograph, its columns of the aligned table."""
    for batch in _batches(contents):
        photographs = [item for item in batch if not isinstance(item, str)]
        faces = iter(detector.detect([_reduced(photograph, params.max_side) for photograph in photographs]))
        for item in batch:
            if isinstance(item, str):
                yield {"status": "unreadable", "detail": item}
            else:
                yield _row(item, next(faces), params, evaluation)


def _batches(contents: Iterable[bytes]) -> Iterator[list[NDArray[np.uint8] | str]]:
    """Decoded photographs in batches, with a reason for each that cannot be decoded."""
    batch: list[NDArray[np.uint8] | str] = []
    pixels = 0
    for content in contents:
        try:
            image = decode(content)
            batch.append(image)
            pixels += image.shape[0] * image.shape[1]
        except UnreadableImage as error:
            batch.append(str(error))
        if len(batch) == _BATCH_IMAGES or pixels >= _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    yield batch


def _reduced(photograph: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """The photograph, its longer side at most `max_side`."""
    height, width = photograph.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return photograph
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(photograph, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _row(photograph: NDArray[np.uint8], faces: Faces, params: Align, evaluation: bool) -> dict[str, Any]:
    """The columns of a readable photograph; of several faces, the one nearest to its centre (SphereFace)."""
    if not len(faces.scores):
        if not evaluation:
            return {"status": "no_face", "faces": 0}
        return {"status": "fallback", "faces": 0, "image": _jpeg(centre_crop(photograph), params.quality)}
    height, width = photograph.shape[:2]
    enlarged = max(1, max(height, width) / params.max_side)
    # Pixel centres lie at whole numbers, pixel 0 of landmarks being pixel 1 of boxes.
    landmarks = (faces.landmarks.astype(np.float64) + 0.5) * enlarged - 0.5
    boxes = (faces.boxes.astype(np.float64) - 0.5) * enlarged + 0.5
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - (np.array([width, height]) + 1) / 2
    nearest = int((centres**2).sum(axis=1).argmin())
    matrix = similarity(landmarks[nearest : nearest + 1])[0]
    return {
        "status": "detected",
        "image": _jpeg(warp(photograph, matrix), params.quality),
        "box": boxes[nearest].astype(np.float32),
        "landmarks": landmarks[nearest].astype(np.float32).ravel(),
        "score": faces.scores[nearest],
        "faces": len(faces.scores),
    }


def _jpeg(face: NDArray[np.uint8], quality: int) -> bytes:
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(face, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return encoded.tobytes()


def _report(aligned: pa.Table, report: Path) -> dict[str, int]:
    """Count, list and log what became of the photographs."""
    statuses = Counter(aligned["status"].to_pylist())
    several = sum(faces is not None and faces > 1 for faces in aligned["faces"].to_pylist())
    counts = {"images": len(aligned), **{name: statuses[name] for name in _STATUSES}, "several_faces": several}
    with tables.atomic(report) as path:
        path.write_text(json.dumps(counts, indent=2) + "\n")

    rejected = [row for row in aligned.to_pylist() if row["status"] in _REJECTED]
    listing = report.with_name(f"{report.stem}-rejected.csv")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, ["image_id", "status", "detail"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rejected)
    with tables.atomic(listing) as path:
        path.write_text(lines.getvalue(), encoding="utf-8")

    log.info("%s: %s", report.stem, ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    for row in rejected[:_SHOWN]:
        log.info("rejected: %s: %s", row["image_id"], row["detail"] or "no face found")
    if rejected:
        log.info("%d rejected in all, listed in %s", len(rejected), listing)
    return counts
