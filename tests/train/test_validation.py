from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.params import Params
from stages.shard.reader import Shards
from stages.train.loop import begin
from stages.train.validation import ByIdentity, ByImage, auc
from tests.samples import shard_section, write_shards

CPU = torch.device("cpu")
SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=20)


@given(same=SCORES, different=SCORES)
def test_auc_is_that_of_scikit_learn(same: list[int], different: list[int]) -> None:
    expected = roc_auc_score([1] * len(same) + [0] * len(different), same + different)
    assert abs(auc(np.array(same), np.array(different)) - expected) < 1e-12


def test_by_identity_scores_the_pairs(tmp_path: Path, params: Params) -> None:
    by = {"by": "identity", "share": 0.5, "pairs": 30}
    shards = Shards(str(write_shards(tmp_path, [6] * 8, shard_section(validation=by))))
    training = begin(params.train, 4, CPU)
    measured = ByIdentity(shards, params.train)(training, CPU)
    assert set(measured) == {"val_auc"}
    assert 0 <= measured["val_auc"] <= 1
    assert training.model.training  # as it was


def test_by_image_counts_the_right_ones(tmp_path: Path, params: Params) -> None:
    shards = Shards(str(write_shards(tmp_path, [10, 10], shard_section())))
    training = begin(params.train, 2, CPU)
    measured = ByImage(shards, params.train)(training, CPU)
    assert (measured["val_accuracy"] * 6).is_integer()
    none = Shards(
        str(write_shards(tmp_path / "none", [6, 6], shard_section(validation={"by": "image", "share": 0, "pairs": 0})))
    )
    assert ByImage(none, params.train)(training, CPU) == {}
