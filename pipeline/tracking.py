"""MLflow runs: parameters, metrics, figures, models and the data's lineage, one run a model.

The only module that knows MLflow, and it imports it only when a run begins: the import takes a second, and
nothing here is needed with `tracking.enabled: false`. No run id enters an output of a stage; evaluation finds the
training's run by the content of the model (tag `model.sha256`).
"""

import glob
import hashlib
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.params import Params, flatten, shown, without_secrets
from pipeline.tables import sha256_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

MODEL_TAG = "model.sha256"
DATA_TAG = "data.shards"
"""Of a training's run: the fingerprint of the shards that it learns from and is validated on."""
FIRST_TAG = "model.first_run"
"""Of a run whose model came of another before, the same to the bit: that one's id."""
RECORDED = ("download", "align", "shard", "train", "evaluate", "audit")
"""Sections of params.yaml that decide what comes out."""
JUDGING = ("evaluate", "audit")
"""Those of them that an evaluation reads."""
FLUSH_SECONDS = 5
"""Metrics wait at most about this long in memory before they are sent, many at a time."""
PATIENCE_SECONDS = 60
"""Between attempts where the store does not answer: each one holds the training up for seconds."""
ANSWER_SECONDS = 10
"""How long a server may take to answer before it counts as one that does not."""
UPLOAD_SECONDS = 120
"""The same where it was sent a file, which it may have to pass on."""
BATCH = 100
"""Most parameters, and safely less than the most metrics, that MLflow takes in one call."""


class TrackingError(InputError):
    """MLflow cannot be used; the message names the store and what to do."""


