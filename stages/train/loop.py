"""The training loop: a function from (parameters, shards) to a model, which can stop and go on anywhere.

Several processes run it side by side, each on its share of every batch: see ranks.py.
"""

import copy
import csv
import io
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.params import Machine, Train
from pipeline.progress import bar
from stages.train.checkpoint import Checkpoint, Checkpoints
from stages.train.heads import Head, build_head
from stages.train.loader import Loader
from stages.train.meter import Meter, Speed
from stages.train.model import FaceModel, build_model
from stages.train.ranks import ALONE, Ranks, agreed, gathered, made_alike, sum_together, summed
from stages.train.schedule import learning_rate

log = logging.getLogger(__name__)


class TrainingError(InputError):
    """Training cannot go on; the message says at which iteration, and what to try."""


class Interrupted(SystemExit):
    """Training was asked to end (SIGTERM, SIGINT) and has left a checkpoint."""


@dataclass(frozen=True)
class Row:
    """A row of history.csv: means over the iterations since the row before.

    Where `train.sample_rate` is below 1, the loss and what is said of training examples are of the centres that were
    sampled, among which it is easier to be the nearest: to be compared at one rate alone. Validation is of all.
    """

    iteration: int
    loss: float
    accuracy: float
    """Un-margined: share of examples nearest to their own class centre."""
    own_cosine: float
    """To the own class centre, un-margined."""
    nearest_cosine: float
    """To the nearest of the other centres."""
    beyond_margin: float
    """Share of examples that are right even with the margin."""
    gradient_norm: float
    """Before it is clipped."""
    learning_rate: float
    val_accuracy: float | None
    """Where validation is by image: share of its images nearest to their own class centre. At checkpoints and at the
    end; null in between."""
    val_auc: float | None
    """Where validation is by identity: area under the ROC of its verification pairs, likewise."""
    loss_scale: float | None
    """In fp16: by what the loss is multiplied, so that small gradients are not lost."""
    skipped: float | None
    """In fp16: share of iterations that moved no weights, for a gradient too large for that scale, which then is
    halved."""


class Validation(Protocol):
    """Measures a model on what training does not see; see validation.py."""

    def __call__(self, training: "Training", device: torch.device) -> dict[str, float]:
        """Fields of Row by name; empty where there is nothing to measure on."""
        ...


