"""Workers behind one `concurrent.futures.Executor`, processes on this machine or a Dask cluster, and what feeds them.

Tasks must be independent and deterministic: the result is the same for any number of workers, of either kind. Where a
worker is lost, by the out-of-memory killer or with its machine, its tasks are done again by another.
"""

import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import tenacity

from pipeline import tables
from pipeline.errors import InputError
from pipeline.params import Machine
from pipeline.progress import bar

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

    import torch

T = TypeVar("T")
log = logging.getLogger(__name__)

_LIVES = 3
"""So many times workers may die without a single task getting done in between."""
_PATIENCE = 30
"""Seconds that a Dask scheduler and its first worker are waited for."""
_CODE = (Path(__file__).parent, Path(__file__).parents[1] / "stages")
_START = (
    "`dask scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:0`, then `dask worker tcp://127.0.0.1:8786 "
    "--host 127.0.0.1 --dashboard-address 127.0.0.1:0 --nthreads 1 --memory-limit 2GiB`"
)

_worker: int | None = None
"""Which of the processes of `_local_pool` this is, from 0; None in any other."""

_TLS = tuple(f"DASK_DISTRIBUTED__COMM__TLS__{name}" for name in ("CA_FILE", "CLIENT__CERT", "CLIENT__KEY"))


def choose_device(name: str) -> "torch.device":
    """The device of `machine.device`: auto takes a GPU where there is one; of several, the workers of `run_all` on this
    machine take theirs by turns.

    Whatever it is, torch takes no more threads from here on than `cores`: of a container's quota it does not know, and
    more would wait for each other.

    Raises:
        InputError: cuda was asked for and is not there.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("machine.device: cuda was asked for, but torch sees no GPU; use auto or cpu")
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if _worker is not None:
        torch.cuda.set_device(_worker % torch.cuda.device_count())
    return torch.device("cuda")


@contextmanager
def enough_gpu_memory(otherwise: str) -> Iterator[None]:
    """For what may need more memory than a GPU has.

    Raises:
        InputError: it does; the message is what to change `otherwise`, and what torch says.
    """
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # which is not imported for this
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        what = ". ".join(str(error).split(". ")[:2])  # the rest is about PyTorch's allocator
        raise InputError(f"the GPU's memory is too small: {otherwise} ({what})") from error


def cores() -> int:
    """Processor cores this process may use, as the system or a container's quota has it: its share of them, where
    torchrun has started several on this machine.
    """
    from dask.system import cpu_count

    return max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def memory() -> int:
    """Bytes of memory that this machine has, or that a container allows."""
    from distributed.system import memory_limit

    return memory_limit()


@functools.lru_cache(maxsize=1)  # for the last number alone: a Dask worker serves one run after another
def prepare_worker(threads: int) -> None:
    """Give this process so many threads, and let it keep its memory."""
    import cv2

    cv2.setNumThreads(threads)
    _limit_threads(threads)  # of torch where a task imports it; it takes seconds, and many tasks do not
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    keep_memory()


def _limit_threads(threads: int) -> None:
    """Of libraries that are loaded from here on, in this process and those that it starts."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


@functools.cache
def keep_memory() -> None:
    """Let this process keep the memory that its networks and batches use again and again.

    By default glibc returns large blocks to the system as soon as they are free; having them back, page by page, costs
    alignment a fifth of its time, and a loader a tenth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            mallopt(parameter, 1 << 30)


_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""mallopt's names in malloc.h, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; bytes."""


def run_all(
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    *,
    machine: Machine,
    label: str,
    unit: str,
    sizes: Sequence[int] | None = None,
    most: int | None = None,
) -> list[T]:
    """`function(*task)` for every task, by the workers of `machine.executor`; results in the order of the tasks.

    The first failure cancels what has not begun and is raised.

    Args:
        label: what is being done, for the progress shown.
        unit: what is counted, in the plural.
        sizes: how many of it each task is worth; one each by default.
        most: at most so many processes on this machine.

    Raises:
        InputError: workers die again and again, or the Dask cluster cannot be used.
    """
    if not tasks:
        return []
    worth = sizes or [1] * len(tasks)
    results: dict[int, T] = {}
    with bar(total=sum(worth), label=label, unit=unit) as shown:

        def done(index: int, result: T) -> None:
            results[index] = result
            shown.update(worth[index])

        call = functools.partial(_prepared, machine.threads, function)
        if machine.executor == "local" and len(tasks) == 1:
            done(0, function(*tasks[0]))  # not worth a process
        elif machine.executor == "local":
            _locally(call, tasks, results, done, _processes(machine, len(tasks), most), machine.threads)
        else:
            with _cluster(machine) as executor:
                _collect(executor, functools.partial(_checked, _code(), call), tasks, results, done)
    return [results[i] for i in range(len(tasks))]


def _prepared(threads: int, function: Callable[..., T], *task: Any) -> T:
    prepare_worker(threads)
    return function(*task)


def _checked(code: str, call: Callable[..., T], *task: Any) -> T:
    """For workers that have joined after `_check_workers`."""
    if code != _code():
        raise InputError(
            f"machine.executor: a Dask worker on {socket.gethostname()} that joined meanwhile runs another version of "
            "this project's code; finished parts are kept"
        )
    return call(*task)


def _collect(
    executor: Executor,
    call: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    results: dict[int, T],
    done: Callable[[int, T], None],
) -> None:
    """Do the tasks that have no result yet."""
    with _interrupts_held():
        futures: dict[Future[T], int] = {
            executor.submit(call, *task): i for i, task in enumerate(tasks) if i not in results
        }
    try:
        for future in as_completed(futures):
            done(futures[future], future.result())
    except BaseException:
        if isinstance(executor, ProcessPoolExecutor):
            executor.shutdown(wait=False, cancel_futures=True)
        else:
            executor.shutdown(wait=False)  # Dask's cancels by itself
        for future, index in futures.items():  # what has come in meanwhile need not be done again
            if index not in results and future.done() and not future.cancelled() and future.exception() is None:
                done(index, future.result())
        raise


