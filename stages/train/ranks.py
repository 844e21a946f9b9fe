"""Processes that train together: ranks, and what passes between them.

Each has its share of every batch, the whole backbone, and a slice of the class centres. A rank's backbone learns from
its own images, and gradients are summed over ranks. Embeddings and labels of all ranks are gathered, each rank compares
them with its own centres, and what that gives is combined, so that every rank has the loss of the whole batch (the
model-parallel head of An et al., "Killing Two Birds with One Stone", CVPR 2022, arXiv 2203.15565, section 3).

With one process nothing here is called.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import InputError, said
from pipeline.params import Machine
from stages.train.launch import started_by_torchrun

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up: a dead one must not hold the rest for ever."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this one speaks for all: it writes what is one file, logs and tracks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's equal share of `count` things, in order; sizes differ by one at most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


ALONE = Ranks()


def take_gpu(machine: Machine) -> None:
    """In one of several processes on this machine, see but its own GPU: no thread can then begin on another's.

    Before anything else asks for GPUs.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    if not started_by_torchrun() or machine.device == "cpu":
        return
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if count and place >= count:
        raise InputError(f"there are {count} GPUs on this machine, and more processes; each takes one")
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[place] if visible else str(place)
        if torch.cuda.device_count() != 1:  # where counting them has read the variable already
            torch.cuda.set_device(place)


@contextmanager
def together(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other ranks that torchrun has started, if it has; leave them in the end.

    Yields:
        The ranks, and the device. GPUs talk by nccl, CPUs by gloo.
    """
    if not started_by_torchrun():
        yield ALONE, device
        return
    _end_with_parent()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    except Exception:
        raise  # the others may be gone, and leaving would wait for them
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _end_with_parent() -> None:
    """A rank must not go on when what started it was killed, and perhaps starts others in the same folder."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def agreed(ranks: Ranks, *flags: int) -> list[int]:
    """The greatest of each flag over ranks: what all must do alike though each learns of it by itself.

    On the CPU, so that nobody waits for a GPU.
    """
    if ranks.size == 1:
        return list(flags)
    greatest = torch.tensor(flags)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.tolist()


@contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """For what each rank does by itself: where one fails, all do, and none waits for it. Each waits for the others.

    Raises:
        InputError, OSError: what this rank's block raised.
        InputError: with the message of such an error of another rank.
    """
    failure: InputError | OSError | None = None
    try:
        yield
    except (InputError, OSError) as error:
        failure = error
    if ranks.size > 1:
        messages: list[str | None] = [None] * ranks.size
        dist.all_gather_object(messages, said(failure) if failure else None)
        failure = failure or next((InputError(message) for message in messages if message), None)
    if failure:
        raise failure


def made_alike(module: nn.Module, ranks: Ranks) -> None:
    """Give every rank the first one's values: other processors may draw and round otherwise."""
    if ranks.size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def collected(rows: Tensor, ranks: Ranks) -> Tensor | None:
    """Rows of all ranks, of which each has some, one below the other, on the CPU of the first; None on the others."""
    if ranks.size == 1:
        return rows.detach().cpu()
    own, whole = rows.detach().cpu().contiguous(), []
    for rank, count in enumerate(gathered(torch.tensor([len(own)])).tolist()):
        if ranks.first:
            whole.append(own if rank == 0 else own.new_empty(count, *own.shape[1:]))
            if rank:
                dist.recv(whole[rank], rank)
        elif rank == ranks.rank:
            dist.send(own, 0)
    return torch.cat(whole) if ranks.first else None


def gathered(values: Tensor) -> Tensor:
    """(n, …) of each rank as (ranks · n, …), in order of ranks, without gradient; n is the same for all."""
    out = values.new_empty(dist.get_world_size() * len(values), *values.shape[1:])
    dist.all_gather_single(out, values.detach().contiguous())
    return out


def summed(values: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    out = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out)
    return out


def sum_together(tensors: list[Tensor]) -> None:
    """Put its sum over ranks in the place of each tensor; all go as one."""
    passing = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(passing)
    for tensor, total in zip(tensors, passing.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(total.view(tensor.shape))


def gathered_parts(embeddings: Tensor) -> Tensor:
    """Embeddings (n, D) of all ranks, (ranks · n, D), which each rank uses for another part of one loss.

    So the gradient is the sum of what the ranks have.
    """
    return cast(Tensor, cast(Any, _Gathered).apply(embeddings, True))


def gathered_copies(values: Tensor) -> Tensor:
    """Values (n,) of all ranks, (ranks · n,), which every rank uses in the same way.

    So each has the whole gradient.
    """
    return cast(Tensor, cast(Any, _Gathered).apply(values, False))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, parts: bool) -> Tensor:
        ctx.count, ctx.parts = len(values), parts
        return gathered(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        whole = summed(gradient) if ctx.parts else gradient
        start = dist.get_rank() * ctx.count
        return whole[start : start + ctx.count], None


def log_sum(values: Tensor) -> Tensor:
    """log Σ e^value over ranks of (N,). Every rank goes on with it in the same way, so has the gradient of its own."""
    return cast(Tensor, cast(Any, _LogSum).apply(values))


class _LogSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        greatest = values.clone()
        dist.all_reduce(greatest, dist.ReduceOp.MAX)
        total = greatest + summed((values - greatest).exp()).log()
        ctx.save_for_backward((values - total).exp())
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (share,) = ctx.saved_tensors
        return cast(Tensor, gradient * share)


def only_one(values: Tensor) -> Tensor:
    """(N,) of which each entry is not zero on one rank at most: those entries. With the gradient as of `log_sum`."""
    return cast(Tensor, cast(Any, _OnlyOne).apply(values))


class _OnlyOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return summed(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return gradients[0]


def greatest_of(values: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """(N,) the greatest over ranks, the first of equals, and what of other things, each (N,), its rank has with it."""
    size = dist.get_world_size()
    found = gathered(values).view(size, -1).max(dim=0)
    return found.values, *(gathered(other).view(size, -1).gather(0, found.indices[None])[0] for other in others)
