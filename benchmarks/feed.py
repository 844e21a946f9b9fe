"""Whether a GPU waits for data: `python -m benchmarks.feed [--faces ../shared/faces]`.

Trains by recipe ir50-modern on real photographs (`CASIA-WebFace.zip`), through the loop and the loader as the stage
does, with each cache and with two augmentations: the paper's flip, and the recipe's. Told are images/s, the share of
the time in which training waited for a batch, and the rate beside that of the same steps on one batch that is there
already. Losses are finite, or the loop would have stopped. The result goes to benchmarks/results/feed-<GPU>.json.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning import ROOT, prepare, settings
from benchmarks.machine import hardware, result_of
from pipeline import tables
from pipeline.executor import choose_device, keep_memory
from pipeline.params import Train, load_params
from stages.shard.reader import Shards
from stages.train import loop
from stages.train.loader import Batch, Loader, loader_processes
from stages.train.meter import Meter

WARM_UP = 10
FLIP = {"shift": 0, "crop": 0.0, "low_resolution": 0.0, "colour": 0.0, "blur": 0.0, "jpeg": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cosface-learning")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=512)
    arguments = parser.parse_args()
    keep_memory()
    device = choose_device("auto")
    recipe = settings("photographs", ROOT / "pipeline" / "recipes" / "photographs.yaml", arguments.faces.resolve(), 1)
    _, folder = prepare(recipe, arguments.work.resolve())
    shards = Shards(str(folder))
    modern = load_params(ROOT / "pipeline" / "recipes" / "ir50-modern.yaml").train
    # these faces have no margin around them to shift within
    augment = modern.augment.model_copy(update={"shift": 0})
    modern = modern.model_copy(update={"batch": arguments.batch, "augment": augment})
    classes = int(np.count_nonzero(shards.identities()["train"].to_numpy()))
    training = loop.begin(modern, classes, device)
    split, face = shards.split("train"), shards.index.face

    def opened(train: Train, cache: Any, processes: int = 0) -> Loader:
        folder = arguments.work.resolve() / "decoded"
        return Loader(split, face, train, device, cache=cache, processes=processes, cache_folder=folder)

    def measured(batches: Iterator[Batch], loader: Loader) -> dict[str, float]:
        meter = Meter(modern, loader, device, 0)
        for i in range(WARM_UP + arguments.steps):
            if i == WARM_UP:
                meter.read(i)  # waits for the GPU
                meter.reset(0)
            batch = next(batches)
            loop.step(training, modern, 20_000, batch.images, batch.labels)
        speed = meter.read(arguments.steps)
        assert training.broken[0] == 0
        return {"images_per_second": round(speed.images_per_second), "data_wait": round(speed.data_wait, 4)}

    some = opened(modern, "none")
    with closing(iter(some)) as batches:
        alone = [measured(repeat(next(batches)), some) for _ in range(2)][-1]["images_per_second"]
    rows: list[dict[str, Any]] = []
    result = {
        "machine": hardware(),
        "versions": {"torch": torch.__version__},
        "batch": arguments.batch,
        "step_alone_images_per_second": alone,
        "rows": rows,
    }
    for name, chosen in (("flip", augment.model_copy(update=FLIP)), ("recipe's", augment)):
        train = modern.model_copy(update={"augment": chosen})
        processes = loader_processes(recipe.machine, train, device, 1)
        for cache in ("none", "host") if chosen.by_image else ("none", "host", "device"):
            loader = opened(train, cache, processes)
            with closing(iter(loader)) as batches:
                found = measured(batches, loader)
            found["of_the_step_alone"] = round(found["images_per_second"] / alone, 3)
            rows.append({"augmentation": name, "cache": cache, "processes": processes} | found)
            print(json.dumps(rows[-1]), flush=True)
            with tables.atomic(result_of("feed")) as path:
                path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
