"""Heads: from embeddings and labels to a loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosFace(nn.Module):
    """The Large Margin Cosine Loss (Wang et al., CVPR 2018, Eq. 4).

    L = mean over i of −log( e^{s(cos θ_y − m)} / (e^{s(cos θ_y − m)} + Σ_{j≠y} e^{s cos θ_j}) ), where cos θ_j is the
    cosine between the embedding and the centre of class j. With m = 0 this is the normalised softmax loss (NSL).

    Args:
        classes: C, identities.
        embedding: D, length of the embedding.
        scale: s.
        margin: m, subtracted from the cosine to the own class.
    """

    def __init__(self, classes: int, embedding: int, scale: float, margin: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, embedding))
        nn.init.xavier_normal_(self.weight)
        self.scale = scale
        self.margin = margin

    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and un-margined prediction, computed in fp32 under any autocast.

        Args:
            embeddings: N×D float, not normalised.
            labels: N int64 in [0, C).

        Returns:
            The mean loss (scalar fp32), and the class of the nearest centre for each embedding (N int64).
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = F.linear(self.scale * F.normalize(embeddings.float()), F.normalize(self.weight.float()))
            predicted = logits.detach().argmax(dim=1)  # before the margin: accuracy under the margin means little
            # In place: the margin touches N of the N×C logits, and a second N×C tensor would double the memory.
            logits[torch.arange(len(labels), device=labels.device), labels] -= self.scale * self.margin
            return F.cross_entropy(logits, labels), predicted

    def extra_repr(self) -> str:
        """Shape and hyper-parameters, for `print(head)`."""
        return f"classes={self.weight.shape[0]}, scale={self.scale}, margin={self.margin}"


def scale_lower_bound(classes: int, probability: float) -> float:
    """The least scale at which a class centre can reach a posterior probability (CosFace, Eq. 6).

    s ≥ (C − 1)/C · ln((C − 1)·P / (1 − P))
    """
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))
