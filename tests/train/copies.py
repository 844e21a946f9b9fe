"""Scripts by processes that need not import torch and all of training first: copies of one that has.

`start` is for tests; the first call begins the process that is copied, `python -m tests.train.copies`, which ends with
the tests. It is copied once for each script, and that copy once for each rank; then it waits for them, and tells how
they have ended: where one fails, all do.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PRELOADED = ("tests.train.test_distributed", "torch._dynamo", "dask", "pandas")
"""What scripts import; and what an optimizer's first step imports, the count of cores, and a history."""


class Copies:
    """As much of subprocess.Popen as tests need."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in their order; each leads a process group."""
        path, deadline = self._folder / "pids", time.monotonic() + 180
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return [int(pid) for pid in path.read_text().split()]

    @property
    def returncode(self) -> int | None:
        """As Popen has it, of the rank that failed first; none before all have ended."""
        path = self._folder / "ended"
        return int(path.read_text()) if path.exists() else None

    def wait(self, timeout: float = 180) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.returncode) is None:
            if time.monotonic() > deadline:
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(self.said())
            time.sleep(0.01)
        return code

    def said(self) -> str:
        """By all ranks so far, to stdout and stderr."""
        return (self._folder / "said").read_text()


def start(script: str, *arguments: object, ranks: int | None = None) -> Copies:
    """A script by several ranks, as torchrun would start them; or by one process, which is told of none."""
    server, root = _server()
    folder = tempfile.mkdtemp(dir=root)
    asked = {"folder": folder, "script": script, "arguments": [*map(str, arguments)], "ranks": ranks}
    server.write(json.dumps(asked) + "\n")
    server.flush()
    return Copies(Path(folder))


@functools.cache
def _server() -> tuple[IO[str], str]:
    """What it is asked by, whose end is its own; and the folder that it then removes."""
    root = tempfile.mkdtemp()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.copies", root],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(process.communicate, timeout=60)
    assert process.stdin
    return process.stdin, root


def main() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    for line in sys.stdin:
        if not os.fork():
            keep(**json.loads(line))
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with suppress(ChildProcessError):
        while True:
            os.wait()
    shutil.rmtree(sys.argv[1])


def keep(folder: str, script: str, arguments: list[str], ranks: int | None) -> None:
    """Start the ranks, and tell how they end."""
    path = Path(folder, "script.py")
    path.write_text(script)
    with Path(folder, "said").open("w") as said, Path(os.devnull).open() as nothing:
        for stream, number in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(stream.fileno(), number)
    if ranks:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "copies"}
        os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    pids = []
    for rank in range(ranks or 1):
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            if ranks:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = [str(path), *arguments]
            runpy.run_path(str(path), run_name="__main__")
            sys.exit()
        pids.append(pid)
    tell(Path(folder, "pids"), " ".join(map(str, pids)))
    failed, left = 0, set(pids)
    while left:
        pid, status = os.wait()
        left.remove(pid)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in left:
                os.kill(other, signal.SIGKILL)
    tell(Path(folder, "ended"), str(failed))
    os._exit(0)


def tell(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
