import io
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from pipeline.params import Augment
from pipeline.tables import EXAMPLES, write_table
from stages.shard.reader import Group, open_shards
from stages.train import loader
from stages.train.augment import Augmenter
from tests.samples import face_like, jpeg

CPU = torch.device("cpu")


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    rows = [{"image": jpeg(face_like(i, i)), "label": i} for i in range(40)]
    write_table(tmp_path / "train-00000-of-00001.parquet", pa.Table.from_pylist(rows, schema=EXAMPLES), EXAMPLES, 8)
    return open_shards(tmp_path, "train")


def test_flips_are_exact_and_as_often_as_asked() -> None:
    images = [face_like(1, photo) for photo in range(400)]
    out = Augmenter(Augment(horizontal_flip=0.5))(images, seed=1)
    flipped = [np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(out, images, strict=True)]
    assert all(f != k for f, k in zip(flipped, kept, strict=True))
    assert 150 < sum(flipped) < 250  # five standard deviations of a fair coin
    for p, count in ((0.0, 0), (1.0, 400)):
        out = Augmenter(Augment(horizontal_flip=p))(images, seed=1)
        assert sum(np.array_equal(a, b[:, ::-1]) for a, b in zip(out, images, strict=True)) == count


def test_augmentation_follows_from_its_seed() -> None:
    images = [face_like(1, photo) for photo in range(20)]
    one, again, other = (Augmenter(Augment(horizontal_flip=0.5))(images, seed) for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_batches_hold_the_decoded_pixels_in_rgb(groups: list[Group]) -> None:
    batch = next(loader.training_batches(groups, 8, 1, Augment(horizontal_flip=0.0), 112, CPU))
    assert batch.images.shape == (8, 3, 112, 112)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        with Image.open(io.BytesIO(jpeg(face_like(label, label)))) as opened:
            expected = np.asarray(opened.convert("RGB")).astype(int)
        # Pillow is another decoder; swapped channels would differ by far more than its rounding
        assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 2


def test_going_on_gives_the_same_batches_whatever_the_threads(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    flip = Augment(horizontal_flip=0.5)
    whole = list(islice(loader.training_batches(groups, 8, 1, flip, 112, CPU), 12))
    monkeypatch.setattr(loader, "MAX_THREADS", 1)
    rest = list(islice(loader.training_batches(groups, 8, 1, flip, 112, CPU, start=7), 5))
    for a, b in zip(whole[7:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_validation_sees_every_example_once_and_unflipped(groups: list[Group]) -> None:
    batches = list(loader.validation_batches(groups, 16, 112, CPU))
    assert [len(batch.labels) for batch in batches] == [16, 16, 8]
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(40))
