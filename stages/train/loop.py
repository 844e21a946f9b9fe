"""The training loop: a function from (parameters, shards) to a model, which can stop and go on anywhere."""

import csv
import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.params import Train
from pipeline.progress import bar
from stages.train.checkpoint import Checkpoints
from stages.train.heads import CosFace
from stages.train.loader import Loader
from stages.train.model import FaceModel, build_model
from stages.train.schedule import learning_rate

log = logging.getLogger(__name__)


class TrainingError(InputError):
    """Training cannot go on; the message says at which iteration, and what to try."""


@dataclass(frozen=True)
class Row:
    """A row of history.csv: means over the iterations since the row before."""

    iteration: int
    loss: float
    accuracy: float
    """Un-margined: share of examples nearest to their own class centre."""
    learning_rate: float
    val_accuracy: float | None
    """Where validation is by image: share of its images nearest to their own class centre. At checkpoints and at the
    end; null in between."""
    val_auc: float | None
    """Where validation is by identity: area under the ROC of its verification pairs, likewise."""


@dataclass(frozen=True)
class Speed:
    """Of the iterations since the row before."""

    images_per_second: float
    data_wait: float
    """Share of the time in which training waited for a batch."""


class Validation(Protocol):
    """Measures a model on what training does not see; see validation.py."""

    def __call__(self, training: "Training", device: torch.device) -> dict[str, float]:
        """Fields of Row by name; empty where there is nothing to measure on."""
        ...


@dataclass
class Training:
    """All that changes while training, and so all that a checkpoint holds."""

    model: FaceModel
    head: CosFace
    optimizer: torch.optim.SGD
    history: list[Row] = field(default_factory=list)
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    """Of loss, correct examples and examples since the last row."""
    run_id: str | None = None
    """Of the MLflow run, so that a resumed training goes on in the same one."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(row) for row in self.history],
            "sums": self.sums,
            "run_id": self.run_id,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Row(**row) for row in state["history"]]
        self.sums = state["sums"].to(self.sums.device)
        self.run_id = state["run_id"]
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def begin(params: Train, classes: int, device: torch.device) -> Training:
    """A training at iteration 0; its weights follow from `params.seed`."""
    torch.manual_seed(params.seed)
    model = build_model(params.backbone).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = CosFace(classes, params.backbone.embedding, params.head.scale, params.head.margin).to(device)
    sgd = params.optimizer
    optimizer = torch.optim.SGD(
        [*model.parameters(), *head.parameters()],
        lr=sgd.learning_rate,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
    )
    return Training(model, head, optimizer, sums=torch.zeros(3, dtype=torch.float64, device=device))


def train(
    params: Train,
    loader: Loader,
    validation: Validation,
    training: Training,
    done: int,
    device: torch.device,
    checkpoints: Checkpoints,
    on_row: Callable[[Row, Speed], None],
) -> None:
    """Train from iteration `done` to the end of the schedule.

    Args:
        params: section train of params.yaml.
        loader: of the training split, at iteration `done`.
        validation: what to measure at checkpoints.
        training: fresh, or restored from a checkpoint.
        done: iterations it has behind it.
        device: where it lies.
        checkpoints: where to save every `params.checkpoint_every` iterations.
        on_row: called with each new row and the speed since the last one.

    Raises:
        TrainingError: the loss is no longer finite.
    """
    total = params.schedule.iterations
    batches = iter(loader)
    training.model.train()
    started, since, waited = time.perf_counter(), done, loader.waited
    with bar(total=total, initial=done, label="training", unit="iterations") as shown:
        for iteration in range(done, total):
            batch = next(batches)
            step(training, params, iteration, batch.images, batch.labels)
            finished = iteration + 1
            saving = finished % params.checkpoint_every == 0 or finished == total
            if saving or finished % params.log_every == 0:
                seconds = time.perf_counter() - started
                measured = validation(training, device) if saving else {}
                row = close_row(training, params, finished, measured)
                on_row(row, Speed((finished - since) * params.batch / seconds, (loader.waited - waited) / seconds))
                shown.set_postfix(loss=f"{row.loss:.3f}", accuracy=f"{row.accuracy:.3f}", refresh=False)
                started, since, waited = time.perf_counter(), finished, loader.waited
            if saving:
                checkpoints.save(finished, training.state())
            shown.update()


def step(training: Training, params: Train, iteration: int, images: Tensor, labels: Tensor) -> None:
    """One iteration: forward, backward, update. Nothing in it waits for a GPU."""
    rate = learning_rate(params.optimizer.learning_rate, params.schedule, iteration)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(images.device.type, torch.bfloat16, enabled=params.precision == "bf16"):
        features = training.model(images)
    loss, predicted = training.head(features, labels)
    training.optimizer.zero_grad()
    loss.backward()
    if params.optimizer.clip_norm is not None:
        parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, params.optimizer.clip_norm)
    training.optimizer.step()
    count = torch.tensor(len(labels), dtype=torch.float64, device=loss.device)
    training.sums += torch.stack([loss.detach().double() * count, (predicted == labels).sum().double(), count])


def close_row(training: Training, params: Train, finished: int, measured: dict[str, float]) -> Row:
    """Turn the sums since the last row, and what validation has measured, into a row of the history.

    Raises:
        TrainingError: the loss is not finite.
    """
    loss, correct, count = training.sums.tolist()
    training.sums.zero_()
    rate = learning_rate(params.optimizer.learning_rate, params.schedule, finished - 1)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss / count} at iteration {finished}, learning rate {rate:g}: lower "
            "train.optimizer.learning_rate, lengthen train.schedule.warmup, or set train.optimizer.clip_norm"
        )
    row = Row(finished, loss / count, correct / count, rate, measured.get("val_accuracy"), measured.get("val_auc"))
    training.history.append(row)
    return row


def history_csv(history: list[Row]) -> str:
    """The history as CSV; a column a field of Row, empty where None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, Row.__dataclass_fields__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()} for row in history
    )
    return text.getvalue()
