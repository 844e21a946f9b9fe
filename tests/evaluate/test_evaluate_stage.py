"""The whole stage on a small run."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipeline.params import Params
from pipeline.tables import ALIGNED, PAIRS, read_parts, read_table
from pipeline.tracking import NoRun
from stages.evaluate import SCORES, run
from stages.evaluate.verification import EvaluationError
from stages.train.model import ModelError, load_model
from tests.evaluate.conftest import Workspace, row, write_rows

FILES = {"metrics.json", "scores.parquet", "roc.csv", "roc.png", "scores.png"}
KEYS = ["accuracy", "accuracy_se", "accuracy_std", "auc", "eer", "pairs", "tar_at_far", "threshold", "undetected"]


class Recorder(NoRun):
    """Remembers what would go to MLflow."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is None
        self.metrics |= metrics

    def log_figure(self, path: Path, artifact_name: str) -> None:
        assert path.exists()
        self.files.append(artifact_name)


@pytest.mark.parametrize("name", ["lfw", "ytf"])
def test_results_agree_with_each_other_and_with_the_input(workspace: Workspace, reports: Path, name: str) -> None:
    out = reports / name
    assert {path.name for path in out.iterdir()} == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == KEYS
    scored = read_table(out / "scores.parquet", SCORES)
    pairs = read_table(workspace.raw / name / "pairs.parquet", PAIRS)
    assert scored.drop_columns("score").equals(pairs)
    assert metrics["pairs"] == len(pairs)
    assert metrics["auc"] == pytest.approx(roc_auc_score(pairs["same"], scored["score"]), abs=1e-9)
    lacking = {"lfw": {"3/1", "4/0"}, "ytf": {"2/1"}}[name]
    sides = zip(pairs["left"].to_pylist(), pairs["right"].to_pylist(), strict=True)
    assert metrics["undetected"] == sum(bool(lacking & set(pair)) for pair in sides) > 0


def test_scores_by_hand(workspace: Workspace, reports: Path) -> None:
    """Every image by itself, in float64 after the network."""
    model = load_model(workspace.models, torch.device("cpu"))
    features = {}
    for item in read_parts(workspace.aligned / "lfw", ALIGNED, ["image_id", "image"]).to_pylist():
        if item["image"]:
            bgr = cv2.imdecode(np.frombuffer(item["image"], np.uint8), cv2.IMREAD_COLOR)
            assert bgr is not None
            pixels = bgr[..., ::-1]
            both = np.stack([pixels, pixels[:, ::-1]]).transpose(0, 3, 1, 2).copy()
            with torch.no_grad():
                features[item["image_id"]] = model(torch.from_numpy(both)).numpy().astype(np.float64).ravel()
    for pair in read_table(reports / "lfw" / "scores.parquet", SCORES).to_pylist():
        if "4/0" in (pair["left"], pair["right"]):  # unreadable
            assert pair["score"] == -1
        else:
            left, right = features[pair["left"]], features[pair["right"]]
            cosine = left @ right / np.sqrt((left @ left) * (right @ right))
            assert pair["score"] == pytest.approx(cosine, abs=1e-5)


def test_again_the_same_bytes_and_tracked_by_set(
    workspace: Workspace, reports: Path, tmp_path: Path, params: Params
) -> None:
    recorder = Recorder()
    folders = (workspace.raw / "lfw", workspace.aligned / "lfw", workspace.models, tmp_path)
    run(*folders, params.evaluate, params.machine, recorder)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (reports / "lfw" / name).read_bytes(), name
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert recorder.metrics["lfw/accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-9)
    assert recorder.metrics["lfw/tar_at_far_0.1"] == pytest.approx(metrics["tar_at_far"]["0.1"], abs=1e-9)
    assert "lfw/tar_at_far_0.001" not in recorder.metrics  # 30 different pairs cannot resolve it
    assert recorder.files == ["lfw/roc.png", "lfw/scores.png"]


def test_roc_csv_is_a_curve(reports: Path) -> None:
    with (reports / "lfw" / "roc.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve = np.array([[float(row["far"]), float(row["tar"])] for row in rows])
    assert curve[0].tolist() == [0, 0]
    assert curve[-1].tolist() == [1, 1]
    assert (np.diff(curve, axis=0) >= 0).all()
    assert 2 < len(curve) <= 1000


def test_no_model(workspace: Workspace, tmp_path: Path, params: Params) -> None:
    folders = (workspace.raw / "lfw", workspace.aligned / "lfw", tmp_path, tmp_path / "out")
    with pytest.raises(ModelError, match=r"model\.json: no such file"):
        run(*folders, params.evaluate, params.machine, NoRun())
    assert not (tmp_path / "out").exists()


def test_pairs_name_an_absent_image(workspace: Workspace, tmp_path: Path, params: Params) -> None:
    write_rows(tmp_path / "lfw", [row("0/0")])
    folders = (workspace.raw / "lfw", tmp_path / "lfw", workspace.models, tmp_path / "out")
    with pytest.raises(EvaluationError, match="images or videos of the pairs are not there"):
        run(*folders, params.evaluate, params.machine, NoRun())


def test_command_line_says_what_is_missing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "stages.evaluate", "lfw"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: no such file")
