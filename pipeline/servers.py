"""Child processes that never outlive us, and the MLflow and Prefect servers on loopback."""

import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from pipeline.errors import InputError
from pipeline.tracking import artifacts_root, store_uri

HOST = "127.0.0.1"
GRACE_SECONDS = 10
"""Between asking a process group to end and ending it. Prefect allows a cancelled flow 30 seconds."""
START_SECONDS = 90
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
    return {**os.environ, **QUIET, "PATH": path, "PYTHONUNBUFFERED": "1", **more}


@contextmanager
def process_group(
    command: list[str],
    env: dict[str, str],
    output: int | IO[str] | None = subprocess.PIPE,
    grace: int = GRACE_SECONDS,
) -> Iterator[subprocess.Popen[str]]:
    """A child in a process group of its own, which ends as a whole when the block ends, however that ends.

    Signalling the child alone would leave its children as orphans: `dvc repro` and the stage it runs, for one.
    A shell that waits for us to disappear ends the group even where we are killed without a chance to.

    Args:
        command: program and arguments.
        env: see `environment`.
        output: where stdout and stderr go: a pipe, a file, or (None) where our stdout goes.
        grace: seconds between asking the group to end and ending it.
    """
    with subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    ) as process:
        guard = subprocess.Popen(
            ["sh", "-c", f"read _; kill -TERM -{process.pid}; sleep {grace}; kill -KILL -{process.pid}"],
            stdin=subprocess.PIPE,  # closed by the system when we are gone, whereupon `read` ends
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            yield process
        finally:
            _end_group(process, grace)
            guard.kill()
            guard.communicate()


def _end_group(process: subprocess.Popen[str], grace: int) -> None:
    deadline = time.monotonic() + grace
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # reaps the child, which would count as alive otherwise
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody is left


@contextmanager
def mlflow_server(port: int) -> Iterator[Server]:
    """MLflow's UI over the store of this project.

    Raises:
        ServerError: the port is taken or not for us, or it does not start.
    """
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
        return httpx.get(address, timeout=5).is_success
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


def prefect_answers(api: str) -> bool:
    """Whether it is a Prefect server that answers at an API's address, and not something else on that port."""
    try:
        response = httpx.get(f"{api}/health", timeout=5)
        return response.is_success and response.json() is True
    except (httpx.HTTPError, ValueError):
        return False
