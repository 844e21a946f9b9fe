"""Which model is champion: MLflow's model registry, by the one decision that needs a person or a rule, `promote`."""

from pipeline.params import Params
from pipeline.tracking import TrackingError, connect, newest_run, store_errors

NAME = "cosface"
"""Of the registered model; its champion is `models:/cosface@champion`."""
CHAMPION = "champion"


def promote(run_id: str, params: Params) -> tuple[str, str]:
    """Register the model of a run and make it the champion.

    A run promoted before keeps its version.

    Args:
        run_id: a run's id, or `latest` for the last training that finished.
        params: for the experiment's name.

    Returns:
        The run's name and the version of the registered model.

    Raises:
        TrackingError: the store does not answer, or there is no such run, or it has no model.
    """
    with store_errors():
        client, experiment = connect(params)
        run = newest_run(client, experiment, "status = 'FINISHED'") if run_id == "latest" else client.get_run(run_id)
        if run is None:
            raise TrackingError(f"no finished run in experiment {params.tracking.experiment!r}; `dvc repro` makes one")
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
