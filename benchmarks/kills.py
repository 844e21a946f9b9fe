"""Whether a training that is killed again and again ends in the same bits: `python -m benchmarks.kills [--kills 20]`.

Trains on the shards of this folder, by its params.yaml but for a shorter schedule, once in peace; then anew, killed by
`kill -9` at random moments of its life, from its first import on, and started again each time, until it has been killed
so often. A training that ends before is compared, and another one begun. What was killed when, and the SHA-256 of
each model, are kept as benchmarks/results/kills.json. CPU alone: on a GPU only rounding is the same.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, hardware
from pipeline.params import load_params
from pipeline.tables import sha256_file

ROOT = Path(__file__).parents[1]
OUTCOME = ("backbone.safetensors", "head.safetensors", "history.csv")


def prepare(folder: Path, iterations: int, batch: int) -> None:
    """A project whose training is short, and leaves a checkpoint after each iteration."""
    document = load_params(Path("params.yaml")).model_dump()
    document["train"] |= {"data": str(Path("data/shards").resolve()), "batch": batch, "checkpoint_every": iterations}
    document["train"]["schedule"] |= {"iterations": iterations, "warmup": iterations // 10}
    if "milestones" in document["train"]["schedule"]:
        document["train"]["schedule"]["milestones"] = [iterations // 2]
    document["machine"] |= {"device": "cpu", "checkpoint_minutes": 0.001}
    document["tracking"]["enabled"] = False
    (folder / "params.yaml").write_text(json.dumps(document))  # which YAML 1.2 takes


def start(folder: Path) -> subprocess.Popen[bytes]:
    """`python -m stages.train` there, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def outcome(folder: Path) -> dict[str, str]:
    """The SHA-256 of what a finished training has left."""
    return {name: sha256_file(folder / "models" / name) for name in OUTCOME}


def newest(folder: Path) -> int:
    """Iterations that its newest checkpoint has behind it; 0 where there is none."""
    return max((int(path.stem[-8:]) for path in folder.rglob("iteration-????????.pt")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    killed: list[dict[str, Any]] = []
    ended: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        peace, war = Path(temporary, "peace"), Path(temporary, "war")
        for folder in (peace, war):
            folder.mkdir()
            prepare(folder, arguments.iterations, arguments.batch)
        started = time.perf_counter()
        if start(peace).wait():
            raise SystemExit("the training has failed: run `python -m stages.train` here to see why")
        alone, whole = time.perf_counter() - started, outcome(peace)
        last = False
        while not last:
            last = len(killed) == arguments.kills
            process, moment = start(war), moments.uniform(0, alone)
            try:
                process.wait(None if last else moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                if process.wait() == -signal.SIGKILL:
                    killed.append({"after_seconds": round(moment, 2), "newest_checkpoint": newest(war)})
                    print(f"kill {len(killed)}: {killed[-1]}", flush=True)
                    continue
            if process.returncode:
                raise SystemExit(f"a training has ended with status {process.returncode} after kill {len(killed)}")
            ended.append(outcome(war))
            print(f"ended after {len(killed)} kills: {'the same' if ended[-1] == whole else ended[-1]}", flush=True)
            for name in ("models", "checkpoints"):
                shutil.rmtree(war / name)
    result = {
        "machine": hardware(),
        "versions": {package: version(package) for package in ("torch", "numpy")},
        "iterations": arguments.iterations,
        "batch": arguments.batch,
        "seed_of_moments": arguments.seed,
        "seconds_in_peace": round(alone, 1),
        "sha256_in_peace": whole,
        "kills": killed,
        "ended": len(ended),
        "ended_in_the_same_bits": sum(found == whole for found in ended),
    }
    (RESULTS / "kills.json").write_text(json.dumps(result, indent=2) + "\n")
    if any(found != whole for found in ended):
        raise SystemExit("a killed training has ended in other bits")


if __name__ == "__main__":
    main()
