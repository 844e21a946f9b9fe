"""The evaluate stage as a function of its folders and parameters; and the same for scores that are at hand."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.pages import save_png
from pipeline.params import Evaluate
from pipeline.tracking import MODEL_TAG
from stages.evaluate import features, figures, scoring, uncertainty
from stages.evaluate.leaks import Trained, check_leaks
from stages.evaluate.scoring import FLIP, Options, Scored
from stages.evaluate.verification import EvaluationError, Metrics, Roc

log = logging.getLogger(__name__)


def run(raw: Path, embedded: Path, trained: Trained | None, out: Path, params: Evaluate) -> Metrics:
    """Score the pairs of one set and write metrics.json, scores.parquet, roc.csv, and figures as PNG.

    All pairs count: an image or video without a detected face is used as its centre crop, and a pair of which one
    side has no readable image at all gets the lowest score; both are counted as `undetected`.

    Args:
        raw: folder with pairs.parquet.
        embedded: folder of the embedded set; its name is the set's.
        trained: for the check that no person is in both sets; None where that cannot be known.
        out: folder of the results.
        params: section evaluate of params.yaml.

    Raises:
        EvaluationError: the pairs or images cannot be evaluated, or people are in both sets and `leaks` refuses that.
        TableError: a table is absent or incomplete.
    """
    pairs = tables.read_table(raw / "pairs.parquet", tables.PAIRS)
    names, left, right = _index(pairs)
    leaked = None
    if trained is not None:
        people = tables.read_parts(embedded, tables.EMBEDDED, ["identity"])["identity"].unique().to_pylist()
        leaked = check_leaks(embedded.name, people, trained, params.leaks)
    frames = features.choose_frames(embedded, names, tables.EMBEDDED)
    options = Options(params.flip, params.centre)
    try:
        vectors, usable = scoring.templates(features.blocks(embedded, frames), options.flip, len(names))
    except EvaluationError as error:
        raise EvaluationError(f"{embedded}: {error}") from error
    fold = pairs["fold"].to_numpy()
    scores = scoring.score(vectors, usable, left, right, fold, options.centre)
    scored = Scored(pairs["left"].to_pylist(), pairs["right"].to_pylist(), pairs["same"].to_numpy(), fold, scores)

    undetected = int((~(frames.detected[left] & frames.detected[right])).sum())
    if undetected:
        lost = int((~(usable[left] & usable[right])).sum())
        log.info(
            "%s: %d pairs touch an image or video without a detected face; scored by the centre crop, %d by %g for "
            "want of any image",
            embedded.name, undetected, lost, scoring.UNUSABLE_SCORE,
        )  # fmt: skip
    model = tables.metadata(tables.parts(embedded)[0], MODEL_TAG)
    return measure(scored, options, model, out, params, embedded.name, undetected, leaked)


def measure(
    scored: Scored,
    options: Options,
    model: str | None,
    out: Path,
    params: Evaluate,
    name: str,
    undetected: int | None,
    leaked: int | None = None,
) -> Metrics:
    """What scored pairs say, written as `run` writes it.

    Args:
        scored: the pairs.
        options: how their scores came about.
        model: the digest of the model whose they are; None where that is not known.
        out: folder of the results.
        params: section evaluate of params.yaml.
        name: of the set.
        undetected: pairs that touch an image or video without a detected face; None where that is not known.
        leaked: people who are trained on; None where that is not known.
    """
    verification = scored.verification(params.fars)
    metrics = verification.measure()
    intervals = uncertainty.intervals(verification, scored.people, replicates=params.replicates, seed=params.seed)
    scored.write(out / "scores.parquet", {FLIP: options.flip} | ({MODEL_TAG: model} if model else {}))
    roc = figures.thin(metrics.roc)
    with tables.atomic(out / "roc.csv") as path:
        points = (f"{scoring.rounded(x)},{scoring.rounded(y)}\n" for x, y in _points(roc))
        path.write_text("far,tar\n" + "".join(points))
    save_png(figures.roc_figure(metrics), out / "roc.png")
    save_png(figures.det_figure(metrics), out / "det.png")
    save_png(figures.scores_figure(scored.own, scored.same, metrics.threshold), out / "scores.png")
    save_png(figures.folds_figure(metrics), out / "folds.png")
    with tables.atomic(out / "metrics.json") as path:
        path.write_text(scoring.as_json(scoring.summary(metrics, intervals, options, undetected, leaked)) + "\n")
    log.info("%s: accuracy %.2f%% ± %.2f", name, 100 * metrics.accuracy, 100 * metrics.accuracy_se)
    return metrics


def _index(pairs: pa.Table) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct names of the pairs, in order of appearance, and both sides as indices into them."""
    both = pa.chunked_array(pairs["left"].chunks + pairs["right"].chunks, pa.string()).combine_chunks()
    encoded = both.dictionary_encode()
    indices = encoded.indices.to_numpy().astype(np.int64)
    return encoded.dictionary.to_pylist(), indices[: len(pairs)], indices[len(pairs) :]


def _points(roc: Roc) -> list[tuple[float, float]]:
    return list(zip(roc.far.tolist(), roc.tar.tolist(), strict=True))
