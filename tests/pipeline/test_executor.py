import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.executor import choose_device, run_all

ROOT = Path(__file__).parents[2]


def square(number: int) -> tuple[int, int]:
    return number * number, torch.get_num_threads()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is not liked")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_in_order_from_single_threaded_workers(workers: int) -> None:
    results = run_all(square, [(i,) for i in range(9)], workers=workers, label="squaring", unit="numbers")
    assert results == [(i * i, 1) for i in range(9)]


def test_the_first_failure_is_raised() -> None:
    with pytest.raises(ValueError, match="three is not liked"):
        run_all(fail_at_three, [(i,) for i in range(9)], workers=1, label="trying", unit="numbers")


def test_nothing_to_do() -> None:
    assert run_all(square, [], workers=2, label="nothing", unit="numbers") == []


PARENT = """
import sys, time
from pathlib import Path
from pipeline.errors import InputError
from pipeline.executor import choose_device, run_all
from tests.pipeline.test_executor import sleep_long
if __name__ == "__main__":
    run_all(sleep_long, [(sys.argv[1], i) for i in range(2)], workers=2, label="sleeping", unit="naps")
"""


def sleep_long(folder: str, number: int) -> None:
    (Path(folder) / f"{number}.pid").write_text(str(os.getpid()))
    time.sleep(120)


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(bool(path.read_text()) for path in tmp_path.glob("*.pid")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for path in tmp_path.glob("*.pid"):
        worker = Path("/proc") / path.read_text()
        while worker.exists() and "zombie" not in (worker / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"machine\.device"):
        choose_device("cuda")
