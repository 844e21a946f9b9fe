"""A head's forward and backward pass, timed in a process of its own: `python benchmarks/head_peers.py NAME C STEPS`.

Prints JSON: seconds of each step, and the memory that a step needs beyond centres, embeddings and labels. Imports
nothing of this project but for NAME ours, so that peers run in an environment of their own.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

SCALE, MARGIN, BATCH, EMBEDDING = 64.0, 0.35, 512, 512

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(weight: Tensor) -> tuple[Loss, Tensor]:
    from stages.train.heads import CosFace

    head = CosFace(2, EMBEDDING, SCALE, MARGIN)
    head.weight = torch.nn.Parameter(weight)
    return lambda x, y: head(x, y).loss, head.weight


def textbook(weight: Tensor) -> tuple[Loss, Tensor]:
    """Margin by a one-hot matrix, as most public code has it."""
    weight.requires_grad_()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        cosine = normalize(x) @ normalize(weight).T
        hot = one_hot(y, len(weight)).to(cosine.dtype)
        return cross_entropy(SCALE * (hot * (cosine - MARGIN) + (1 - hot) * cosine), y)

    return loss, weight


def indexed(weight: Tensor) -> tuple[Loss, Tensor]:
    """Margin subtracted at the labels' entries, then cross_entropy."""
    weight.requires_grad_()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = SCALE * (normalize(x) @ normalize(weight).T)
        logits[torch.arange(len(y)), y] -= SCALE * MARGIN
        return cross_entropy(logits, y)

    return loss, weight


def metric_learning(weight: Tensor) -> tuple[Loss, Tensor]:
    from pytorch_metric_learning.losses import CosFaceLoss

    peer = CosFaceLoss(len(weight), EMBEDDING, margin=MARGIN, scale=SCALE)
    peer.W = torch.nn.Parameter(weight.T.contiguous())
    return peer, peer.W


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        products = x @ weight.T
        ctx.save_for_backward(x, weight, products)
        return products[0, 0].clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, products = ctx.saved_tensors
        return products @ weight, products.T @ x


def bare(weight: Tensor) -> tuple[Loss, Tensor]:
    """The floor: the three matrix products, and nothing else."""
    weight.requires_grad_()
    return lambda x, _: cast(Tensor, _Products.apply(x, weight)), weight


HEADS = {
    "ours": ours,
    "bare products": bare,
    "one-hot": textbook,
    "index": indexed,
    "pytorch-metric-learning": metric_learning,
}


def memory(key: str) -> float:
    """VmRSS or VmHWM, MiB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    name, classes, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    x = torch.randn(BATCH, EMBEDDING, requires_grad=True)
    y = torch.randint(classes, (BATCH,))
    loss, weight = HEADS[name](0.02 * torch.randn(classes, EMBEDDING))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    seconds = []
    for _ in range(steps):
        x.grad = weight.grad = None
        started = time.perf_counter()
        value = loss(x, y)
        value.backward()
        seconds.append(time.perf_counter() - started)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "extra_mib": memory("VmHWM") - before,
                "peak_mib": memory("VmHWM"),
                "loss": value.item(),
                "version": version(name) if name == "pytorch-metric-learning" else torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
