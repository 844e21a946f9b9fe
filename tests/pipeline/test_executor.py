import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distributed
import psutil
import pytest
import torch
from dask import config as dask_config
from dask import system as dask_system
from pydantic import ValidationError

from pipeline import executor
from pipeline.cli import RECIPES
from pipeline.errors import InputError
from pipeline.executor import choose_device, run_all
from tests.work import die, die_once, fail_at_three, machine, sleep_long, square, which

ROOT = Path(__file__).parents[2]
LOOPBACK = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")


def test_results_in_order_from_workers_of_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = machine(workers=2, threads=2)
    results = run_all(square, [(i,) for i in range(9)], machine=where, label="squaring", unit="numbers")
    assert results == [(i * i, 2) for i in range(9)]


def test_workers_share_the_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three; they are numbered, and take them by turns."""
    tasks = [(str(tmp_path), i) for i in range(4)]
    assert set(run_all(which, tasks, machine=machine(), label="asking", unit="answers")) == {0, 1}

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number in (None, 0, 1, 2, 3):
        monkeypatch.setattr(executor, "_worker", number)
        assert choose_device("auto") == torch.device("cuda")
    assert taken == [0, 1, 2, 0]


def test_the_first_failure_is_raised() -> None:
    with pytest.raises(ValueError, match="three is not liked"):
        run_all(fail_at_three, [(i,) for i in range(9)], machine=machine(workers=1), label="trying", unit="numbers")


def test_nothing_to_do() -> None:
    assert run_all(square, [], machine=machine(), label="nothing", unit="numbers") == []


def test_no_more_processes_than_memory_or_the_tasks_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of 6 cores with 8 GiB available."""
    monkeypatch.setattr(distributed.system, "memory_limit", lambda: 2**40)
    monkeypatch.setattr(executor, "cores", lambda: 6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 2**30))
    assert executor._processes(machine(workers=None, memory=4.1), 100, None) == 1
    assert executor._processes(machine(workers=None, memory=72), 100, None) == 1
    assert executor._processes(machine(workers=None, memory=2), 100, None) == 4
    assert executor._processes(machine(workers=None, memory=0.5), 100, None) == 6
    assert executor._processes(machine(workers=None, memory=0.5, threads=2), 100, None) == 3
    assert executor._processes(machine(workers=None, memory=0.5, threads=6), 100, None) == 1
    assert executor._processes(machine(workers=7, memory=72), 100, None) == 7
    assert executor._processes(machine(workers=7), 3, None) == 3
    assert executor._processes(machine(workers=7), 100, 4) == 4
    monkeypatch.setattr(distributed.system, "memory_limit", lambda: 3 * 2**30)  # of a container
    assert executor._processes(machine(workers=None, memory=1), 100, None) == 3


def test_a_container_limits_cores_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_system, "_try_extract_cgroup_cpu_quota", lambda: (100_000, 100_000))  # docker run --cpus 1
    assert executor.cores() == 1
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        choose_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_a_killed_worker_had_in_hand_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = [(str(tmp_path), i) for i in range(8)]
    assert run_all(die_once, tasks, machine=machine(), label="trying", unit="numbers") == list(range(8))
    attempts = [len(list(tmp_path.glob(f"{i}-*"))) for i in range(8)]
    assert attempts[3] == 2
    assert sum(attempts) <= 8 + 4  # what both workers had in hand or in their queue
    assert "a worker process died" in caplog.text


def test_workers_that_die_again_and_again_are_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"died 3 times.*machine\.workers \(now 1\).*machine\.memory"):
        run_all(die, [(i,) for i in range(4)], machine=machine(workers=1), label="dying", unit="numbers")


PARENT = """
import sys
from pipeline.executor import run_all
from tests.work import machine, sleep_long
if __name__ == "__main__":
    run_all(sleep_long, [(sys.argv[1], i) for i in range(2)], machine=machine(), label="sleeping", unit="naps")
"""


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


