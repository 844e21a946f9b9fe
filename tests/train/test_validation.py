import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pipeline.params import Backbone, Params, Train
from stages.shard.reader import Shards
from stages.train.loop import Training, begin
from stages.train.model import FaceModel
from stages.train.validation import ByIdentity, ByImage, auc
from tests.samples import FACE, shard_section, write_shards

CPU = torch.device("cpu")
SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=20)
MARGIN = 4


class TwoPixels(nn.Module):
    """Two pixels of a face, which tell identities apart but for the noise; in training something else."""

    def forward(self, faces: Tensor) -> Tensor:
        found = faces[:, :, 30:91:60, 80].flatten(1)
        return found.abs() if self.training else found


def seen(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What `TwoPixels` sees of the validation shards, by Pillow and in float64, and the labels."""
    features, labels = [], []
    for path in sorted(folder.glob("val-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            with Image.open(io.BytesIO(row["image"])) as opened:
                pixels = np.asarray(opened.convert("RGB"), np.float64)
            features.append(pixels[[MARGIN + 30, MARGIN + 90], MARGIN + 80].T.ravel())
            labels.append(row["label"])
    return (np.array(features) - 127.5) / 128, np.array(labels)


def cosines(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    return (left * right).sum(axis=-1) / np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))


def begun(params: Params, classes: int, batch: int) -> tuple[Train, Training]:
    """A training of `TwoPixels`."""
    backbone = Backbone(name="small", width=112, embedding=6)
    section = params.train.model_copy(update={"batch": batch, "backbone": backbone})
    training = begin(section, classes, CPU)
    training.model = FaceModel(TwoPixels()).train()
    return section, training


@given(same=SCORES, different=SCORES)
def test_auc_is_that_of_scikit_learn(same: list[int], different: list[int]) -> None:
    expected = roc_auc_score([1] * len(same) + [0] * len(different), same + different)
    assert abs(auc(np.array(same), np.array(different)) - expected) < 1e-12


def test_by_identity_is_the_auc_of_the_pairs_cosines(tmp_path: Path, params: Params) -> None:
    """Of the middle of faces with a margin, the last batch smaller than the others."""
    by = {"by": "identity", "share": 0.5, "pairs": 80}
    face = FACE.model_copy(update={"margin": MARGIN})
    folder = write_shards(tmp_path, [6] * 8, shard_section(validation=by), face)
    features, _ = seen(folder)
    pairs = pq.read_table(folder / "val_pairs.parquet").to_pydict()
    left, right = features[pairs["left"]], features[pairs["right"]]
    expected = roc_auc_score(pairs["same"], cosines(left, right))
    assert 0.6 < expected < 0.999
    assert len(features) == 24
    section, training = begun(params, 4, batch=7)
    measured = ByIdentity(Shards(str(folder)), section)(training, CPU)
    assert measured == {"val_auc": pytest.approx(expected, abs=1e-9)}
    assert training.model.training  # as it was
    assert training.head.training


def test_by_image_is_the_share_nearest_to_their_own_centre(tmp_path: Path, params: Params) -> None:
    """By direction alone, however long a centre is; the last batch is smaller than the others."""
    face = FACE.model_copy(update={"margin": MARGIN})
    folder = write_shards(tmp_path, [10] * 5, shard_section(), face)
    features, labels = seen(folder)
    centres = np.stack([features[labels == label].mean(axis=0) for label in range(5)])
    centres[3], centres[4] = centres[4].copy(), centres[3].copy()
    centres *= np.array([[1], [40], [0.1], [3], [1]])
    nearest = cosines(features[:, None], centres[None]).argmax(axis=1)
    expected = float((nearest == labels).mean())
    assert 0.3 < expected < 0.9
    assert len(features) == 15
    section, training = begun(params, 5, batch=4)
    with torch.no_grad():
        training.head.weight.copy_(torch.from_numpy(centres))
    measured = ByImage(Shards(str(folder)), section)(training, CPU)
    assert measured == {"val_accuracy": pytest.approx(expected, abs=1e-12)}
    assert training.model.training
    assert training.head.training


def test_nothing_to_validate_on_is_nothing_measured(tmp_path: Path, params: Params) -> None:
    by = {"by": "image", "share": 0, "pairs": 0}
    shards = Shards(str(write_shards(tmp_path, [6, 6], shard_section(validation=by))))
    section, training = begun(params, 2, batch=4)
    assert ByImage(shards, section)(training, CPU) == {}
