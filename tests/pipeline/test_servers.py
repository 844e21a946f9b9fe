import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.servers import process_group

SLOW = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: (asked.append(1), open("asked", "a").write("once ")))
open("ready", "w").write("yes")
while not asked:
    time.sleep(0.01)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    time.sleep(0.01)
open("saved", "w").write("yes")
"""
"""Takes its time to save what it has when it is asked to end, as a training does."""
HOLDER = """
import os, signal, sys
from pipeline.servers import process_group
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with process_group(sys.argv[1:-1], dict(os.environ), output=None, grace=int(sys.argv[-1])) as process:
    process.wait()
"""


def slow(seconds: float) -> list[str]:
    return [sys.executable, "-c", SLOW, str(seconds)]


def held(command: list[str], grace: int) -> list[str]:
    """A process that holds a command in a group of its own."""
    return [sys.executable, "-c", HOLDER, *command, str(grace)]


def appears(path: Path) -> bool:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def slept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in which the shell that ends a group notes the seconds it would have slept, each time; it does not."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sleep").write_text(f"#!/bin/sh\necho $1 >> {folder}/slept\n")
    (folder / "bin" / "sleep").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)
    return folder / "slept"


def test_a_group_has_time_to_end(folder: Path) -> None:
    with process_group(slow(2), dict(os.environ), grace=300):
        assert appears(folder / "ready")
    assert (folder / "asked").read_text() == "once "
    assert (folder / "saved").exists()


def test_a_group_that_does_not_end_is_ended_when_its_grace_is_over(folder: Path, slept: Path) -> None:
    with process_group(slow(300), dict(os.environ), grace=7):
        assert appears(folder / "ready")
    assert sum(map(float, slept.read_text().split())) == pytest.approx(7)
    assert not (folder / "saved").exists()


def test_a_group_that_has_ended_is_not_waited_for(slept: Path) -> None:
    subprocess.run(held(["true"], 6000), check=True, timeout=120)
    assert not slept.exists()


def test_ctrl_c_waits_and_a_second_one_does_not(folder: Path) -> None:
    process = subprocess.Popen(held(slow(200), 300), stderr=subprocess.PIPE, text=True)
    assert appears(folder / "ready")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline() == ("waiting, 300 s at most, for what runs here to end; Ctrl-C ends it at once\n")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)  # long before what runs has saved what it has
    assert not (folder / "saved").exists()


def test_a_second_sigterm_changes_nothing(folder: Path) -> None:
    process = subprocess.Popen(held(slow(3), 60))
    assert appears(folder / "ready")
    process.terminate()
    assert appears(folder / "asked")
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert (folder / "saved").exists()
    assert (folder / "asked").read_text() == "once "


def test_who_is_killed_while_waiting_is_outlived_by_what_was_asked_to_end(folder: Path) -> None:
    """Prefect kills a cancelled flow after 30 seconds."""
    process = subprocess.Popen(held(slow(3), 60))
    assert appears(folder / "ready")
    process.terminate()
    assert appears(folder / "asked")
    process.kill()
    process.wait()
    assert appears(folder / "saved")
    assert (folder / "asked").read_text() == "once "


def test_groups_further_below_are_waited_for(folder: Path) -> None:
    """Even where what held them has been killed."""
    below = shlex.join(held(slow(3), 60))
    runner = f"trap 'sleep 1; kill -9 $flow; exit' TERM; {below} & flow=$!; while :; do sleep 0.1; done"
    with process_group(["sh", "-c", runner], dict(os.environ), output=None, grace=60):
        assert appears(folder / "ready")
    assert (folder / "saved").exists()
    assert (folder / "asked").read_text() == "once "