@pytest.mark.parametrize("begun", [0, 2])
def test_an_interruption_does_not_wait_for_tasks(begun: int, tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it to all: what has not begun, though a worker may have it already, is not done."""
    code = f"""
from pipeline.entry import stage
from pipeline.executor import run_all
from tests.work import machine, sleep_long

def main(_):
    tasks = [({str(tmp_path)!r}, i) for i in range(8)]
    run_all(sleep_long, tasks, machine=machine(), label="sleeping", unit="naps")

if __name__ == "__main__":
    stage(main)
"""
    shutil.copy(RECIPES / "quickstart.yaml", tmp_path / "params.yaml")
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        process_group=0,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    workers = "multiprocessing.spawn"
    while len(list(tmp_path.glob("*.pid"))) < begun or (
        sum(workers in " ".join(child.cmdline()) for child in psutil.Process(parent.pid).children()) < 2
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(parent.pid, signal.SIGINT)
    try:
        said = parent.communicate(timeout=60)[1]
    finally:
        parent.kill()
    assert parent.returncode == 130
    assert said.endswith("interrupted; the same command goes on from what is finished\n")
    assert "Traceback" not in said
    assert len(list(tmp_path.glob("*.pid"))) == begun


@contextmanager
def dask(*arguments: str, code: Path = ROOT, wait_for: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler or a worker by dask's own command, and what its log says behind `wait_for`, in a minute at most."""
    environment = os.environ | {"PYTHONPATH": str(code)}
    with subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments], env=environment, stderr=subprocess.PIPE, cwd=code
    ) as process:
        end = threading.Timer(60, process.kill)
        end.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                found = re.search(rf"{wait_for}\s*(\S+)", line.decode())
                if found:
                    end.cancel()
                    yield process, found[1]
                    break
            else:
                pytest.fail(f"dask {arguments} ended, or was ended after a minute, without a word of {wait_for!r}")
        finally:
            end.cancel()
            process.kill()


FIRST, THEN = re.findall(r"`dask ([^`]+)`", executor._START)


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler as error messages say to start it, but for its port, and its address."""
    with dask(*FIRST.split(), "--port", "0", wait_for="Scheduler at:") as found:
        yield found


@pytest.fixture
def scheduler(started: tuple[subprocess.Popen[bytes], str]) -> str:
    return started[1]


def worker(scheduler: str, memory: str = "1GiB", code: Path = ROOT, options: tuple[str, ...] = ()) -> Any:
    usual = ("--nthreads", "1", "--memory-limit", memory, "--no-nanny")
    return dask("worker", scheduler, *LOOPBACK, *usual, *options, code=code, wait_for="Registered to:")


def test_what_is_said_to_start_a_cluster_opens_no_port_to_others(started: tuple[subprocess.Popen[bytes], str]) -> None:
    """The commands of error messages, which README.md has too."""
    readme = (ROOT / "README.md").read_text()
    assert f"\ndask {FIRST}\n" in readme
    assert f"\ndask {THEN} " in readme
    scheduler, address = started
    arguments = THEN.replace("tcp://127.0.0.1:8786", address).split()
    with dask(*arguments, wait_for="Registered to:") as (nanny, _):
        worker = psutil.Process(nanny.pid).children(recursive=True)
        everyone = [psutil.Process(scheduler.pid), psutil.Process(nanny.pid), *worker]
        ports = [port for each in everyone for port in each.net_connections() if port.status == "LISTEN"]
        nanny.terminate()  # and its worker with it
        nanny.wait(timeout=60)
    assert len(ports) >= 5  # the dashboards' and Dask's own
    assert {port.laddr.ip for port in ports} == {"127.0.0.1"}


def refused(match: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=match):
        run_all(square, [(1,)], machine=machine(**changes), label="trying", unit="numbers")


def test_a_cluster_gives_what_local_processes_give_though_a_worker_is_killed(scheduler: str, tmp_path: Path) -> None:
    """And raises what a task raises; and is refused where its workers have too little memory."""
    where = machine(executor=scheduler)
    tasks = [(str(tmp_path), i) for i in range(8)]
    with worker(scheduler) as (first, _), worker(scheduler) as (second, _):
        assert run_all(die_once, tasks, machine=where, label="trying", unit="numbers") == list(range(8))
        assert sorted(process.poll() is None for process in (first, second)) == [False, True]
        with pytest.raises(ValueError, match="three is not liked"):
            run_all(fail_at_three, [(3,)], machine=where, label="trying", unit="numbers")
        less = r"machine\.memory: 2 GiB, but the Dask worker tcp://.* 1 GiB"
        refused(less, executor=scheduler, memory=2.0)
    assert len(list(tmp_path.glob("3-*"))) == 2


def test_a_cluster_that_cannot_do_the_work_is_refused(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_PATIENCE", 2)
    refused(
        r"machine\.executor: no Dask scheduler at tcp://127\.0\.0\.1:1 .*dask scheduler", executor="tcp://127.0.0.1:1"
    )
    refused("has no workers.*dask worker", executor=scheduler)
    for name in ("pipeline", "stages", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "stages" / "align" / "warp.py").open("a") as file:
        file.write("# changed\n")
    with worker(scheduler, code=tmp_path):
        refused("runs another version of this project's code", executor=scheduler)
        monkeypatch.setattr(executor, "_check_workers", lambda *_: None)  # as if it had joined later
        refused(
            "a Dask worker on .* that joined meanwhile runs another version of this project's code", executor=scheduler
        )


class Cluster:
    """As much of Dask's client as is asked about workers: the first has this machine's files, the second others."""

    def __init__(self, files: Path) -> None:
        self._roots = {"tcp://10.0.0.1:1": "", "tcp://10.0.0.2:1": str(files)}

    def scheduler_info(self, n_workers: int) -> dict[str, Any]:
        return {"workers": {address: {"memory_limit": 2**30} for address in self._roots}}

    def run(self, function: Callable[..., Any], *paths: str) -> dict[str, Any]:
        return {address: function(*(root + path for path in paths)) for address, root in self._roots.items()}


def test_a_worker_that_has_other_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    there = rf"the Dask worker tcp://10\.0\.0\.2:1 does not see {tmp_path}/project: it must be shared"
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=there):
        executor._check_workers(Cluster(tmp_path / "other"), machine())
    (tmp_path / "same").symlink_to("/")
    executor._check_workers(Cluster(tmp_path / "same"), machine())
    assert not list(Path.cwd().iterdir())


def test_a_scheduler_s_address_is_of_a_protocol_that_dask_has() -> None:
    for protocol in ("tcp", "tls", "ws", "wss"):
        assert distributed.comm.registry.backends[protocol].get_connector()
        assert machine(executor=f"{protocol}://127.0.0.1:8786")
    for protocol in ("ucx", "http", "inproc"):  # Dask has given up the first; the last does not leave this process
        with pytest.raises(ValidationError, match="executor"):
            machine(executor=f"{protocol}://127.0.0.1:8786")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a certificate that has signed itself, and its key."""
    made = distributed.Security.temporary()
    path = tmp_path / "certificate.pem"
    path.write_text(made.tls_client_cert + made.tls_client_key)
    return path


