"""What MLflow gets, by the files that the stages have left."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.utils.validation import _validate_metric_name

from pipeline.params import SETS
from pipeline.tracking import NoRun
from stages.evaluate.record import record
from stages.evaluate.verification import EvaluationError


class Recorder(NoRun):
    """Remembers what would go to MLflow, by its name there."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is None
        assert not metrics.keys() & self.metrics.keys()
        self.metrics |= metrics

    def log_figure(self, path: Path, artifact_name: str) -> None:
        assert path.exists()
        self.files.add(f"figures/{artifact_name}")

    def log_artifact(self, path: Path, folder: str) -> None:
        assert path.exists()
        self.files.add(f"{folder}/{path.name}")


@pytest.fixture
def finished(reports: Path, tmp_path: Path) -> Path:
    """Reports of a graph that has come to its end, with a set of one's own that is called as one of the project's."""
    folder = tmp_path / "reports"
    shutil.copytree(reports, folder)
    shutil.copytree(reports / "ytf", folder / "extra" / "lfw")
    for name in ("index.html", "map.png", "audit/suspects.csv", "audit/index.html"):
        (folder / name).touch()
    return folder


def test_all_is_recorded_by_set(finished: Path) -> None:
    run = Recorder()
    record(finished, run)
    results = ("metrics.json", "scores.parquet", "roc.csv")
    pictures = ("roc.png", "det.png", "scores.png", "folds.png")
    assert run.files == {
        *(f"{name}/{file}" for name in ("lfw", "ytf", "extra/lfw") for file in results),
        *(f"figures/{name}/{file}" for name in ("lfw", "ytf", "extra/lfw") for file in pictures),
        *("megaface/metrics.json", "megaface/cmc.csv", "figures/megaface/cmc.png"),
        *("audit/suspects.csv", "audit/index.html", "figures/lfw/map.png", "report/index.html"),
    }
    for name, results_of in (("lfw", "lfw"), ("ytf", "ytf"), ("extra/lfw", "ytf")):
        found = json.loads((finished / results_of / "metrics.json").read_text())
        for figure in ("accuracy", "accuracy_se", "accuracy_std", "auc", "eer", "threshold"):
            assert run.metrics[f"{name}/{figure}"] == found[figure]
        assert run.metrics[f"{name}/tar_at_far_0.1"] == found["tar_at_far"]["0.1"]
        assert f"{name}/tar_at_far_0.001" not in run.metrics  # so few different pairs cannot resolve it
    found = json.loads((finished / "megaface" / "metrics.json").read_text())["distractors"]
    for count, of_count in found.items():
        assert run.metrics[f"megaface/rank_1_of_{count}"] == of_count["rank_1"]
        assert f"megaface/tar_at_far_0.0001_of_{count}" not in run.metrics
    rates = {f"{far}_of_{count}": rate for count, each in found.items() for far, rate in each["tar_at_far"].items()}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    assert known
    assert {name: run.metrics[f"megaface/tar_at_far_{name}"] for name in known} == known
    assert run.metrics["audit/suspected_labels"] == 9
    assert run.metrics["shard/dropped/no_face"] == 6
    for place, name in enumerate(SETS):
        assert run.metrics[f"align/{name}/images"] == 4000 + 100 * place


def test_names_are_such_as_mlflow_takes(finished: Path) -> None:
    """One that it does not take loses all that come with it; a browser calls the second download of pairs.csv so."""
    extra, names = finished / "extra", ("pairs (1), Jo\u00e3o@x", "pairs [1], Jo\u00e3o@x")
    (extra / "lfw").rename(extra / names[0])
    shutil.copytree(extra / names[0], extra / names[1])
    run = Recorder()
    record(finished, run)
    for name in run.metrics:
        _validate_metric_name(name)
    assert {f"extra/pairs _1__ Jo\u00e3o_x{more}/accuracy" for more in ("", "_")} <= run.metrics.keys()
    for name in names:  # files keep theirs
        assert {f"extra/{name}/scores.parquet", f"figures/extra/{name}/roc.png"} <= run.files


def test_without_identification_there_is_none_of_it(finished: Path) -> None:
    (finished / "megaface" / "metrics.json").write_text('{"why": "download.probes has no photographs"}')
    run = Recorder()
    record(finished, run)
    assert not [name for name in (*run.metrics, *run.files) if "megaface" in name]


def test_a_damaged_file_is_named(finished: Path) -> None:
    (finished / "ytf" / "metrics.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"ytf/metrics\.json: not JSON"):
        record(finished, Recorder())