@dataclass
class Training:
    """All that changes while training, and so all that a checkpoint holds."""

    model: FaceModel
    head: Head
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    sums: Tensor
    """Of the examples since the last row: _SUMS."""
    broken: Tensor
    """(2,) the first iteration, counted from 1, whose loss or gradient was not finite, or its gradient 0 but not its
    loss; and its gradient norm."""
    mean: FaceModel | None = None
    """The running mean of the model's weights, where there is one."""
    mean_centres: nn.Parameter | None = None
    """And of this rank's centres."""
    ranks: Ranks = ALONE
    history: list[Row] = field(default_factory=list)
    run_id: str | None = None
    """Of the MLflow run, so that a resumed training goes on in the same one."""

    @property
    def outcome(self) -> FaceModel:
        """What is judged, and what becomes of the training."""
        return self.mean or self.model

    @cached_property
    def followed(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """What of the mean follows what of the model: weights and running statistics; and how many batches those have
        seen, in which both are the same."""
        assert self.mean
        means, values = (list(model.state_dict().values()) for model in (self.mean, self.model))
        pairs = list(zip(means, values, strict=True))
        kinds = [[pair for pair in pairs if pair[1].is_floating_point() == number] for number in (True, False)]
        return [([mean for mean, _ in kind], [value for _, value in kind]) for kind in kinds]

    def settle(self) -> None:
        """In the end: the mean of the centres, where there is one, takes their place."""
        if self.mean_centres is not None:
            self.head.weight.data.copy_(self.mean_centres)

    @property
    def momentum(self) -> dict[str, Tensor]:
        """What the optimizer remembers of the centres."""
        return self.optimizer.state[self.head.weight]

    def common(self) -> dict[str, Any]:
        """For a checkpoint: what all ranks have alike."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {key: value for key, value in optimizer["state"].items() if key != self._last}
        return {
            "model": self.model.state_dict(),
            "mean": self.mean and self.mean.state_dict(),
            "head": {name: value for name, value in self.head.state_dict().items() if name != "weight"},
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "history": [asdict(row) for row in self.history],
            "sums": self.sums,
            "run_id": self.run_id,
        }

    def own(self) -> dict[str, Any]:
        """For a checkpoint: this rank's centres and random states."""
        return {
            "weight": self.head.weight.detach(),
            "mean": None if self.mean_centres is None else self.mean_centres.detach(),
            "momentum": dict(self.momentum),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if self.sums.is_cuda else None,
        }

    def restore(self, saved: Checkpoint) -> None:
        """From a checkpoint, by whatever number of ranks."""
        common, mine = saved.common, self.ranks.share(self.head.classes)
        self.model.load_state_dict(common["model"])
        if self.mean:
            self.mean.load_state_dict(common["mean"])
        weight = _rows([own["weight"] for own in saved.own], mine).to(self.sums.device)
        if self.mean_centres is not None:
            self.mean_centres.data.copy_(_rows([own["mean"] for own in saved.own], mine))
        self.head.load_state_dict(common["head"] | {"weight": weight})
        names = saved.own[0]["momentum"]
        momentum = {name: _rows([own["momentum"][name] for own in saved.own], mine) for name in names}
        optimizer = common["optimizer"]
        self.optimizer.load_state_dict(optimizer | {"state": optimizer["state"] | {self._last: momentum}})
        self.scaler.load_state_dict(common["scaler"])
        self.history = [Row(**row) for row in common["history"]]
        self.sums = common["sums"].to(self.sums.device)
        self.run_id = common["run_id"]
        if self.ranks.rank < len(saved.own):
            own = saved.own[self.ranks.rank]
            torch.set_rng_state(own["rng"])
            if own["cuda_rng"] is not None and self.sums.is_cuda:
                torch.cuda.set_rng_state(own["cuda_rng"])

    @property
    def _last(self) -> int:
        """The optimizer's number of the centres: they come after the model's parameters."""
        return len(self.optimizer.param_groups[0]["params"]) - 1

    @contextmanager
    def judging(self) -> Iterator[FaceModel]:
        """In evaluation mode for a while; gives what is to be judged, to whose centres the head's are set."""
        weight, cudnn = self.head.weight, torch.backends.cudnn
        tries, rounded = cudnn.benchmark, cudnn.allow_tf32
        cudnn.benchmark = cudnn.allow_tf32 = False  # what is judged is in whole precision: see begin
        self.model.eval()
        self.head.eval()
        if self.mean_centres is not None:
            self.head.weight = self.mean_centres
        yield self.outcome
        cudnn.benchmark, cudnn.allow_tf32 = tries, rounded
        self.head.weight = weight
        self.model.train()
        self.head.train()


_SUMS = ("loss", "accuracy", "own_cosine", "nearest_cosine", "beyond_margin", "examples", "gradient_norm", "steps")
"""The last counts steps whose gradient was finite, the only ones whose norm is in the sum."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def begin(params: Train, classes: int, device: torch.device, ranks: Ranks = ALONE) -> Training:
    """A training at iteration 0; its weights follow from `params.seed`, whatever the number of ranks.

    Raises:
        InputError: there are more ranks than the identities allow, or the network has no dropout to set.
    """
    torch.manual_seed(params.seed)
    # cuDNN's convolutions would use TF32 unasked.
    torch.backends.cudnn.allow_tf32 = params.precision == "tf32"
    # Shapes stay: tried once, the fastest algorithm of each serves on. In whole precision that takes minutes.
    torch.backends.cudnn.benchmark = params.precision in _AUTOCAST
    model = build_model(params.backbone).to(device, memory_format=torch.channels_last)  # pyrefly: ignore[no-matching-overload]
    model.recompute = params.recompute
    if params.dropout is not None:
        _set_dropout(model, params.backbone.name, params.dropout)
    head = build_head(params.head, classes, params.backbone.embedding, ranks)
    if ranks.size > 1:
        made_alike(model, ranks)
        torch.manual_seed(_seed(params.seed, ranks.rank))  # or dropout would be the same on all
    head.to(device)
    mean = copy.deepcopy(model).eval() if params.average else None
    mean_centres = nn.Parameter(head.weight.detach().clone(), requires_grad=False) if params.average else None
    if params.compile:
        # The gradients of a batch in parts are summed, so those of a part must outlast the next one
        model.compile_training(replayed=device.type == "cuda" and params.micro_batches == 1)
    sgd = params.optimizer
    optimizer = torch.optim.SGD(
        [*model.parameters(), head.weight],
        lr=sgd.learning_rate,
        momentum=sgd.momentum,
        weight_decay=sgd.weight_decay,
        fused=True,
    )
    if sgd.momentum:
        # Fused SGD allocates what it is to fill in its first step, and leaves it unfilled where fp16 skips that step.
        for parameter in optimizer.param_groups[0]["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=params.precision == "fp16")
    sums, broken = (torch.zeros(size, dtype=torch.float64, device=device) for size in (len(_SUMS), 2))
    return Training(model.train(), head.train(), optimizer, scaler, sums, broken, mean, mean_centres, ranks)


def _set_dropout(model: FaceModel, name: str, share: float) -> None:
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if not layers:
        raise InputError(f"train.dropout: {share:g}, but {name} has no dropout; IR networks have: set it to null")
    for layer in layers:
        layer.p = share


def _seed(*of: int) -> int:
    return int(np.random.SeedSequence(of).generate_state(1, np.uint64)[0] >> 1)


def _rows(parts: list[Tensor], wanted: range) -> Tensor:
    """Some rows of what lies in several parts, one below the other."""
    pieces, start = [], 0
    for part in parts:
        pieces.append(part[max(wanted.start - start, 0) : max(wanted.stop - start, 0)])
        start += len(part)
    return torch.cat(pieces)


def train(
    params: Train,
    machine: Machine,
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
        machine: section machine.
        loader: of the training split, at iteration `done`.
        validation: what to measure every `params.checkpoint_every` iterations.
        training: fresh, or restored from a checkpoint.
        done: iterations it has behind it.
        device: where it lies.
        checkpoints: where to save, then, every so many minutes, and when asked to end.
        on_row: called with each new row and the speed since the last one.

    Raises:
        TrainingError: the loss or the gradient is no longer finite, or there is none.
        InputError: torch.compile fails, as it does without a compiler.
        Interrupted: by SIGTERM or SIGINT; a checkpoint is there.
    """
    total = params.schedule.iterations
    meter = Meter(params, loader, device, done, training.ranks.size)
    saved = time.monotonic()
    with (
        closing(iter(loader)) as batches,
        asked_to_end(patient=training.ranks.size > 1) as asked,
        bar(total=total, initial=done, label="training", unit="iterations", shown=training.ranks.first) as shown,
    ):
        for iteration in range(done, total):
            batch = next(batches)
            with _compiling(params):
                step(training, params, iteration, batch.images, batch.labels)
            finished = iteration + 1
            validating = finished % params.checkpoint_every == 0 or finished == total
            due_row = validating or finished % params.log_every == 0
            if due_row:
                speed = meter.read(finished)
                row = close_row(training, params, finished, validation(training, device) if validating else {})
                on_row(row, speed)
                shown.set_postfix(
                    loss=f"{row.loss:.3f}",
                    accuracy=f"{row.accuracy:.3f}",
                    speed=f"{speed.images_per_second:.0f} images/s",
                    waiting=f"{speed.data_wait:.0%}",
                    refresh=False,
                )
            shown.update()
            waited = time.monotonic() - saved > 60 * machine.checkpoint_minutes
            end, due = agreed(training.ranks, asked(), int(waited))
            if saving := validating or bool(end or due):
                _check(training, params, finished)
                checkpoints.save(finished, training.common(), training.own())
                saved = time.monotonic()
            if due_row or saving:
                meter.reset(finished)  # what validation and checkpoints take is none of the training's speed
            if end and finished < total:
                if training.ranks.first:
                    log.warning(
                        "%s: ended after iteration %d of %d, with a checkpoint from which the same command goes on",
                        signal.Signals(end).name,
                        finished,
                        total,
                    )
                raise Interrupted(128 + end)


@contextmanager
def _compiling(params: Train) -> Iterator[None]:
    """Where torch.compile has to make code, the first time."""
    if not params.compile:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"train.compile: torch.compile has failed ({why}); it needs a C++ compiler and Python's headers: install "
            "g++ and python3-dev, or set it to false"
        ) from error


