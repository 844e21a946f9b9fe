"""Choosing a recipe without a test set: `python -m benchmarks.choice --recipe FILE --name NAME`.

Trains a recipe, with some values of its section train changed (`--change batch=64 augment.crop=0.6`), on the
photographs (`--faces`: CASIA-WebFace.zip) of all but 12 % of the people, and tells how well it verifies those 12 %: by
cosines of the concatenated embeddings of a face and its mirror image, over all pairs of their photographs, after each
third of the training. LFW has no part in it.

Each trial is kept in benchmarks/results/choice-<cpu or the GPU's name>.json under its name.
"""

import argparse
import json
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML

from benchmarks.learning import ROOT, distinctive, prepare, settings
from benchmarks.machine import hardware, result_of
from pipeline import tables
from pipeline.executor import choose_device, keep_memory
from pipeline.params import Params
from pipeline.progress import configure_logging
from stages.evaluate.scoring import unit
from stages.evaluate.verification import threshold_at
from stages.shard.reader import Shards
from stages.train.backbones import forward_flops
from stages.train.checkpoint import Checkpoints
from stages.train.loader import Loader, loader_processes, validation_batches
from stages.train.loop import Training, begin, train
from stages.train.validation import auc

RESULT = result_of("choice")
SHARE = 0.12
FAR = 0.01


class AllPairs:
    """Verification of people whom the model does not know."""

    def __init__(self, shards: Shards, params: Params) -> None:
        self._split, self._face, self._params = shards.split("val"), shards.index.face, params.train
        self.found: list[dict[str, float]] = []

    @torch.inference_mode()
    def __call__(self, training: Training, device: torch.device) -> dict[str, float]:
        """Over all pairs of images of the validation split: AUC, and TAR at a FAR of 1 %."""
        width = self._params.backbone.width
        embeddings, mirrored, labels = [], [], []
        with training.judging() as model:
            for batch in validation_batches(self._split, self._face, 128, width, device):
                embeddings.append(model(batch.images).cpu())
                mirrored.append(model(batch.images.flip(3)).cpu())
                labels.append(batch.labels.cpu())
        features = unit(torch.cat(embeddings).numpy(), torch.cat(mirrored).numpy(), "concatenate")
        left, right = np.triu_indices(len(features), 1)
        person = torch.cat(labels).numpy()
        scores, same = (features @ features.T)[left, right], person[left] == person[right]
        threshold = threshold_at(FAR, scores, same)
        assert threshold is not None
        self.found.append(
            {"auc": auc(scores[same], scores[~same]), "tar_at_far_0.01": float((scores[same] >= threshold).mean())}
        )
        print(self.found[-1], flush=True)
        return {"val_auc": self.found[-1]["auc"]}


def changed(params: Params, changes: list[str]) -> Params:
    """With people kept back, three validations, and the changes in section train."""
    document = params.model_dump()
    document["shard"]["validation"] = {"by": "identity", "share": SHARE, "pairs": 6000}
    for change in changes:
        key, _, value = change.partition("=")
        *sections, last = key.split(".")
        place = document["train"]
        for section in sections:
            place = place[section]
        place[last] = YAML(typ="safe").load(value)
    document["train"]["checkpoint_every"] = max(1, document["train"]["schedule"]["iterations"] // 3)
    return Params.model_validate(document)


def tried(params: Params, work: Path) -> dict[str, Any]:
    """What a trial finds."""
    _, folder = prepare(params, work)
    keep_memory()
    device = choose_device(params.machine.device)
    shards = Shards(str(folder))
    people = np.count_nonzero(shards.identities()["train"].to_numpy())
    training = begin(params.train, int(people), device)
    split, face = shards.split("train"), shards.index.face
    processes = loader_processes(params.machine, params.train, device, 1)
    cache, decoded = params.machine.cache, work / "decoded"
    loader = Loader(split, face, params.train, device, cache=cache, processes=processes, cache_folder=decoded)
    loader.load_state_dict({"iteration": 0})
    verification = AllPairs(shards, params)
    checkpoints = Checkpoints(work / "checkpoints", params.model_dump(mode="json"), kept=1)
    started, computed = time.perf_counter(), time.process_time()
    train(params.train, params.machine, loader, verification, training, 0, device, checkpoints, lambda *_: None)
    shutil.rmtree(checkpoints.folder)
    return {
        "params": distinctive(params),
        "mflop_a_face": round(forward_flops(params.train.backbone) / 1e6),
        "training": {
            "people": int(people),
            "images": len(split),
            "seen": params.train.schedule.iterations * params.train.batch,
        },
        "kept_back": {"images": len(shards.split("val"))},
        "after_thirds": [
            {key: round(value, 4) for key, value in row.items()}
            for row in [*verification.found[:2], verification.found[-1]]
        ],
        "loss": round(training.history[-1].loss, 3),
        "accuracy": round(training.history[-1].accuracy, 3),
        "seconds": round(time.perf_counter() - started),
        "core_seconds": round(time.process_time() - computed),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cosface-learning")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the trial")
    parser.add_argument("--change", nargs="+", default=[], metavar="KEY=VALUE", help="in section train")
    arguments = parser.parse_args()
    configure_logging()
    params = changed(settings(arguments.name, arguments.recipe, arguments.faces.resolve(), 1), arguments.change)
    trial = tried(params, arguments.work.resolve())
    with tables.locked(arguments.work / "choice"):
        whole = json.loads(RESULT.read_text()) if RESULT.exists() else {"trials": {}}
        whole["trials"][arguments.name] = {"machine": hardware(), "versions": {"torch": version("torch")}} | trial
        with tables.atomic(RESULT) as path:
            path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(trial), flush=True)


if __name__ == "__main__":
    main()