def _locally(
    call: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    results: dict[int, T],
    done: Callable[[int, T], None],
    workers: int,
    threads: int,
) -> None:
    """By processes of this machine; when one dies, all begin anew with the tasks that are not done."""
    deaths: list[int] = []

    def give_up(_: tenacity.RetryCallState) -> bool:
        deaths.append(len(results))
        return deaths.count(len(results)) >= _LIVES

    def warn(_: tenacity.RetryCallState) -> None:
        left = len(tasks) - len(results)
        log.warning("a worker process died (out of memory?); going on with the %d of %d tasks left", left, len(tasks))

    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BrokenProcessPool), stop=give_up, before_sleep=warn
    )
    try:
        for attempt in again:
            with attempt, _local_pool(workers, threads) as pool:
                _collect(pool, call, tasks, results, done)
    except tenacity.RetryError as error:
        raise InputError(
            f"worker processes died {_LIVES} times without finishing a task, probably for want of memory: lower "
            f"machine.workers (now {workers}) or raise machine.memory, what a worker may need"
        ) from error


def _processes(machine: Machine, tasks: int, most: int | None) -> int:
    """How many processes to start: what machine.workers says, or one a core as far as memory reaches."""
    if machine.workers is None:
        wanted = max(1, cores() // machine.threads)
        room = int(min(psutil.virtual_memory().available, memory()) / 2**30 / machine.memory)
        if room < wanted:
            log.info("%d workers instead of %d: machine.memory is %g GiB each", max(1, room), wanted, machine.memory)
        wanted = max(1, min(wanted, room))
    else:
        wanted = machine.workers
    return min(wanted, tasks, most or wanted)


def _local_pool(workers: int, threads: int) -> Executor:
    """Fresh processes, none of which outlives this one."""
    _limit_threads(threads)  # read by a worker before any code of ours runs in it
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin, (context.Value("i", 0),))


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C from workers that start here until they `_begin`; imports would end in a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(begun: "Synchronized[int]") -> None:
    """Take a number, counting those that have `begun`, end by Ctrl-C at once, and do not outlive the parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an exception would end the task in hand alone, and begin another
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with begun.get_lock():
        _worker = begun.value
        begun.value += 1
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def _cluster(machine: Machine) -> Iterator[Executor]:
    """The workers of a Dask scheduler, once it is sure that they can do the work.

    Raises:
        InputError: TLS is not configured, there is no scheduler or no worker, a worker has too little memory, other
            code, or sees other files, one task has cost several workers their lives, or the scheduler goes away.
    """
    import distributed
    from distributed.comm import CommClosedError

    _check_certificates(machine.executor)
    try:
        client = distributed.Client(machine.executor, timeout=_PATIENCE)
    except (OSError, ValueError) as error:
        raise InputError(
            f"machine.executor: no Dask scheduler at {machine.executor} ({error}); start {_START}"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_PATIENCE)
        except TimeoutError as error:
            raise InputError(f"machine.executor: {machine.executor} has no workers; start {_START}") from error
        _check_workers(client, machine)
        try:
            yield client.get_executor(pure=False)
        except distributed.KilledWorker as error:
            raise InputError(f"machine.executor: {error}. Give the workers more --memory-limit") from error
        except (CancelledError, CommClosedError) as error:
            raise InputError(
                f"machine.executor: the Dask scheduler at {machine.executor} is gone; start it again and run again: "
                "finished parts are kept"
            ) from error


def _check_certificates(address: str) -> None:
    """See that Dask's own configuration has what a scheduler behind tls:// asks for.

    Nothing is checked of other addresses, nor where Dask is configured with a loader of certificates.

    Raises:
        InputError: they are not configured, or a file is absent or of another kind.
    """
    import dask
    import distributed

    if not address.startswith("tls://") or dask.config.get("distributed.client.security-loader", None):
        return
    security = distributed.Security()
    try:
        if security.get_connection_args("client")["ssl_context"] is not None:
            return
        wrong = "one is not set"
    except OSError as error:  # as ssl.SSLError is, for a file without a certificate
        wrong = str(error)
    raise InputError(
        f"machine.executor: {address} needs certificates, of which Dask's configuration has the files: "
        f"{', '.join(_TLS)} (the key may be in the certificate's file). It is {security}: {wrong}"
    )


def _check_workers(client: Any, machine: Machine) -> None:
    for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
        if 0 < worker["memory_limit"] < machine.memory * 2**30:
            raise InputError(
                f"machine.memory: {machine.memory:g} GiB, but the Dask worker {address} has a --memory-limit of "
                f"{worker['memory_limit'] / 2**30:.2g} GiB"
            )
    try:
        codes = client.run(_code)
    except ImportError as error:
        raise InputError(f"machine.executor: a Dask worker cannot import this project: {error}") from error
    with tempfile.NamedTemporaryFile(dir=".", prefix=".shared-") as file:
        sees = client.run(os.path.exists, str(Path(file.name).resolve()))
    for address in codes:
        if codes[address] != _code():
            raise InputError(f"machine.executor: the Dask worker {address} runs another version of this project's code")
        if not sees[address]:
            raise InputError(
                f"machine.executor: the Dask worker {address} does not see {Path.cwd()}: it must be shared"
            )


def _code() -> str:
    return tables.fingerprint(code=_CODE)
