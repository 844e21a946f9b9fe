"""pairs.txt of LFW and splits.txt of YouTube Faces become pairs of images or videos."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from pipeline.tables import PAIRS
from stages.download.errors import DamagedError, SourceError


class Pair(NamedTuple):
    """A line of a pair list."""

    line: int
    """From 1."""
    fold: int
    """From 0."""
    left: str
    """An image id (lfw) or a video (ytf)."""
    right: str
    same: bool


def read_pairs(set_name: str, path: Path, origin: str) -> list[Pair]:
    """Read pairs.txt (lfw) or splits.txt (ytf).

    Args:
        set_name: lfw or ytf.
        path: the file.
        origin: what to call it in messages: where params.yaml says that it is.

    Raises:
        DamagedError: a line is malformed or the list is not as long as its header says; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise DamagedError(f"{origin}: not a text file: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    pairs = list((_lfw if set_name == "lfw" else _ytf)(numbered, origin))
    if not pairs:
        raise DamagedError(f"{origin}: holds no pairs")
    return pairs


def _lfw(lines: list[tuple[int, str]], origin: str) -> Iterator[Pair]:
    """LFW: a header `folds<TAB>n`, then for each fold n pairs of the same person and n of different ones.

    That is view 2. The two lists of view 1, for development, are a fold each, and have n alone for a header.
    """
    first, header = lines[0] if lines else (1, "")
    numbers = header.split()
    if len(numbers) not in (1, 2) or not all(number.isdecimal() for number in numbers):
        raise DamagedError(f"{origin}:{first}: expected a header `folds<TAB>pairs of each kind`, found {header!r}")
    folds, each = map(int, numbers if len(numbers) == 2 else ["1", *numbers])
    if len(lines) - 1 != folds * 2 * each:
        raise DamagedError(
            f"{origin}: holds {len(lines) - 1} pairs, but its header {header!r} means {folds} × 2 × {each} = "
            f"{folds * 2 * each}"
        )
    for index, (number, line) in enumerate(lines[1:]):
        match line.split("\t") if "\t" in line else line.split():
            case [name, i, j] if i.isdecimal() and j.isdecimal():
                left, right, same = _lfw_image(name, i), _lfw_image(name, j), True
            case [name, i, other, j] if i.isdecimal() and j.isdecimal():
                left, right, same = _lfw_image(name, i), _lfw_image(other, j), False
            case _:
                raise DamagedError(f"{origin}:{number}: expected `name i j` or `name1 i name2 j`, found {line!r}")
        if same != (index % (2 * each) < each):
            expected = "different people" if same else "the same person"
            raise DamagedError(f"{origin}:{number}: by the header a pair of {expected} stands here, found {line!r}")
        yield Pair(number, index // (2 * each), left, right, same)


def _lfw_image(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _ytf(lines: list[tuple[int, str]], origin: str) -> Iterator[Pair]:
    """YouTube Faces: `split, n, name/video, name/video, same`, splits from 1; a first line of words is a header."""
    for number, line in lines:
        fields = [field.strip() for field in line.split(",")]
        if number == lines[0][0] and not fields[0].isdecimal():
            continue
        match fields:
            case [split, _, left, right, "0" | "1" as same] if (
                split.isdecimal() and int(split) >= 1 and left.count("/") == right.count("/") == 1
            ):
                yield Pair(number, int(split) - 1, left, right, same == "1")
            case _:
                raise DamagedError(
                    f"{origin}:{number}: expected `split, n, name/video, name/video, same` with split from 1 and "
                    f"same 0 or 1, found {line!r}"
                )


def check_pairs(pairs: list[Pair], known: Container[str], origin: str, source: str) -> None:
    """Check that every image or video of the pairs is there.

    Raises:
        SourceError: some are not; names the first few and the line of the first.
    """
    absent: dict[str, int] = {}
    for pair in pairs:
        for name in (pair.left, pair.right):
            if name not in known:
                absent.setdefault(name, pair.line)
    if absent:
        first = list(absent.items())[:3]
        names = ", ".join(f"{name} (line {line})" for name, line in first)
        more = f" and {len(absent) - len(first)} more" if len(absent) > len(first) else ""
        raise SourceError(f"{origin}: names {len(absent)} that {source} lacks: {names}{more}")


def pairs_table(pairs: list[Pair]) -> pa.Table:
    """The pairs as a table by `pipeline.tables.PAIRS`."""
    columns = {name: [getattr(pair, name) for pair in pairs] for name in PAIRS.names}
    return pa.table(columns, schema=PAIRS)
