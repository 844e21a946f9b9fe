"""Workers behind one `concurrent.futures.Executor`, and the loop that feeds them.

Tasks must be independent and deterministic: the result is the same for any number of workers.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import InputError
from pipeline.progress import progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def choose_device(name: str) -> "torch.device":
    """The device of `machine.device`: auto takes a GPU where there is one.

    Raises:
        InputError: cuda was asked for and is not there.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("machine.device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    """One thread a worker, and no life after the parent's: a killed stage leaves nothing running."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def local_pool(workers: int | None) -> Executor:
    """A pool of fresh single-threaded processes; `None` for one a core."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # read by a worker before any code of ours runs in it
    return ProcessPoolExecutor(workers or cores(), multiprocessing.get_context("spawn"), _start_worker)


def run_all(
    function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], *, workers: int | None, label: str, unit: str
) -> list[T]:
    """`function(*task)` for every task, spread over worker processes; results in the order of the tasks.

    Shows progress, counted in `unit`. The first failure cancels what has not begun and is raised.
    """
    if not tasks:
        return []
    with local_pool(workers) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in progress(as_completed(futures), total=len(futures), label=label, unit=unit):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]
