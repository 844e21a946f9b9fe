"""Learning on real faces: `python -m benchmarks.learning [--faces ../shared/faces]`.

Every head trains the same network (the small one; on a GPU iresnet50) on the same photographs (`CASIA-WebFace.zip`) for
as many iterations, from three seeds each, and so does pytorch-metric-learning's CosFaceLoss in place of our head; then
IR-18 at quarter width as a plain loop outside of this project had trained it. Measured on the pairs of LFW (`lfw.tgz`,
`pairs.txt`) by the last iteration's model. With `--recipe FILE --name NAME`, another recipe instead: a params.yaml
whose `download` is replaced.

Each run is a process of its own, and what it finds is kept in the folder `--work`: started again, the benchmark goes on
where it was. The result, of all runs there, goes to benchmarks/results/learning-<cpu or the GPU's name>.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import GPU, hardware, result_of
from pipeline import tables
from pipeline.executor import choose_device, keep_memory
from pipeline.params import NOTHING_LOCAL, CosFace, Params, flatten, load_params
from pipeline.progress import configure_logging
from stages.align import run as align
from stages.download import run as download
from stages.evaluate import run as evaluate
from stages.evaluate.embed import embed_set
from stages.evaluate.models import load_embedder
from stages.shard import run as shard
from stages.shard.reader import Shards
from stages.train.backbones import forward_flops
from stages.train.checkpoint import Checkpoints
from stages.train.loader import Loader, loader_processes
from stages.train.loop import begin, train
from stages.train.model import save_model
from stages.train.run import emulated
from stages.train.validation import ByIdentity, ByImage

ROOT = Path(__file__).parents[1]
RESULT = result_of("learning")
PEER = "pytorch-metric-learning"
PINNED = f"{PEER}==2.9.0"

NETWORK, ITERATIONS = ("small", 240) if GPU is None else ("iresnet50", 600)
COSFACE = {"name": "cosface", "scale": 64.0, "margin": 0.35}
HEADS: dict[str, dict[str, Any]] = {
    "cosface": COSFACE,
    PEER: COSFACE,
    "nsl": {"name": "nsl", "scale": 64.0},
    "softmax": {"name": "softmax"},
    "arcface": {"name": "arcface", "scale": 64.0, "margin": 0.5, "easy": False},
    "adaface": {"name": "adaface", "scale": 64.0, "margin": 0.4, "concentration": 0.333, "momentum": 0.01},
    # λ is at its least half-way. (SphereFace's authors let it fall by 0.12 an iteration over 28,000 of them: there it
    # is after 6 in a hundred. Of so short a training that is before the warm-up is over, and nothing is learnt.)
    "a-softmax": {"name": "a-softmax", "margin": 4, "first": 1000.0, "least": 5.0, "rate": 2 * 199 / ITERATIONS},
    f"{PEER}, its own start": COSFACE,
}
REFERENCE = "iresnet18-quarter"
IMAGES, EPOCHS = 10_750, 12
"""Of the reference: photographs with a face, and how often each is seen."""


def compared(head: dict[str, Any]) -> dict[str, Any]:
    """The default recipe, of another length, with another head; on a GPU with a network that is worth one."""
    document = load_params(ROOT / "params.yaml").model_dump()
    precision = "fp32" if emulated("bf16", choose_device("auto")) else "bf16"
    document["train"] |= {"head": head, "precision": precision, "checkpoint_every": ITERATIONS}
    document["train"]["compile"] = GPU is not None
    document["train"]["backbone"]["name"] = NETWORK
    document["train"]["schedule"] |= {
        "iterations": ITERATIONS,
        "milestones": [round(0.6 * ITERATIONS), round(0.85 * ITERATIONS)],
    }
    return document


def reference() -> dict[str, Any]:
    """As the plain loop had it: all photographs, none kept back."""
    document = load_params(ROOT / "params.yaml").model_dump()
    document["shard"]["clean"] |= {"duplicates": False, "near_duplicates": None, "same_names": False}
    document["shard"]["validation"]["share"] = 0.0
    document["train"]["backbone"]["name"] = REFERENCE
    document["train"]["compile"] = True
    iterations = EPOCHS * IMAGES // 128
    milestones = [iterations // 2, iterations * 4 // 5]
    document["train"]["schedule"] |= {"iterations": iterations, "warmup": 0, "milestones": milestones}
    return document


def settings(name: str, recipe: Path | None, faces: Path, seed: int) -> Params:
    """All of params.yaml for a contestant, on these photographs."""

    def archive(file: str, pairs: str | None) -> dict[str, Any]:
        of_pairs = str(faces / pairs) if pairs else None
        location = {"location": str(faces / file), "sha256": None, "pairs": of_pairs, "pairs_sha256": None}
        watch = [str(faces / file), of_pairs or NOTHING_LOCAL]
        return {"source": "archive", "watch": watch} | location

    if recipe:
        document = load_params(recipe).model_dump()
    else:
        document = reference() if name == REFERENCE else compared(HEADS[name])
    absent = {"source": "none", "watch": [NOTHING_LOCAL, NOTHING_LOCAL]}
    document["download"] |= {"probes": absent, "distractors": absent}
    document["download"]["train"] = archive("CASIA-WebFace.zip", None)
    document["download"]["lfw"] = archive("lfw.tgz", "pairs.txt")
    document["shard"]["clean"]["names"] = str(faces / "names.txt")
    document["shard"]["clean"]["exclude"] = str(ROOT / "data" / "exclude.csv")
    document["train"]["seed"] = seed
    return Params.model_validate(document)


def prepare(params: Params, work: Path) -> tuple[Path, Path]:
    """Folders of the aligned sets and of the shards; made where they are missing."""
    key = params.align.model_dump(), params.shard.model_dump()
    aligned = work / f"aligned-{tables.fingerprint(key[0])[:8]}"
    shards = work / f"shards-{tables.fingerprint(*key)[:8]}"
    with tables.locked(work / "preparation"):
        for name, source in (("train", params.download.train), ("lfw", params.download.lfw)):
            raw = work / "raw" / name
            if not raw.exists() or raw.with_name(f".{name}.unfinished").exists():
                download.run(name, source, raw, params.machine, work / "downloads")
            if not (aligned / name).exists() or (aligned / f".{name}.unfinished").exists():
                report = work / "reports" / name
                align.run(raw, aligned / name, params.align, params.machine, evaluation=name != "train", report=report)
        if not (shards / "index.json").exists():
            known, page = {"lfw": aligned / "lfw"}, work / "reports" / shards.name
            shard.run(aligned / "train", known, shards, page, params.shard, params.align.face, params.machine)
    return aligned, shards


def run(name: str, params: Params, work: Path, out: Path) -> None:
    """Train and measure a contestant, in a process of its own."""
    aligned, folder = prepare(params, work)
    keep_memory()
    device = choose_device(params.machine.device)
    shards = Shards(str(folder))
    classes = int(np.count_nonzero(shards.identities()["train"].to_numpy()))
    training = begin(params.train, classes, device)
    if name.startswith(PEER):
        from benchmarks.learning_peer import replace_head

        assert isinstance(params.train.head, CosFace)
        replace_head(training, params.train.head, same_start=name == PEER)
    made_by = {"name": name, "train": params.train.model_dump(mode="json"), "data": shards.hashes()}
    checkpoints = Checkpoints(work / "checkpoints", made_by, kept=1)
    found = None if name.startswith(PEER) else checkpoints.newest()  # a foreign head cannot go on from one
    done = 0
    if found:
        done = found.iteration
        training.restore(found)
    split, face = shards.split("train"), shards.index.face
    started, computed = time.perf_counter(), time.process_time()
    processes = loader_processes(params.machine, params.train, device, 1)
    cache, decoded = params.machine.cache, work / "decoded"
    loader = Loader(split, face, params.train, device, cache=cache, processes=processes, cache_folder=decoded)
    loader.load_state_dict({"iteration": done})
    validation = (ByImage if shards.val_pairs() is None else ByIdentity)(shards, params.train)
    train(params.train, params.machine, loader, validation, training, done, device, checkpoints, lambda *_: None)
    seconds, computed = time.perf_counter() - started, time.process_time() - computed
    models = work / "models" / out.stem
    save_model(models, training.outcome, training.head, {"backbone": params.train.backbone.model_dump()})
    results = work / "reports" / out.stem
    raw = work / "raw" / "lfw"
    embedded = work / "embedded" / out.stem / "lfw"
    embed_set(aligned / "lfw", load_embedder(models, device), embedded, batch=params.evaluate.batch, flip=True)
    metrics = evaluate.run(raw, embedded, None, results, params.evaluate)
    last = asdict(training.history[-1])
    row = {
        "seed": params.train.seed,
        "lfw": metrics.accuracy,
        "lfw_se_of_folds": metrics.accuracy_se,
        "lfw_auc": metrics.auc,
        **{key: last[key] for key in ("loss", "accuracy", "own_cosine", "nearest_cosine", "val_accuracy", "val_auc")},
        "seconds": seconds,
        "core_seconds": computed,
        "of_iterations": params.train.schedule.iterations - done,
    }
    content = {
        "name": name,
        "fingerprint": identity(params),
        "params": distinctive(params),
        "mflop_a_face": round(forward_flops(params.train.backbone) / 1e6),
        "iterations": params.train.schedule.iterations,
        "training_images": len(split),
        "identities": classes,
        "images_seen": params.train.schedule.iterations * params.train.batch,
        "threads": torch.get_num_threads(),
        "run": {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()},
    }
    with tables.atomic(out) as path:
        path.write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(checkpoints.folder)


def identity(params: Params) -> str:
    """Of all that decides a run."""
    return tables.fingerprint(params.model_dump(exclude={"download", "audit", "machine", "tracking"}))


def distinctive(params: Params) -> dict[str, Any]:
    """What is unlike params.yaml, by dotted names."""
    sections = ("align", "shard", "train", "evaluate")
    here, default = (
        {key: value for name in sections for key, value in flatten(getattr(each, name), name).items()}
        for each in (params, load_params(ROOT / "params.yaml"))
    )
    without = {"train.data", "train.seed", "shard.clean.names", "shard.clean.exclude"}
    return {key: value for key, value in here.items() if key not in without and default.get(key) != value}


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean, and its standard error where there are several."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": round(statistics.mean(values), 5), "se": None if error is None else round(error, 5)}


def record(work: Path) -> dict[str, Any]:
    """All that was found so far."""
    contestants: dict[str, Any] = {}
    for path in sorted((work / "runs").glob("*.json")):
        content = json.loads(path.read_text())
        own, row = content.pop("name"), content.pop("run")
        del content["fingerprint"]  # another one for each seed
        contestants.setdefault(own, content | {"runs": []})["runs"].append(row)
    for content in contestants.values():
        content["runs"].sort(key=lambda row: row["seed"])
        content["lfw"] = spread([row["lfw"] for row in content["runs"]])
    ours, differences = contestants.get("cosface"), {}
    for name in contestants:
        if ours and name in HEADS and name != "cosface":
            theirs = {row["seed"]: row["lfw"] for row in contestants[name]["runs"]}
            pairs = [(row["lfw"], theirs[row["seed"]]) for row in ours["runs"] if row["seed"] in theirs]
            differences[name] = spread([a - b for a, b in pairs]) | {"seeds": len(pairs)}
    result = {
        "machine": hardware(),
        "versions": {"torch": version("torch"), PEER: PINNED.partition("==")[2]},
        "contestants": contestants,
        "lfw_of_cosface_less_that_of": differences,
    }
    with tables.atomic(RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def peers_python(folder: Path) -> str:
    """Of an environment that has pytorch-metric-learning beside all of this one."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", PINNED], check=True)
        here = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(here) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "complete").touch()
    return str(python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--work", type=Path, default=temporary / "cosface-learning")
    parser.add_argument("--peers", type=Path, default=temporary / "cosface-learning-peers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", default=[*HEADS, REFERENCE], help="some of the contestants")
    parser.add_argument("--recipe", type=Path, help="a params.yaml, to be the only contestant")
    parser.add_argument("--name", default="recipe", help="of the recipe")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    faces, work = arguments.faces.resolve(), arguments.work.resolve()
    recipe: Path | None = arguments.recipe and arguments.recipe.resolve()
    names: list[str] = [arguments.name] if recipe else arguments.names
    if arguments.run:
        configure_logging()
        run(names[0], settings(names[0], recipe, faces, arguments.seeds[0]), work, arguments.run)
        return
    plan = [(name, seed) for seed in arguments.seeds for name in names if name != REFERENCE]
    plan += [(REFERENCE, arguments.seeds[0])] * (REFERENCE in names)
    for name, seed in plan:
        params = settings(name, recipe, faces, seed)
        out = work / "runs" / f"{name.replace(' ', '-')}-{seed}.json"
        if not (out.exists() and json.loads(out.read_text())["fingerprint"] == identity(params)):
            python = peers_python(arguments.peers.resolve()) if name.startswith(PEER) else sys.executable
            command = [python, __file__, "--faces", str(faces), "--work", str(work), "--seeds", str(seed)]
            command += ["--recipe", str(recipe), "--name", name] if recipe else ["--names", name]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([*command, "--run", str(out)], check=True, env=environment)
        found = record(work)["contestants"][name]
        row = next(row for row in found["runs"] if row["seed"] == seed)
        print(f"{name}, seed {seed}: {json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
