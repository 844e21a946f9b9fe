"""What the graph has measured → the MLflow run of the model's training.

By the report, the last of its stages: each connection to MLflow takes seconds.
"""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.params import PAIRED, SETS
from pipeline.tracking import NoRun
from stages.evaluate.scoring import EXTRA, FIGURES, FILES
from stages.evaluate.verification import EvaluationError

_MEASURED = ("accuracy", "accuracy_se", "accuracy_std", "auc", "eer", "threshold")


def record(reports: Path, run: NoRun) -> None:
    """Record the metrics, figures and tables of a folder of reports.

    Args:
        reports: as of `report.build`, with the page and map.png.
        run: the MLflow run of the model's training, or a `NoRun`.

    Raises:
        EvaluationError, OSError: something is absent or unreadable.
    """
    for name in SETS:
        run.log_metrics(_flat(read_json(reports / "align" / name / "metrics.json"), f"align/{name}"))
    run.log_metrics(_flat(read_json(reports / "shard" / "metrics.json"), "shard"))
    for name in PAIRED:
        _record_pairs(reports / name, name, run)
    taken: set[str] = set()
    for folder in extra_sets(reports):
        name = EXTRA.format(folder.name)
        # by a name that it does not take, MLflow refuses all that comes along
        of_metrics = re.sub(r"[^\w.\-: /]", "_", name)
        while of_metrics in taken:
            of_metrics += "_"
        taken.add(of_metrics)
        _record_pairs(folder, name, run, of_metrics)
    _record_identification(reports / "megaface", run)
    run.log_metrics(_flat(read_json(reports / "audit" / "metrics.json"), "audit"))
    for file in ("suspects.csv", "index.html"):
        run.log_artifact(reports / "audit" / file, "audit")
    run.log_figure(reports / "map.png", "lfw/map.png")
    run.log_artifact(reports / "index.html", "report")


def extra_sets(reports: Path) -> list[Path]:
    """Where the results of further sets lie, in order."""
    return sorted(path.parent for path in (reports / "extra").glob("*/scores.parquet"))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a metrics.json, or of another file of a run.

    Raises:
        EvaluationError: it is no JSON.
        OSError: it is absent or unreadable.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON: {error}") from error
    return content


def _record_pairs(results: Path, name: str, run: NoRun, of_metrics: str | None = None) -> None:
    found = read_json(results / "metrics.json")
    rates = {f"tar_at_far_{far}": tar for far, tar in found["tar_at_far"].items()}
    run.log_metrics(_flat({key: found[key] for key in _MEASURED} | rates, of_metrics or name))
    for figure in FIGURES:
        run.log_figure(results / figure, f"{name}/{figure}")
    for file in FILES:
        run.log_artifact(results / file, name)


def _record_identification(results: Path, run: NoRun) -> None:
    found = read_json(results / "metrics.json")
    if "why" in found:
        return
    for count, each in found["distractors"].items():
        rates = {f"tar_at_far_{far}_of_{count}": tar for far, tar in each["tar_at_far"].items()}
        run.log_metrics(_flat({f"rank_1_of_{count}": each["rank_1"]} | rates, "megaface"))
    run.log_figure(results / "cmc.png", "megaface/cmc.png")
    for file in ("metrics.json", "cmc.csv"):
        run.log_artifact(results / file, "megaface")


def _flat(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """Numbers by the names that MLflow shows, `{"align/train/score/median": 0.998, ...}`; without what is null."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}/{key}")
        elif value is not None:
            flat[f"{prefix}/{key}"] = value
    return flat
