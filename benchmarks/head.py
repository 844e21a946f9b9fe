"""The head beside its peers: `python benchmarks/head.py [--peers FOLDER]`.

Forward and backward of LMCL at batch 512, 512 dimensions, for 10,575 classes (CASIA-WebFace's), 93,431 (MS1MV3's) and a
million: ours; the bare matrix products, which are the floor; the one-hot formulation; an indexed subtraction with
cross_entropy; and pytorch-metric-learning's CosFaceLoss, which is set up in an environment of its own. Contestants take
turns, each in a process of its own; ratios are those of a round. The result goes to benchmarks/results/head.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from pipeline.executor import cores

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "head.json"
PINNED = ["torch==2.13.0", "numpy", "pytorch-metric-learning==2.9.0"]
PEERS = ("bare products", "one-hot", "index", "pytorch-metric-learning")
STEPS = {10_575: 8, 93_431: 4, 1_000_000: 2}
ROUNDS = 5


def run(python: str, name: str, classes: int) -> dict[str, Any]:
    command = [python, str(ROOT / "benchmarks" / "head_peers.py"), name, str(classes), str(STEPS[classes])]
    environment = os.environ | {"PYTHONPATH": str(ROOT) if name == "ours" else ""}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    # The first step allocates, and is not what training sees.
    return found | {"seconds": statistics.median(found["seconds"][1:])}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def summary(own: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a contestant's rounds, beside ours."""
    return {
        "seconds": spread([each["seconds"] for each in own]),
        "extra_mib": round(statistics.median(each["extra_mib"] for each in own)),
        "peak_mib": round(max(each["peak_mib"] for each in own)),
        "loss": own[0]["loss"],
        "our_share_of_its_time": spread([a["seconds"] / b["seconds"] for a, b in zip(ours, own, strict=True)]),
        "our_share_of_its_memory": spread([a["extra_mib"] / b["extra_mib"] for a, b in zip(ours, own, strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "cosface-head-peers")
    peers: Path = parser.parse_args().peers
    if not (peers / "complete").exists():
        venv.create(peers, clear=True, with_pip=True)
        subprocess.run([peers / "bin" / "python", "-m", "pip", "install", "--quiet", *PINNED], check=True)
        (peers / "complete").touch()
    theirs = str(peers / "bin" / "python")
    result: dict[str, Any] = {
        "machine": {"cores": cores(), "processor": platform.processor() or platform.machine()},
        "batch": 512,
        "embedding": 512,
        "versions": {"torch": torch.__version__},
        "classes": {},
    }
    for classes in STEPS:
        # Of a million classes, the others hold the N×C matrix several times over: beyond this machine's memory.
        names = ("ours", *PEERS) if classes < 1_000_000 else ("ours", "bare products")
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(ROUNDS if classes < 1_000_000 else 2):
            for name in names:
                rounds[name].append(run(sys.executable if name == "ours" else theirs, name, classes))
        result["classes"][str(classes)] = {name: summary(own, rounds["ours"]) for name, own in rounds.items()}
        if "pytorch-metric-learning" in rounds:
            result["versions"]["pytorch-metric-learning"] = rounds["pytorch-metric-learning"][0]["version"]
        print(classes, json.dumps(result["classes"][str(classes)], indent=1), flush=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
