"""LMCL by pytorch-metric-learning in place of our head, for benchmarks/learning.py; runs in an environment with it."""

import torch
from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline import params
from stages.train.heads import Judgement
from stages.train.loop import Training


class MetricLearning(nn.Module):
    """CosFaceLoss, and the cosines that training is judged by, behind the interface of a head."""

    def __init__(self, classes: int, embedding: int, section: params.CosFace) -> None:
        super().__init__()
        self.margin = section.margin
        self.inner = CosFaceLoss(classes, embedding, margin=section.margin, scale=section.scale)

    @property
    def weight(self) -> Tensor:
        """The centres, as a checkpoint asks for them."""
        return self.inner.W

    def advance(self) -> None:
        """As stages.train.heads.Head; nothing goes by iterations here."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Judgement:
        """As stages.train.heads.Head."""
        loss = self.inner(embeddings, labels)
        with torch.no_grad():
            cosines = normalize(embeddings) @ normalize(self.inner.W, dim=0)
            own = cosines.gather(1, labels[:, None])
            nearest = cosines.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
            own = own[:, 0]
        return Judgement(loss, own, nearest, own > nearest, own - self.margin > nearest)


def replace_head(training: Training, section: params.CosFace, *, same_start: bool) -> None:
    """Put it in the place of a fresh training's head.

    Args:
        section: its scale and margin.
        same_start: whether its centres begin where ours do; otherwise where the library has them, standard normal, so
            some 18 times as long as ours, which by weight decay and normalisation is another rate for them.
    """
    ours = training.head.weight
    classes, embedding = ours.shape
    head = MetricLearning(classes, embedding, section).to(ours.device)
    if same_start:
        head.inner.W.data = ours.detach().T.contiguous()
    training.head = head.train()  # pyrefly: ignore[bad-assignment]  # has all of a head that is used here
    optimizer = training.optimizer
    parameters = optimizer.param_groups[0]["params"]
    assert parameters.pop() is ours
    parameters.append(head.inner.W)
    optimizer.state[head.inner.W] = {"momentum_buffer": torch.zeros_like(head.inner.W)}
    del optimizer.state[ours]
