"""The train stage as a function of its folders and parameters."""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.executor import choose_device, enough_gpu_memory, keep_memory
from pipeline.params import CosFace, Params, Train, flatten, shown
from pipeline.tables import atomic, fingerprint, locked
from pipeline.tracking import DATA_TAG, NoRun, model_digest, training_run
from stages.shard.reader import Shards
from stages.train.checkpoint import Checkpoints, Other
from stages.train.heads import margin_upper_bound, scale_lower_bound
from stages.train.loader import Loader, loader_processes
from stages.train.loop import Row, Training, begin, history_csv, train
from stages.train.meter import Speed
from stages.train.model import input_contract, save_model
from stages.train.ranks import Ranks, collected, take_gpu, together
from stages.train.sheet import write_sheet
from stages.train.validation import ByIdentity, ByImage

log = logging.getLogger(__name__)

_FEW = 16
"""Images over which batch normalisation's statistics are poor (Wu and He, Group Normalization, ECCV 2018, Figure 1)."""
_CONVERGED = 0.45
"""The largest margin with which the paper's trainings converged."""
_HERE = Path(__file__).parent
_ASIDE = {"__init__", "__main__", "checkpoint", "export", "launch", "meter", "sheet", "validation"}
"""Modules of this folder that do not decide the weights."""
CODE = (
    *(path for path in sorted(_HERE.glob("*.py")) if path.stem not in _ASIDE),
    _HERE.parent / "shard" / "reader.py",
)
"""What does: trained by other code, a checkpoint is of no use."""
_LAST = "learning_rate"
"""What is recorded last of a row: where it is, all of the row is."""
_NEITHER = {"data", "log_every", "checkpoint_every", "recompute"}
"""Keys of section train that do not: where the data lies, how often something is written down, and how memory is saved,
which is the same to the bit."""


def run(models: Path, checkpoints_root: Path, params: Params) -> None:
    """Train on the shards of `train.data` and leave the model, its metrics and its history in `models`.

    By this process alone, or, where torchrun has started it, together with the others: then `models` and the
    checkpoints must be folders that all of them see.

    An interrupted training goes on from its last checkpoint and ends, on a CPU, in the same bits as one that was never
    interrupted; one that has ended is not repeated, but its outcome written again. The last checkpoint stays until a
    training by other parameters, data or code has ended, which deletes what others have left. Parameters that do not
    decide the weights may change: rows of the history stay as they were written.

    Writes backbone.safetensors, head.safetensors, model.json, train.json, history.csv, and faces.png: faces as the
    network sees them.

    Args:
        models: folder of the model.
        checkpoints_root: folder for checkpoints, of one training at a time: another one that runs is waited for.
        params: all of params.yaml: section train decides, the others are recorded.

    Raises:
        TableError: shards are absent, incomplete, or fewer than a batch.
        InputError: several processes cannot share a batch or the identities, do not share a folder, the GPU's memory is
            too small, or no checkpoint of this training can be used.
        TrainingError: the loss or the gradient is no longer finite.
        Interrupted: asked to end; a checkpoint is there.
        OSError: the system refuses, for want of space for one; earlier checkpoints are there.
    """
    keep_memory()
    take_gpu(params.machine)
    with together(choose_device(params.machine.device)) as (ranks, device):
        if not ranks.first:
            logging.getLogger().setLevel(logging.ERROR)  # the first speaks for all
        alone = locked(checkpoints_root) if ranks.first else nullcontext()
        with alone, enough_gpu_memory(_needs_less(params)):
            _run(models, checkpoints_root, params, ranks, device)


def _needs_less(params: Params) -> str:
    """What to change where the GPU's memory is too small: what keeps checkpoints of use comes first."""
    train, keeping, anew = params.train, [], []
    if params.machine.cache == "device":
        keeping.append("set machine.cache, now device, to host or none")
    if not train.recompute and not train.compile:
        keeping.append("set train.recompute to true")
    if train.compile:
        anew.append("set train.compile to false and train.recompute to true")
    anew += ["raise train.micro_batches", "lower train.batch"]
    return " or ".join([*keeping, f"{', '.join(anew[:-1])} or {anew[-1]}, with which training begins anew"])


