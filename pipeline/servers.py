"""Child processes that never outlive us, and the MLflow and Prefect servers on loopback."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from pipeline.errors import InputError
from pipeline.tracking import artifacts_root, prepare_file, store_uri

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
GRACE_SECONDS = 10
"""Between asking a process group to end and ending it."""
SILENT_SECONDS = 3
"""Who has not ended by then is waited for audibly."""
START_SECONDS = 300
"""A server that has not answered by then is taken for broken."""
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # halves the UI's processes
}


class ServerError(InputError):
    """A server cannot be started or does not answer; the message names it, its address and what to do."""


@dataclass(frozen=True)
class Server:
    """A server on loopback that has answered."""

    name: str
    address: str
    process: subprocess.Popen[str]
    log: IO[str]
    """What it has said."""

    def check(self) -> None:
        """Whether it still runs.

        Raises:
            ServerError: it has ended; the message repeats its last words.
        """
        if self.process.poll() is not None:
            raise self.error("has ended")

    def error(self, what: str) -> "ServerError":
        """An error that says what is wrong with it, and its last words."""
        self.log.seek(0)
        return ServerError(f"{self.name} on {self.address} {what}; it said:\n{self.log.read()[-2000:]}")


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: ours, with this interpreter's folder first on PATH and nothing phoning home.

    DVC runs whichever `python` comes first on PATH, so that must be the one that has everything installed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **QUIET, **not_by_proxy(), "PATH": path, "PYTHONUNBUFFERED": "1", **more}


def not_by_proxy() -> dict[str, str]:
    """Variables by which no proxy is asked for what is on loopback, where it could not get; the rest is as it was."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in (HOST, "localhost") if host not in hosts]
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))


_GUARD = """
read _
kill -TERM -$1 || exit
for _ in $(seq ${2}0); do sleep 0.1; kill -0 -$1 || exit; done
kill -KILL -$1
"""
"""Waits for its stdin to be closed, then asks group $1 to end, once, and ends it if it has not after $2 seconds."""


@contextmanager
def process_group(
    command: list[str],
    env: dict[str, str],
    output: int | IO[str] | None = subprocess.PIPE,
    grace: int = GRACE_SECONDS,
) -> Iterator[subprocess.Popen[str]]:
    """A child in a process group of its own, which ends as a whole when the block ends, however that ends.

    Signalling the child alone would leave its children as orphans: `dvc repro` and the stage it runs, for one.
    A shell ends the group, because it does so even where we are killed without a chance to. It asks once, by SIGTERM,
    for some take a second time for an order to drop everything. Groups that were begun in the same way further below
    are waited for too. Ctrl-C while we wait ends everything at once.

    Args:
        command: program and arguments.
        env: see `environment`.
        output: where stdout and stderr go: a pipe, a file, or (None) where our stdout goes.
        grace: seconds between asking the group to end and ending it.
    """
    with (
        subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
        ) as process,
        subprocess.Popen(
            ["sh", "-c", _GUARD, "guard", str(process.pid), str(grace)],
            stdin=subprocess.PIPE,  # closed by the system when we are gone
            stderr=subprocess.DEVNULL,
            process_group=0,
        ) as guard,
    ):
        try:
            yield process
        finally:
            with _sigterm_deferred():
                _end_group(process, guard, grace)


def _end_group(process: subprocess.Popen[str], guard: subprocess.Popen[bytes], grace: int) -> None:
    below = _descendants(process.pid)
    assert guard.stdin is not None
    guard.stdin.close()
    begun, said = time.monotonic(), False
    try:
        while guard.poll() is None or (time.monotonic() < begun + grace and any(map(_runs, below))):
            process.poll()  # reaps the child, which would count as alive otherwise
            time.sleep(0.05)
            if not said and time.monotonic() > begun + SILENT_SECONDS:
                log.warning("waiting, %d s at most, for what runs here to end; Ctrl-C ends it at once", grace)
                said = True
    finally:
        guard.kill()
        with suppress(ProcessLookupError, PermissionError):  # nobody is left; of zombies macOS says the latter
            os.killpg(process.pid, signal.SIGKILL)
        for each in below + _descendants(process.pid):
            with suppress(psutil.Error):
                each.kill()


@contextmanager
def _sigterm_deferred() -> Iterator[None]:
    """Let SIGTERM wait for the end of the block: whoever asks us to end may ask more than once."""
    if threading.current_thread() is not threading.main_thread():  # which alone is told of signals
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def mlflow_server(port: int) -> Iterator[Server]:
    """MLflow's UI over the store of this project.

    Raises:
        ServerError: the port is taken or not for us, or it does not start.
        TrackingError: the store is a file that cannot be read.
    """
    prepare_file()
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifacts_root().as_uri()]
    # not by the command line, which everyone on this machine can see, and a password in it
    env = environment(MLFLOW_BACKEND_STORE_URI=store_uri())
    with _server("MLflow", command, env, port, "/health") as server:
        yield server


@contextmanager
def prefect_server(port: int) -> Iterator[Server]:
    """Prefect's server and UI; its API is below `/api`.

    Raises:
        ServerError: the port is taken or not for us, or it does not start.
    """
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    env = environment(PREFECT_API_URL=f"http://{HOST}:{port}/api")  # the UI in the browser asks there
    with _server("Prefect", command, env, port, "/api/health") as server:
        yield server


@contextmanager
def _server(name: str, command: list[str], env: dict[str, str], port: int, health: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            problem = "is in use; end what uses it, or" if error.errno == errno.EADDRINUSE else f"({error.strerror}):"
            raise ServerError(f"{name}: port {port} of {HOST} {problem} give --{name.lower()}-port") from error
    with tempfile.TemporaryFile("w+", errors="replace") as log, process_group(command, env, log) as process:
        server = Server(name, f"http://{HOST}:{port}", process, log)
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(server.address + health):
            server.check()
            if time.monotonic() > deadline:
                raise server.error(f"has not answered for {START_SECONDS} s")
            time.sleep(0.2)
        yield server


def _healthy(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    """Whether anything answers at an http(s) address, be it with a refusal."""
    try:
        httpx.get(address, timeout=10)
    except httpx.HTTPError:
        return False
    return True


def prefect_answers(api: str, *, by_proxy: bool = False) -> bool:
    """Whether it is a Prefect server that answers at an API's address, and not something else there.

    Args:
        api: the address, which ends in /api where nobody has put the server elsewhere.
        by_proxy: whether the environment's proxies are asked, as for an address that is not on loopback.
    """
    try:
        response = httpx.get(f"{api.rstrip('/')}/health", timeout=10, trust_env=by_proxy)
        return response.is_success and response.json() is True
    except (httpx.HTTPError, ValueError):
        return False
