"""Tasks for workers, in a module of their own: a worker imports it, and little else; and a machine for them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from pipeline import executor
from pipeline.params import Machine

HERE = Machine(
    executor="local",
    workers=1,
    threads=1,
    memory=0.5,
    device="cpu",
    processes=None,
    loaders=None,
    cache="none",
    checkpoint_minutes=60,
    checkpoints_kept=2,
)


def machine(**changes: Any) -> Machine:
    return Machine.model_validate(HERE.model_dump() | {"workers": 2} | changes)


def square(number: int) -> tuple[int, int]:
    """And the threads that torch takes, imported here as it is by a task that needs it."""
    import torch

    return number * number, torch.get_num_threads()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is not liked")
    return number


def which(folder: str, _: int) -> int | None:
    """Once two processes have come so far, in a minute at most."""
    (Path(folder) / f"{os.getpid()}.came").touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).glob("*.came"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return executor._worker


def die_once(folder: str, number: int) -> int:
    """Notes each attempt; the first one at number 3 costs the worker its life."""
    attempts = len(list(Path(folder).glob(f"{number}-*")))
    (Path(folder) / f"{number}-{attempts}").touch()
    if number == 3 and not attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)
    return number


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(folder: str, number: int) -> None:
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(120)
