"""train: shards become a face-verification model, by the Large Margin Cosine Loss."""

import json
import logging
from pathlib import Path

from pipeline.executor import choose_device
from pipeline.params import Params
from pipeline.tables import LABELS, atomic, fingerprint, read_table, sha256_file
from pipeline.tracking import model_digest, training_run
from stages.shard.reader import open_shards
from stages.train.checkpoint import Checkpoints
from stages.train.heads import scale_lower_bound
from stages.train.loop import Row, Training, begin, history_csv, train
from stages.train.model import input_contract, save_model

log = logging.getLogger(__name__)

CODE = (Path(__file__).parent, Path(__file__).parents[1] / "shard")


def run(shards: Path, models: Path, checkpoints_root: Path, params: Params) -> None:
    """Train on `shards` and leave the model, its metrics and its history in `models`.

    An interrupted training goes on from its last checkpoint and ends, on a CPU, in the same bits as one that was
    never interrupted. Writes backbone.safetensors, head.safetensors, model.json, train.json and history.csv.

    Args:
        shards: folder of train-*, val-* and labels.parquet.
        models: folder of the model.
        checkpoints_root: folder for checkpoints; emptied of this training's when it ends well.
        params: all of params.yaml: section train decides, the others are recorded.

    Raises:
        TableError: shards are absent, incomplete, or fewer than a batch.
        TrainingError: the loss is no longer finite.
    """
    device = choose_device(params.machine.device)
    labels = read_table(shards / "labels.parquet", LABELS)
    classes = labels["label"].drop_null()
    groups, val_groups = open_shards(shards, "train"), open_shards(shards, "val")
    data = {path.name: sha256_file(path) for path in sorted(shards.glob("*.parquet"))}
    key = fingerprint(params.train.model_dump(), data, code=CODE)
    _warn_of_bounds(len(classes), params)

    checkpoints = Checkpoints(checkpoints_root, key)
    training = begin(params.train, len(classes), device)
    found = checkpoints.newest()
    done = 0
    if found:
        done, state = found
        training.restore(state)
    images = sum(group.rows for group in groups)
    log.info(
        "training %s by cosface (s = %g, m = %g) on %d images of %d identities, on %s",
        params.train.backbone.name,
        params.train.head.scale,
        params.train.head.margin,
        images,
        len(classes),
        device,
    )
    with training_run(params, lineage={"data.shards": fingerprint(data)}, resume_id=training.run_id) as tracked:
        training.run_id = tracked.id

        def on_row(row: Row, images_per_second: float) -> None:
            values = {"loss": row.loss, "accuracy": row.accuracy, "learning_rate": row.learning_rate}
            if row.val_accuracy is not None:
                values["val_accuracy"] = row.val_accuracy
            tracked.log_metrics(
                {f"train/{name}": value for name, value in values.items()}
                | {"train/images_per_second": images_per_second},
                step=row.iteration,
            )

        train(params.train, groups, val_groups, training, done, device, checkpoints, on_row)
        _write(models, training, params, data, images, len(classes))
        tracked.set_tag("model.sha256", model_digest(models))
        tracked.log_model(models)
    checkpoints.clear()
    last = training.history[-1]
    log.info("trained: loss %.3f, accuracy %.3f; validation accuracy %s", last.loss, last.accuracy, last.val_accuracy)


def _write(models: Path, training: Training, params: Params, data: dict[str, str], images: int, classes: int) -> None:
    last = training.history[-1]
    description = {
        "backbone": params.train.backbone.model_dump(),
        "head": params.train.head.model_dump() | {"classes": classes},
        "input": input_contract(params.train.backbone.width),
        "params": {name: getattr(params, name).model_dump(mode="json") for name in ("align", "shard", "train")},
        "data": data,
    }
    save_model(models, training.model, training.head, description)
    with atomic(models / "history.csv") as path:
        path.write_text(history_csv(training.history))
    metrics = {
        "iterations": last.iteration,
        "loss": round(last.loss, 6),
        "accuracy": round(last.accuracy, 6),
        "val_accuracy": None if last.val_accuracy is None else round(last.val_accuracy, 6),
        "images": images,
        "identities": classes,
    }
    with atomic(models / "train.json") as path:
        path.write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")


def _warn_of_bounds(classes: int, params: Params) -> None:
    """The paper's bounds on scale and margin (CosFace, section 3.4)."""
    least = scale_lower_bound(classes, 0.9)
    if params.train.head.scale < least:
        log.warning(
            "train.head.scale = %g is below %.1f, the least at which %d classes can be told apart with "
            "probability 0.9 (CosFace, Eq. 6)",
            params.train.head.scale,
            least,
            classes,
        )
