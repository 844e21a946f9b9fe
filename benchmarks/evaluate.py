"""Evaluation measured: `python benchmarks/evaluate.py [--only SECTION ...]`.

scoring: 6,000 pairs of LFW's shape with the full bootstrap, beside the same by lists that repeat their pairs.
The result goes to benchmarks/results/evaluate.json.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.executor import cores
from stages.evaluate import uncertainty
from stages.evaluate.uncertainty import REPLICATES
from stages.evaluate.verification import Verification

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "evaluate.json"
FARS = [0.1, 0.01, 0.001]
ROUNDS = 5


def scoring() -> dict[str, Any]:
    """Seconds of one core for 6,000 pairs in ten folds, of some 3,800 people, with 1,000 replicates."""
    left, right, same, fold, scores = lfw_like()
    who = uncertainty.people(left, right, same)
    assert who is not None
    rounds = []
    for _ in range(ROUNDS):
        wall, begun = time.perf_counter(), time.process_time()
        pairs = Verification(scores, same, fold, FARS)
        found = uncertainty.intervals(pairs, who)
        ours, wall = time.process_time() - begun, time.perf_counter() - wall
        random, begun = np.random.default_rng(1), time.process_time()
        some = 20
        for _ in range(some):
            times = np.bincount(random.integers(who.count, size=who.count), minlength=who.count)
            weight = times[who.left] * np.where(same, 1, times[who.right])
            plain = by_lists(scores, same, fold, weight)
            assert plain == pairs.measure(weight).accuracy
        one_plain = (time.process_time() - begun) / some
        rounds.append({"seconds": ours, "wall_seconds": wall, "plain_seconds": 2 * REPLICATES * one_plain})
    return {
        "pairs": len(same),
        "people": who.count,
        "replicates": REPLICATES,
        "accuracy_interval": found.bounds["accuracy"],
        "seconds": statistics.median(each["seconds"] for each in rounds),
        "wall_seconds": statistics.median(each["wall_seconds"] for each in rounds),
        "times_as_fast_as_lists": sorted(round(each["plain_seconds"] / each["seconds"], 2) for each in rounds),
    }


def by_lists(scores: NDArray, same: NDArray, fold: NDArray, weight: NDArray) -> float:
    """Accuracy of a replicate as one would write it down: pairs listed as often as drawn, every cut counted."""
    listed = np.repeat(np.arange(len(same)), weight)
    score, truth, part = scores[listed].astype(np.float64), same[listed], fold[listed]
    accuracies = []
    for number in np.unique(part):
        training = part != number
        distinct = np.unique(score[training])
        cuts = np.concatenate([distinct[:1], (distinct[:-1] + distinct[1:]) / 2, [np.nextafter(distinct[-1], 9)]])
        people, strangers = (np.sort(score[training & kind]) for kind in (truth, ~truth))
        right = len(people) - np.searchsorted(people, cuts) + np.searchsorted(strangers, cuts)
        best = np.flatnonzero(right == right.max())
        threshold = cuts[best[(len(best) - 1) // 2]]
        accuracies.append(float(np.mean((score[~training] >= threshold) == truth[~training])))
    return float(np.mean(accuracies))


def lfw_like() -> tuple[list[str], list[str], NDArray, NDArray, NDArray]:
    """Names, truths, folds and scores: of each fold 300 pairs of one person and 300 of two, drawn from 428 people."""
    random = np.random.default_rng(1)
    left, right = [], []
    for fold in range(10):
        for k in range(600):
            one, other = random.choice(428, 2, replace=False)
            left.append(f"{fold}-{one}/1")
            right.append(f"{fold}-{one if k < 300 else other}/2")
    same = np.arange(6000) % 600 < 300
    scores = np.where(same, random.normal(0.6, 0.15, 6000), random.normal(0.0, 0.12, 6000)).astype(np.float32)
    return left, right, same, np.arange(6000) // 600, scores


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {"scoring": scoring}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in parser.parse_args().only:
        result[name] = SECTIONS[name]()
        print(name, json.dumps(result[name], indent=2), flush=True)
    result["machine"] = {"cores": cores(), "processor": platform.processor() or platform.machine()}
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
