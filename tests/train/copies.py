"""Ranks as torchrun starts them, in less time: `python -m tests.train.copies COUNT SCRIPT ARGUMENT...`.

One process imports torch and all of training, and is then copied; by torchrun each rank would import them anew. Where
one fails, all end.
"""

import importlib
import os
import runpy
import signal
import socket
import sys

PRELOADED = ("stages.train.run", "torch._dynamo")
"""The latter is what an optimizer's first step imports."""


def main() -> None:
    count, script = int(sys.argv[1]), sys.argv[2]
    for module in PRELOADED:
        importlib.import_module(module)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "copies"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = set[int]()
    for rank in range(count):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = sys.argv[2:]
            runpy.run_path(script, run_name="__main__")
            return
        ranks.add(pid)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank has failed: {status}")


if __name__ == "__main__":
    main()