def store_uri(root: Path | None = None) -> str:
    """Where runs are kept: MLFLOW_TRACKING_URI, otherwise mlflow.db in the project (`root`, default: here)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(root or Path.cwd()) / 'mlflow.db'}"


def artifacts_root() -> Path:
    """Where files of runs are kept when the store is on this machine."""
    return Path.cwd() / "mlartifacts"


def model_digest(models: Path) -> str:
    """SHA-256 of the trained backbone, by which an evaluation finds the run that trained it."""
    return sha256_file(models / "backbone.safetensors")


class NoRun:
    """The interface of `Run` with tracking switched off: does nothing."""

    @property
    def id(self) -> str | None:
        """By which the store knows the run."""
        return None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""

    def steps(self, metric: str) -> set[int]:
        """At which iterations a metric was recorded, by this process or an earlier one that went on with the run."""
        return set()

    def log_figure(self, path: Path, artifact_name: str) -> None:
        """Nothing."""

    def log_artifact(self, path: Path, folder: str) -> None:
        """Nothing."""

    def log_model(self, models: Path) -> None:
        """Nothing."""

    def set_tag(self, key: str, value: str) -> None:
        """Nothing."""

    def log_digest(self, digest: str) -> None:
        """Nothing."""

    def end_lost(self, run_ids: Iterable[str]) -> None:
        """Nothing."""


class Run(NoRun):
    """A run in MLflow.

    A store that fails once the run has begun costs the record, never the training: it is warned of, and metrics are
    kept to be sent later.
    """

    def __init__(self, client: "MlflowClient", run: "MlflowRun") -> None:
        self._id: str = run.info.run_id
        self._client = client
        self._experiment = run.info.experiment_id
        self._model = run.outputs.model_outputs[0].model_id if run.outputs and run.outputs.model_outputs else None
        self._waiting: list[Metric] = []
        self._flush_at = time.monotonic() + FLUSH_SECONDS

    @property
    def id(self) -> str:
        """By which the store knows the run."""
        return self._id

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record values by name, at an iteration or (without one) for the run as a whole; cheap inside a loop."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [
            Metric(name, float(value), now, step or 0, model_id=self._model, run_id=self.id)
            for name, value in metrics.items()
        ]
        if time.monotonic() > self._flush_at:
            self.flush()

    def steps(self, metric: str) -> set[int]:
        """At which iterations a metric was recorded, by this process or an earlier one that went on with the run.

        Raises:
            TrackingError: the store cannot be used.
        """
        with store_errors():
            return {each.step for each in self._client.get_metric_history(self.id, metric)}

    def log_figure(self, path: Path, artifact_name: str) -> None:
        """Record a picture under a name such as `lfw/roc.png`, below `figures/`."""
        target = Path("figures") / artifact_name
        with self._forgiving(artifact_name, UPLOAD_SECONDS), tempfile.TemporaryDirectory() as folder:
            copy = shutil.copyfile(path, Path(folder) / target.name)
            self._client.log_artifact(self.id, str(copy), target.parent.as_posix())

    def log_artifact(self, path: Path, folder: str) -> None:
        """Record a file in a folder of the run's artifacts."""
        with self._forgiving(path.name, UPLOAD_SECONDS):
            self._client.log_artifact(self.id, str(path), folder)

    def log_model(self, models: Path) -> None:
        """Record the files of `models`, and the model as one that MLflow lists, compares, registers and serves.

        The latter is a torch.export archive without pickles: N×3×112×112 uint8 → N×D float32, any N.
        """
        with self._forgiving("the model", UPLOAD_SECONDS):
            self._client.log_artifacts(self.id, str(models), "models")
            if self._model is None:  # or a training that had ended only writes its outcome again
                self._model = _log_exported_model(self.id, self._experiment, models)

    def set_tag(self, key: str, value: str) -> None:
        """Label the run."""
        with self._forgiving(key):
            self._client.set_tag(self.id, key, value)

    def log_digest(self, digest: str) -> None:
        """Label the run with the SHA-256 of its model; and with the run that it came of before, if there is one.

        Of a model that it has evaluated before, DVC takes the results from its cache: they are in that run.
        """
        with self._forgiving(MODEL_TAG):
            self._client.set_tag(self.id, MODEL_TAG, digest)
            condition = f"tags.`{MODEL_TAG}` = '{digest}' and status = 'FINISHED'"
            runs = self._client.search_runs([self._experiment], condition, order_by=["attributes.start_time ASC"])
            first = next((run for run in runs if run.info.run_id != self.id), None)
            if first is not None:
                self._client.set_tag(self.id, FIRST_TAG, first.info.run_id)
                log.info("the same model as of run %s, to the bit; its results are there", first.info.run_id)

    def end_lost(self, run_ids: Iterable[str]) -> None:
        """End as KILLED those runs that are said to run still, though nobody will go on with them."""
        for run_id in run_ids:
            with self._forgiving(f"the end of run {run_id}"):
                if self._client.get_run(run_id).info.status == "RUNNING":
                    self._client.set_terminated(run_id, "KILLED")

    def tag_evaluation(self, recorded: dict[str, str], tags: dict[str, str], params: Params) -> None:
        """Label the run with what an evaluation of its model is made by.

        Args:
            recorded: the parameters that the run has.
            tags: the tags that it has; those that an earlier evaluation left and that hold no more are removed.
            params: what this evaluation is made by.
        """
        values = {key: str(value) for section in JUDGING for key, value in _flat(params, section).items()}
        wanted = {key: value for key, value in values.items() if recorded.get(key) != value}
        wanted |= {f"evaluated.{key}": value for key, value in _origin().items() if not key.startswith("mlflow.")}
        with self._forgiving("what the evaluation is made by"):
            for key in (values.keys() & tags.keys()) - wanted.keys():
                self._client.delete_tag(self.id, key)
            for key, value in wanted.items():
                if tags.get(key) != value:
                    self._client.set_tag(self.id, key, value)

    def close(self, status: str) -> None:
        """Send what waits and end the run as FINISHED, FAILED or KILLED."""
        self.flush()
        with self._forgiving("the end of the run"):
            self._client.set_terminated(self.id, status)

    def flush(self) -> None:
        """Send the metrics that wait; where the store does not answer they go on waiting."""
        self._flush_at = time.monotonic() + PATIENCE_SECONDS
        with self._forgiving("metrics"):
            while self._waiting:
                self._client.log_batch(self.id, metrics=self._waiting[:BATCH])
                del self._waiting[:BATCH]
            self._flush_at = time.monotonic() + FLUSH_SECONDS

    @contextmanager
    def _forgiving(self, what: str, seconds: int = ANSWER_SECONDS) -> Iterator[None]:
        """Warn of whatever goes wrong: beside MLflow, stores of artifacts fail in ways of their own."""
        try:
            with _answered_within(seconds):
                yield
        except Exception as error:
            log.warning("MLflow at %s did not record %s: %s", shown(store_uri()), what, _said(error))


