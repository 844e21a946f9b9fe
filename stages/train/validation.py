"""What a model is worth on what training does not see, by which to choose models without ever touching a test set."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.params import Train
from stages.shard.reader import Shards
from stages.train.loader import validation_batches
from stages.train.loop import Training


class ByImage:
    """Un-margined accuracy on images of identities that the model knows."""

    def __init__(self, shards: Shards, params: Train) -> None:
        """On the validation split of the shards."""
        self._split, self._face, self._params = shards.split("val"), shards.index.face, params

    @torch.inference_mode()
    def __call__(self, training: Training, device: torch.device) -> dict[str, float]:
        """`val_accuracy`; nothing where the split is empty."""
        if not len(self._split):
            return {}
        correct = torch.zeros((), dtype=torch.int64, device=device)
        params = self._params
        with training.judging() as model:
            for batch in validation_batches(self._split, self._face, params.batch, params.backbone.width, device):
                correct += training.head(model(batch.images), batch.labels).correct.sum()
        return {"val_accuracy": correct.item() / len(self._split)}


class ByIdentity:
    """Verification of people whom the model does not know."""

    def __init__(self, shards: Shards, params: Train) -> None:
        """On the validation split of the shards and the pairs drawn from it."""
        self._split, self._face, self._params = shards.split("val"), shards.index.face, params
        pairs = shards.val_pairs()
        assert pairs is not None
        self._left, self._right, self._same = (pairs[name].to_numpy() for name in ("left", "right", "same"))

    @torch.inference_mode()
    def __call__(self, training: Training, device: torch.device) -> dict[str, float]:
        """`val_auc`, of the cosines of single embeddings, without the flip-test."""
        params = self._params
        with training.judging() as model:
            embeddings = torch.cat(
                [
                    nn.functional.normalize(model(batch.images)).cpu()
                    for batch in validation_batches(
                        self._split, self._face, params.batch, params.backbone.width, device
                    )
                ]
            ).numpy()
        scores = (embeddings[self._left] * embeddings[self._right]).sum(axis=1)
        return {"val_auc": auc(scores[self._same], scores[~self._same])}


def auc(same: NDArray[np.floating], different: NDArray[np.floating]) -> float:
    """Area under the ROC: the probability that a pair of the same person scores above one of different people.

    Ties count half (Hanley and McNeil, Radiology 1982).
    """
    ordered = np.sort(different)
    below = np.searchsorted(ordered, same, side="left") + np.searchsorted(ordered, same, side="right")
    return float(below.mean() / (2 * len(different)))
