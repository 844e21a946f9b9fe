"""Which model is champion: MLflow's model registry, by the one decision that needs a person or a rule, `promote`.

And where a model lies that a person names: a path, or an address in MLflow.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.params import Params, shown
from pipeline.tracking import (
    DATA_TAG,
    TrackingError,
    connect,
    fetch,
    first_of,
    need_store,
    newest_run,
    prepare_file,
    store_client,
    store_errors,
    store_exists,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

NAME = "cosface"
"""Of the registered model; its champion is `models:/cosface@champion`."""
CHAMPION = "champion"
MODELS = Path("models")
"""Where training leaves the model of this folder."""
SCORES = "lfw/scores.parquet"
"""Below reports/ and among the artifacts of a run: the scores that thresholds are chosen by."""
_ADDRESS = re.compile(
    r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)"
    r"|models:/(?P<versioned>[^/@]+)/(?P<version>\d+)"
    r"|models:/(?P<model>m-\w+)"
    r"|runs:/(?P<run>\w+)(/.*)?"
)


@dataclass(frozen=True)
class Located:
    """A model that was asked for."""

    path: Path
    """A folder or a file."""
    name: str
    """For people."""
    scores: Path | None
    """Of its pairs of lfw, from the run that trained it; None where it is no model of MLflow, or was not evaluated."""


@contextmanager
def located(address: str | None, params: Params) -> Iterator[Located]:
    """A model by the way that a person names it, for as long as the block lasts.

    Args:
        address: a path; `models:/<name>@<alias>`, `models:/<name>/<version>`, `models:/m-<id>` or `runs:/<id>`; None
            for the champion where there is one, otherwise the folder `models`.
        params: for whether there is tracking.

    Raises:
        TrackingError: MLflow does not answer, or has no such model, or not its weights.
    """
    if address is None:
        address = f"models:/{NAME}@{CHAMPION}" if params.tracking.enabled and _has_champion() else str(MODELS)
    if not address.startswith(("models:", "runs:")):
        yield Located(Path(address), address, None)
        return
    with tempfile.TemporaryDirectory(prefix="cosface-model-") as folder:
        need_store(address)
        with store_errors():
            place = _fetched(address, Path(folder))
        yield place


def _has_champion() -> bool:
    from mlflow.exceptions import MlflowException

    if not store_exists():  # asking would make one
        return False
    with store_errors():
        try:
            store_client().get_model_version_by_alias(NAME, CHAMPION)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return False
    return True


def _fetched(address: str, folder: Path) -> Located:
    """The files of a model in MLflow, as its run keeps them: weights in safetensors, and scores if there are any."""
    client = store_client()
    run_id, version = _run_of(client, address)
    run = client.get_run(run_id)
    name = f"{address} ({version}{run.info.run_name}, run {run_id})"
    there = {file.path for file in client.list_artifacts(run_id, "models")}
    wanted = [f"models/{file}" for file in ("backbone.safetensors", "model.json")]
    if not there.issuperset(wanted):
        raise TrackingError(
            f"{name}: {' and '.join(wanted)} are not at {shown(run.info.artifact_uri)}; take a run that ended well"
        )
    for file in wanted:
        fetch(client, run_id, file, folder)
    scored = first_of(client, run).info.run_id
    has_scores = SCORES in {file.path for file in client.list_artifacts(scored, str(Path(SCORES).parent))}
    return Located(folder / "models", name, fetch(client, scored, SCORES, folder) if has_scores else None)


def _run_of(client: "MlflowClient", address: str) -> tuple[str, str]:
    """The run that an address means, and, where it means a version of a registered model, which one."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise TrackingError(
            f"{address}: not an address of a model, as models:/{NAME}@{CHAMPION}, models:/{NAME}/1, models:/m-<id> and "
            "runs:/<id> are"
        )
    if found["run"]:
        return found["run"], ""
    if found["model"]:
        return str(client.get_logged_model(found["model"]).source_run_id), ""
    if found["alias"]:
        version = client.get_model_version_by_alias(found["name"], found["alias"])
    else:
        version = client.get_model_version(found["versioned"], found["version"])
    return str(version.run_id), f"version {version.version}, "


def promote(run_id: str, params: Params) -> tuple[str, str]:
    """Register the model of a run and make it the champion.

    A run promoted before keeps its version.

    Args:
        run_id: a run's id; `latest` for the last training that finished; or `best` for the one whose model is best by
            validation, of pairs of people or of images that were kept back, among those on the same data as `latest`.
        params: for the experiment's name.

    Returns:
        The run's name and the version of the registered model.

    Raises:
        TrackingError: the store does not answer, or there is no such run, or it has no model; or none was validated.
    """
    need_store(f"run {run_id}")
    prepare_file(written=True)
    with store_errors():
        client, experiment = connect(params)
        named = run_id in ("latest", "best")
        run = newest_run(client, experiment, "status = 'FINISHED'") if named else client.get_run(run_id)
        if run is None:
            raise TrackingError(f"no finished run in experiment {params.tracking.experiment!r}; `dvc repro` makes one")
        run = first_of(client, _best(client, run) if run_id == "best" else run)
        models = run.outputs.model_outputs if run.outputs else []
        if not models:
            raise TrackingError(f"run {run.info.run_name} ({run.info.run_id}) has recorded no model")
        if not client.search_registered_models(f"name = '{NAME}'"):
            client.create_registered_model(NAME, description="Aligned faces to embeddings (Large Margin Cosine Loss)")
        found = client.search_model_versions(f"name = '{NAME}' and run_id = '{run.info.run_id}'")
        if found:
            version = found[0]
        else:
            model = models[-1].model_id
            version = client.create_model_version(NAME, f"models:/{model}", run.info.run_id, model_id=model)
        client.set_registered_model_alias(NAME, CHAMPION, version.version)
        return run.info.run_name, str(version.version)


def _best(client: "MlflowClient", latest: "MlflowRun") -> "MlflowRun":
    """The finished run on the same data whose last iteration's model is best by validation; of equals the first."""
    same = f"status = 'FINISHED' and tags.`{DATA_TAG}` = '{latest.data.tags.get(DATA_TAG)}'"
    for metric in ("metrics.`train/val_auc`", "metrics.`train/val_accuracy`"):
        order = [f"{metric} DESC", "attributes.start_time ASC"]
        runs = client.search_runs(
            [latest.info.experiment_id], f"{same} and {metric} >= 0", order_by=order, max_results=1
        )
        if runs:
            return runs[0]
    raise TrackingError(
        f"best: no training on the data of run {latest.info.run_name} ({latest.info.run_id}) was validated; set "
        "shard.validation.share above 0 and train again, or name a run"
    )
