"""`python -m stages.train` by two processes, as DVC runs it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from pipeline.errors import InputError
from pipeline.params import Params
from pipeline.tables import TableError
from stages.train import launch
from stages.train import run as train
from stages.train.ranks import Ranks
from tests.conftest import ROOT
from tests.samples import shard_section, write_shards


@pytest.fixture
def project(tmp_path: Path, params: Params) -> Path:
    write_shards(tmp_path, [4] * 6, shard_section(validation={"by": "image", "share": 0.0, "pairs": 0}))
    content: dict[str, Any] = params.model_dump(mode="json")
    content["train"] |= {"data": "shards", "batch": 16, "log_every": 1}
    content["machine"] |= {"device": "cpu", "processes": 2, "checkpoint_minutes": 0.0001}
    YAML().dump(content, tmp_path / "params.yaml")
    return tmp_path


def start(project: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.train"]
    return subprocess.Popen(command, cwd=project, env=environment, stderr=subprocess.PIPE, text=True)


def test_asked_to_end_all_save_and_the_status_tells(project: Path) -> None:
    process = start(project)
    deadline = time.monotonic() + 120
    while not list(project.rglob("iteration-????????.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "on cpu, 2 processes" in said
    assert said.count("SIGTERM: ended after iteration") == 1
    assert "Traceback" not in said


class Failure:
    """torchrun's ProcessFailure, as far as it is looked at."""

    def __init__(self, exitcode: int, timestamp: int) -> None:
        self.exitcode, self.timestamp = exitcode, timestamp

    def signal_name(self) -> str:
        return signal.Signals(-self.exitcode).name


def test_the_first_that_died_is_named() -> None:
    """The others fail after it, for want of it."""
    with pytest.raises(InputError, match=r"process 1 of the training was killed by SIGKILL; the same command goes on"):
        launch._explain({0: Failure(1, 20), 1: Failure(-9, 10)})
    with pytest.raises(SystemExit) as ended:
        launch._explain({0: Failure(143, 20), 1: Failure(-15, 10)})
    assert ended.value.code == 143


def test_a_message_for_a_person_comes_through_the_file_of_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise TableError("shards: no such: folder")

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(SystemExit) as ended:
        launch.tell_launcher(fail)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=int(str(ended.value.code)), error_file=str(path))
    with pytest.raises(InputError, match=r"^shards: no such: folder$"):
        launch._explain({1: Failure(1, 5), 0: failure})  # the other fails for want of this one


def test_a_process_for_each_gpu_and_no_more(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def count(device: str, processes: int | None) -> int:
        return launch.processes(params.machine.model_copy(update={"device": device, "processes": processes}))

    assert count("auto", None) == 4
    assert count("cpu", None) == 1
    assert count("cpu", 8) == 8
    assert count("cuda", 2) == 2
    with pytest.raises(InputError, match=r"machine\.processes: 8, but there are 4 GPUs"):
        count("auto", 8)


@pytest.mark.parametrize(
    ("batch", "parts", "size", "problem"),
    [(48, 3, 5, r"48 images cannot be cut into 3 .* each of 5"), (16, 1, 4, ""), (128, 1, 8, "")],
)
def test_how_a_batch_is_shared(
    params: Params, caplog: pytest.LogCaptureFixture, batch: int, parts: int, size: int, problem: str
) -> None:
    section = params.train.model_copy(update={"batch": batch, "micro_batches": parts})
    changed = params.model_copy(update={"train": section})
    if problem:
        with pytest.raises(InputError, match=problem):
            train._check_parts(changed, Ranks(0, size))
        return
    train._check_parts(changed, Ranks(0, size))
    few = f"each of {size} processes computes batch normalisation over {batch // size} images"
    assert (few in caplog.text) == (batch // size < 16)
