import csv
import json
from pathlib import Path

import pytest
import torch

from pipeline.params import Params
from stages import train
from stages.train import checkpoint, loop
from tests.samples import shard_section, write_shards


@pytest.fixture
def tiny(params: Params, tmp_path: Path) -> Params:
    section = params.train.model_dump()
    section |= {"data": str(tmp_path / "shards"), "batch": 16, "log_every": 3, "checkpoint_every": 4}
    section["backbone"]["embedding"] = 32
    section["schedule"] = {"iterations": 14, "warmup": 2, "milestones": [10], "factor": 0.1}
    section["optimizer"]["learning_rate"] = 0.05
    return params.model_copy(update={"train": type(params.train).model_validate(section)})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path, [10] * 6, shard_section(validation={"by": "image", "share": 0.1, "pairs": 0}))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_interrupted_anywhere_ends_in_the_same_bits(
    tmp_path: Path, shards: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.run(tmp_path / "whole", tmp_path / "a", tiny)
    assert not list((tmp_path / "a").iterdir())
    step = loop.step
    for kill_at in (2, 4, 9, 13):
        checkpoints = tmp_path / f"b{kill_at}"

        def dying(training, params, iteration, *rest, kill_at=kill_at):  # type: ignore[no-untyped-def]
            if iteration == kill_at:
                raise Killed
            step(training, params, iteration, *rest)

        monkeypatch.setattr(loop, "step", dying)
        with pytest.raises(Killed):
            train.run(tmp_path / f"m{kill_at}", checkpoints, tiny)
        assert not (tmp_path / f"m{kill_at}").exists()
        monkeypatch.setattr(loop, "step", step)
        train.run(tmp_path / f"m{kill_at}", checkpoints, tiny)
        assert files(tmp_path / f"m{kill_at}") == files(tmp_path / "whole")


def test_what_is_left_behind(tmp_path: Path, shards: Path, tiny: Params) -> None:
    train.run(tmp_path / "models", tmp_path / "checkpoints", tiny)
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


def test_it_learns(tmp_path: Path, shards: Path, tiny: Params) -> None:
    """Six identities that differ by colour: chance is 1/6, and a learner is right at least half the time."""
    schedule = tiny.train.schedule.model_copy(update={"iterations": 40, "milestones": [30]})
    longer = tiny.train.model_copy(update={"schedule": schedule})
    train.run(tmp_path / "models", tmp_path / "checkpoints", tiny.model_copy(update={"train": longer}))
    metrics = json.loads((tmp_path / "models" / "train.json").read_text())
    assert metrics["accuracy"] > 0.5
    assert metrics["val_accuracy"] > 0.5


def test_a_corrupt_newest_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = checkpoint.Checkpoints(tmp_path, "k" * 64)
    for iteration in (1, 2, 3):
        saved.save(iteration, {"value": torch.tensor(iteration)})
    newest = sorted(saved.folder.iterdir())[-1]
    assert [path.name for path in sorted(saved.folder.iterdir())] == [
        "iteration-00000002.pt",
        "iteration-00000003.pt",
    ]
    for damage in (newest.read_bytes()[:100], b"", b"\x80\x04garbage" * 20):
        newest.write_bytes(damage)
        found = saved.newest()
        assert found is not None
        assert found[0] == 2
        assert found[1]["value"].item() == 2
        assert "trying the one before" in caplog.text
    assert checkpoint.Checkpoints(tmp_path, "other" * 13).newest() is None


def test_a_loss_that_is_not_finite_stops(tmp_path: Path, shards: Path, tiny: Params) -> None:
    wild = tiny.train.model_copy(
        update={"optimizer": tiny.train.optimizer.model_copy(update={"learning_rate": 1e30, "clip_norm": None})}
    )
    with pytest.raises(loop.TrainingError, match=r"at iteration \d+.*learning_rate"):
        train.run(tmp_path / "models", tmp_path / "checkpoints", tiny.model_copy(update={"train": wild}))
    assert not (tmp_path / "models").exists()


def test_too_few_examples_are_said(tmp_path: Path, shards: Path, tiny: Params) -> None:
    large = tiny.train.model_copy(update={"batch": 4096})
    with pytest.raises(ValueError, match=r"54 examples, fewer than a batch of 4096"):
        train.run(tmp_path / "models", tmp_path / "checkpoints", tiny.model_copy(update={"train": large}))