def _run(models: Path, checkpoints_root: Path, params: Params, ranks: Ranks, device: torch.device) -> None:
    shards = Shards(params.train.data)
    classes = int(np.count_nonzero(shards.identities()["train"].to_numpy()))
    data = shards.hashes()
    _warn_of_bounds(classes, params)
    _warn_of_emulation(params.train.precision, device)
    _check_parts(params, ranks)

    checkpoints = Checkpoints(checkpoints_root, made_by(params.train, data), params.machine.checkpoints_kept, ranks)
    if ranks.first:
        _tell_of_others(checkpoints.others(), made_by(params.train, data))
    training = begin(params.train, classes, device, ranks)
    done = _go_on(training, checkpoints)
    before = training.run_id
    split, face = shards.split("train"), shards.index.face
    rest = None
    if done < params.train.schedule.iterations:
        loader = Loader(
            split,
            face,
            params.train,
            device,
            cache=params.machine.cache,
            rank=ranks.rank,
            world=ranks.size,
            processes=loader_processes(params.machine, params.train, device, ranks.size),
        )
        loader.load_state_dict({"iteration": done})
        validation = (ByImage if shards.val_pairs() is None else ByIdentity)(shards, params.train)
        rest = partial(train, params.train, params.machine, loader, validation, training, done, device, checkpoints)
        log.info(
            "training %s by %s on %d images of %d identities, on %s%s",
            params.train.backbone.name,
            params.train.head.summary,
            len(split),
            classes,
            device.type,
            f", {ranks.size} processes" if ranks.size > 1 else "",
        )
    else:
        log.warning("trained already; writing what came of it again (delete %s to train again)", checkpoints.folder)
    lineage = {DATA_TAG: fingerprint(data)}
    tracking = training_run(params, lineage=lineage, resume_id=before) if ranks.first else nullcontext(NoRun())
    with tracking as tracked:
        training.run_id = tracked.id

        # Killed, a training leaves out what it had not sent, and has sent what it will do again
        there = tracked.steps(f"train/{_LAST}")

        def on_row(row: Row, speed: Speed | None = None) -> None:
            if row.iteration in there:
                return
            values = asdict(row) | (asdict(speed) if speed else {})
            del values["iteration"]
            values[_LAST] = values.pop(_LAST)
            known = {f"train/{name}": value for name, value in values.items() if value is not None}
            tracked.log_metrics(known, step=row.iteration)

        for row in training.history:
            on_row(row)
        if rest:
            rest(on_row)
        training.settle()
        centres = collected(training.head.weight, ranks)
        if centres is not None:
            training.head.weight = nn.Parameter(centres)
            _write(models, training, params, data, len(split), classes)
            write_sheet(models / "faces.png", split, face, params.train)
            tracked.log_figure(models / "faces.png", "faces.png")
            tracked.log_digest(model_digest(models))
            tracked.log_model(models)
            tracked.end_lost([run_id for other in checkpoints.others() if (run_id := other.run_id)])
    if ranks.first:
        checkpoints.delete_others()
    last = training.history[-1]
    measured = {"validation accuracy": last.val_accuracy, "validation AUC": last.val_auc}
    told = "".join(f", {what} {value:.3f}" for what, value in measured.items() if value is not None)
    log.info("trained: loss %.3f, accuracy %.3f%s", last.loss, last.accuracy, told)


def made_by(params: Train, data: dict[str, str]) -> dict[str, Any]:
    """All that decides the weights, by name."""
    decisive = {name: value for name, value in flatten(params).items() if name not in _NEITHER}
    return {"data": fingerprint(data), "code": fingerprint(code=CODE)} | {f"train.{k}": v for k, v in decisive.items()}


def _go_on(training: Training, checkpoints: Checkpoints) -> int:
    """From the newest checkpoint, if there is one; the iterations that are done."""
    found = checkpoints.newest()
    if not found:
        return 0
    training.restore(found)
    return found.iteration


