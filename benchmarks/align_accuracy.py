"""What alignment is worth: `python -m benchmarks.align_accuracy [--faces ../shared/faces]`.

Trains the default recipe, with 900 iterations, on the photographs of `CASIA-WebFace.zip`, then measures that model on
LFW's pairs (`lfw.tgz`, `pairs.txt`) whose faces were aligned in other ways: with landmarks rounded to whole pixels, or
off by up to 2 pixels, or cut out by their boxes, or kept as JPEG of other qualities. Writes
benchmarks/results/align-accuracy.json.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from benchmarks.machine import hardware
from pipeline import tables
from pipeline.executor import choose_device
from pipeline.params import Archive, Params, load_params
from pipeline.progress import configure_logging
from stages.align import run as align
from stages.align.decode import decode
from stages.align.warp import similarity, warp
from stages.download import run as download
from stages.evaluate import run as evaluate
from stages.evaluate.embed import embed_set
from stages.evaluate.models import load_embedder
from stages.shard import run as shard
from stages.train import run as train

ROOT = Path(__file__).parents[1]
ITERATIONS, MILESTONES = 900, [550, 780]
NOISE = 2.0
QUALITIES = (50, 75, 90, 100)

Make = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From a photograph, five landmarks (5, 2) and a box (4,) to a face (112, 112, 3)."""


def by_landmarks(params: Params, change: Callable[[np.ndarray], np.ndarray]) -> Make:
    def make(photograph: np.ndarray, landmarks: np.ndarray, _: np.ndarray) -> np.ndarray:
        return warp(photograph, similarity(change(landmarks)[None])[0], params.align.face)

    return make


def by_box(photograph: np.ndarray, _: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The box, made square by its longer side, as many detectors' users cut faces out."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top) + 1
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    matrix = np.array([[112 / side, 0, -x * 112 / side], [0, 112 / side, -y * 112 / side]])
    return cv2.warpAffine(photograph, matrix, (112, 112), flags=cv2.INTER_LINEAR).astype(np.uint8)


def realigned(raw: Path, aligned: Path, out: Path, make: Make, quality: int) -> None:
    """The aligned table again, every face made in another way."""
    for path in tables.parts(aligned):
        rows = tables.read_table(path, tables.ALIGNED).to_pylist()
        photographs = tables.read_table(raw / path.name, tables.RAW)["image"]
        for row, photograph in zip(rows, photographs, strict=True):
            if row["status"] == "detected":
                face = make(decode(photograph.as_py()), np.reshape(row["landmarks"], (5, 2)), np.array(row["box"]))
                row["image"] = simplejpeg.encode_jpeg(np.ascontiguousarray(face), quality, "RGB", "420")
        tables.write_table(out / path.name, pa.Table.from_pylist(rows, tables.ALIGNED), tables.ALIGNED)


def settings(faces: Path, work: Path) -> Params:
    """The default recipe on these photographs."""
    params = load_params(ROOT / "params.yaml")

    def archive(name: str, pairs: str | None) -> Archive:
        location = str((faces / name).resolve())
        of_pairs = str((faces / pairs).resolve()) if pairs else None
        return Archive(source="archive", watch=[], location=location, sha256=None, pairs=of_pairs, pairs_sha256=None)

    sources = {"train": archive("CASIA-WebFace.zip", None), "lfw": archive("lfw.tgz", "pairs.txt")}
    changes = {"iterations": ITERATIONS, "milestones": MILESTONES}
    schedule = params.train.schedule.model_copy(update=changes)
    return params.model_copy(
        update={
            "download": params.download.model_copy(update=sources),
            "train": params.train.model_copy(update={"schedule": schedule, "data": str(work / "shards")}),
            "tracking": params.tracking.model_copy(update={"enabled": False}),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    faces: Path = parser.parse_args().faces
    configure_logging()
    with tempfile.TemporaryDirectory() as name:
        rows = measure(settings(faces, Path(name)), Path(name))
    result = {
        "machine": hardware(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "numpy", "opencv-python-headless", "simplejpeg")},
        "training": {"iterations": ITERATIONS, "milestones": MILESTONES, "photographs": 10_800},
        "lfw": rows,
    }
    (ROOT / "benchmarks" / "results" / "align-accuracy.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(params: Params, work: Path) -> list[dict[str, Any]]:
    """Train once, evaluate each way of making the faces of LFW."""
    for name, source in (("train", params.download.train), ("lfw", params.download.lfw)):
        raw, aligned = work / "raw" / name, work / "aligned" / name
        download.run(name, source, raw, params.machine, work / "downloads")
        report = work / "reports" / name
        align.run(raw, aligned, params.align, params.machine, evaluation=name != "train", report=report)
    shards, page = work / "shards", work / "reports" / "shard"
    shard.run(work / "aligned" / "train", {}, shards, page, params.shard, params.align.face, params.machine)
    started = time.perf_counter()
    train.run(work / "models", work / "checkpoints", params)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    noise = np.random.default_rng(0)
    plain = by_landmarks(params, lambda landmarks: landmarks)
    quality = params.align.face.quality
    ways: dict[str, tuple[Make, int]] = {
        "as the pipeline aligns": (plain, quality),
        "landmarks rounded to whole pixels": (by_landmarks(params, np.round), quality),
        "landmarks off by up to 2 px": (
            by_landmarks(params, lambda p: p + noise.uniform(-NOISE, NOISE, p.shape)),
            quality,
        ),
        "cut out by the box": (by_box, quality),
    } | {f"JPEG quality {q} instead of {quality}": (plain, q) for q in QUALITIES}
    rows = []
    model = load_embedder(work / "models", choose_device(params.machine.device))
    for label, (make, q) in ways.items():
        folder = work / "ways" / label / "lfw"
        realigned(work / "raw" / "lfw", work / "aligned" / "lfw", folder, make, q)
        results = work / "results"
        embedded = work / "embedded" / label / "lfw"
        embed_set(folder, model, embedded, batch=params.evaluate.batch, flip=True)
        metrics = evaluate.run(work / "raw" / "lfw", embedded, None, results, params.evaluate)
        images = tables.read_parts(folder, tables.ALIGNED, ["image"])["image"].to_pylist()
        size = float(np.mean([len(image) for image in images if image]))
        rows.append(
            {
                "faces": label,
                "accuracy": round(metrics.accuracy, 5),
                "accuracy_se": round(metrics.accuracy_se, 5),
                "auc": round(metrics.auc, 5),
                "bytes_per_face": round(size),
            }
        )
        print(f"{label:36} {100 * metrics.accuracy:.2f} ± {100 * metrics.accuracy_se:.2f} %, {size:.0f} bytes a face")
    return rows


if __name__ == "__main__":
    main()
