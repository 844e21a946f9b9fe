import hashlib
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import nn

from pipeline import registry, servers, tracking
from pipeline.params import Archive, Backbone, Params
from pipeline.tracking import NoRun, TrackingError, training_run, training_run_of
from stages.train import backbones
from stages.train.model import build_model, load_model, save_model
from tests.samples import NARROW

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a commit, whose MLflow store the tests of this file share: making one takes seconds."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "params.yaml", project)
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "begin"]):
        subprocess.run([*git, *arguments], check=True)
    return project


@pytest.fixture
def project(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return store


@pytest.fixture
def tracked(params: Params, request: pytest.FixtureRequest) -> Params:
    """Parameters with tracking on, in an experiment of the test's own."""
    update = {"enabled": True, "experiment": request.node.name}
    return params.model_copy(update={"tracking": params.tracking.model_copy(update=update)})


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small trained model, as far as its files go."""
    monkeypatch.setitem(backbones.BACKBONES, "small", NARROW)
    with torch.random.fork_rng():
        backbone = Backbone(name="small", width=112, embedding=16)
        folder = tmp_path / "models"
        save_model(folder, build_model(backbone), nn.Linear(16, 2), {"backbone": backbone.model_dump()})
        yield folder


def recorded(project: Path, params: Params) -> list[Run]:
    """What a reader of the store sees, newest first."""
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def interrupted_training(params: Params, exception: type[BaseException]) -> None:
    with training_run(params, lineage={}) as run:
        run.log_metrics({"train/loss": 2.0}, step=1)
        raise exception


def test_a_training_run_says_what_it_was(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={"data.shards": "abc"}) as run:
        run.set_tag("colour", "blue")
    (found,) = recorded(project, tracked)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found.info.run_name == "small, CosFace (s = 64, m = 0.35)"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.head.scale"] == "64.0"
    assert found.data.params["train.head.margin"] == "0.35"
    assert found.data.params["download.lfw.folds"] == "10"
    sections = {"download", "align", "shard", "train", "evaluate", "audit"}
    assert {key.split(".")[0] for key in found.data.params} == sections
    tags = found.data.tags
    assert (tags["git.commit"], tags["git.dirty"]) == (head, "false")
    assert tags["dvc.lock"] == hashlib.sha256(b"schema: '2.0'\n").hexdigest()
    assert (tags["data.shards"], tags["colour"]) == ("abc", "blue")
    files = MlflowClient(tracking.store_uri()).list_artifacts(found.info.run_id)
    assert {file.path for file in files} == {"dvc.lock", "params.yaml"}


def test_addresses_are_recorded_without_what_signs_them(project: Path, tracked: Params, tmp_path: Path) -> None:
    secret = "https://me:SECRET@host/casia.zip?key=SECRET"
    train = Archive(source="archive", watch=[], location=secret, sha256=None, pairs=None, pairs_sha256=None)
    params = tracked.model_copy(update={"download": tracked.download.model_copy(update={"train": train})})
    for file in ("params.yaml", "dvc.lock"):
        before = (project / file).read_text()
        (project / file).write_text(f"location: {secret}\n")
        with training_run(params, lineage={}):
            pass
        (project / file).write_text(before)
        (found, *_) = recorded(project, params)
        assert found.data.params["download.train.location"] == "https://host/casia.zip"
        path = tracking.fetch(MlflowClient(tracking.store_uri()), found.info.run_id, file, tmp_path)
        assert path.read_text() == "location: https://host/casia.zip\n"


def test_the_password_of_a_store_is_not_told(project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://me:SECRET@127.0.0.1:{servers.free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(TrackingError) as caught, training_run(tracked, lineage={}):
        pass
    assert "SECRET" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://me:SECRET@loft")
    with pytest.raises(TrackingError, match="carrier-pigeon://loft") as caught, training_run(tracked, lineage={}):
        pass
    assert "SECRET" not in str(caught.value)


def test_changed_code_is_dirty_and_a_changed_lock_is_not(project: Path, tracked: Params) -> None:
    lock, parameters = project / "dvc.lock", project / "params.yaml"
    before = lock.read_bytes(), parameters.read_bytes()
    try:
        lock.write_text("schema: '2.0'\nstages: {}\n")
        with training_run(tracked, lineage={}):
            pass
        parameters.write_bytes(before[1] + b"# edited\n")
        with training_run(tracked, lineage={}):
            pass
    finally:
        lock.write_bytes(before[0])
        parameters.write_bytes(before[1])
    assert [run.data.tags["git.dirty"] for run in recorded(project, tracked)] == ["true", "false"]


def test_metrics_keep_their_steps(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}) as run:
        for step in range(1, 251):
            run.log_metrics({"train/loss": 1 / step, "train/accuracy": step / 250}, step=step)
    (found,) = recorded(project, tracked)
    history = MlflowClient(tracking.store_uri()).get_metric_history(found.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in history} == {step: 1 / step for step in range(1, 251)}
    assert found.data.metrics["train/accuracy"] == 1


@pytest.mark.parametrize(
    ("exception", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_ends_as_its_training_does(
    project: Path, tracked: Params, exception: type[BaseException], status: str
) -> None:
    with pytest.raises(exception):
        interrupted_training(tracked, exception)
    (found,) = recorded(project, tracked)
    assert found.info.status == status
    assert found.data.metrics == {"train/loss": 2.0}


def test_sigterm_ends_a_run_as_killed(project: Path, tracked: Params) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), training_run(tracked, lineage={}):
        signal.raise_signal(signal.SIGTERM)
    assert recorded(project, tracked)[0].info.status == "KILLED"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_resumed_training_goes_on_in_its_run(project: Path, tracked: Params) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(tracked, KeyboardInterrupt)
    (first,) = recorded(project, tracked)
    with training_run(tracked, lineage={}, resume_id=first.info.run_id) as second:
        assert recorded(project, tracked)[0].info.status == "RUNNING"
        assert (second.steps("train/loss"), second.steps("train/never")) == ({1}, set())
        second.log_metrics({"train/loss": 1.0}, step=2)
    (found,) = recorded(project, tracked)
    assert (found.info.run_id, found.info.status) == (first.info.run_id, "FINISHED")
    history = MlflowClient(tracking.store_uri()).get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]


def test_a_training_whose_run_is_gone_gets_a_new_one(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}, resume_id="0" * 32) as run:
        pass
    assert [found.info.run_id for found in recorded(project, tracked)] == [run.id]


def test_evaluation_and_promotion_find_the_training_s_run(project: Path, tracked: Params, models: Path) -> None:
    with training_run(tracked, lineage={}) as training:
        training.set_tag("model.sha256", hashlib.sha256((models / "backbone.safetensors").read_bytes()).hexdigest())
        training.log_model(models)
    with training_run(tracked, lineage={}, resume_id=training.id) as again:  # one that had ended
        again.log_model(models)
    outputs = recorded(project, tracked)[0].outputs
    assert outputs is not None
    assert len(outputs.model_outputs) == 1
    with training_run_of(models, tracked) as evaluation:
        evaluation.log_metrics({"lfw/accuracy": 0.9})
        evaluation.log_artifact(models / "model.json", "lfw")
        evaluation.log_figure(models / "model.json", "lfw/roc.png")
    (found,) = recorded(project, tracked)
    assert evaluation.id == training.id == found.info.run_id
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"lfw/accuracy": 0.9}

    client = MlflowClient(tracking.store_uri())
    for folder, name in (("lfw", "model.json"), ("figures/lfw", "roc.png"), ("models", "backbone.safetensors")):
        assert f"{folder}/{name}" in [file.path for file in client.list_artifacts(found.info.run_id, folder)]

    assert (
        registry.promote("latest", tracked)
        == registry.promote(found.info.run_id, tracked)
        == (
            "small, CosFace (s = 64, m = 0.35)",
            "1",
        )
    )
    champion = client.get_model_version_by_alias("cosface", "champion")
    assert champion.run_id == found.info.run_id
    (logged,) = client.search_logged_models([found.info.experiment_id])
    assert [(metric.key, metric.value) for metric in logged.metrics or []] == [("lfw/accuracy", 0.9)]

    images = torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8)
    served = mlflow.pytorch.load_model("models:/cosface@champion")  # refuses archives with pickles in them
    with torch.inference_mode():
        expected = load_model(models, torch.device("cpu"))(images)
        np.testing.assert_allclose(served(images), expected, rtol=1e-5, atol=1e-6)


def test_a_model_is_found_by_every_address(project: Path, tracked: Params, models: Path) -> None:
    """With its weights, and with its scores once it has been evaluated; nothing is left behind."""
    with training_run(tracked, lineage={}) as run:
        run.log_model(models)
    _, version = registry.promote(str(run.id), tracked)
    outputs = MlflowClient(tracking.store_uri()).get_run(str(run.id)).outputs
    assert outputs is not None
    (output,) = outputs.model_outputs
    for address in ("models:/cosface@champion", f"models:/cosface/{version}", f"models:/{output.model_id}"):
        with registry.located(address, tracked) as found:
            assert (found.path / "backbone.safetensors").read_bytes() == (models / "backbone.safetensors").read_bytes()
            assert (found.path / "model.json").exists()
            assert address in found.name
            assert str(run.id) in found.name
            assert found.scores is None
        assert not found.path.exists()

    (models / "scores.parquet").write_bytes(b"of the evaluation")
    run.log_artifact(models / "scores.parquet", "lfw")
    either: tuple[str | None, ...] = (None, f"runs:/{run.id}")
    for where in either:
        with registry.located(where, tracked) as found:
            assert found.scores is not None
            assert found.scores.read_bytes() == b"of the evaluation"
            assert (found.path / "model.json").exists()


def test_a_model_that_comes_out_again_counts_as_the_first(project: Path, tracked: Params, models: Path) -> None:
    """As where earlier parameters are gone back to: DVC has its results in its cache, MLflow those of the first run."""
    digest = tracking.model_digest(models)
    ids = []
    for number in range(3):
        with training_run(tracked, lineage={}) as run:
            run.log_digest(digest if number else "of another")
            run.log_model(models)
        ids.append(str(run.id))
    other, first, again = (MlflowClient(tracking.store_uri()).get_run(each) for each in ids)
    assert again.data.tags["model.first_run"] == first.info.run_id
    assert "model.first_run" not in other.data.tags | first.data.tags
    with training_run_of(models, tracked) as evaluation:
        (models / "scores.parquet").write_bytes(b"of the evaluation")
        evaluation.log_artifact(models / "scores.parquet", "lfw")
    assert evaluation.id == first.info.run_id
    registry.promote("latest", tracked)
    with registry.located("models:/cosface@champion", tracked) as found:
        assert first.info.run_id in found.name
        assert found.scores is not None
    with registry.located(f"runs:/{ids[2]}", tracked) as found:
        assert found.scores is not None
    tracking.download(ids[2], "scores.parquet", models / "fetched", tracked)
    MlflowClient(tracking.store_uri()).delete_run(ids[1])
    registry.promote("latest", tracked)
    with registry.located("models:/cosface@champion", tracked) as found:
        assert ids[2] in found.name


def test_who_nobody_goes_on_with_does_not_run_for_ever(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}) as ended:
        pass
    client = MlflowClient(tracking.store_uri())
    experiment = client.get_run(str(ended.id)).info.experiment_id
    lost = client.create_run(experiment)
    with training_run(tracked, lineage={}) as run:
        run.end_lost([lost.info.run_id, str(ended.id)])
    assert [client.get_run(each).info.status for each in (lost.info.run_id, str(ended.id))] == ["KILLED", "FINISHED"]


def test_a_project_may_be_moved_or_copied(
    project: Path,
    tracked: Params,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To where a name has a space and an accent; its models are found there, and new files are written there."""
    with training_run(tracked, lineage={}) as run:
        run.log_model(models)
    registry.promote(str(run.id), tracked)
    moved = shutil.copytree(project, tmp_path / "mÿ faces")
    before = sorted((project / "mlartifacts").rglob("*"))
    monkeypatch.chdir(moved)
    with registry.located("models:/cosface@champion", tracked) as found:
        assert (found.path / "backbone.safetensors").read_bytes() == (models / "backbone.safetensors").read_bytes()
    assert f"has them in {moved / 'mlartifacts'} from now on" in caplog.text
    caplog.clear()
    with training_run(tracked, lineage={}) as another:
        another.log_model(models)
    assert (moved / "mlartifacts" / str(another.id) / "artifacts" / "models" / "backbone.safetensors").exists()
    client = MlflowClient(tracking.store_uri())
    for each in (run, another):
        outputs = client.get_run(str(each.id)).outputs
        assert outputs is not None
        assert mlflow.pytorch.load_model(f"models:/{outputs.model_outputs[0].model_id}")
    assert sorted((project / "mlartifacts").rglob("*")) == before
    assert "from now on" not in caplog.text
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_only_what_was_the_projects_own_moves_along(
    project: Path, tracked: Params, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not files of another experiment, which lie elsewhere; nothing while a run goes on, unless one is to be written;
    and not by a link to another project's store.
    """
    with training_run(tracked, lineage={}) as run:
        run.log_model(models)
    client = MlflowClient(tracking.store_uri())
    places = ["s3://bucket/mlartifacts", (tmp_path / "mlartifacts").as_uri(), f"{(project / 'mlartifacts').as_uri()}2"]
    others = [client.create_experiment(f"{tracked.tracking.experiment} {place}", place) for place in places]
    client.create_run(others[1])  # said to be running
    moved = shutil.copytree(project, tmp_path / "moved")

    def addresses() -> list[str]:
        found = MlflowClient(tracking.store_uri())
        return [
            found.get_run(str(run.id)).info.artifact_uri,
            *(found.get_experiment(i).artifact_location for i in others),
        ]

    before, now = (f"{(folder / 'mlartifacts').as_uri()}/{run.id}/artifacts" for folder in (project, moved))
    linked = tmp_path / "linked"
    (linked / "mlartifacts" / str(run.id)).mkdir(parents=True)
    (linked / "mlflow.db").symlink_to(moved / "mlflow.db")
    monkeypatch.chdir(linked)
    tracking.prepare_file(written=True)
    monkeypatch.chdir(moved)
    tracking.prepare_file()
    assert addresses() == [before, *places]
    tracking.prepare_file(written=True)
    assert addresses() == [now, *places]


def test_artifacts_of_one_name_are_kept_apart(project: Path, tracked: Params, tmp_path: Path) -> None:
    with training_run(tracked, lineage={}) as run:
        for name in ("lfw", "ytf", "extra/lfw"):
            (tmp_path / "scores.parquet").write_text(name)
            run.log_artifact(tmp_path / "scores.parquet", name)
    folder = tracking.download(str(run.id), "scores.parquet", tmp_path / "fetched", tracked)
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert files == {f"{name}/scores.parquet": name for name in ("lfw", "ytf", "extra/lfw")}


def test_an_address_that_leads_nowhere_is_named(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}) as run:
        pass
    for address, problem in (
        (
            f"runs:/{run.id}",
            rf"run {run.id}\): models/backbone\.safetensors and models/model\.json are not at file:///",
        ),
        ("runs:/nosuch", "Run with id=nosuch not found"),
        ("models:/nosuch@champion", "name=nosuch not found"),
        ("models:/m-nosuch", "'m-nosuch' not found"),
        ("models:/cosface", "models:/cosface: not an address of a model"),
    ):
        with pytest.raises(TrackingError, match=problem), registry.located(address, tracked):
            pass


def test_without_a_champion_the_folder_counts(tracked: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for address, path in ((None, "models"), ("elsewhere/model.onnx", "elsewhere/model.onnx")):
        with registry.located(address, tracked) as found:
            assert (found.path, found.name, found.scores) == (Path(path), path, None)
    with (
        pytest.raises(
            TrackingError, match=r"models:/cosface@champion: there is no MLflow store sqlite:///.*mlflow\.db"
        ),
        registry.located("models:/cosface@champion", tracked),
    ):
        pass
    assert list(tmp_path.iterdir()) == []  # looking makes no store


def test_a_model_without_a_run_gets_one_for_its_evaluation(project: Path, tracked: Params, models: Path) -> None:
    for accuracy in (0.8, 0.9):
        with training_run_of(models, tracked) as run:
            run.log_metrics({"lfw/accuracy": accuracy})
    (found,) = recorded(project, tracked)
    assert found.data.tags["model.sha256"] == tracking.model_digest(models)
    assert found.data.params["train.head.margin"] == "0.35"
    assert found.data.metrics == {"lfw/accuracy": 0.9}
    assert found.info.status == "FINISHED"


def test_tracking_off_leaves_no_trace(
    params: Params, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with training_run(params, lineage={}) as run, training_run_of(models, params) as other:
        for off in (run, other):
            assert type(off) is NoRun
            assert off.id is None
            off.log_metrics({"x": 1.0}, step=1)
            off.log_model(models)
            off.log_figure(models / "model.json", "a.png")
            off.log_artifact(models / "model.json", "a")
            off.set_tag("a", "b")
            off.log_digest("0" * 64)
            off.end_lost(["0" * 32])
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_server_that_does_not_answer_is_named(
    project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{servers.free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with (
        pytest.raises(TrackingError, match=f"MLFLOW_TRACKING_URI={address}: no answer"),
        training_run(tracked, lineage={}),
    ):
        pass


def test_a_store_that_mlflow_refuses_is_named(project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://loft")
    with pytest.raises(TrackingError, match="carrier-pigeon://loft"), training_run(tracked, lineage={}):
        pass


def test_a_file_that_is_no_store_is_named_at_once(
    tmp_path: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_text("notes " * 100)
    told = rf"^MLflow store sqlite:///{tmp_path}/mlflow\.db: file is not a database; make it a database that you may"
    with pytest.raises(TrackingError, match=told), training_run(tracked, lineage={}):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    with (
        pytest.raises(TrackingError, match=r"nowhere/mlflow\.db \(MLFLOW_TRACKING_URI\): \S*/nowhere is not there; "),
        training_run(tracked, lineage={}),
    ):
        pass
    assert not caplog.records


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_store_that_may_only_be_read_is_read(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}):
        pass
    (project / "mlflow.db").chmod(0o444)
    try:
        with pytest.raises(TrackingError, match=r"mlflow\.db may not be written; make it"):
            interrupted_training(tracked, KeyboardInterrupt)
        assert tracking.connect(tracked)
    finally:
        (project / "mlflow.db").chmod(0o644)


def test_a_deleted_experiment_is_named(project: Path, tracked: Params) -> None:
    with training_run(tracked, lineage={}):
        pass
    (found,) = recorded(project, tracked)
    MlflowClient(tracking.store_uri()).delete_experiment(found.info.experiment_id)
    with pytest.raises(TrackingError, match=f"tracking.experiment: '{tracked.tracking.experiment}' was deleted"):
        tracking.connect(tracked)


def test_the_best_is_that_of_validation_on_the_same_data(project: Path, tracked: Params) -> None:
    """Whatever LFW says, and whatever a model on other data has reached; pairs of people count before images. (None of
    these runs has its model, which is said of the one that is chosen.)
    """

    def trained(name: str, data: str, validated: dict[str, float], lfw: float) -> None:
        changed = tracked.train.model_copy(update={"head": tracked.train.head.model_copy(update={"margin": lfw})})
        with training_run(tracked.model_copy(update={"train": changed}), lineage={"data.shards": data}) as run:
            for step, share in enumerate((2, 1)):  # the last iteration's is what counts
                run.log_metrics({f"train/{key}": value * share for key, value in validated.items()}, step)
            run.log_metrics({"lfw/accuracy": lfw})
            run.set_tag("mlflow.runName", name)

    trained("none", "a", {}, 0.1)
    with pytest.raises(
        TrackingError, match=r"best: no training on the data of run none \(\w+\) was validated; set shard"
    ):
        registry.promote("best", tracked)
    trained("low", "a", {"val_accuracy": 0.3}, 0.9)
    trained("high", "a", {"val_accuracy": 0.4}, 0.2)
    trained("elsewhere", "b", {"val_accuracy": 0.5}, 0.3)
    trained("late", "a", {"val_accuracy": 0.35}, 0.4)
    with pytest.raises(TrackingError, match=r"run high .* has recorded no model"):
        registry.promote("best", tracked)
    trained("pairs", "a", {"val_accuracy": 0.1, "val_auc": 0.4}, 0.1)
    with pytest.raises(TrackingError, match=r"run pairs .* has recorded no model"):
        registry.promote("best", tracked)


def test_promotion_needs_a_run_with_a_model(project: Path, tracked: Params) -> None:
    with pytest.raises(TrackingError, match="no finished run"):
        registry.promote("latest", tracked)
    with pytest.raises(TrackingError, match="Run with id=nosuch not found"):
        registry.promote("nosuch", tracked)
    with training_run(tracked, lineage={}) as run:
        pass
    with pytest.raises(TrackingError, match=f"{run.id}.* has recorded no model"):
        registry.promote("latest", tracked)


def test_training_outlives_its_tracking_server(
    project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with training_run(tracked, lineage={}):
        pass
    gone = MlflowClient(f"http://127.0.0.1:{servers.free_port()}")
    run = tracking.Run(gone, recorded(project, tracked)[0])
    run.log_metrics({"train/loss": 2.0}, step=1)
    run.set_tag("colour", "red")
    run.close("FINISHED")
    for what in ("colour", "metrics", "the end of the run"):
        assert f"did not record {what}: " in caplog.text


@pytest.fixture
def refusing() -> Iterator[str]:
    """An MLflow server as far as it refuses everything, at an address with a password."""
    with answering(lambda handler: handler.send_error(507, "Insufficient Storage")) as address:
        yield address.replace("://", "://me:SECRET@")


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None], certificate: Path | None = None) -> Iterator[str]:
    """A server on loopback that answers anything alike; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_with_artifacts_at(where: str, tracked: Params) -> tracking.Run:
    """A run whose record is in the store of the project, but whose files are to go elsewhere."""
    client = MlflowClient(tracking.store_uri())
    experiment = client.create_experiment(tracked.tracking.experiment, where)
    return tracking.Run(client, client.create_run(experiment))


@pytest.mark.parametrize("kind", ["a server that refuses", "a file in the way", "a module that is missing"])
def test_training_outlives_a_store_that_takes_no_files(
    project: Path,
    tracked: Params,
    models: Path,
    refusing: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setitem(sys.modules, "boto3", None)  # as where it is not installed
    where, problem = {
        "a server that refuses": (f"{refusing}/api/2.0/mlflow-artifacts/artifacts", "507"),
        "a file in the way": ((tmp_path / "file" / "artifacts").as_uri(), "Not a directory"),
        "a module that is missing": ("s3://bucket/runs", "boto3"),
    }[kind]
    run = run_with_artifacts_at(where, tracked)
    run.log_artifact(models / "model.json", "lfw")
    run.log_figure(models / "model.json", "lfw/roc.png")
    run.log_model(models)
    run.log_metrics({"lfw/accuracy": 0.9})
    run.close("FINISHED")
    for what in ("model.json", "lfw/roc.png", "the model"):
        assert any(f"did not record {what}: " in line and problem in line for line in caplog.messages), caplog.text
    assert "SECRET" not in caplog.text
    (found,) = recorded(project, tracked)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"lfw/accuracy": 0.9})


def test_a_run_that_cannot_begin_does_not_stay_open(
    project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    MlflowClient(tracking.store_uri()).create_experiment(tracked.tracking.experiment, "s3://bucket/runs")
    with pytest.raises(TrackingError, match=r"MLflow store sqlite:.*boto3"), training_run(tracked, lineage={}):
        pass
    assert [run.info.status for run in recorded(project, tracked)] == ["FAILED"]


def test_a_server_that_hangs_holds_training_up_for_seconds_only(
    project: Path, tracked: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    within = tracking._answered_within
    monkeypatch.setattr(tracking, "_answered_within", lambda seconds: within(seconds // tracking.ANSWER_SECONDS))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    with training_run(tracked, lineage={}):
        pass
    over, asked, released = threading.Event(), threading.Event(), threading.Event()

    def hang(_: BaseHTTPRequestHandler) -> None:
        asked.set()
        over.wait(60)
        released.set()

    with answering(hang) as address:
        run = tracking.Run(MlflowClient(address), recorded(project, tracked)[0])
        run.log_metrics({"train/loss": 2.0}, step=1)
        run.flush()
        told = asked.is_set(), released.is_set()
        over.set()
    assert told == (True, False)
    assert "did not record metrics: " in caplog.text
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_an_evaluation_by_other_parameters_says_so(project: Path, tracked: Params, models: Path) -> None:
    with training_run(tracked, lineage={}) as run:
        run.set_tag("model.sha256", tracking.model_digest(models))
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    before = set(recorded(project, tracked)[0].data.tags)
    other = tracked.model_copy(
        update={
            "evaluate": tracked.evaluate.model_copy(update={"flip": "none", "centre": not tracked.evaluate.centre}),
            "audit": tracked.audit.model_copy(update={"overlap": 0.25}),
        }
    )
    same: dict[str, str] = {}
    changed = {"evaluate.flip": "none", "evaluate.centre": str(other.evaluate.centre), "audit.overlap": "0.25"}
    for params, expected in ((tracked, same), (other, changed), (tracked, same)):
        with training_run_of(models, params) as evaluation:
            evaluation.log_metrics({"lfw/accuracy": 0.9})
        (found,) = recorded(project, tracked)
        tags = {key: value for key, value in found.data.tags.items() if key not in before}
        assert tags.pop("evaluated.git.commit") == head
        assert tags.pop("evaluated.git.dirty") == "false"
        assert tags.pop("evaluated.dvc.lock") == found.data.tags["dvc.lock"]
        assert tags == expected
        assert found.data.params["evaluate.flip"] == tracked.evaluate.flip


def certificate(folder: Path) -> Path:
    """A key and a certificate for loopback that nobody has signed but itself."""
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(secret + signed.public_bytes(Encoding.PEM))
    return path


def test_a_server_is_trusted_as_mlflow_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate(tmp_path)
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_INSECURE_TLS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with answering(lambda handler: handler.send_error(404), path) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(TrackingError, match=r"no answer .*CERTIFICATE_VERIFY_FAILED"):
            tracking.store_client()
        for name, value in zip(names, (str(path), str(path), "true"), strict=True):
            with monkeypatch.context() as patched:
                patched.setenv(name, value)
                tracking.store_client()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "nosuch.pem"))
        with pytest.raises(TrackingError, match=r"no answer .*nosuch\.pem"):
            tracking.store_client()


def test_what_an_evaluation_left_is_had_back(project: Path, tracked: Params, tmp_path: Path) -> None:
    with training_run(tracked, lineage={}) as run:
        for name in ("lfw", "ytf"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "scores.parquet").write_text(name)
            run.log_artifact(tmp_path / name / "scores.parquet", name)
        (tmp_path / "index.html").write_text("")
        run.log_artifact(tmp_path / "index.html", "report")
    assert run.id is not None
    folder = tracking.download(run.id, "scores.parquet", tmp_path / "back", tracked)
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.*")}
    assert found == {"lfw/scores.parquet": "lfw", "ytf/scores.parquet": "ytf"}
    with pytest.raises(TrackingError, match=f"{run.id} has recorded no roc"):
        tracking.download(run.id, "roc.csv", folder, tracked)
    with pytest.raises(TrackingError, match="nobody"):
        tracking.download("nobody", "roc.csv", folder, tracked)
