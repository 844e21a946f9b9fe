"""The real graph, end to end, by `dvc repro` itself, on a tiny procedural set in a clone of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml

ROOT = Path(__file__).parents[1]
SETS = ("train", "lfw", "ytf", "probes", "distractors")
DATA_STAGES = {f"{stage}@{name}" for stage in ("download", "align") for name in SETS} | {"shard"}
MODEL_STAGES = {"train", "evaluate@lfw", "evaluate@ytf", "identify", "extra", "audit", "report"}
MODEL_STAGES |= {f"embed@{name}" for name in SETS}

TINY: dict[str, dict[str, Any]] = {
    "download.train": {"identities": 10, "images": 8},
    "download.lfw": {"identities": 12, "images": 3, "folds": 2, "pairs": 12},
    "download.ytf": {"identities": 8, "images": 2, "videos": 2, "folds": 2, "pairs": 6},
    "download.probes": {"identities": 4, "images": 3},
    "download.distractors": {"identities": 20},
    "evaluate": {"replicates": 100},
    "evaluate.megaface": {"distractors": [5, 20]},
    "train": {"batch": 16, "log_every": 4, "checkpoint_every": 8},
    "train.backbone": {"embedding": 32},
    "train.schedule": {"iterations": 24, "warmup": 4, "milestones": [20]},
}


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PREFECT_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def call(project: Path, *command: str, expect: int = 0) -> str:
    done = subprocess.run(
        command, cwd=project, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def clone(target: Path) -> Path:
    """The working tree as git would clone it, with tiny parameters, as a repository of its own; with what installing it
    compiles.
    """
    listed = call(ROOT, "git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "stages" / "align").glob("_kernels.*")]
    for name in [*listed, *compiled]:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    change(target, TINY)
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "as cloned")):
        call(target, "git", "-c", "user.name=test", "-c", "user.email=test@localhost", *command)
    return target


def change(project: Path, values: dict[str, dict[str, Any]]) -> None:
    yaml = ruamel.yaml.YAML()
    content = yaml.load(project / "params.yaml")
    for dotted, update in values.items():
        section = content
        for name in dotted.split("."):
            section = section[name]
        section.update(update)
    yaml.dump(content, project / "params.yaml")


def stages_run(output: str) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", output))


def lock(project: Path) -> dict[str, Any]:
    stages: dict[str, Any] = ruamel.yaml.YAML(typ="safe").load(project / "dvc.lock")["stages"]
    return stages


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = clone(tmp_path_factory.mktemp("first"))
    assert stages_run(call(folder, "dvc", "repro")) == DATA_STAGES | MODEL_STAGES
    return folder


@pytest.fixture
def editable(project: Path) -> Iterator[Path]:
    """The project, for a test that edits these files of it; afterwards they are as they were."""
    files = [project / name for name in ("params.yaml", "data/exclude.csv", "stages/train/loop.py")]
    before = [file.read_bytes() for file in files]
    yield project
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)


def test_every_output_is_there(project: Path) -> None:
    for name in ("lfw", "ytf"):
        metrics = json.loads((project / "reports" / name / "metrics.json").read_text())
        wanted = {"accuracy", "accuracy_std", "accuracy_se", "auc", "eer", "tar_at_far", "threshold", "pairs"}
        assert wanted | {"undetected", "intervals"} <= set(metrics)
        assert metrics["leaked_identities"] == 0
        assert metrics["pairs"] == {"lfw": 24, "ytf": 12}[name]
        assert metrics["tar_at_far"]["0.001"] is None  # a dozen negatives cannot resolve it
    megaface = json.loads((project / "reports" / "megaface" / "metrics.json").read_text())
    assert (megaface["probes"], megaface["distractors"]["20"]["impostors"]) == (12, 240)
    assert megaface["leaked_identities"] == 0
    page = (project / "reports" / "index.html").read_text()
    assert "<html" in page
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    tracked = call(project, "git", "status", "--porcelain", "--untracked-files=all").splitlines()
    assert {line[3:] for line in tracked} == {
        "dvc.lock",
        "models/train.json",
        "reports/audit/metrics.json",
        "reports/lfw/metrics.json",
        "reports/megaface/metrics.json",
        "reports/shard/metrics.json",
        "reports/ytf/metrics.json",
    } | {f"reports/align/{name}/metrics.json" for name in SETS}


def test_dvc_says_something_useful(project: Path) -> None:
    shown = json.loads(call(project, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert "accuracy" in shown["reports/lfw/metrics.json"]["data"]
    assert "loss" in shown["models/train.json"]["data"]
    plots = json.loads(call(project, "dvc", "plots", "show", "--json"))["data"]
    assert all(plots[name] for name in ("loss", "accuracy", "roc"))


def test_one_tracked_run_holds_training_and_both_evaluations(project: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    (experiment,) = (e for e in client.search_experiments() if e.name == "cosface")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert float(run.data.params["train.head.scale"]) == 64
    assert float(run.data.params["train.head.margin"]) == 0.35
    for name in ("lfw", "ytf"):
        metrics = json.loads((project / "reports" / name / "metrics.json").read_text())
        assert run.data.metrics[f"{name}/accuracy"] == pytest.approx(metrics["accuracy"])
    megaface = json.loads((project / "reports" / "megaface" / "metrics.json").read_text())
    assert run.data.metrics["megaface/rank_1_of_20"] == pytest.approx(megaface["distractors"]["20"]["rank_1"])
    for name in SETS:
        metrics = json.loads((project / "reports" / "align" / name / "metrics.json").read_text())
        assert run.data.metrics[f"align/{name}/detected"] == metrics["detected"] > 0
        assert run.data.metrics[f"align/{name}/residual/median"] == pytest.approx(metrics["residual"]["median"])
    shards = json.loads((project / "reports" / "shard" / "metrics.json").read_text())
    assert run.data.metrics["shard/train"] == shards["train"] > 0
    assert "figures/faces.png" in {artifact.path for artifact in client.list_artifacts(run.info.run_id, "figures")}
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(4, 25, 4))


def test_shards_verify(project: Path) -> None:
    assert "all as index.json says" in call(project, "cosface", "shards", "verify")


def copy_without(project: Path, target: Path, stages: set[str]) -> Path:
    """A project as if these stages had never run in it: neither their outputs nor any memory of them."""
    shutil.copytree(project, target, symlinks=True)
    yaml = ruamel.yaml.YAML()
    content = yaml.load(target / "dvc.lock")
    for stage in stages:
        for out in content["stages"].pop(stage)["outs"]:
            path = target / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    yaml.dump(content, target / "dvc.lock")
    shutil.rmtree(target / ".dvc" / "cache" / "runs")
    shutil.rmtree(target / "checkpoints")
    return target


def test_killed_and_in_another_folder_it_ends_in_the_same_hashes(project: Path, tmp_path: Path) -> None:
    """kill -9 of everything in the middle of align, then of train; the third go finishes: Prefect's, and untracked."""
    stages = {"align@train", "shard", "train", "embed@lfw"}
    second = copy_without(project, tmp_path / "second", stages)
    change(second, {"tracking": {"enabled": False}})
    recorded = (second / "mlflow.db").read_bytes()
    for sign in ("data/aligned/.train.earlier", "checkpoints/*/iteration-00000008.pt"):
        process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=second,
            env=environment(),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while not list(second.glob(sign)):
            assert process.poll() is None, f"ended before {sign} came"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = call(second, "cosface", "retrain")
    ran = set(re.findall(r"Running stage '([^']+)'", output))
    assert ran == {"train", "embed@lfw"}
    assert f"{len(ran)} stages ran, {len(DATA_STAGES | MODEL_STAGES) - len(ran)} were cached" in output
    assert "going on from here" in output
    assert lock(second) == lock(project)
    assert (second / "mlflow.db").read_bytes() == recorded
    (kept,) = second.glob("checkpoints/*")  # until another training has ended
    assert max(path.name for path in kept.glob("iteration-????????.pt")) == "iteration-00000024.pt"


