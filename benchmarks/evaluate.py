"""Evaluation measured: `python -m benchmarks.evaluate [--only SECTION ...]`.

scoring: 6,000 pairs of LFW's shape with the full bootstrap, beside the same by lists that repeat their pairs.
coverage: how often 95 % intervals of a TAR have the truth, by how many of 100 different pairs its FAR accepts.
identification: 3,530 probes among a million distractors, 512 numbers each, beside the bare matrix product.
embedding: a set from aligned JPEGs to the table of features, beside the bare forward passes.
The result goes to benchmarks/results/evaluate.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import RESULTS, hardware
from pipeline import tables
from pipeline.params import Synthetic, load_params
from stages.align import run as align
from stages.download import run as download
from stages.evaluate import uncertainty
from stages.evaluate.embed import embed_set
from stages.evaluate.identification import identify
from stages.evaluate.models import load_embedder
from stages.evaluate.uncertainty import REPLICATES
from stages.evaluate.verification import Verification
from stages.train.faces import decode_face
from stages.train.model import build_model, save_model

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "evaluate.json"
FARS = [0.1, 0.01, 0.001]
PROBES, PEOPLE, LENGTH = 3530, 80, 512
DISTRACTORS = int(os.environ.get("DISTRACTORS", "1000000"))
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
        random, weights = np.random.default_rng(1), []
        for _ in range(20):
            times = np.bincount(random.integers(who.count, size=who.count), minlength=who.count)
            weights.append(times[who.left] * np.where(same, 1, times[who.right]))
        begun = time.process_time()
        plain = [by_lists(scores, same, fold, weight) for weight in weights]
        one_plain = (time.process_time() - begun) / len(weights)
        assert plain == [pairs.measure(weight).accuracy for weight in weights]
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


def coverage(sets: int = 1000, replicates: int = 200, pairs: int = 100) -> dict[str, Any]:
    """Of so many sets of normal scores, two deviations apart, drawn as independent pairs."""
    fars = [accepted / pairs for accepted in (1, 2, 3, 5, 10)]
    truths = {far: 1 - NormalDist(2).cdf(NormalDist().inv_cdf(1 - far)) for far in fars}
    random, held, given = np.random.default_rng(1), Counter[float](), Counter[float]()
    same, fold = np.arange(2 * pairs) < pairs, np.arange(2 * pairs) % 10
    uncertainty.LEAST_ACCEPTED = 1  # what it should be is what is asked here
    for number in range(sets):
        scores = np.where(same, random.normal(2, 1, 2 * pairs), random.normal(0, 1, 2 * pairs)).astype(np.float32)
        found = uncertainty.intervals(Verification(scores, same, fold, fars), None, replicates=replicates, seed=number)
        for far in fars:
            bounds = found.bounds[f"tar_at_far_{far}"]
            given[far] += bounds is not None
            held[far] += bounds is not None and bounds[0] <= truths[far] <= bounds[1]
    shares = {f"{round(far * pairs)}": round(held[far] / given[far], 3) for far in fars}
    return {"sets": sets, "replicates": replicates, "different_pairs": pairs, "share_with_truth_by_accepted": shares}


def identification() -> dict[str, Any]:
    """MegaFace at full size; ours and the bare product over the same blocks take turns, each in its own process."""
    result: dict[str, Any] = {"probes": PROBES, "people": PEOPLE, "distractors": DISTRACTORS, "length": LENGTH}
    for mates in ("at random", "alike"):
        rounds = [{kind: _child(kind, mates) for kind in ("bare", "ours")} for _ in range(2)]
        result[f"mates {mates}"] = {
            "seconds": [{kind: round(found["seconds"], 1) for kind, found in each.items()} for each in rounds],
            "times_the_bare_product": sorted(
                round(each["ours"]["seconds"] / each["bare"]["seconds"], 3) for each in rounds
            ),
            "peak_gib": max(each["ours"]["peak_gib"] for each in rounds),
            "rank_1": rounds[0]["ours"]["rank_1"],
        }
    return result


def _child(kind: str, mates: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--identify", kind, mates]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def identify_once(kind: str, mates: str) -> dict[str, Any]:
    """One contestant."""
    random = np.random.default_rng(1)

    def unit(vectors: NDArray) -> NDArray[np.float32]:
        return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)

    people = np.arange(PROBES) % PEOPLE
    noise = random.standard_normal((PROBES, LENGTH))
    probes = unit(noise if mates == "at random" else noise + 1.2 * random.standard_normal((PEOPLE, LENGTH))[people])
    some = unit(random.standard_normal((1 << 15, LENGTH)))

    def distractors() -> Iterator[NDArray[np.float32]]:
        left = DISTRACTORS
        while left:
            signs = random.choice(np.array([-1, 1], np.float32), LENGTH)  # others each time, as random
            for start in range(0, min(left, len(some)), 8192):
                yield some[start : start + min(8192, left)] * signs
            left -= min(left, len(some))

    began, cpu = time.perf_counter(), torch.device("cpu")
    share = float("nan")
    if kind == "ours":
        counts = [count for count in (10, 100, 1000, 10_000, 100_000, 1_000_000) if count <= DISTRACTORS]
        share = float(identify(probes, people, distractors(), counts, [1e-6], cpu).identified()[-1])
    else:
        on_device, size = torch.from_numpy(probes), 1024
        for block in distractors():
            for start in range(0, len(block), size):
                on_device @ torch.from_numpy(block[start : start + size]).T
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "peak_gib": round(peak, 2), "rank_1": share}


def embedding() -> dict[str, Any]:
    """Images/s of a set from aligned JPEGs to the table of features, against the bare forward passes of its faces."""
    params = load_params(ROOT / "params.yaml")
    network = params.train.backbone
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        description = {"backbone": network.model_dump()}
        save_model(work / "models", build_model(network), torch.nn.Linear(2, 2), description)
        model = load_embedder(work / "models", torch.device("cpu"))
        aligned = aligned_faces(work)
        images = [
            image for image in tables.read_parts(aligned, tables.ALIGNED, ["image"])["image"].to_pylist() if image
        ]
        faces = np.stack([decode_face(image, model.width) for image in images])
        batch, rounds = params.evaluate.batch, []
        for turn in range(ROUNDS):
            began = time.perf_counter()
            embed_set(aligned, model, work / f"out{turn}", batch=batch, flip=True)
            ours, began = time.perf_counter() - began, time.perf_counter()
            for start in range(0, len(faces), batch):
                pixels = torch.from_numpy(faces[start : start + batch]).permute(0, 3, 1, 2)
                for each in (pixels, pixels.flip(3)):
                    model(each)
            rounds.append({"ours": ours, "bare": time.perf_counter() - began})
    return {
        "images": len(images),
        "backbone": network.name,
        "share_of_the_bare_forward_pass": sorted(round(each["bare"] / each["ours"], 3) for each in rounds),
    }


def aligned_faces(work: Path) -> Path:
    """2,000 procedural faces, aligned."""
    params = load_params(ROOT / "params.yaml")
    source = Synthetic.model_validate(params.download.probes.model_dump() | {"identities": 200, "images": 10})
    download.run("probes", source, work / "raw", params.machine)
    align.run(work / "raw", work / "aligned", params.align, params.machine, evaluation=True, report=work / "report")
    return work / "aligned"


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "scoring": scoring,
    "coverage": coverage,
    "identification": identification,
    "embedding": embedding,
}


def main() -> None:
    if sys.argv[1:2] == ["--identify"]:
        print(json.dumps(identify_once(*sys.argv[2:4])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in parser.parse_args().only:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
        result[name] = {"machine": hardware(), "versions": versions} | SECTIONS[name]()
        print(name, json.dumps(result[name], indent=2), flush=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
