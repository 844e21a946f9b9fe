"""How the recipe `cosface-casia` begins, with and without warm-up and clipping: `python -m benchmarks.beginning`.

Its network has no batch normalisation. A smaller one of its kind (sphere20) learns real faces (`--aligned`: a folder of
the aligned table) by its head and arithmetic; the rate is as much of the recipe's as `--batch` is of its 512, and the
warm-up, where there is one, of 200 iterations. The result goes to benchmarks/results/beginning.json.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from benchmarks.machine import RESULTS, hardware
from pipeline import tables
from pipeline.cli import RECIPES
from pipeline.executor import cores, keep_memory
from pipeline.params import Train, load_params
from stages.train import loop

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "beginning.json"
CONTESTANTS: dict[str, dict[str, Any]] = {
    "as in the paper": {"warmup": 0, "clip_norm": None},
    "warm-up and clipping": {"warmup": 200, "clip_norm": 5.0},
}


def section(batch: int, warmup: int, clip_norm: float | None) -> Train:
    train = load_params(RECIPES / "cosface-casia.yaml").train
    rate = train.optimizer.learning_rate * batch / train.batch
    return train.model_copy(
        update={
            "backbone": train.backbone.model_copy(update={"name": "sphere20"}),
            "optimizer": train.optimizer.model_copy(update={"learning_rate": rate, "clip_norm": clip_norm}),
            "schedule": train.schedule.model_copy(update={"warmup": warmup}),
            "batch": batch,
        }
    )


def measure(aligned: Path, name: str, batch: int, iterations: int, every: int) -> list[dict[str, Any]]:
    """One contestant, on one core."""
    torch.set_num_threads(1)
    keep_memory()
    columns = tables.read_parts(aligned, tables.ALIGNED, ["identity", "status", "image"])
    rows = np.flatnonzero(np.array(columns["status"].to_pylist()) == "detected")
    labels = np.unique(np.array(columns["identity"].to_pylist())[rows], return_inverse=True)[1]
    train = section(batch, **CONTESTANTS[name])
    training = loop.begin(train, int(labels.max()) + 1, torch.device("cpu"))
    random, order, seen = np.random.default_rng(1), np.empty(0, np.int64), []
    for iteration in range(iterations):
        if len(order) < batch:
            order = random.permutation(len(rows))
        some, order = order[:batch], order[batch:]
        faces = np.stack([simplejpeg.decode_jpeg(columns["image"][int(rows[i])].as_py(), "RGB") for i in some])
        flip = random.random(batch) < train.augment.horizontal_flip
        faces[flip] = faces[flip, :, ::-1]
        images = torch.from_numpy(faces).permute(0, 3, 1, 2)
        try:
            loop.step(training, train, iteration, images, torch.from_numpy(labels[some]))
            if (iteration + 1) % every:
                continue
            row = loop.close_row(training, train, iteration + 1, {})
        except loop.TrainingError as error:
            seen.append({"iteration": iteration + 1, "stopped": str(error)})
            break
        with torch.inference_mode():
            lengths = training.model(images).float().norm(dim=1)
        told = {what: round(getattr(row, what), 4) for what in ("loss", "accuracy", "own_cosine", "gradient_norm")}
        seen.append({"iteration": iteration + 1} | told | {"median_length": float(f"{lengths.median():.3g}")})
        print(name, seen[-1], file=sys.stderr, flush=True)
    return seen


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        folder, name, *numbers = sys.argv[2:]
        print(json.dumps(measure(Path(folder), name, *map(int, numbers))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aligned", type=Path, default=ROOT / "data" / "aligned" / "train")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=25)
    arguments = parser.parse_args()

    def run(name: str) -> list[dict[str, Any]]:
        numbers = map(str, (arguments.batch, arguments.iterations, arguments.every))
        command = [sys.executable, __file__, "--measure", str(arguments.aligned), name, *numbers]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return found

    with ThreadPoolExecutor(cores()) as pool:
        rows = dict(zip(CONTESTANTS, pool.map(run, CONTESTANTS), strict=True))
    result = {
        "machine": hardware(),
        "versions": {"torch": torch.__version__},
        "backbone": "sphere20",
        "batch": arguments.batch,
        "learning_rate": section(arguments.batch, 0, None).optimizer.learning_rate,
        "rows": rows,
    }
    with tables.atomic(RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
