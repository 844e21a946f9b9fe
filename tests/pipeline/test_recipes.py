from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cli import RECIPES
from pipeline.params import Archive, CosFace, Steps, load_params
from stages.shard.reader import Shards
from stages.train import backbones, loader, loop
from tests.samples import shard_section, write_shards

ROOT = Path(__file__).parents[2]
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_valid(name: str) -> None:
    load_params(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of its network and head, by its arithmetic and schedule, on two images of each of the first batches
    that its sampling and augmentation make of faces with its margin; not compiled. After a first step that is too
    large, embeddings of the networks without batch normalisation are 1,000 times as long.
    """
    params, cpu = load_params(RECIPES / f"{name}.yaml"), torch.device("cpu")
    section, face = params.train.model_copy(update={"batch": 32, "compile": False}), params.align.face
    if section.precision == "bf16":  # which most CPUs emulate: of the whole network a step takes half a minute
        narrower = partial(backbones.improved_residual, (1, 1, 1, 1), channels=(16, 16, 32, 32), stem=((16, 1),))
        monkeypatch.setitem(backbones.BACKBONES, section.backbone.name, narrower)
    monkeypatch.setattr(loader, "_TOGETHER", 32)
    made = shard_section(validation={"by": "image", "share": 0.0, "pairs": 0})
    split = Shards(str(write_shards(tmp_path, [8] * 4, made, face))).split("train")
    options: dict[str, Any] = {"cache": params.machine.cache, "cache_folder": tmp_path / "decoded"}
    with closing(iter(loader.Loader(split, face, section, cpu, **options))) as endless:
        batches = list(islice(endless, 2))

    width, augment = section.backbone.width, section.augment
    whole = [batch.images for batch in loader.validation_batches(split, face, 32, width, cpu)]
    plain = {image.numpy().tobytes() for images in (*whole, *(each.flip(3) for each in whole)) for image in images}
    shown = [image.numpy().tobytes() for batch in batches for image in batch.images]
    assert len(shown) == 64
    assert all(image in plain for image in shown) != (augment.by_image or augment.shift > 0)

    training = loop.begin(section, 4, cpu)
    for iteration, batch in enumerate(batches):
        loop.step(training, section, iteration, batch.images[:2], batch.labels[:2])
    with torch.inference_mode():
        assert training.model(batches[0].images[:2]).norm(dim=1).max() < 100
    row = loop.close_row(training, section, 2, {})
    assert 0 < row.loss < 100
    assert row.gradient_norm > 0


def test_the_repository_comes_with_the_quickstart() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (RECIPES / "quickstart.yaml").read_bytes()


def test_cosface_casia_is_the_papers_experiment() -> None:
    """Wang et al., CosFace, CVPR 2018, section 4.1. Of how training begins it says nothing; warm-up and clipping are
    ours.
    """
    params = load_params(RECIPES / "cosface-casia.yaml")
    train = params.train
    assert (train.backbone.name, train.backbone.embedding) == ("sphere64", 512)
    assert train.head == CosFace(name="cosface", scale=64, margin=0.35)
    assert train.batch == 8 * 64
    assert (train.optimizer.learning_rate, train.optimizer.momentum, train.optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert train.optimizer.clip_norm == 5
    assert train.schedule == Steps(
        name="steps", iterations=30_000, warmup=1000, milestones=[16_000, 24_000, 28_000], factor=0.1
    )
    assert train.augment.horizontal_flip == 0.5
    assert (params.evaluate.flip, params.evaluate.centre) == ("concatenate", False)


def test_cosface_large_is_the_papers_other_experiment() -> None:
    """Wang et al., CosFace, CVPR 2018, section 4.1."""
    small, large = (load_params(RECIPES / f"{name}.yaml").train for name in ("cosface-casia", "cosface-large"))
    milestones = [80_000, 140_000, 200_000]
    schedule = Steps(name="steps", iterations=240_000, warmup=1000, milestones=milestones, factor=0.1)
    sgd = small.optimizer.model_copy(update={"learning_rate": 0.05})
    assert large == small.model_copy(update={"schedule": schedule, "optimizer": sgd})


def test_experiment_1_is_as_reported() -> None:
    params = load_params(RECIPES / "experiment-1.yaml")
    train = params.train
    assert (train.backbone.name, train.batch, train.optimizer.learning_rate) == ("ir50", 128, 0.1)
    assert train.head == CosFace(name="cosface", scale=64, margin=0.32)
    assert (params.shard.validation.by, params.shard.validation.share) == ("image", 0.3)


def test_cosface_casia_takes_lfw_from_its_mirror_with_its_published_hashes() -> None:
    """The hashes are those scikit-learn pins in sklearn/datasets/_lfw.py."""
    sklearn_lfw = pytest.importorskip("sklearn.datasets._lfw")
    lfw = load_params(RECIPES / "cosface-casia.yaml").download.lfw
    assert isinstance(lfw, Archive)
    pairs = next(target for target in sklearn_lfw.TARGETS if target.filename == "pairs.txt")
    assert (lfw.location, lfw.sha256) == (sklearn_lfw.ARCHIVE.url, sklearn_lfw.ARCHIVE.checksum)
    assert (lfw.pairs, lfw.pairs_sha256) == (pairs.url, pairs.checksum)