@contextmanager
def training_run(params: Params, *, lineage: dict[str, str], resume_id: str | None = None) -> Iterator[NoRun]:
    """The MLflow run of a training: begun with all parameters and tags, and ended as the block ends.

    FINISHED when it ends well, KILLED on Ctrl-C or SIGTERM, FAILED on any other exception.

    Args:
        params: all of params.yaml; the sections that decide what comes out are recorded by dotted name.
        lineage: tags that say which data it is, DATA_TAG for one.
        resume_id: the run of an interrupted training, which is then continued.

    Yields:
        A `Run`; a `NoRun` with tracking switched off.

    Raises:
        TrackingError: the store cannot be used.
    """
    if not params.tracking.enabled:
        yield NoRun()
        return
    with store_errors():
        client, experiment = connect(params)
        run = _continue(client, resume_id) if resume_id else None
        run = run or _begin(client, experiment, params, lineage)
    with _closing(run):
        yield run


@contextmanager
def training_run_of(models: Path, params: Params) -> Iterator[NoRun]:
    """The run that trained the model in `models`, for its evaluation to record into.

    Metrics of an earlier evaluation are written over. Parameters cannot be, and so those by which this one differs from
    what the run has recorded become tags of the same names (`evaluate.flip`); tags `evaluated.*` say by which commit.

    Where no run trained it (tracking was off, or it came from a cache filled elsewhere), one is begun for it.

    Raises:
        TrackingError: the store cannot be used.
    """
    if not params.tracking.enabled:
        yield NoRun()
        return
    digest = model_digest(models)
    with store_errors():
        client, experiment = connect(params)
        found = newest_run(client, experiment, f"tags.`{MODEL_TAG}` = '{digest}'")
        found = found and first_of(client, found)
        run = Run(client, found) if found else _begin(client, experiment, params, {MODEL_TAG: digest})
    if not found:
        log.warning("MLflow has no training run of this model; its evaluation is recorded as a run of its own")
        with _closing(run):
            run.log_model(models)
            yield run
        return
    run.tag_evaluation(found.data.params, found.data.tags, params)
    try:
        yield run
    finally:
        run.flush()


def connect(params: Params) -> tuple["MlflowClient", str]:
    """A client of the store, and the id of the experiment of params.yaml, which is made if absent.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    client, name = store_client(), params.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        kind = {"mlflow.experimentKind": "custom_model_development"}  # or the UI takes it for a chat application
        return client, client.create_experiment(name, None if served() else artifacts_root().as_uri(), tags=kind)
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or take another name"
        )
    return client, experiment.experiment_id


def store_client() -> "MlflowClient":
    """A client of the store, which is made if it is a file that is absent.

    Raises:
        TrackingError: it is a server, and does not answer; or a file that cannot be read.
    """
    uri = store_uri()
    prepare_file()
    if served():
        import requests  # as MLflow does, with the certificates that it takes

        trusted = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
        mine = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
        try:
            requests.get(uri, timeout=ANSWER_SECONDS, verify=trusted or not insecure, cert=mine)
        except OSError as error:  # which those of requests are
            raise TrackingError(
                f"MLFLOW_TRACKING_URI={shown(uri)}: no answer ({_said(error)}); start that server, unset the variable, "
                "or set tracking.enabled: false in params.yaml"
            ) from error
    return _client(uri)


def prepare_file(*, written: bool = False) -> None:
    """See that the store, where it is a file, may be read, for MLflow would try for minutes, and print tracebacks; and
    that the project's own has moved along with the project.

    Args:
        written: it may be written, too.

    Raises:
        TrackingError: it may not, or is no database, or absent where none can be made.
    """
    path = _store_file()
    if path is None:
        return
    try:
        if path.exists():
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", ANSWER_SECONDS, uri=True)) as database:
                database.execute("SELECT 1 FROM sqlite_master")
        needed = [path.parent, path] if path.exists() else [path.parent]
        refused = [each for each in needed if not os.access(each, os.W_OK)] if written or not path.exists() else []
        if refused:
            raise OSError(f"{refused[0]} {'may not be written' if refused[0].exists() else 'is not there'}")
        if path.exists() and not os.environ.get("MLFLOW_TRACKING_URI"):
            _move_along(path, written=written)
    except (sqlite3.Error, OSError) as error:
        raise TrackingError(
            f"{_named_store()}: {error}; make it a database that you may read and write, name another store by "
            "MLFLOW_TRACKING_URI, or set tracking.enabled: false in params.yaml"
        ) from error


_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Where MLflow's database has the absolute addresses of files, tables and columns."""


