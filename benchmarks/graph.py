"""How long each stage of the graph takes, and how much memory: `python -m benchmarks.graph NAME`.

Runs every stage of this folder's params.yaml anew, one after the other by `dvc repro --single-item --force` (deleting
the checkpoints in this folder), and keeps the result as benchmarks/results/graph-NAME.json. Seconds are wall-clock and
include DVC's hashing; memory is the largest sum over all processes of a stage of what each has to itself (unique set
size), sampled ten times a second, or as often as takes 2 % of a core: it takes long where processes have much memory.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, hardware
from pipeline.flow import stages

PACKAGES = ("torch", "numpy", "opencv-python-headless", "pyarrow", "dvc", "prefect", "mlflow")


def unique_bytes(root: psutil.Process) -> int:
    """Memory that a process and its descendants do not share with others."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:  # ended between the listing and the look
            continue
    return total


def measure(stage: str) -> dict[str, Any]:
    """Seconds and peak memory of one stage."""
    # Even when forced, these would not do again what is done already
    if stage.startswith("align@"):
        shutil.rmtree(Path("data/aligned") / stage.removeprefix("align@"), ignore_errors=True)
    if stage == "train":
        shutil.rmtree("checkpoints", ignore_errors=True)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started = time.perf_counter()
    process = subprocess.Popen(
        ["dvc", "repro", "--single-item", "--force", stage], env=environment, stdout=subprocess.DEVNULL
    )
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        pause = 0.1
        while not ended.wait(pause):
            looked = time.perf_counter()
            peak = max(peak, unique_bytes(psutil.Process()))
            pause = max(0.1, 50 * (time.perf_counter() - looked))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"{stage} failed")
    print(f"{stage:16} {seconds:7.1f} s {peak / 2**20:7.0f} MiB", flush=True)
    return {"stage": stage, "seconds": round(seconds, 1), "peak_mib": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result, such as quickstart")
    name = parser.parse_args().name
    rows = [measure(stage) for stage in stages(Path.cwd())]
    result = {
        "machine": hardware() | {"memory_gib": round(psutil.virtual_memory().total / 2**30)},
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "stages": rows,
        "total_seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_mib": max(row["peak_mib"] for row in rows),
        "metrics": {
            str(path.parent.relative_to("reports")): json.loads(path.read_text())
            for path in sorted(Path("reports").rglob("metrics.json"))
        },
    }
    (RESULTS / f"graph-{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'total':16} {result['total_seconds']:7.1f} s {result['peak_mib']:7.0f} MiB")


if __name__ == "__main__":
    main()