def test_only_what_changed_is_run_again(editable: Path) -> None:
    assert not stages_run(call(editable, "dvc", "repro"))

    code = editable / "stages" / "train" / "loop.py"
    before = code.read_text()
    code.write_text(before + "# a changed line\n")
    again = stages_run(call(editable, "dvc", "repro", "--dry"))
    assert "train" in again
    assert again <= MODEL_STAGES
    code.write_text(before)

    change(editable, {"train.head": {"margin": 0.2}})
    again = stages_run(call(editable, "dvc", "repro", "--dry"))
    assert "train" in again
    assert again <= MODEL_STAGES
    assert "train.head.margin" in call(editable, "dvc", "params", "diff")


def test_a_stage_that_refuses_leaves_what_was_there(editable: Path) -> None:
    made = {path: path.read_bytes() for name in ("data/shards", "models") for path in (editable / name).iterdir()}
    assert {path.name for path in made} >= {"index.json", "labels.parquet", "backbone.safetensors", "model.json"}
    for file, old, new, stage in (
        ("data/exclude.csv", "image_id,", "image_id;", "shard"),
        ("params.yaml", "  batch: 16 ", "  batch: 5000 ", "train"),
    ):
        content = (editable / file).read_text()
        assert old in content
        (editable / file).write_text(content.replace(old, new, 1))
        output = call(editable, "dvc", "repro", "--single-item", stage, expect=255)
        assert f"Running stage '{stage}'" in output
        assert {path: path.read_bytes() for path in made if path.exists()} == made
        (editable / file).write_text(content)


def test_bad_parameters_stop_the_graph_with_one_message(tmp_path: Path) -> None:
    project = clone(tmp_path / "bad")
    change(project, {"train.head": {"margin": -1}})
    output = call(project, "dvc", "repro", "download@train", expect=255)
    assert "params.yaml:" in output
    assert "train.head.margin: Input should be greater than or equal to 0, not -1" in output
    assert "Traceback" not in output