def _move_along(path: Path, *, written: bool) -> None:
    """Where the project was moved or copied since, put the addresses of its runs' files right.

    Args:
        path: of the database.
        written: it is to be written anyhow; otherwise it stays as it is while a run goes on, which may be one that sees
            this very folder by another path, from within a container.
    """
    here = artifacts_root()
    if path.resolve().parent != here.resolve().parent or not here.is_dir():
        return
    before = _places_before(path, here, running=written)
    if not before:
        return
    try:
        with closing(sqlite3.connect(path, ANSWER_SECONDS)) as database, database:
            for place, (table, column) in product(before, _PLACES):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR {column} GLOB ?",
                    (here.as_uri(), len(place) + 1, place, f"{glob.escape(place)}/*"),
                )
    except sqlite3.OperationalError as error:
        if written:
            raise
        log.warning("%s has its runs' files in %s, not in %s as it should: %s", path, " and ".join(before), here, error)
        return
    log.warning("%s had its runs' files in %s, and has them in %s from now on", path, " and ".join(before), here)


def _places_before(path: Path, here: Path, *, running: bool) -> list[str]:
    """Where the project's experiments keep files by their database, though files of their runs are here.

    Args:
        running: also while a run goes on.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", ANSWER_SECONDS, uri=True)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return []  # it is new
        found = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        runs = database.execute("SELECT run_uuid, artifact_uri, status FROM runs").fetchall()
    if not running and any(status == "RUNNING" for *_, status in runs):
        return []
    places = [place for (place,) in found if place.startswith(("file:", "/")) and place.endswith(f"/{here.name}")]
    return [
        place
        for place in places
        if place != here.as_uri() and any(uri.startswith(f"{place}/") and (here / run).is_dir() for run, uri, _ in runs)
    ]


def _store_file() -> Path | None:
    """The file that the store is; None where it is none."""
    uri = store_uri()
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _named_store() -> str:
    """The store as messages name it."""
    by = " (MLFLOW_TRACKING_URI)" if os.environ.get("MLFLOW_TRACKING_URI") else ""
    return f"MLflow store {shown(store_uri())}{by}"


def store_exists() -> bool:
    """Whether there is a store to look into: a file that is there, or anything else than a file."""
    path = _store_file()
    return path is None or path.exists()


def need_store(what: str) -> None:
    """Before something is looked for in the store, which asking would make where it is a file that is absent.

    Raises:
        TrackingError: there is none.
    """
    if not store_exists():
        raise TrackingError(f"{what}: there is no {_named_store()}")


def served() -> bool:
    """Whether the store is behind a server, rather than a file or a database."""
    return store_uri().startswith(("http://", "https://"))


def newest_run(client: "MlflowClient", experiment: str, condition: str = "") -> "MlflowRun | None":
    """The run begun last among those that meet a condition in MLflow's search syntax; None where there is none."""
    runs = client.search_runs([experiment], condition, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0] if runs else None


