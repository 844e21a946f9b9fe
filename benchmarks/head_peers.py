"""Heads' forward and backward passes: `python benchmarks/head_peers.py C STEPS ROUNDS NAME...`.

Prints JSON, by name a list of rounds, in which the named take turns: seconds of each step, and the memory that a step
needs beyond centres, embeddings and labels. On a CPU that is the process's, so one name and round at a time. Imports
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
GPU = torch.cuda.is_available()

Loss = Callable[[Tensor, Tensor], Tensor]


def ours(weight: Tensor) -> tuple[Loss, Tensor]:
    from stages.train.heads import CosFace

    head = CosFace(2, EMBEDDING, SCALE, MARGIN)
    head.weight = torch.nn.Parameter(weight)
    head.classes = len(weight)
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
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, Tensor]:
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
    """VmRSS or VmHWM, MiB; on a GPU what is allocated of its memory, and the most that was."""
    if GPU:
        return (torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def forget_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Contestant:
    """A head with centres of its own."""

    def __init__(self, name: str, classes: int) -> None:
        torch.manual_seed(0)
        device = "cuda" if GPU else "cpu"
        self._name = name
        self._x = torch.randn(BATCH, EMBEDDING).to(device).requires_grad_()
        self._y = torch.randint(classes, (BATCH,)).to(device)
        self._loss, self._weight = HEADS[name]((0.02 * torch.randn(classes, EMBEDDING)).to(device))

    def turn(self, steps: int) -> dict[str, Any]:
        before = memory("VmRSS")
        forget_peak()
        seconds = []
        for _ in range(steps):
            self._x.grad = self._weight.grad = None
            started = now()
            value = self._loss(self._x, self._y)
            value.backward()
            seconds.append(now() - started)
        found = {
            "seconds": seconds,
            "extra_mib": memory("VmHWM") - before,
            "peak_mib": memory("VmHWM"),
            "loss": value.item(),
            "version": version(self._name) if self._name == "pytorch-metric-learning" else torch.__version__,
        }
        self._x.grad = self._weight.grad = None
        return found


def main() -> None:
    classes, steps, rounds = map(int, sys.argv[1:4])
    names = sys.argv[4:]
    contestants = {name: Contestant(name, classes) for name in names}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            found[name].append(contestant.turn(steps))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