@contextmanager
def configured(monkeypatch: pytest.MonkeyPatch, **tls: Path) -> Iterator[None]:
    """Dask's configuration as it would be, had the process begun with these variables and no other."""
    with monkeypatch.context() as patched:
        for name in [name for name in os.environ if name.startswith("DASK_")]:
            patched.delenv(name)
        for name, path in tls.items():
            patched.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{name}", str(path))
        dask_config.refresh()
        try:
            yield
        finally:
            patched.undo()
            dask_config.refresh()


def test_a_cluster_behind_tls_by_dask_s_own_configuration(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a scheduler that goes away is one clear error."""
    options = ("--tls-ca-file", certificate, "--tls-cert", certificate, "--tls-key", certificate)
    tls = ("--protocol", "tls", *map(str, options))
    arguments = ("scheduler", *LOOPBACK, "--port", "0", *tls)

    def kill(process: subprocess.Popen[bytes]) -> bool:
        """Once a task has begun, or after a minute; whether one had."""
        deadline = time.monotonic() + 60
        while not (begun := bool(list(tmp_path.glob("*.pid")))) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        return begun

    with (
        dask(*arguments, wait_for="Scheduler at:") as (process, address),
        worker(address, options=tls),
        configured(monkeypatch, CA_FILE=certificate, CLIENT__CERT=certificate, CLIENT__KEY=certificate),
        ThreadPoolExecutor(1) as killer,
    ):
        assert address.startswith("tls://")
        where = machine(executor=address)
        for threads in (1, 2, 1):  # a worker outlives the runs that it works for
            run_of = where.model_copy(update={"threads": threads})
            assert run_all(square, [(3,)], machine=run_of, label="squaring", unit="numbers") == [(9, threads)]
        killed = killer.submit(kill, process)
        gone = rf"the Dask scheduler at {address} is gone; start it again and run again"
        with pytest.raises(InputError, match=gone):
            run_all(sleep_long, [(str(tmp_path), i) for i in range(2)], machine=where, label="sleeping", unit="naps")
    assert killed.result(0)


def test_tls_that_is_not_configured_is_one_clear_error(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = r"needs certificates.*DASK_DISTRIBUTED__COMM__TLS__CA_FILE, DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT, "
    absent, none = tmp_path / "absent.pem", tmp_path / "none.pem"
    none.write_text("no certificate")
    for tls, found in (
        ({}, "one is not set"),
        ({"CA_FILE": certificate}, rf"{certificate}.*one is not set"),
        ({"CA_FILE": certificate, "CLIENT__CERT": absent}, rf"{absent}.*No such file"),
        ({"CA_FILE": certificate, "CLIENT__CERT": none}, "SSL"),
        ({"CA_FILE": none, "CLIENT__CERT": certificate}, "X509"),
    ):
        with (
            configured(monkeypatch, **tls),
            pytest.raises(InputError, match=rf"machine\.executor: tls://127\.0\.0\.1:1 {names}.*{found}"),
        ):
            run_all(square, [(3,)], machine=machine(executor="tls://127.0.0.1:1"), label="trying", unit="numbers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"machine\.device"):
        choose_device("cuda")
