"""Progress of long work: a live bar with rate and estimate on a terminal, a plain line now and then elsewhere."""

import io
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {rate_fmt}, {elapsed} so far, {remaining} left{postfix}"


class _Lines(tqdm):
    """tqdm that writes log lines instead of redrawing one."""

    said: float = -1

    def display(self, *_: Any, **__: Any) -> None:
        """Log where we are, once there is something new to tell."""
        if self.n > max(self.initial, self.said):
            log.info(str(self))
            self.said = self.n


def progress(items: Iterable[T], *, total: int | None, label: str, unit: str) -> Iterator[T]:
    """Iterate over `items`, showing how many of `total` (None where nobody can know) are done."""
    with bar(total=total, label=label, unit=unit) as shown:
        for item in items:
            yield item
            shown.update()


def bar(*, total: int | None, label: str, unit: str, initial: int = 0, shown: bool = True) -> "tqdm[Any]":
    """Progress to `update` by hand, as a context manager.

    Args:
        total: how many there will be, in `unit`; None where nobody can know.
        label: what is being done.
        unit: what is counted, in the plural.
        initial: how many were already done, by an interrupted run.
        shown: whether anything is to be seen: of several processes that do it together, one shows it.
    """
    terminal = sys.stderr.isatty()
    return (tqdm if terminal else _Lines)(
        total=total,
        initial=initial,
        disable=not shown,
        desc=label,
        unit=f" {unit}" if terminal else unit,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
        maxinterval=SECONDS_BETWEEN_LINES,
        bar_format=None if terminal else LINE,
        file=None if terminal else io.StringIO(),  # what it would draw with; _Lines logs instead
    )


def configure_logging() -> None:
    """What every command prints: plain lines on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "alembic", "mlflow", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