def step(training: Training, params: Train, iteration: int, images: Tensor, labels: Tensor) -> None:
    """One iteration: forward, backward, update. Nothing in it waits for a GPU, unless centres are sampled.

    Args:
        images: this rank's share of the batch, n×3×112×width uint8.
        labels: n int64.
    """
    rate = learning_rate(params.optimizer.learning_rate, params.schedule, iteration)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad()
    with _sampled(training, params, iteration, labels):
        _learn(training, params, iteration, images, labels)
    _average(training, params, iteration)


def _learn(training: Training, params: Train, iteration: int, images: Tensor, labels: Tensor) -> None:
    parts = params.micro_batches
    losses, examples = [], 0
    for some, own in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with torch.autocast(images.device.type, _AUTOCAST.get(params.precision), params.precision in _AUTOCAST):
            features = training.model(some)
        judged = training.head(features, own)
        training.scaler.scale(judged.loss / parts).backward()
        losses.append(judged.loss.detach())
        examples += len(judged.own)
        told = [judged.correct, judged.own, judged.nearest, judged.beyond, torch.ones_like(judged.own)]
        training.sums[1:6] += torch.stack([values.double().sum() for values in told])
    training.head.advance()
    _exchange(training)
    training.scaler.unscale_(training.optimizer)
    norm = _clip(training, params.optimizer.clip_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    loss = torch.stack(losses).double().mean()
    finite, still = norm.isfinite(), (norm == 0) & (loss > torch.finfo(torch.float32).eps)
    training.sums[0] += loss * examples
    training.sums[6:] += torch.stack([torch.where(finite, norm, 0), finite]).double()
    # A scaled gradient may be too large for fp16 now and then: such a step is left out, and the scale lowered.
    bad = ~loss.isfinite() | still if training.scaler.is_enabled() else ~(loss.isfinite() & finite) | still
    first = bad & (training.broken[0] == 0)
    training.broken = torch.where(
        first, torch.stack([torch.full_like(norm, iteration + 1), norm]).double(), training.broken
    )


@torch.no_grad()
def _exchange(training: Training) -> None:
    """Give each rank the sum of the backbone's gradients over ranks, and the mean of its running statistics.

    At once, not in buckets while gradients are computed, as DistributedDataParallel has it: that cuts its buckets anew
    after the first iteration, so that a resumed training would be rounded otherwise; and compiled code has all
    gradients at the same moment anyway.
    """
    ranks = training.ranks
    if ranks.size == 1:
        return
    gradients = [parameter.grad for parameter in training.model.parameters() if parameter.grad is not None]
    statistics = [buffer for buffer in training.model.buffers() if buffer.is_floating_point()]
    for each in statistics:
        each.div_(ranks.size)
    # Where a gradient of centres is not finite, on whichever rank, fp16 must leave the step out on all
    assert training.head.weight.grad is not None
    gradients[0].add_(0 * training.head.weight.grad.norm())
    sum_together([*gradients, *statistics])


@torch.no_grad()
def _average(training: Training, params: Train, iteration: int) -> None:
    """Let the mean follow weights, centres and running statistics (Polyak and Juditsky, SIAM J. Control Optim. 1992,
    with weights that fall by `params.average` an iteration): a plain mean at first, until that reaches further back.
    """
    if training.mean is None or training.mean_centres is None or params.average is None:
        return
    share = max(1 - params.average, 1 / (iteration + 1))
    numbers, counts = training.followed
    torch._foreach_lerp_(*numbers, share)
    if counts[0]:  # none without batch normalisation
        torch._foreach_copy_(*counts)
    training.mean_centres.lerp_(training.head.weight, share)


@contextmanager
def _sampled(training: Training, params: Train, iteration: int, labels: Tensor) -> Iterator[None]:
    """With a part of the centres in place of all: `train.sample_rate`.

    The others are left as they are, and so is what momentum remembers of them (An et al., CVPR 2022, Algorithm 1).
    Which ones follows from seed, iteration and rank.
    """
    if params.sample_rate == 1:
        yield
        return
    head, optimizer = training.head, training.optimizer
    everyone = labels if training.ranks.size == 1 else gathered(labels)
    generator = torch.Generator(labels.device)
    generator.manual_seed(_seed(params.seed, iteration, training.ranks.rank))
    whole, memory = head.weight, training.momentum
    head.rows = head.choose(everyone, params.sample_rate, generator)
    head.weight = nn.Parameter(whole.detach()[head.rows])
    optimizer.param_groups[0]["params"][-1] = head.weight
    optimizer.state[head.weight] = {name: value[head.rows] for name, value in memory.items()}
    try:
        yield
    finally:
        part = optimizer.state.pop(head.weight)
        whole.data[head.rows] = head.weight.detach()
        for name, value in memory.items():
            value[head.rows] = part[name]
        optimizer.param_groups[0]["params"][-1] = whole
        head.weight, head.rows = whole, None


def _clip(training: Training, largest: float | None) -> Tensor:
    """The norm of all gradients together, which are shortened to `largest` where that is longer."""
    parameters = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    if training.ranks.size == 1:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    else:
        of_model = nn.utils.get_total_norm([p.grad for p in parameters[:-1] if p.grad is not None])
        assert parameters[-1].grad is not None
        norm = (of_model.square() + summed(parameters[-1].grad.norm().square())).sqrt()
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def close_row(training: Training, params: Train, finished: int, measured: dict[str, float]) -> Row:
    """Turn the sums since the last row, and what validation has measured, into a row of the history.

    Raises:
        TrainingError: a loss or a gradient was not finite, or there was none; of fp16, in whatever scale.
    """
    _check(training, params, finished)
    scaler = training.scaler
    sums = dict(zip(_SUMS, training.sums.tolist(), strict=True))
    training.sums.zero_()
    examples, steps = sums.pop("examples"), sums.pop("steps")
    norm = sums.pop("gradient_norm") / max(steps, 1)
    rate = learning_rate(params.optimizer.learning_rate, params.schedule, finished - 1)
    row = Row(
        iteration=finished,
        gradient_norm=norm,
        learning_rate=rate,
        val_accuracy=measured.get("val_accuracy"),
        val_auc=measured.get("val_auc"),
        loss_scale=scaler.get_scale() if scaler.is_enabled() else None,
        skipped=1 - steps * params.batch / examples if scaler.is_enabled() else None,
        **{name: value / examples for name, value in sums.items()},
    )
    training.history.append(row)
    if training.ranks.first:
        _report_standstill(training.history, params)
    return row


_CALMER = (
    "lower train.optimizer.learning_rate, lengthen train.schedule.warmup, or set train.optimizer.clip_norm; with other "
    "parameters training begins anew"
)


def _check(training: Training, params: Train, finished: int) -> None:
    iteration, norm = training.broken.tolist()
    if iteration:
        rate = learning_rate(params.optimizer.learning_rate, params.schedule, int(iteration) - 1)
        what = "loss or gradient is not finite" if norm else "no gradient is left (embeddings too long for fp32?)"
        raise TrainingError(
            f"{what} at iteration {iteration:.0f}: learning rate {rate:g}, gradient norm {norm:g}; {_CALMER}"
        )
    # Halved at each step that is left out, doubled after 2,000 that are not: from 65,536 it takes 17 in succession
    if training.scaler.is_enabled() and (scale := training.scaler.get_scale()) < 1:
        raise TrainingError(
            f"train.precision: fp16 has left out step after step until iteration {finished}, since gradients are not "
            f"finite in whatever scale, now {scale:g}: set it to bf16 or fp32, {_CALMER}"
        )


def _report_standstill(history: list[Row], params: Train) -> None:
    """Say that nothing was learnt: soon after the warm-up, and each time that twice as many have passed since then."""
    soon = min(1000, max(10, params.schedule.iterations // 10))

    def looks(iteration: int) -> int:
        return (max(0, iteration - params.schedule.warmup) // soon).bit_length()

    if len(history) < 2:
        return
    first, last = history[0], history[-1]
    due = looks(last.iteration) > looks(history[-2].iteration)
    if due and last.loss > 0.9 * first.loss and last.own_cosine < first.own_cosine + 0.05:
        log.warning(
            "the loss has not left its start: %.3f at iteration %d, %.3f at %d, where the cosine to the own class is "
            "%.3f. Lower train.head.margin or train.optimizer.learning_rate, lengthen train.schedule.warmup, and look "
            "at the faces and their labels",
            first.loss,
            first.iteration,
            last.loss,
            last.iteration,
            last.own_cosine,
        )


@contextmanager
def asked_to_end(*, patient: bool) -> Iterator[Callable[[], int]]:
    """What to ask whether SIGTERM or SIGINT has come, and which (0: none).

    A second one ends the process at once, unless it is `patient`: torchrun passes on what the terminal has sent
    already, and kills by itself what does not end.
    """
    received = [0]
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, _: Any) -> None:
        received[0] = number
        if patient:
            return
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: received[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def history_csv(history: list[Row]) -> str:
    """The history as CSV; a column a field of Row, empty where None."""
    text = io.StringIO()
    writer = csv.DictWriter(text, Row.__dataclass_fields__, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()} for row in history
    )
    return text.getvalue()
