"""Any model on the sets of this project, without retraining: `cosface evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.executor import choose_device
from pipeline.params import Params
from pipeline.tracking import NoRun, model_digest
from stages.evaluate import Trained, extra, identify, run
from stages.evaluate.features import embed_set
from stages.evaluate.models import Embedder

Protocol = Literal["lfw", "ytf", "megaface", "extra"]


def evaluate_model(
    model: Embedder, protocols: Sequence[Protocol], data: Path, models: Path, out: Path, params: Params
) -> None:
    """Embed what the protocols ask for, and measure it as the stages of the graph do.

    Whom a model has learnt from is known of that in `models` alone; of others, people who are trained on are not found.

    Args:
        model: any model.
        protocols: those wanted.
        data: folder with raw, aligned and shards.
        models: folder of this project's own model.
        out: where results go, `<protocol>/metrics.json` and the rest, and features, in `embedded`; an interrupted
            evaluation goes on with those.
        params: all of params.yaml.

    Raises:
        TableError: a set is absent: `dvc repro align` makes it.
        EvaluationError: a set cannot be evaluated.
    """
    own = (models / "backbone.safetensors").exists() and model.digest == model_digest(models)
    trained = Trained(data / "shards" / "labels.parquet", Path(params.shard.clean.names)) if own else None
    embedded, section = out / "embedded", params.evaluate
    for protocol in protocols:
        for name in {"megaface": ("probes", "distractors"), "extra": ()}.get(protocol, (protocol,)):
            embed_set(data / "aligned" / name, model, embedded / name, batch=section.batch, flip=True)
        match protocol:
            case "lfw" | "ytf":
                run(data / "raw" / protocol, embedded / protocol, trained, out / protocol, section, NoRun())
            case "megaface":
                sets = (embedded / "probes", embedded / "distractors")
                device = choose_device(params.machine.device)
                identify.run(*sets, trained, out / "megaface", section, device, NoRun())
            case "extra":
                extra.run(Path(section.extra), model, out / "extra", params, NoRun())
