"""`cosface compare`: two runs on the same pairs, from their stored scores."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.params import Evaluate, Params
from pipeline.tracking import download
from stages.evaluate.scoring import EXTRA, Scored, rounded
from stages.evaluate.uncertainty import Comparison, compare
from stages.evaluate.verification import EvaluationError

log = logging.getLogger(__name__)

FILE = "scores.parquet"


def scores_of(run: str, folder: Path, params: Params) -> dict[str, Path]:
    """The stored scores of a run, by protocol.

    Args:
        run: what `stored_scores` reads, or a run's id in MLflow.
        folder: where to copy what MLflow has.
        params: for the store's experiment.

    Raises:
        EvaluationError: it is neither, or has no scores.
        TrackingError: the store does not answer, or does not know the run.
    """
    if Path(run).exists():
        return stored_scores(Path(run))
    if not re.fullmatch(r"[0-9a-f]{32}", run):
        raise EvaluationError(f"{run}: no such folder or file, and no run's id in MLflow, which has 32 hex digits")
    return stored_scores(download(run, FILE, folder, params))


def stored_scores(path: Path) -> dict[str, Path]:
    """The scores that lie in a folder of reports, by protocol.

    Args:
        path: a folder with a scores.parquet (of the protocol that the folder is named after), a folder of such
            folders and of `extra`, where those of more sets lie, or the file itself.

    Raises:
        EvaluationError: there are none.
    """
    if path.is_file():
        return {_protocol(path): path}
    if (path / FILE).exists():
        return {_protocol(path / FILE): path / FILE}
    found = {
        _protocol(file): file for pattern in ("*", EXTRA.format("*")) for file in sorted(path.glob(f"{pattern}/{FILE}"))
    }
    if not found:
        raise EvaluationError(f"{path}: neither {FILE} nor folders with one; `dvc repro evaluate` makes reports/<set>")
    return found


def _protocol(file: Path) -> str:
    """Whose scores a file holds, by the folder that it lies in."""
    folder = file.resolve().parent
    name = EXTRA.format(folder.name)
    return name if folder.as_posix().endswith(f"/{name}") else folder.name


def compare_runs(a: Mapping[str, Path], b: Mapping[str, Path], params: Evaluate) -> dict[str, Comparison]:
    """The paired comparison of B with A, for each protocol that both have; of one file each, whatever their names.

    Protocols that only one of them has are logged.

    Args:
        a: stored scores by protocol.
        b: the same.
        params: section evaluate of params.yaml, for false accept rates and the bootstrap.

    Raises:
        EvaluationError: they have no protocol in common, or its pairs are not the same.
        TableError: a file is not of scores.
    """
    common = {name: (a[name], b[name]) for name in a if name in b}
    if len(a) == len(b) == 1:
        common = {next(iter(a)): (next(iter(a.values())), next(iter(b.values())))}
    elif not common:
        raise EvaluationError(f"no protocol in common: A has {', '.join(a)}, B has {', '.join(b)}")
    else:
        for side, only in (("A", a.keys() - b), ("B", b.keys() - a)):
            if only:
                log.warning("only %s has %s", side, ", ".join(sorted(only)))
    found = {}
    for name, files in common.items():
        one, other = (Scored.read(file).in_order() for file in files)
        _check_same_pairs(one, other, *files)
        runs = one.verification(params.fars), other.verification(params.fars)
        found[name] = compare(*runs, one.people, replicates=params.replicates, seed=params.seed)
    return found


def title(protocol: str) -> str:
    """As papers write it."""
    kind, slash, name = protocol.rpartition("/")
    return kind + slash + name.upper().replace("_", "-")


def summary(name: str, found: Comparison) -> dict[str, Any]:
    """What `--json` prints of a protocol."""
    bounds = found.difference.bounds
    return {
        "verdict": found.verdict(title(name)),
        "pairs": found.pairs,
        "a": {figure: value if value is None else rounded(value) for figure, value in found.a.items()},
        "b": {figure: value if value is None else rounded(value) for figure, value in found.b.items()},
        "difference": {
            figure: None if value is None else rounded(value) for figure, value in found.differences.items()
        },
        "intervals": {figure: each and [rounded(each[0]), rounded(each[1])] for figure, each in bounds.items()},
        "bootstrap_over": found.difference.over,
        "unresolved": found.difference.unresolved,
        "mcnemar": {"only_a": found.only_a, "only_b": found.only_b, "p": rounded(found.p_value)},
    }


def text(name: str, found: Comparison) -> str:
    """What is printed of a protocol: the verdict, then the figures, in per cent."""
    lines = [found.verdict(title(name))]
    for figure, difference in found.differences.items():
        bounds = found.difference.bounds[figure]
        if difference is None:
            lines.append(f"  {figure:<18} none: {found.difference.unresolved[figure]}")
            continue
        why = found.difference.unresolved.get(figure)
        interval = f"95% interval {_points(bounds[0])} to {_points(bounds[1])}" if bounds else f"({why})"
        lines.append(
            f"  {figure:<18} A {found.a[figure]:7.2%}   B {found.b[figure]:7.2%}   B - A {_points(difference)}   "
            f"{interval}"
        )
    lines.append(
        f"  decided rightly by one alone: A {found.only_a}, B {found.only_b} of {found.pairs:,} pairs "
        f"(McNemar's exact test, which takes pairs as independent: p = {found.p_value:.2g}); "
        f"intervals by bootstrap over {found.difference.over}"
    )
    return "\n".join(lines)


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _check_same_pairs(a: Scored, b: Scored, file_a: Path, file_b: Path) -> None:
    """Pairs in order are the same, of the same truth and in the same fold."""
    only_a, only_b = (
        sorted(set(zip(x.left, x.right, strict=True)) - set(zip(y.left, y.right, strict=True)))
        for x, y in ((a, b), (b, a))
    )
    for file, other, only in ((file_a, file_b, only_a), (file_b, file_a, only_b)):
        if only:
            raise EvaluationError(
                f"the pairs are not the same: {file} has {len(only):,} that {other} lacks, as {' – '.join(only[0])}"
            )
    if (a.left, a.right) != (b.left, b.right):
        raise EvaluationError(
            f"the pairs are not the same: {file_a} ({len(a.left):,} rows) lists some of them more or less often than "
            f"{file_b} ({len(b.left):,} rows)"
        )
    for what, x, y in (("truth", a.same, b.same), ("fold", a.fold, b.fold)):
        unlike = np.flatnonzero(x != y)
        if len(unlike):
            first = unlike[0]
            raise EvaluationError(
                f"{len(unlike):,} pairs differ in {what}, as {a.left[first]} – {a.right[first]}: {x[first]} in "
                f"{file_a}, {y[first]} in {file_b}"
            )
