"""Verification on LFW- and YTF-style pairs: scores, metrics, figures and the report page."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.executor import choose_device
from pipeline.pages import save_png
from pipeline.params import Evaluate, Machine
from pipeline.tracking import MODEL_TAG, NoRun, model_digest
from stages.evaluate import embed, figures
from stages.evaluate.verification import EvaluationError, Metrics, Roc, evaluate
from stages.train.model import load_model

__all__ = ["SCORES", "EvaluationError", "run"]

log = logging.getLogger(__name__)

SCORES = pa.schema(
    [
        ("fold", pa.int32()),
        ("left", pa.string()),
        ("right", pa.string()),
        ("score", pa.float32()),  # cosine
        ("same", pa.bool_()),
    ]
)
DIGITS = 10
"""Decimals of a figure in metrics.json and roc.csv."""


def run(
    raw: Path, aligned: Path, models: Path, out: Path, params: Evaluate, machine: Machine, tracker: NoRun
) -> Metrics:
    """Score the pairs of one set and write metrics.json, scores.parquet, roc.csv, roc.png and scores.png.

    All pairs count: an image or video without a detected face is used as its centre crop, and a pair of which one
    side has no readable image at all gets the lowest score; both are counted as `undetected`.

    Args:
        raw: folder with pairs.parquet.
        aligned: folder of the aligned set; its name is the set's.
        models: folder of the trained model.
        out: folder of the results.
        params: section evaluate of params.yaml.
        machine: section machine.
        tracker: the MLflow run of the model's training, or a `NoRun`.

    Raises:
        EvaluationError: the pairs, images or model cannot be evaluated.
        TableError: a table is absent or incomplete.
        ModelError: there is no usable model.
    """
    pairs = tables.read_table(raw / "pairs.parquet", tables.PAIRS)
    names, left, right = _index(pairs)
    frames = embed.choose_frames(aligned, names)
    device = choose_device(machine.device)
    model = load_model(models, device)
    vectors = embed.templates(model, aligned, frames, batch=params.batch, flip=params.flip, device=device)
    scores = embed.score_pairs(vectors, frames.usable, left, right)

    metrics = evaluate(scores, pairs["same"].to_numpy(), pairs["fold"].to_numpy(), params.fars)
    undetected = int((~(frames.detected[left] & frames.detected[right])).sum())
    lost = int((~(frames.usable[left] & frames.usable[right])).sum())
    if undetected:
        log.info(
            "%s: %d pairs touch an image or video without a detected face; scored by the centre crop, %d by %g for "
            "want of any image",
            aligned.name, undetected, lost, embed.UNUSABLE_SCORE,
        )  # fmt: skip
    scored = pairs.append_column("score", pa.array(scores)).select(SCORES.names)
    tables.write_table(out / "scores.parquet", scored, SCORES, metadata={MODEL_TAG: model_digest(models)})
    _write(out, scored, metrics, undetected)
    _track(tracker, aligned.name, out, metrics)
    log.info("%s: accuracy %.2f%% ± %.2f", aligned.name, 100 * metrics.accuracy, 100 * metrics.accuracy_se)
    return metrics


def _index(pairs: pa.Table) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct names of the pairs, in order of appearance, and both sides as indices into them."""
    both = pa.chunked_array(pairs["left"].chunks + pairs["right"].chunks, pa.string()).combine_chunks()
    encoded = both.dictionary_encode()
    indices = encoded.indices.to_numpy().astype(np.int64)
    return encoded.dictionary.to_pylist(), indices[: len(pairs)], indices[len(pairs) :]


def _write(out: Path, scored: pa.Table, metrics: Metrics, undetected: int) -> None:
    roc = figures.thin(metrics.roc)
    with tables.atomic(out / "roc.csv") as path:
        path.write_text("far,tar\n" + "".join(f"{_rounded(x)},{_rounded(y)}\n" for x, y in _points(roc)))
    save_png(figures.roc_figure(metrics), out / "roc.png")
    scores, same = scored["score"].to_numpy(), scored["same"].to_numpy()
    save_png(figures.scores_figure(scores, same, metrics.threshold), out / "scores.png")
    summary = {
        "accuracy": _rounded(metrics.accuracy),
        "accuracy_std": _rounded(metrics.accuracy_std),
        "accuracy_se": _rounded(metrics.accuracy_se),
        "auc": _rounded(metrics.auc),
        "eer": _rounded(metrics.eer),
        "tar_at_far": {far: tar if tar is None else _rounded(tar) for far, tar in metrics.tar_at_far.items()},
        "threshold": _rounded(metrics.threshold),
        "pairs": metrics.pairs,
        "undetected": undetected,
    }
    with tables.atomic(out / "metrics.json") as path:
        path.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")


def _points(roc: Roc) -> list[tuple[float, float]]:
    return list(zip(roc.far.tolist(), roc.tar.tolist(), strict=True))


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)


def _track(tracker: NoRun, name: str, out: Path, metrics: Metrics) -> None:
    values = {
        key: getattr(metrics, key) for key in ("accuracy", "accuracy_std", "accuracy_se", "auc", "eer", "threshold")
    }
    values |= {f"tar_at_far_{far}": tar for far, tar in metrics.tar_at_far.items() if tar is not None}
    tracker.log_metrics({f"{name}/{key}": value for key, value in values.items()})
    for figure in ("roc.png", "scores.png"):
        tracker.log_figure(out / figure, f"{name}/{figure}")
    for file in ("metrics.json", "scores.parquet", "roc.csv"):
        tracker.log_artifact(out / file, name)