def _tell_of_others(others: list[Other], made_by: dict[str, Any]) -> None:
    """Which unfinished trainings will be lost, and why this is none of them."""
    for other in others:
        if not other.iteration or other.iteration == other.made_by.get("train.schedule.iterations"):
            continue
        log.warning(
            "%s: a training that was stopped after iteration %d is not what is asked for now: %s. This one begins by "
            "itself, and deletes that folder when it has ended; to go on with the other, stop it and undo the change",
            other.folder,
            other.iteration,
            _differences(other.made_by, made_by),
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    if not before:
        return "it was begun by an earlier version of the code"
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    hashes = {"code": "the code has changed", "data": "the data has changed"}
    return ", ".join(hashes.get(name) or f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)


def _write(models: Path, training: Training, params: Params, data: dict[str, str], images: int, classes: int) -> None:
    last = training.history[-1]
    description = {
        "backbone": params.train.backbone.model_dump(),
        "head": params.train.head.model_dump() | {"classes": classes},
        "input": input_contract(params.train.backbone.width),
        "params": {
            "align": params.align.model_dump(mode="json"),
            "shard": params.shard.model_dump(mode="json"),
            "train": params.train.model_dump(mode="json") | {"data": shown(params.train.data)},
        },
        "data": data,
    }
    save_model(models, training.outcome, training.head, description)
    with atomic(models / "history.csv") as path:
        path.write_text(history_csv(training.history))
    metrics = {
        "iterations": last.iteration,
        "loss": round(last.loss, 6),
        "accuracy": round(last.accuracy, 6),
        "val_accuracy": None if last.val_accuracy is None else round(last.val_accuracy, 6),
        "val_auc": None if last.val_auc is None else round(last.val_auc, 6),
        "images": images,
        "identities": classes,
    }
    with atomic(models / "train.json") as path:
        path.write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")


def _check_parts(params: Params, ranks: Ranks) -> None:
    """That ranks can share a batch, and what batch normalisation sees of it.

    Raises:
        InputError: parts are not equal, or of fewer than two images.
    """
    batch, parts = params.train.batch, params.train.micro_batches
    images, left = divmod(batch, ranks.size * parts)
    if left or images < 2:
        raise InputError(
            f"train.batch: {batch} images cannot be cut into {parts} equal parts (train.micro_batches) for each of "
            f"{ranks.size} processes, two images at least in each"
        )
    if images < _FEW and ranks.size > 1:
        log.warning(
            "each of %d processes computes batch normalisation over %d images at a time, which is few: raise "
            "train.batch, or lower machine.processes or train.micro_batches",
            ranks.size,
            images,
        )


_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}
"""Of x86 processors, by torch's names; either will do."""


def emulated(precision: str, device: torch.device) -> bool:
    """Whether the device has no instructions for a precision, so that it is slower than fp32."""
    names, there = _INSTRUCTIONS.get(precision, ()), torch.cpu.get_capabilities()
    x86 = device.type == "cpu" and there.get("architecture") == "x86_64"
    return x86 and bool(names) and not any(map(there.get, names))


def _warn_of_emulation(precision: str, device: torch.device) -> None:
    if emulated(precision, device):
        log.warning(
            "train.precision: %s, for which this processor (%s) has no instructions (%s): fp32 will be faster here",
            precision,
            torch.cpu.get_capabilities().get("cpu_name"),
            " or ".join(_INSTRUCTIONS[precision]),
        )


def _warn_of_bounds(classes: int, params: Params) -> None:
    """The paper's bounds on scale and margin (CosFace, section 3.4)."""
    head, embedding = params.train.head, params.train.backbone.embedding
    scale = getattr(head, "scale", None)
    if scale is not None and scale < (least := scale_lower_bound(classes, 0.9)):
        log.warning(
            "train.head.scale = %g is below %.1f, the least at which %d classes can be told apart with "
            "probability 0.9 (CosFace, Eq. 6)",
            scale,
            least,
            classes,
        )
    if not isinstance(head, CosFace):
        return
    most = margin_upper_bound(classes, embedding)
    if head.margin > most:
        log.warning(
            "train.head.margin = %g is above %.3f, the most that %d centres in %d dimensions can have between them "
            "(CosFace, section 3.4)",
            head.margin,
            most,
            classes,
            embedding,
        )
    elif classes > embedding + 1 and head.margin > _CONVERGED:
        log.warning(
            "train.head.margin = %g: the bound of %.3f is far out of reach for %d centres in %d dimensions; the "
            "paper's trainings did not converge above %g (CosFace, section 4.2)",
            head.margin,
            most,
            classes,
            embedding,
            _CONVERGED,
        )
