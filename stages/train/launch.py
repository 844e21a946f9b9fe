"""One command, several processes: `python -m stages.train` starts what torchrun would, and says how it ended."""

import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import InputError
from pipeline.executor import cores
from pipeline.params import Machine

_PATIENCE = 300
"""Seconds that processes have to end in when asked to: validation and checkpoint may be under way."""
_TOLD = 3
"""Exit status of a process that has left a message for a person, in the file that torchrun gives it."""


def started_by_torchrun() -> bool:
    """Whether this process is one of those that torchrun, or `launch`, started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def processes(machine: Machine) -> int:
    """How many processes a training on this machine has: `machine.processes`, or one for each GPU, or one.

    Raises:
        InputError: there are not so many GPUs.
    """
    gpus = torch.cuda.device_count() if machine.device != "cpu" else 0
    wanted = machine.processes or max(gpus, 1)
    if gpus and wanted > gpus:
        raise InputError(f"machine.processes: {wanted}, but there are {gpus} GPUs, and each takes one")
    return wanted


def launch(count: int, module: str) -> None:
    """Run `python -m module` in `count` processes on this machine, by torchrun's agent; return when all have ended.

    Signals pass on to them, and when one dies the others are ended.

    Raises:
        InputError: with the message that one of them left, or that one died.
        SystemExit: they were asked to end; 128 and the signal.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for chatty in ("agent.server.api", "multiprocessing.api"):  # of all that happens
        logging.getLogger(f"torch.distributed.elastic.{chatty}").setLevel(logging.CRITICAL)
    arguments = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={_PATIENCE}", "-m", module]
    try:
        run.run(run.parse_args(arguments))
    except SignalException as asked:
        raise SystemExit(128 + asked.sigval) from None
    except ChildFailedError as error:
        _explain(error.failures)


def _explain(failures: dict[int, Any]) -> None:
    """Raise what the processes that failed, torchrun's ProcessFailure by rank, amount to."""
    for failure in failures.values():
        if failure.exitcode == _TOLD:
            raise InputError(failure.error_file_data["message"]["message"].partition(": ")[2])
    for failure in failures.values():
        if failure.exitcode in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise SystemExit(failure.exitcode)
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else "failed, see above"
    raise InputError(f"process {rank} of the training {how}; the same command goes on from the last checkpoint")


def tell_launcher(function: Callable[..., None], *arguments: Any) -> None:
    """Call it in one of several processes: an error that a person can mend is for the launcher to tell, once."""
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        record(function)(*arguments)
    except (InputError, OSError):
        raise SystemExit(_TOLD) from None