def first_of(client: "MlflowClient", run: "MlflowRun") -> "MlflowRun":
    """The run that the model of a run came of first, which has its results; the run itself where that is gone."""
    from mlflow.exceptions import MlflowException

    try:
        first = client.get_run(run.data.tags.get(FIRST_TAG, run.info.run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return run
    return first if first.info.lifecycle_stage == "active" else run


def download(run_id: str, name: str, folder: Path, params: Params) -> Path:
    """Copy the artifacts of a run that have this name, whatever folder they are in, into `folder`, which it returns.

    Raises:
        TrackingError: the store does not answer, there is no such run, or it has none.
    """
    need_store(f"run {run_id}")
    with store_errors():
        client, _ = connect(params)
        run_id = first_of(client, client.get_run(run_id)).info.run_id
        found = [path for path in _artifacts(client, run_id) if Path(path).name == name]
        if not found:
            raise TrackingError(f"run {run_id} has recorded no {name}")
        for path in found:
            fetch(client, run_id, path, folder)
    return folder


def _artifacts(client: "MlflowClient", run_id: str, folder: str | None = None) -> Iterator[str]:
    """The paths of a run's artifacts below a folder."""
    for each in client.list_artifacts(run_id, folder):
        if each.is_dir:
            yield from _artifacts(client, run_id, each.path)
        else:
            yield each.path


def fetch(client: "MlflowClient", run_id: str, path: str, folder: Path) -> Path:
    """Copy an artifact of a run to `folder/path`, which it returns.

    (MLflow itself keeps the path below the folder for some kinds of stores, for others the file's name alone.)
    """
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        return Path(client.download_artifacts(run_id, path, own)).replace(target)


def _client(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 would stop the training loop for minutes
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    given = "MLFLOW_TRACKING_URI" in os.environ
    mlflow.set_tracking_uri(uri)
    if not given:  # as MLflow would have it from now on
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return mlflow.MlflowClient()


@contextmanager
def _answered_within(seconds: int) -> Iterator[None]:
    """Have MLflow wait so long for each answer of a server, unless MLFLOW_HTTP_REQUEST_TIMEOUT says how long."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(seconds)
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def store_errors() -> Iterator[None]:
    """What MLflow, its stores and the system fail with, and modules that a store needs and lacks, as our errors.

    The message names the store. What is a defect of ours stays what it is.
    """
    try:
        yield
    except Exception as error:
        ours = type(error).__module__.partition(".")[0] in ("builtins", "pipeline", "stages")
        if ours and not isinstance(error, OSError | ImportError):
            raise
        raise TrackingError(f"{_named_store()}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What an error says, which may repeat addresses of stores and requests to them, without what is secret there."""
    text = str(error).replace(store_uri(), shown(store_uri())) or type(error).__name__
    text = re.sub(r"\w[\w+.-]*://\S+", lambda found: shown(found[0]), text)
    return re.sub(r"\?\S*=\S*", "", text)


def _begin(client: "MlflowClient", experiment: str, params: Params, tags: dict[str, str]) -> Run:
    prepare_file(written=True)
    train = params.train
    name = f"{train.backbone.name}, {train.head.summary}"
    run = Run(client, client.create_run(experiment, tags=_origin() | tags, run_name=name))
    try:
        _describe(client, run.id, params)
    except BaseException:
        run.close("FAILED")
        raise
    return run


def _describe(client: "MlflowClient", run_id: str, params: Params) -> None:
    """Record all that decides what comes out: parameters, and the files that say it whole."""
    from mlflow.entities import Param

    values = [Param(key, str(value)) for section in RECORDED for key, value in _flat(params, section).items()]
    for start in range(0, len(values), BATCH):
        client.log_batch(run_id, params=values[start : start + BATCH])
    for file in ("dvc.lock", "params.yaml"):
        if Path(file).exists():
            client.log_text(run_id, without_secrets(Path(file).read_text(encoding="utf-8"), params), file)


def _flat(params: Params, section: str) -> dict[str, Any]:
    return flatten(getattr(params, section), section)


def _continue(client: "MlflowClient", run_id: str) -> Run | None:
    """The interrupted run, running again; None where the store has it no longer."""
    from mlflow.exceptions import MlflowException

    prepare_file(written=True)
    try:
        client.update_run(run_id, status="RUNNING")
        return Run(client, client.get_run(run_id))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        log.warning("the interrupted training's run %s is no longer in MLflow; it goes on as a new one", run_id)
        return None


def _origin() -> dict[str, str]:
    """Tags that say which code, parameters and data: git commit, whether files differ from it, and dvc.lock."""
    tags: dict[str, str] = {}
    commit = _git("rev-parse", "HEAD")
    if commit:
        # DVC itself rewrites dvc.lock between two stages, so that it says nothing about the code
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
        tags |= {"mlflow.source.git.commit": commit, "git.commit": commit, "git.dirty": str(bool(changed)).lower()}
    lock = Path("dvc.lock")
    if lock.exists():
        tags["dvc.lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return tags


def _git(*arguments: str) -> str:
    """What git answers; empty where there is no git, no repository or no commit."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def _closing(run: Run) -> Iterator[None]:
    """End the run as the block ends; SIGTERM becomes SystemExit, so that it ends as KILLED rather than not at all."""

    def terminate(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        run.close("KILLED")
        raise
    except BaseException:
        run.close("FAILED")
        raise
    else:
        run.close("FINISHED")
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


def _log_exported_model(run_id: str, experiment: str, models: Path) -> str:
    """Log the model of a folder as an MLflow model of the run; its id."""
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from stages.train.model import load_model

    model = load_model(models, torch.device("cpu"))
    example = np.zeros((2, 3, 112, model.width), np.uint8)  # two, or the exported model would take just one
    with torch.inference_mode():
        width = model(torch.from_numpy(example)).shape[1]
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 3, 112, model.width))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, width))]),
    )
    with mlflow.start_run(run_id=run_id, experiment_id=experiment):
        info = mlflow.pytorch.log_model(
            model,
            name="cosface",
            input_example=example,
            signature=signature,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}"],  # given, or MLflow would run it to find out
        )
    return str(info.model_id)
