"""The head beside its peers: `python -m benchmarks.head [--peers FOLDER]`.

Forward and backward of LMCL at batch 512, 512 dimensions, for 10,575 classes (CASIA-WebFace's), 93,431 (MS1MV3's) and a
million: ours; the bare matrix products, which are the floor; the one-hot formulation; an indexed subtraction with
cross_entropy; and pytorch-metric-learning's CosFaceLoss, which is set up in an environment of its own. Contestants take
turns, on a CPU each in a process of its own; ratios are those of a round. The result goes to
benchmarks/results/head-<cpu or the GPU's name>.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.learning import peers_python
from benchmarks.machine import GPU, hardware, result_of

ROOT = Path(__file__).parents[1]
PEERS = ("bare products", "one-hot", "index", "pytorch-metric-learning")
STEPS = {10_575: 8, 93_431: 4, 1_000_000: 2} if GPU is None else {10_575: 200, 93_431: 50, 1_000_000: 10}
ROUNDS = 5 if GPU is None else 3


def run(python: str, classes: int, rounds: int, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    command = [python, str(ROOT / "benchmarks" / "head_peers.py"), str(classes), str(STEPS[classes]), str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT) if "ours" in names else ""}
    answer = subprocess.run([*command, *names], check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, list[dict[str, Any]]] = json.loads(answer.splitlines()[-1])
    for each in (each for own in found.values() for each in own):
        # The first steps allocate, and are not what training sees.
        each["seconds"] = statistics.median(each["seconds"][max(1, STEPS[classes] // 4) :])
    return found


def contest(python: str, classes: int) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all contestants: in one process on a GPU, each time in one of its own on a CPU."""
    names, count = ["ours", *PEERS], ROUNDS
    if GPU is None and classes == max(STEPS):
        # The others hold the N×C matrix several times over: beyond a small machine's memory.
        names, count = ["ours", "bare products"], 2
    if GPU:
        return run(python, classes, count, names)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            rounds[name] += run(python, classes, 1, [name])[name]
    return rounds


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
    python = peers_python(parser.parse_args().peers.resolve())
    result: dict[str, Any] = {
        "machine": hardware(),
        "batch": 512,
        "embedding": 512,
        "versions": {"torch": torch.__version__},
        "classes": {},
    }
    for classes in STEPS:
        rounds = contest(python, classes)
        result["classes"][str(classes)] = {name: summary(own, rounds["ours"]) for name, own in rounds.items()}
        if "pytorch-metric-learning" in rounds:
            result["versions"]["pytorch-metric-learning"] = rounds["pytorch-metric-learning"][0]["version"]
        print(classes, json.dumps(result["classes"][str(classes)], indent=1), flush=True)
        result_of("head").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
