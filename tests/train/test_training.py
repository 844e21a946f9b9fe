import copy
import csv
import dataclasses
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.params import Params, Train
from pipeline.tracking import NoRun
from stages.shard import reader as shard_reader
from stages.train import backbones, checkpoint, loader, loop, meter
from stages.train import run as train
from stages.train.heads import Judgement
from stages.train.loop import Training
from stages.train.validation import ByImage
from tests.conftest import ROOT, on_gpu
from tests.pipeline.test_tables import little_space
from tests.samples import NARROW, mean_colours, shard_section, write_shards
from tests.train.copies import Copies, start


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    validation = {"by": "image", "share": 0.1, "pairs": 0}
    return write_shards(tmp_path_factory.mktemp("train"), [10] * 6, shard_section(validation=validation))


@pytest.fixture
def small(params: Params, shards: Path) -> Params:
    """A short training of the default network."""
    section = params.train.model_dump()
    section |= {"data": str(shards), "batch": 16, "log_every": 3, "checkpoint_every": 4}
    section["backbone"]["embedding"] = 32
    section["schedule"] = {"name": "steps", "iterations": 14, "warmup": 2, "milestones": [10], "factor": 0.1}
    section["optimizer"]["learning_rate"] = 0.05
    return params.model_copy(update={"train": type(params.train).model_validate(section)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def tiny(small: Params, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The same of a narrow network."""
    monkeypatch.setitem(backbones.BACKBONES, "small", NARROW)
    return changed(small, batch=8)


@pytest.fixture
def plain(tiny: Params, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The same of what is hardly a network, where it does not matter."""
    monkeypatch.setitem(backbones.BACKBONES, "small", mean_colours)
    return tiny


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("changes", [{}, {"average": 0.8, "dropout": 0.3}], ids=["plain", "averaged"])
def test_interrupted_anywhere_ends_in_the_same_bits(
    tmp_path: Path, shards: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    tiny = changed(tiny, **changes)
    train.run(tmp_path / "whole", tmp_path / "a", tiny)
    step = loop.step
    for kill_at in (2, 9):

        def dying(training: Training, section: Train, iteration: int, *rest: Tensor, kill_at: int = kill_at) -> None:
            if iteration == kill_at:
                raise Killed
            step(training, section, iteration, *rest)

        monkeypatch.setattr(loop, "step", dying)
        with pytest.raises(Killed):
            train.run(tmp_path / "models", tmp_path / "b", tiny)
        assert not (tmp_path / "models").exists()
    monkeypatch.setattr(loop, "step", step)
    train.run(tmp_path / "models", tmp_path / "b", tiny)
    assert files(tmp_path / "models") == files(tmp_path / "whole")


FOUR = {"name": "steps", "iterations": 4, "warmup": 1, "milestones": [3], "factor": 0.1}


@pytest.fixture
def short(tiny: Params) -> Params:
    """Four iterations, with a checkpoint after two."""
    return changed(tiny, checkpoint_every=2, log_every=2, schedule=FOUR)


@pytest.fixture
def shortest(plain: Params) -> Params:
    """The same of what is hardly a network."""
    return changed(plain, checkpoint_every=2, log_every=2, schedule=FOUR)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Iterations that are trained, in order; put -1 into it, and it is killed in iteration 3."""
    step, iterations = loop.step, list[int]()

    def watched(training: Training, section: Train, iteration: int, *rest: Tensor) -> None:
        if iterations[:1] == [-1] and iteration == 3:
            raise Killed
        iterations.append(iteration)
        step(training, section, iteration, *rest)

    monkeypatch.setattr(loop, "step", watched)
    return iterations


def run_whole_and_killed(folder: Path, params: Params, seen: list[int]) -> None:
    """Train into `whole`; and into `models`, killed in iteration 3, from where it goes on after the second."""
    train.run(folder / "whole", folder / "a", params)
    seen[:] = [-1]
    with pytest.raises(Killed):
        train.run(folder / "models", folder / "b", params)
    seen.clear()
    train.run(folder / "models", folder / "b", params)
    assert seen == [2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 2},
        {"sample_rate": 0.5},
        {"sampling": {"name": "balanced", "identities": 4, "images": 2}},
    ],
    ids=lambda changes: str(next(iter(changes))),
)
def test_interrupted_in_other_ways_of_training(
    tmp_path: Path,
    shards: Path,
    short: Params,
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)  # for the cache
    cached = short.model_copy(update={"machine": short.machine.model_copy(update={"cache": "host"})})
    run_whole_and_killed(tmp_path, changed(cached, **changes), seen)
    assert files(tmp_path / "models") == files(tmp_path / "whole")


def test_a_checkpoint_serves_no_other_parameters_data_or_code(
    tmp_path: Path,
    shards: Path,
    shortest: Params,
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Beside that of a training that was stopped, others begin at the beginning, end as by themselves, and say so; then
    what was stopped is gone.
    """
    code = tmp_path / "code.py"
    code.write_text("before")
    monkeypatch.setattr(train, "CODE", (code,))
    seen.append(-1)
    with pytest.raises(Killed):
        train.run(tmp_path / "models", tmp_path / "state", shortest)
    (tmp_path / "others").mkdir()
    section = shard_section(validation={"by": "image", "share": 0.1, "pairs": 0})
    more = write_shards(tmp_path / "others", [10] * 5 + [11], section)
    slower = changed(shortest, optimizer=shortest.train.optimizer.model_dump() | {"learning_rate": 0.01})
    for name, params, why in (
        ("rate", slower, "train.optimizer.learning_rate was 0.05, is 0.01"),
        ("data", changed(shortest, data=str(more)), "the data has changed"),
        ("code", shortest, "the code has changed"),
    ):
        code.write_text("after" if name == "code" else "before")
        state = tmp_path / f"{name}-state"
        shutil.copytree(tmp_path / "state", state)
        (stopped,) = state.iterdir()
        (state / "kept by hand").mkdir()
        (state / f"{stopped.name}.deleted" / "half").mkdir(parents=True)  # as a kill amidst deleting leaves it
        caplog.clear()
        seen.clear()
        train.run(tmp_path / name, state, params)
        assert seen == [0, 1, 2, 3]
        said = f"{stopped}: a training that was stopped after iteration 2 is not what is asked for now: {why}. This one"
        assert [message for message in caplog.messages if message.startswith(said)], caplog.text
        assert not stopped.exists()
        assert len(list(state.iterdir())) == 2
        train.run(tmp_path / f"{name}-alone", tmp_path / f"{name}-alone-state", params)
        assert files(tmp_path / name) == files(tmp_path / f"{name}-alone")
    seen.clear()
    code.write_text("before")
    train.run(tmp_path / "models", tmp_path / "state", shortest)  # what it does serve
    assert seen == [2, 3]
    assert files(tmp_path / "models") == files(tmp_path / "code")


def test_what_does_not_decide_the_weights_loses_no_checkpoint(
    tmp_path: Path, shards: Path, short: Params, seen: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    short = changed(short, average=0.8)
    seen.append(-1)
    with pytest.raises(Killed):
        train.run(tmp_path / "models", tmp_path / "state", short)
    seen.clear()
    train.run(tmp_path / "models", tmp_path / "state", changed(short, log_every=1, checkpoint_every=3, recompute=True))
    assert seen == [2, 3]
    assert "is not what is asked for" not in caplog.text
    train.run(tmp_path / "whole", tmp_path / "whole-state", short)
    for name in ("backbone.safetensors", "head.safetensors"):
        assert (tmp_path / "models" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Store(NoRun):
    """Has what was sent of each metric; what a killed process had not sent is lost."""

    def __init__(self, sent: dict[str, list[int]]) -> None:
        self._sent = sent
        self.lost: list[str] = []

    @property
    def id(self) -> str:
        return "the run"

    def steps(self, metric: str) -> set[int]:
        return set(self._sent.get(metric, []))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for name in metrics:
            self._sent.setdefault(name, []).append(step)

    def end_lost(self, run_ids: Iterable[str]) -> None:
        self.lost += run_ids


@pytest.mark.parametrize("sent", [[], [1], [1, 2, 3]], ids=["nothing", "some", "more than the checkpoint has"])
def test_after_a_kill_each_row_is_in_mlflow_once(
    tmp_path: Path,
    shards: Path,
    shortest: Params,
    seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
    sent: list[int],
) -> None:
    """Killed in the fourth iteration, after a checkpoint at the second, when so many rows had been sent."""
    rows: dict[str, list[int]] = {}
    monkeypatch.setattr(train, "training_run", lambda *_, **__: nullcontext(Store(rows)))
    params = changed(shortest, log_every=1)
    seen.append(-1)
    with pytest.raises(Killed):
        train.run(tmp_path / "models", tmp_path / "state", params)
    rows.clear()
    rows.update({f"train/{name}": sent[:] for name in ("loss", "learning_rate")})
    seen.clear()
    train.run(tmp_path / "models", tmp_path / "state", params)
    assert (rows["train/loss"], rows["train/learning_rate"]) == ([1, 2, 3, 4], [1, 2, 3, 4])


def test_the_run_of_a_training_that_is_deleted_ends(
    tmp_path: Path, shards: Path, shortest: Params, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it left its run running; another's end deletes its checkpoint, and so nobody will go on with it."""
    store = Store({})
    monkeypatch.setattr(train, "training_run", lambda *_, **__: nullcontext(store))
    seen.append(-1)
    with pytest.raises(Killed):
        train.run(tmp_path / "models", tmp_path / "state", shortest)
    assert store.lost == []
    seen.clear()
    slower = changed(shortest, optimizer=shortest.train.optimizer.model_dump() | {"learning_rate": 0.01})
    train.run(tmp_path / "models", tmp_path / "state", slower)
    assert store.lost == ["the run"]


def test_only_what_decides_the_weights_is_code_that_a_checkpoint_asks_for() -> None:
    names = {path.name for path in train.CODE}
    assert {"run.py", "loop.py", "heads.py", "backbones.py", "loader.py", "augment.py", "reader.py"} <= names
    assert not names & {"sheet.py", "export.py", "meter.py", "launch.py", "page.py", "clean.py"}


def test_a_training_that_has_ended_is_not_repeated(
    tmp_path: Path, shards: Path, shortest: Params, seen: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Its outputs lost, it writes them again; another's end takes its checkpoint away, without a warning."""
    shortest = changed(shortest, average=0.8)
    train.run(tmp_path / "models", tmp_path / "state", shortest)
    (folder,) = (tmp_path / "state").iterdir()
    whole = files(tmp_path / "models")
    shutil.rmtree(tmp_path / "models")
    seen.clear()
    train.run(tmp_path / "models", tmp_path / "state", shortest)
    assert not seen
    assert files(tmp_path / "models") == whole
    assert f"trained already; writing what came of it again (delete {folder} to train again)" in caplog.text
    caplog.clear()
    train.run(tmp_path / "models", tmp_path / "state", changed(shortest, seed=2))
    assert not folder.exists()
    assert "is not what is asked for" not in caplog.text


HOLDER = """
import sys
from pathlib import Path
from pipeline import tables
with tables.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_one_training_at_a_time(
    tmp_path: Path, shards: Path, shortest: Params, seen: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """It waits for another process that trains there."""
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "state")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout
    assert held.stdout.readline() == "held\n"
    training = threading.Thread(target=train.run, args=(tmp_path / "models", tmp_path / "state", shortest))
    training.start()
    while "another process is writing here; waiting" not in caplog.text:
        assert training.is_alive()
        time.sleep(0.01)
    assert not seen
    held.communicate("\n")
    training.join(60)
    assert seen == [0, 1, 2, 3]


def test_what_is_left_behind(tmp_path: Path, shards: Path, plain: Params) -> None:
    train.run(tmp_path / "models", tmp_path / "checkpoints", plain)
    assert set(files(tmp_path / "models")) == {
        "backbone.safetensors",
        "head.safetensors",
        "model.json",
        "train.json",
        "history.csv",
        "faces.png",
    }
    with (tmp_path / "models" / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in history] == [3, 4, 6, 8, 9, 12, 14]
    assert [bool(row["val_accuracy"]) for row in history] == [False, True, False, True, False, True, True]
    assert float(history[-1]["learning_rate"]) == pytest.approx(0.005)
    metrics = json.loads((tmp_path / "models" / "train.json").read_text())
    assert metrics["identities"] == 6
    assert metrics["images"] == 54  # of 60, 10 % of each identity's to validation
    assert metrics["loss"] == pytest.approx(float(history[-1]["loss"]), abs=1e-4)
    description = json.loads((tmp_path / "models" / "model.json").read_text())
    assert description["head"] == {"name": "cosface", "scale": 64.0, "margin": 0.35, "classes": 6}
    assert set(description["data"]) == {path.name for path in shards.glob("*.parquet")}


def test_a_password_in_the_shards_address_does_not_enter_the_model(
    tmp_path: Path, shards: Path, shortest: Params
) -> None:
    address = "memory://me:secret@host/shards"
    fsspec.filesystem("memory").put(str(shards), address, recursive=True)
    train.run(tmp_path / "models", tmp_path / "checkpoints", changed(shortest, data=address))
    description = json.loads((tmp_path / "models" / "model.json").read_text())
    assert description["params"]["train"]["data"] == "memory://host/shards"
    assert not [name for name, content in files(tmp_path / "models").items() if b"secret" in content]


def test_it_learns(tmp_path: Path, shards: Path, tiny: Params) -> None:
    """Six identities that differ by colour: chance is 1/6, and a learner is right at least half the time."""
    schedule = tiny.train.schedule.model_copy(update={"iterations": 40, "milestones": [30]})
    longer = tiny.train.model_copy(update={"schedule": schedule})
    train.run(tmp_path / "models", tmp_path / "checkpoints", tiny.model_copy(update={"train": longer}))
    metrics = json.loads((tmp_path / "models" / "train.json").read_text())
    assert metrics["accuracy"] > 0.5
    assert metrics["val_accuracy"] > 0.5


def write_three(root: Path, kept: int = 2, size: int = 1) -> checkpoint.Checkpoints:
    saved = checkpoint.Checkpoints(root, {"seed": 1}, kept)
    for iteration in (1, 2, 3):
        saved.save(iteration, {"value": torch.full((size,), iteration)}, {"mine": torch.full((size,), -iteration)})
    return saved


@pytest.mark.parametrize("which", ["iteration-00000003.pt", "iteration-00000003.rank-00-of-01.pt"])
def test_a_damaged_newest_checkpoint_falls_back_and_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, which: str
) -> None:
    saved = write_three(tmp_path, size=100_000)
    assert sorted(path.name for path in saved.folder.iterdir()) == [
        *(f"iteration-0000000{i}{part}.pt" for i in (2, 3) for part in ("", ".rank-00-of-01")),
        "made_by.json",
    ]
    newest = saved.folder / which
    whole = newest.read_bytes()
    hole = whole[:200_000] + bytes(4096) + whole[204_096:]  # within a tensor, which torch itself does not notice
    assert len(torch.load(newest, weights_only=True)) == 2 - ("rank" in which)
    for damage in (hole, whole[:100], b"", b"\x80\x04garbage" * 20, None):
        for path in saved.folder.glob("*.damaged"):
            path.rename(path.with_suffix(""))
        newest.unlink()
        if damage is not None:
            newest.write_bytes(damage)
        caplog.clear()
        found = saved.newest()
        assert found is not None
        assert (found.iteration, found.common["value"][0].item(), found.own[0]["mine"][0].item()) == (2, 2, -2)
        if damage is not None:
            assert f"{which}: damaged, not what was written; trying the one before" in caplog.text
            assert (saved.folder / f"{which}.damaged").read_bytes() == damage
        elif "rank" in which:
            assert f"{which}: missing; trying the one before" in caplog.text
    saved.save(4, {}, {})
    if "rank" not in which:
        return
    assert (saved.folder / "iteration-00000003.pt.damaged").exists()
    assert checkpoint.Checkpoints(tmp_path, {"seed": 2}, 2).newest() is None


def test_where_none_can_be_used_nothing_begins_and_nothing_is_deleted(tmp_path: Path) -> None:
    saved = write_three(tmp_path)
    for path in saved.folder.glob("*.pt"):
        path.write_bytes(b"damaged")
    before = files(saved.folder)
    with pytest.raises(InputError, match=rf"{saved.folder}: none of its checkpoints can be used; .*00003\.pt: damaged"):
        saved.newest()
    assert files(saved.folder) == before


def test_what_the_system_refuses_is_no_damage(tmp_path: Path) -> None:
    """Short of memory, a checkpoint cannot be mapped; what is there stays as it is."""
    saved = checkpoint.Checkpoints(tmp_path, {"seed": 1}, 2)
    saved.save(1, {"values": torch.zeros(8 << 20)}, {})
    before = sorted(saved.folder.iterdir())
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    here = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (here + (16 << 20), unlimited[1]))
    try:
        with pytest.raises(InputError, match=r"00001\.pt: is not damaged, but cannot .* deleted \(.*annot allocate"):
            saved.newest()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert sorted(saved.folder.iterdir()) == before


@pytest.mark.parametrize("whole", [False, True])
def test_a_full_disk_is_told_with_the_path_and_costs_no_checkpoint(tmp_path: Path, whole: bool) -> None:
    saved = write_three(tmp_path)
    before = files(saved.folder)
    large = {"values": torch.zeros(100_000)}
    path = saved.folder / f"iteration-00000004{'' if whole else '.rank-00-of-01'}.pt"
    with little_space(100_000), pytest.raises(OSError, match=rf"File too large: '{path}'$"):
        saved.save(4, large if whole else {}, {} if whole else large)
    found = saved.newest()
    assert found is not None
    assert found.iteration == 3
    assert files(saved.folder) == before  # with what is of no use gone


def test_what_killed_writers_have_left_goes(tmp_path: Path) -> None:
    saved = write_three(tmp_path)
    before = files(saved.folder)
    for name in (".iteration-00000004.pt.0a1b2c3d.tmp", "iteration-00000001.rank-01-of-02.pt"):
        (saved.folder / name).write_text("half")
    saved.newest()
    assert files(saved.folder) == before


def test_what_is_gone_on_from_is_not_held_when_it_is_deleted(tmp_path: Path, shards: Path, short: Params) -> None:
    training = loop.begin(short.train, 6, torch.device("cpu"))
    saved = checkpoint.Checkpoints(tmp_path / "state", {}, 1)
    saved.save(1, training.common(), training.own())
    assert train._go_on(training, saved) == 1
    assert str(saved.folder) not in Path("/proc/self/maps").read_text()


def test_any_damage_within_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """A bit turned over, wherever it is."""
    saved = checkpoint.Checkpoints(tmp_path, {"seed": 1}, 2)
    saved.save(1, {"values": [torch.zeros(2), {"name": 1.5}]}, {})
    path = saved.folder / "iteration-00000001.pt"
    whole, draws = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"00001\.pt: damaged, not what was written\)$"):
            saved.newest()
    path.write_bytes(whole)
    assert saved.newest()


def changed(params: Params, **changes: Any) -> Params:
    """With another section train."""
    content = params.train.model_dump() | changes
    return params.model_copy(update={"train": type(params.train).model_validate(content)})


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, shards: Path, plain: Params) -> None:
    sgd = plain.train.optimizer.model_dump() | {"learning_rate": 1e30, "clip_norm": None}
    told = r"at iteration [2-4]: learning rate 5?e?.*, gradient norm .*; lower train\.optimizer\.learning_rate"
    with pytest.raises(loop.TrainingError, match=told):
        train.run(tmp_path / "models", tmp_path / "checkpoints", changed(plain, optimizer=sgd))
    assert not (tmp_path / "models").exists()
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))  # nothing broken is kept


@dataclasses.dataclass(frozen=True)
class Batch:
    """A training in small, and a batch for it."""

    training: Training
    params: Train
    images: Tensor
    labels: Tensor

    def step(self, iteration: int = 5) -> None:
        loop.step(self.training, self.params, iteration, self.images, self.labels)

    def close(self, finished: int = 6) -> loop.Row:
        return loop.close_row(self.training, self.params, finished, {})


@pytest.fixture
def begun(tiny: Params, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Batch]:
    """By a quick network; section train changed as is said."""
    monkeypatch.setitem(backbones.BACKBONES, "small", mean_colours)

    def begin(**changes: Any) -> Batch:
        params = changed(tiny, batch=8, **changes).train
        images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
        return Batch(loop.begin(params, 4, torch.device("cpu")), params, images, torch.arange(8) % 4)

    return begin


def test_embeddings_too_long_for_fp32_stop(begun: Callable[..., Batch]) -> None:
    """Their loss would be an ordinary number, and its gradient 0 from then on."""
    one = begun()
    one.step(4)
    one.close(5)
    *_, last = (each for name, each in one.training.model.backbone.named_parameters() if name.endswith("weight"))
    with torch.no_grad():
        last.mul_(1e25)
    one.step(5)
    told = r"no gradient is left .* at iteration 6: learning rate 0\.05, gradient norm 0; lower train\.optimizer\.learn"
    with pytest.raises(loop.TrainingError, match=told):
        one.close()


def test_a_loss_without_a_slope_stops(begun: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where there is nothing left to learn."""
    for loss in (3.0, 0.0):
        one = begun()

        def flat(embeddings: Tensor, labels: Tensor, loss: float = loss) -> Judgement:
            right = labels == labels
            return Judgement(loss + 0 * embeddings.sum(), right.float(), right.float(), right, right)

        monkeypatch.setattr(one.training.head, "forward", flat)
        one.step()
        if loss:
            with pytest.raises(loop.TrainingError, match="no gradient is left"):
                one.close()
        else:
            assert one.close().gradient_norm == 0


@pytest.mark.parametrize("name", ["a-softmax", "adaface"])
def test_what_goes_by_iterations_does_in_however_many_parts(begun: Callable[..., Batch], name: str) -> None:
    head = next(head for head in HEADS if head["name"] == name)
    slow = {"learning_rate": 1e-9, "momentum": 0.9, "weight_decay": 0.0, "clip_norm": None}
    states = []
    for parts in (1, 4):
        one = begun(head=head, micro_batches=parts, optimizer=slow)
        for iteration in range(3):
            one.images.copy_(20 * torch.arange(8)[:, None, None, None] + 30 * iteration)
            one.step(iteration)
        states.append({key: value for key, value in one.training.head.state_dict().items() if key != "weight"})
    if name == "a-softmax":
        assert states == [{"steps": torch.tensor(3)}] * 2
    else:
        assert states[0]["mean"] != 20
        torch.testing.assert_close(states[1], states[0])


def test_fp16_stops_where_no_scale_is_small_enough(begun: Callable[..., Batch]) -> None:
    """The loss is finite, the gradient never: 17 times the scale is halved."""
    one = begun(precision="fp16")
    one.training.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    before = one.training.head.weight.detach().clone()
    for iteration in range(16):
        one.step(iteration)
    row = one.close(16)
    assert (row.loss_scale, row.skipped) == (1, 1)
    one.step(16)
    with pytest.raises(
        loop.TrainingError, match=r"train\.precision: fp16 .* until iteration 17, .* now 0\.5: set it to"
    ):
        one.close(17)
    assert torch.equal(one.training.head.weight, before)


def test_what_fp16_leaves_out_is_told_and_of_fp16_alone(begun: Callable[..., Batch]) -> None:
    one = begun(precision="fp16")
    one.training.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    spoilt = one.training.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    one.step(3)
    spoilt.remove()
    for iteration in range(4, 7):
        one.step(iteration)
    row = one.close(7)
    assert (row.loss_scale, row.skipped) == (128, 0.25)
    plain = begun()
    plain.step()
    row = plain.close()
    assert (row.loss_scale, row.skipped) == (None, None)


def test_without_a_compiler_train_compile_is_named(tmp_path: Path, shards: Path, plain: Params) -> None:
    import torch._inductor.config as inductor

    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}),
        pytest.raises(InputError, match=r"^train\.compile: .*No working C\+\+ compiler.* install g\+\+ .* to false$"),
    ):
        train.run(tmp_path / "models", tmp_path / "checkpoints", changed(plain, compile=True))


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_gpu_too_small_is_told_with_what_to_change(
    tmp_path: Path, shards: Path, plain: Params, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(loop, "step", full)
    cached = plain.model_copy(update={"machine": plain.machine.model_copy(update={"cache": cache})})
    with pytest.raises(InputError) as told:
        train.run(tmp_path / "models", tmp_path / "checkpoints", cached)
    assert str(told.value) == (
        "the GPU's memory is too small: "
        + ("" if cache == "none" else "set machine.cache, now device, to host or none or ")
        + "set train.recompute to true or raise train.micro_batches or lower train.batch, with which training begins "
        "anew (CUDA out of memory. Tried to allocate 2.00 GiB)"
    )


def test_a_loss_that_stands_still_is_reported(
    tmp_path: Path, shards: Path, tiny: Params, caplog: pytest.LogCaptureFixture
) -> None:
    sgd = tiny.train.optimizer.model_dump() | {"learning_rate": 1e-12}
    schedule = {"name": "cosine", "iterations": 14, "warmup": 2}
    train.run(tmp_path / "models", tmp_path / "a", changed(tiny, optimizer=sgd, schedule=schedule))
    said = [message for message in caplog.messages if "has not left its start" in message]
    assert len(said) == 1  # at iteration 22 it would be said again
    assert "at iteration 3, " in said[0]
    assert " at 12, where the cosine to the own class is 0.0" in said[0]
    caplog.clear()
    train.run(tmp_path / "models", tmp_path / "b", changed(tiny, schedule=schedule))
    assert "has not left its start" not in caplog.text


@pytest.mark.parametrize(
    ("iterations", "warmup", "expected"),
    [
        (240_000, 500, [1500, 2500, 4500, 8500, 16_500, 32_500, 64_500, 128_500]),
        (320, 20, [52, 84, 148, 276]),
        (40, 0, [10, 20, 40]),
    ],
)
def test_a_standstill_is_reported_early_and_again(
    tiny: Params, caplog: pytest.LogCaptureFixture, iterations: int, warmup: int, expected: list[int]
) -> None:
    """After the warm-up and a tenth of the schedule, 1,000 at most; then after twice that, and so on."""
    params = changed(tiny, schedule={"name": "cosine", "iterations": iterations, "warmup": warmup}).train
    every = 2 if iterations < 1000 else 500
    still = loop.Row(0, 30.0, 0.0, 0.01, 0.2, 0.0, 1.0, 0.1, None, None, None, None)
    history, told = [], []
    for iteration in range(every, iterations + 1, every):
        history.append(dataclasses.replace(still, iteration=iteration))
        loop._report_standstill(history, params)
        if caplog.messages:
            told.append(iteration)
            caplog.clear()
    assert told == expected
    loop._report_standstill([dataclasses.replace(still, iteration=iterations)], params)  # the first row has no start
    learnt = [dataclasses.replace(row, loss=row.loss if row.iteration < expected[1] else 20.0) for row in history]
    for count in range(1, len(learnt) + 1):
        loop._report_standstill(learnt[:count], params)
    assert len(caplog.messages) == 1


def test_bounds_are_told_with_their_numbers(
    tmp_path: Path, shards: Path, shortest: Params, caplog: pytest.LogCaptureFixture
) -> None:
    """Six identities: s ≥ 5/6 · ln(5 · 9) = 3.2, m ≤ 6/5."""
    head = {"name": "cosface", "scale": 3.0, "margin": 1.25}
    train.run(tmp_path / "models", tmp_path / "checkpoints", changed(shortest, head=head))
    assert "train.head.scale = 3 is below 3.2" in caplog.text
    assert "train.head.margin = 1.25 is above 1.200, the most that 6 centres in 32 dimensions" in caplog.text


@pytest.mark.parametrize(
    ("classes", "name", "margin", "told"),
    [
        (10_575, "cosface", 0.46, True),
        (10_575, "cosface", 0.45, False),  # the largest of the paper's that converged
        (33, "cosface", 1.0, False),  # as many as can be equally far from each other in 32 dimensions
        (10_575, "arcface", 0.5, False),  # an angle
    ],
)
def test_a_margin_at_which_the_papers_trainings_did_not_converge_is_told(
    plain: Params, caplog: pytest.LogCaptureFixture, classes: int, name: str, margin: float, told: bool
) -> None:
    head = {"name": name, "scale": 64.0, "margin": margin} | ({"easy": False} if name == "arcface" else {})
    train._warn_of_bounds(classes, changed(plain, head=head))
    said = f"train.head.margin = {margin:g}: the bound of 1.000 is far out of reach for 10575 centres in 32 dimensions"
    assert [message.startswith(said) for message in caplog.messages] == [True] * told


@pytest.mark.parametrize(
    ("precision", "has", "told"),
    [("fp32", "", False), ("bf16", "", True), ("bf16", "amx_bf16", False), ("bf16", "avx512_fp16", True)],
)
def test_a_precision_that_the_processor_emulates_is_told(
    tmp_path: Path,
    shards: Path,
    plain: Params,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    has: str,
    told: bool,
) -> None:
    processor = {"architecture": "x86_64", "cpu_name": "Some Xeon", "avx512_bf16": False, has: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(loop, "step", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        train.run(tmp_path / "models", tmp_path / "checkpoints", changed(plain, precision=precision))
    said = "train.precision: bf16, for which this processor (Some Xeon) has no instructions (avx512_bf16 or amx_bf16)"
    assert (said in caplog.text) == told


HEADS: list[dict[str, Any]] = [
    {"name": "softmax"},
    {"name": "nsl", "scale": 16.0},
    {"name": "a-softmax", "margin": 4, "first": 1000.0, "least": 5.0, "rate": 0.12},
    {"name": "arcface", "scale": 64.0, "margin": 0.5, "easy": False},
    {"name": "adaface", "scale": 64.0, "margin": 0.4, "concentration": 0.333, "momentum": 0.01},
]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head["name"])
def test_every_head_learns_and_goes_on_where_it_was(
    tmp_path: Path, shards: Path, plain: Params, head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = changed(plain, head=head)
    step, seen = loop.step, []

    def watched(training: Training, section: Train, iteration: int, *rest: Tensor) -> None:
        if iteration == 6 and not (tmp_path / "b").exists():
            shutil.copytree(tmp_path / "a", tmp_path / "b")  # as a kill would leave it
        seen.append(iteration)
        step(training, section, iteration, *rest)

    monkeypatch.setattr(loop, "step", watched)
    train.run(tmp_path / "whole", tmp_path / "a", params)
    with (tmp_path / "whole" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["own_cosine"]) > float(rows[0]["own_cosine"])
    assert all(float(row["beyond_margin"]) <= float(row["accuracy"]) for row in rows)
    train.run(tmp_path / "again", tmp_path / "b", params)
    assert seen == [*range(14), *range(4, 14)]
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.parametrize(("clip", "base"), [(None, 0.001), (0.5, 0.02)])
def test_the_first_steps_are_those_written_out_in_float64(tiny: Params, clip: float | None, base: float) -> None:
    """CosFace as Eq. 4 has it, as cross-entropy of all logits; its gradients, together shortened; SGD as PyTorch's
    documentation has it, g += λw, v = μv + g, w −= γv; two steps of warm-up, and a milestone after the fourth.
    """
    sgd = {"learning_rate": base, "momentum": 0.7, "weight_decay": 0.1, "clip_norm": clip}
    schedule = {"name": "steps", "iterations": 8, "warmup": 2, "milestones": [4], "factor": 0.1}
    head = {"name": "cosface", "scale": 8.0, "margin": 0.35}
    params = changed(tiny, optimizer=sgd, schedule=schedule, head=head).train
    training = loop.begin(params, 4, torch.device("cpu"))
    network = copy.deepcopy(training.model.backbone).double()
    centres = training.head.weight.detach().double().requires_grad_()
    weights = [*network.parameters(), centres]
    memory = [torch.zeros_like(weight) for weight in weights]
    labels = torch.arange(8) % 4
    for iteration, rate in enumerate([base / 2, base, base, base, base / 10, base / 10]):
        images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
        loop.step(training, params, iteration, images, labels)
        row = loop.close_row(training, params, iteration + 1, {})
        cosines = F.normalize(network((images.double() - 127.5) / 128)) @ F.normalize(centres).T
        own = F.one_hot(labels, 4)
        loss = F.cross_entropy(8 * (cosines - 0.35 * own), labels)
        gradients = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        assert norm > 1
        with torch.no_grad():
            for weight, velocity, gradient in zip(weights, memory, gradients, strict=True):
                shortened = gradient if clip is None else gradient * clip / norm
                velocity.mul_(0.7).add_(shortened + 0.1 * weight)
                weight.sub_(rate * velocity)
        # fp32 rounds to 6e-8 and six steps of batch normalisation over 8 images enlarge that some hundredfold; without
        # its decay a weight of 1 would end 7e-4 elsewhere, without momentum and by a wrong rate farther
        assert row.loss == pytest.approx(loss.item(), rel=1e-4)
        assert row.gradient_norm == pytest.approx(norm, rel=1e-3)
        assert row.own_cosine == pytest.approx((cosines * own).sum(dim=1).mean().item(), abs=1e-4)
        assert row.learning_rate == pytest.approx(rate)
        found = training.model.backbone.state_dict() | {"centres": training.head.weight.detach()}
        expected = network.state_dict() | {"centres": centres.detach()}
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, check_dtype=False)


def test_the_first_weights_follow_from_the_seed(tiny: Params) -> None:
    found = []
    for seed in (1, 1, 2):
        training = loop.begin(changed(tiny, seed=seed).train, 4, torch.device("cpu"))
        found.append(dict(training.model.named_parameters()) | {"centres": training.head.weight})
    drawn = [name for name, value in found[0].items() if value.ndim > 1]
    assert "centres" in drawn
    assert len(drawn) > 10
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert not any(torch.equal(found[0][name], found[2][name]) for name in drawn)


def test_the_batch_in_parts_is_the_batch(shards: Path, plain: Params) -> None:
    """Without batch normalisation, gradients of a batch in parts are those of the whole, to rounding."""
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    weights = []
    for parts in (1, 4):
        params = changed(plain, micro_batches=parts)
        training = loop.begin(params.train, 4, torch.device("cpu"))
        loop.step(training, params.train, 5, images, labels)
        row = loop.close_row(training, params.train, 6, {})
        weights.append((training.model.state_dict(), training.head.state_dict(), row))
    for one, other in zip(weights[0][:2], weights[1][:2], strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)
    assert weights[0][2].loss == pytest.approx(weights[1][2].loss, rel=1e-5)
    assert weights[0][2].gradient_norm == pytest.approx(weights[1][2].gradient_norm, rel=1e-4)


def test_the_model_is_the_mean_of_weights(
    tmp_path: Path, shards: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all iterations so far at first, then falling by a fifth an iteration: by weights in closed form, in float64.
    Centres, too, and it is what validation judges.
    """
    step, seen, judged = loop.step, [], []

    def watched(training: Training, *rest: Any) -> None:
        step(training, *rest)
        seen.append({name: value.double() for name, value in training.model.backbone.state_dict().items()})
        seen[-1]["centres"] = training.head.weight.detach().double()
        with training.judging() as model:
            judged.append((model.backbone, training.head.weight))
        assert torch.equal(training.head.weight.double(), seen[-1]["centres"])

    monkeypatch.setattr(loop, "step", watched)
    train.run(tmp_path / "models", tmp_path / "checkpoints", changed(tiny, average=0.8))
    count = len(seen)
    assert count == 14
    shares = [max(0.2, 1 / (i + 1)) for i in range(count)]
    weights = [shares[i] * math.prod(1 - share for share in shares[i + 1 :]) for i in range(count)]
    assert sum(weights) == pytest.approx(1)
    written = load_file(tmp_path / "models" / "backbone.safetensors")
    written["centres"] = load_file(tmp_path / "models" / "head.safetensors")["weight"]
    for name, value in written.items():
        if value.is_floating_point():
            mean = sum(weight * values[name] for weight, values in zip(weights, seen, strict=True))
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
        else:
            assert value == seen[-1][name]
    for name in ("0.weight", "centres"):
        assert not torch.equal(written[name].double(), seen[-1][name])
    network, centres = judged[-1]
    assert torch.equal(network.state_dict()["0.weight"], written["0.weight"])
    assert torch.equal(centres, written["centres"])
    assert not network.training


class Clock:
    """Time that passes only where it is made to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_speed_is_what_a_clock_says(
    tmp_path: Path, shards: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 images take 3 seconds to come and 1 to learn from; validation and checkpoints do not count."""
    tiny = changed(tiny, batch=16)
    clock = Clock()
    for module in (loader, meter):
        monkeypatch.setattr(module, "time", clock)

    class Slow(loader.Loader):
        def _by_threads(self) -> Iterator[loader.Batch]:
            for batch in super()._by_threads():
                clock.now += 3
                yield batch

    class Saved(checkpoint.Checkpoints):
        def save(self, iteration: int, common: dict[str, Any], own: dict[str, Any]) -> None:
            clock.now += 1000

    def measure(training: Training, device: torch.device) -> dict[str, float]:
        clock.now += 100
        return {"val_accuracy": 0.5}

    def learn(training: Training, *_: Any) -> None:
        clock.now += 1
        training.sums[5] += 16

    monkeypatch.setattr(loop, "step", learn)
    cpu, found = torch.device("cpu"), shard_reader.Shards(tiny.train.data)
    training = loop.begin(tiny.train, 6, cpu)
    slow = Slow(found.split("train"), found.index.face, tiny.train, cpu)
    speeds: list[meter.Speed] = []
    loop.train(
        tiny.train,
        tiny.machine,
        slow,
        measure,
        training,
        0,
        cpu,
        Saved(tmp_path, {}, 1),
        lambda row, speed: speeds.append(speed),
    )
    assert clock.now == 14 * 4 + 4 * 1100  # rows at 3, 4, 6, 8, 9, 12 and 14, of which 4, 8, 12 and 14 are checkpoints
    operations = 3 * backbones.forward_flops(tiny.train.backbone)
    assert [speed.images_per_second for speed in speeds] == [4] * 7
    assert [speed.data_wait for speed in speeds] == [0.75] * 7
    assert [speed.teraflops for speed in speeds] == pytest.approx([4 * operations / 1e12] * 7)


def test_compiled_and_computed_again_exclude_each_other(tiny: Params) -> None:
    with pytest.raises(ValueError, match="compile: true excludes recompute: true"):
        changed(tiny, compile=True, recompute=True)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_go_by_the_gpu_s_whole_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert meter.peak_teraflops(torch.device("cuda"), "bf16") == peak


@pytest.mark.parametrize(
    ("precision", "dtype", "tries", "tf32"),
    [
        ("bf16", torch.bfloat16, True, False),
        ("fp16", torch.float16, True, False),
        ("fp32", torch.float32, False, False),
        ("tf32", torch.float32, False, True),
    ],
    ids=["bf16", "fp16", "fp32", "tf32"],
)
def test_a_precision_is_that_of_convolutions_in_training(
    tiny: Params, precision: str, dtype: torch.dtype, tries: bool, tf32: bool
) -> None:
    """What is judged is in fp32. By halves cuDNN tries its algorithms, which otherwise takes minutes on a GPU; TF32 it
    takes only where that is asked for.
    """
    cpu, params, cudnn = torch.device("cpu"), changed(tiny, precision=precision).train, torch.backends.cudnn
    training = loop.begin(params, 6, cpu)
    assert (cudnn.benchmark, cudnn.allow_tf32) == (tries, tf32)
    dtypes: list[torch.dtype] = []
    for layer in training.model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, _inputs, out: dtypes.append(out.dtype))
    loop.step(training, params, 0, torch.zeros(8, 3, 112, 112, dtype=torch.uint8), torch.arange(8) % 6)
    assert set(dtypes) == {dtype}
    dtypes.clear()
    ByImage(shard_reader.Shards(params.data), params)(training, cpu)
    assert set(dtypes) == {torch.float32}
    with training.judging():
        assert (cudnn.benchmark, cudnn.allow_tf32) == (False, False)
    assert (cudnn.benchmark, cudnn.allow_tf32) == (tries, tf32)


@on_gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_on_a_gpu_does_not_wait_for_it(tiny: Params, precision: str, compiled: bool) -> None:
    device = torch.device("cuda")
    params = changed(tiny, precision=precision, average=0.9, compile=compiled).train
    training = loop.begin(params, 4, device)
    images = torch.zeros(16, 3, 112, 112, dtype=torch.uint8, device=device)
    labels = torch.arange(16, device=device) % 4
    for iteration in range(6):
        if iteration == 5:  # what is done once is done
            torch.cuda.set_sync_debug_mode("error")
        try:
            loop.step(training, params, iteration, images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_compiled_on_a_gpu_steps_are_those_that_are_not(tiny: Params, parts: int) -> None:
    """Kernels that are recorded see each new batch and the weights as they have become, and lose no gradient."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_container

    device = torch.device("cuda")
    counters.clear()
    found = []
    for compiled in (False, True):
        # at a gentle rate: what rounding does differently stays small
        gentle = tiny.train.optimizer.model_dump() | {"learning_rate": 0.01}
        section = changed(tiny, compile=compiled, average=0.9, micro_batches=parts, optimizer=gentle).train
        training = loop.begin(section, 4, device)
        generator = torch.Generator().manual_seed(7)
        for iteration in range(8):
            images = torch.randint(0, 256, (16, 3, 112, 112), dtype=torch.uint8, generator=generator).to(device)
            labels = torch.randint(4, (16,), generator=generator).to(device)
            loop.step(training, section, iteration, images, labels)
            if iteration == 5:  # in between they are used otherwise
                with training.judging() as model, torch.no_grad():
                    model(images[:5])
        row = loop.close_row(training, section, 8, {})
        weights = {name: value.cpu() for name, value in training.model.state_dict().items()}
        found.append(weights | {"loss": torch.tensor(row.loss), "norm": torch.tensor(row.gradient_norm)})
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)
    manager = get_container(0).tree_manager
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert parts > 1 or (manager is not None and next(manager.graph_counter) > 0)


@on_gpu
def test_compiled_on_a_gpu_dropout_is_drawn_anew_in_each_step(tiny: Params) -> None:
    device = torch.device("cuda")
    model = loop.begin(changed(tiny, compile=True, dropout=0.5).train, 4, device).model
    images = torch.randint(0, 256, (16, 3, 112, 112), dtype=torch.uint8, device=device)
    drawn = []
    for _ in range(6):
        model.zero_grad()
        features = model(images)
        features.sum().backward()
        drawn.append(features.detach().clone())
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(drawn))


@on_gpu
@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_on_a_gpu_it_goes_on_where_it_was(
    tmp_path: Path, shards: Path, short: Params, seen: list[int], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """Within rounding; and on the CPU it begins at the same loss."""
    monkeypatch.chdir(tmp_path)  # for the cache
    params = changed(short, log_every=1)
    machine = short.machine.model_copy(update={"cache": cache})
    params = params.model_copy(update={"machine": machine.model_copy(update={"device": "cuda"})})
    run_whole_and_killed(tmp_path, params, seen)
    train.run(tmp_path / "cpu", tmp_path / "c", changed(short, log_every=1))
    losses = {}
    for name in ("whole", "models", "cpu"):
        with (tmp_path / name / "history.csv").open() as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses["models"] == pytest.approx(losses["whole"], rel=1e-2)
    assert losses["whole"][0] == pytest.approx(losses["cpu"][0], rel=1e-4)


def test_dropout_is_what_is_asked_for(tiny: Params) -> None:
    def shares(**changes: Any) -> list[float]:
        model = loop.begin(changed(tiny, **changes).train, 4, torch.device("cpu")).model
        return [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]

    assert shares() == [0.0]
    assert shares(dropout=0.3) == [0.3]
    ir50 = {"name": "ir50", "width": 112, "embedding": 16}
    assert shares(backbone=ir50) == [0.4]
    assert shares(backbone=ir50, dropout=0.0) == [0.0]
    with pytest.raises(InputError, match=r"train\.dropout: 0\.3, but sphere20 has no dropout"):
        shares(backbone={"name": "sphere20", "width": 112, "embedding": 16}, dropout=0.3)


no_compiler = pytest.mark.skipif(
    not os.environ.get("COSFACE_COMPILE") or shutil.which("g++") is None,
    reason="torch.compile needs g++ on a CPU, and a minute: set COSFACE_COMPILE=1",
)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16"}, {"precision": "fp16"}, pytest.param({"compile": True}, marks=no_compiler)],
    ids=["bf16", "fp16", "compiled"],
)
def test_other_arithmetic_learns_alike(
    tmp_path: Path, shards: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The same start to rounding, and something learnt in the end."""
    losses = []
    narrower = partial(backbones.improved_residual, (1, 1), channels=(16, 16), strides=(2, 2), stem=((16, 2),))
    monkeypatch.setitem(backbones.BACKBONES, "small", narrower)
    short = {"log_every": 1, "schedule": {"name": "polynomial", "iterations": 8, "warmup": 1, "power": 1.0}}
    for name, params in (("plain", changed(tiny, **short)), ("changed", changed(tiny, **short, **changes))):
        train.run(tmp_path / name, tmp_path / "checkpoints", params)
        with (tmp_path / name / "history.csv").open() as file:
            losses.append([float(row["loss"]) for row in csv.DictReader(file)])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.03)
    assert all(own[-1] < own[0] for own in losses)
    plain, other = (load_file(tmp_path / name / "backbone.safetensors").keys() for name in ("plain", "changed"))
    assert plain == other


def test_torch_compile_sees_the_network_as_one_graph(tiny: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """And makes code for training alone."""
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    plain, compiled = (
        loop.begin(changed(tiny, compile=value).train, 4, torch.device("cpu")) for value in (False, True)
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=kept))
    compiled.model.compile_training()
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    torch.testing.assert_close(compiled.model(images), plain.model(images))
    (graph,) = graphs
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert sum(node.target is torch.conv2d for node in operations) == sum(
        isinstance(layer, nn.Conv2d) for layer in plain.model.modules()
    )
    with compiled.judging() as model:
        model(images[:5])
    assert len(graphs) == 1


def test_fp16_survives_that_its_first_step_is_left_out(shards: Path, tiny: Params) -> None:
    """Gradients overflow under a scale too large, at first: the step is skipped, the scale halved, nothing is lost."""
    params = changed(tiny, precision="fp16")
    training = loop.begin(params.train, 4, torch.device("cpu"))
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    labels = torch.arange(8) % 4
    training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    loop.step(training, params.train, 5, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in training.model.named_parameters())
    assert training.scaler.get_scale() == 2.0**39
    training.scaler.update(2.0**8)
    loop.step(training, params.train, 6, images, labels)
    assert not all(torch.equal(value, before[name]) for name, value in training.model.named_parameters())
    row = loop.close_row(training, params.train, 7, {})
    assert 0 < row.gradient_norm < 1e6


def test_the_stored_trace(tmp_path: Path, shards: Path, small: Params) -> None:
    """A short run of the default network, from shards to history.csv, as it was when trace.json was written."""
    sgd = {"learning_rate": 0.002, "momentum": 0.9, "weight_decay": 1.0, "clip_norm": 0.5}
    train.run(tmp_path / "models", tmp_path / "checkpoints", changed(small, log_every=1, optimizer=sgd))
    with (tmp_path / "models" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Another processor sums in another order. Moving all initial weights by 1e-6 of themselves, which is 16 roundings
    # of fp32, moves losses by 2e-5 of themselves, norms by 3e-4 and cosines by 7e-6 in the end: steps are so short that
    # it hardly grows. Without weight decay they end 2e-2, 8e-2 and 4e-3 elsewhere, without momentum 2e-1, 5e-2, 5e-2.
    within: dict[str, dict[str, Any]] = {
        "loss": {"rel": 1e-3},
        "gradient_norm": {"rel": 1e-2},
        "own_cosine": {"abs": 5e-4},
    }
    found = {name: [float(row[name]) for row in rows] for name in within}
    stored, made = Path(__file__).with_name("trace.json"), tmp_path / "trace.json"
    made.write_text(json.dumps({"torch": torch.__version__} | found, indent=2) + "\n")
    how = f"a change that is meant to move it says why, and takes what it is now: cp {made} {stored}"
    assert stored.exists(), how
    expected = json.loads(stored.read_text())
    for name, tolerance in within.items():
        assert found[name] == pytest.approx(expected[name], **tolerance), how


CHILD = """
if __name__ == "__main__":
    import logging
    import sys
    import time
    from pathlib import Path
    from pipeline.params import Params
    from stages.train import backbones, loop
    from stages.train import run as train
    from tests.samples import NARROW

    step = loop.step

    def slowly(*arguments):
        time.sleep(0.2)  # so that there is time to end it
        step(*arguments)

    loop.step = slowly
    backbones.BACKBONES["small"] = NARROW
    logging.basicConfig()
    train.run(Path(sys.argv[1]), Path(sys.argv[2]), Params.model_validate_json(Path(sys.argv[3]).read_text()))
"""


def newest(folder: Path) -> int:
    """The iterations that the newest checkpoint has behind it; 0 where there is none."""
    return max((int(path.stem[-8:]) for path in folder.rglob("iteration-????????.pt")), default=0)


def wait_for_checkpoint(folder: Path, process: Copies, after: int) -> None:
    deadline = time.monotonic() + 60
    while newest(folder) <= after:
        assert process.returncode is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ended_in_any_way_it_goes_on_to_the_same_bits(
    tmp_path: Path, shards: Path, tiny: Params, one_thread: None
) -> None:
    """Asked to end by SIGTERM; by SIGINT as a terminal sends it, to the processes that make batches, too; and killed
    between checkpoints. (Killed at twenty random moments, by `python -m benchmarks.kills`.)
    """
    schedule = {"name": "steps", "iterations": 12, "warmup": 2, "milestones": [9], "factor": 0.1}
    quick = tiny.machine.model_copy(update={"checkpoint_minutes": 0.0001})
    params = changed(tiny, schedule=schedule).model_copy(update={"machine": quick})
    train.run(tmp_path / "whole", tmp_path / "whole-state", params)
    state, models = tmp_path / "ended-state", tmp_path / "ended"

    def child(params: Params) -> Copies:
        (tmp_path / "params.json").write_text(params.model_dump_json())
        return start(CHILD, models, state, tmp_path / "params.json")

    process = child(params)
    wait_for_checkpoint(state, process, after=0)
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, process.said()
    assert "SIGTERM: ended after iteration" in process.said()
    left = newest(state)
    assert 0 < left < 12

    process = child(params.model_copy(update={"machine": quick.model_copy(update={"loaders": 2})}))
    wait_for_checkpoint(state, process, after=left + 1)  # each of the two has made a batch
    others = psutil.Process(process.pids[0]).children(recursive=True)
    assert len(others) >= 2
    os.killpg(process.pids[0], signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, process.said()
    deadline = time.monotonic() + 10
    while any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in others):
        assert time.monotonic() < deadline, others
        time.sleep(0.05)
    assert "SIGINT: ended after iteration" in process.said()
    assert left + 1 < newest(state) < 12
    assert len(list(state.rglob("iteration-????????.pt"))) <= params.machine.checkpoints_kept

    process = child(params)
    wait_for_checkpoint(state, process, after=newest(state))
    os.kill(process.pids[0], signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert newest(state) < 12
    train.run(models, state, params)
    assert files(models) == files(tmp_path / "whole")


def test_too_few_examples_are_said(tmp_path: Path, shards: Path, tiny: Params) -> None:
    large = tiny.train.model_copy(update={"batch": 4096})
    with pytest.raises(ValueError, match=r"54 examples, fewer than a batch of 4096"):
        train.run(tmp_path / "models", tmp_path / "checkpoints", tiny.model_copy(update={"train": large}))
