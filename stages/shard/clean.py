"""What is left out of the training set, and why: each step a parameter, each image left out a row with its reason."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.errors import InputError
from pipeline.params import Clean
from stages.shard.hashes import near_pairs

REASONS = {
    "unreadable": "the photograph cannot be read",
    "no_face": "no face was found",
    "excluded": "listed in shard.clean.exclude",
    "published_list": "the identity is of an evaluation set, as a published list says",
    "evaluated_name": "the identity bears a name of an evaluation set",
    "evaluated_photograph": "an evaluation set has the same photograph",
    "evaluated_near": "an evaluation set has nearly the same face",
    "contradiction": "the same photograph bears another identity too",
    "contradiction_near": "nearly the same face bears another identity too",
    "duplicate": "the same photograph is there already",
    "near_duplicate": "nearly the same face is there already",
    "few_images": "too few images of the identity are left",
}
"""In the order in which they are looked for: an image is left out for the first that holds."""

WITHOUT_FACE = ("unreadable", "no_face")

_LISTS = Path(__file__).parent / "lists"
_EXCLUDE = ["image_id", "identity", "reason"]


class ShardError(InputError):
    """The aligned faces cannot be made into a training set; the message says why."""


@dataclass(frozen=True)
class Faces:
    """What is known of the rows of an aligned set, in order."""

    image_id: pa.ChunkedArray
    identity: pa.ChunkedArray
    sha256: pa.ChunkedArray
    status: NDArray[np.object_]
    size: NDArray[np.float64]
    """Pixels of the face in its photograph; 0 where none was found."""
    hashes: NDArray[np.uint64] | None
    """(rows, 4), of the aligned faces; None where nobody wants them."""

    @property
    def pictured(self) -> NDArray[np.bool_]:
        """Which have an aligned face."""
        return ~np.isin(self.status, WITHOUT_FACE)

    def of(self, rows: NDArray[np.intp]) -> NDArray[np.uint64]:
        """The hashes of some rows."""
        assert self.hashes is not None
        return self.hashes[rows]

    @classmethod
    def read(cls, aligned: Path, hashes: NDArray[np.uint64] | None) -> "Faces":
        """Of an aligned table; its hashes are given."""
        columns = ["image_id", "identity", "sha256", "status", "box"]
        table = tables.read_parts(aligned, tables.ALIGNED, columns)
        size = np.zeros(len(table))
        found = table["box"].is_valid().to_numpy()
        boxes = table["box"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        size[found] = (boxes[:, 2:] - boxes[:, :2]).mean(axis=1)
        status = np.asarray(table["status"].to_pylist(), object)
        return cls(table["image_id"], table["identity"], table["sha256"], status, size, hashes)


class _Left:
    """Which rows are still in, and why the others are not."""

    def __init__(self, rows: int) -> None:
        self.reason = np.full(rows, "", object)
        self.of = np.full(rows, None, object)
        self.distance = np.full(rows, -1, np.int32)

    @property
    def alive(self) -> NDArray[np.bool_]:
        return np.asarray(self.reason == "", bool)

    def drop(self, rows: NDArray[np.intp], reason: str, of: Sequence[str] | None = None, distance: int = -1) -> None:
        """Leave out those of `rows` that are still in."""
        for place, row in enumerate(rows.tolist()):
            if not self.reason[row]:
                self.reason[row], self.distance[row] = reason, distance
                self.of[row] = of[place] if of is not None else None


def clean(faces: Faces, evaluation: dict[str, Faces], params: Clean) -> pa.Table:
    """What is to be left out.

    Of copies within an identity the one with the largest face stays, the first of those. Copies that bear different
    identities all go: at most one label is right, and nobody knows which.

    Args:
        faces: of the training set.
        evaluation: of each evaluation set, by its name.

    Returns:
        A row for each image left out, in the order of the aligned table, schema tables.DROPPED, and the column `row`:
        its number there.

    Raises:
        ShardError: a file that params names cannot be used, or fewer than two identities remain.
    """
    left = _Left(len(faces.status))
    names, code = np.unique(np.asarray(faces.identity.to_pylist(), object), return_inverse=True)
    for status in WITHOUT_FACE:
        left.drop(np.flatnonzero(faces.status == status), status)
    images, identities = read_exclude(Path(params.exclude), faces)
    left.drop(images, "excluded")
    left.drop(_rows_of(code, names, identities), "excluded")
    for name in params.lists:
        left.drop(_rows_of(code, names, _listed(name)), "published_list", None)
    if params.same_names:
        called = read_names(Path(params.names))
        _check_names(called, names.tolist(), params.names)
        _drop_names(left, code, names, evaluation, called)
    if params.duplicates:
        _drop_copies(left, faces, code, evaluation, params.near_duplicates)
    counts = np.bincount(code[left.alive], minlength=len(names))
    left.drop(np.flatnonzero(counts[code] < params.min_images), "few_images")
    kept = int((counts >= params.min_images).sum())
    if kept < 2:
        raise ShardError(
            f"{kept} of {len(names)} identities have at least shard.clean.min_images = {params.min_images} faces; "
            "training needs at least 2"
        )
    rows = np.flatnonzero(~left.alive)
    return pa.table(
        {
            "row": rows,
            "image_id": faces.image_id.take(rows),
            "identity": faces.identity.take(rows),
            "reason": pa.array(left.reason[rows], pa.string()),
            "of": pa.array(left.of[rows], pa.string()),
            "distance": pa.array(left.distance[rows], pa.int32(), mask=left.distance[rows] < 0),
        }
    )


def normalised(name: str) -> str:
    """A name as it is compared: without case, accents, and all that is neither letter nor digit."""
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(c for c in decomposed.casefold() if c.isalnum())


def read_names(path: Path) -> dict[str, str]:
    """The names of identities that are numbers, `<identity> <name>` a line.

    Raises:
        ShardError: there is no such file, or a line has no name.
    """
    names = {}
    for number, line in enumerate(_lines(path, "shard.clean.names"), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split(maxsplit=1)
        if len(parts) < 2:
            raise ShardError(f"{path}: line {number}: expected `<identity> <name>`, not {line.strip()!r}")
        names[parts[0]] = parts[1].strip()
    return names


def _check_names(called: dict[str, str], identities: list[str], origin: str) -> None:
    """Refuse names of another set, or of identities written otherwise; names of a larger set will do."""
    if called and called.keys().isdisjoint(identities):
        raise ShardError(
            f"{origin}: the training set has none of its identities, such as {next(iter(called))!r}; the set's are "
            f"written as {identities[0]!r}. Set shard.clean.names in params.yaml to this set's list, or empty the file"
        )


def read_exclude(path: Path, faces: Faces) -> tuple[NDArray[np.intp], list[str]]:
    """The rows and the identities that people have decided to leave out.

    A line with an image_id leaves out that image; one with an identity alone, the identity.

    Raises:
        ShardError: there is no such file, it has other columns, or names what is not in the set.
    """
    reader = csv.DictReader(_lines(path, "shard.clean.exclude"))
    if reader.fieldnames != _EXCLUDE:
        raise ShardError(
            f"{path}: its first line must be {','.join(_EXCLUDE)!r}, not {','.join(reader.fieldnames or [])!r}"
        )
    wanted = list(reader)
    if not wanted:
        return np.empty(0, np.intp), []
    rows = {image: row for row, image in enumerate(faces.image_id.to_pylist())}
    known = set(faces.identity.to_pylist())
    images, identities = [], []
    for number, line in enumerate(wanted, 2):
        if line["image_id"]:
            if line["image_id"] not in rows:
                raise ShardError(f"{path}: line {number}: the training set has no image {line['image_id']!r}")
            images.append(rows[line["image_id"]])
        elif line["identity"] in known:
            identities.append(line["identity"])
        else:
            raise ShardError(f"{path}: line {number}: the training set has no identity {line['identity']!r}")
    return np.asarray(images, np.intp), identities


def _lines(path: Path, key: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # with or without the mark that Windows puts first
    except FileNotFoundError as error:
        raise ShardError(f"{path}: no such file, though {key} in params.yaml names it") from error
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: not text in UTF-8: {error}") from error


def _listed(name: str) -> list[str]:
    lines = (_LISTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if re.fullmatch(r"\w+", line)]


def _rows_of(code: NDArray[np.intp], names: NDArray[np.object_], identities: Iterable[str]) -> NDArray[np.intp]:
    return np.flatnonzero(np.isin(names, list(identities))[code])


def _drop_names(
    left: _Left,
    code: NDArray[np.intp],
    names: NDArray[np.object_],
    evaluation: dict[str, Faces],
    called: dict[str, str],
) -> None:
    theirs = {
        normalised(identity): f"{name}: {identity}"
        for name, known in reversed(evaluation.items())
        for identity in sorted(set(known.identity.to_pylist()))
    }
    for number, identity in enumerate(names):
        same = theirs.get(normalised(called.get(identity, identity)))
        if same is not None:
            rows = np.flatnonzero(code == number)
            left.drop(rows, "evaluated_name", [same] * len(rows))


def _drop_copies(
    left: _Left, faces: Faces, code: NDArray[np.intp], evaluation: dict[str, Faces], near: int | None
) -> None:
    """Equal photographs first, then nearly equal faces."""
    theirs = [
        f"{name}: {image}"
        for name, known in evaluation.items()
        for image in known.image_id.filter(pa.array(known.pictured)).to_pylist()
    ]
    rows = np.flatnonzero(left.alive)
    columns = [faces.sha256.take(rows)]
    columns += [known.sha256.filter(pa.array(known.pictured)) for known in evaluation.values()]
    pairs = _equal(np.concatenate([np.asarray(column.to_pylist(), object) for column in columns]), len(rows))
    _drop_pairs(left, faces, code, rows, theirs, _Pairs(pairs, np.full(len(pairs), -1), ""))
    if near is None:
        return
    rows = np.flatnonzero(left.alive)
    hashes = [faces.of(rows)] + [known.of(np.flatnonzero(known.pictured)) for known in evaluation.values()]
    pairs, distances = near_pairs(np.concatenate(hashes), near, len(rows))
    _drop_pairs(left, faces, code, rows, theirs, _Pairs(pairs, distances, "_near"))


def _equal(values: NDArray[np.object_], ours: int) -> NDArray[np.intp]:
    """All pairs of equal values, (m, 2), of which the first is one of the first `ours`."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    groups = [group for group in np.split(order, ends) if len(group) > 1 and group[0] < ours]
    pairs = [group[np.stack(np.triu_indices(len(group), 1), axis=1)] for group in groups]
    found = np.concatenate(pairs) if pairs else np.empty((0, 2), np.intp)
    return found[found[:, 0] < ours]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of copies, (m, 2); the distance of each, −1 where none counts; and how the reasons' names end."""

    numbers: NDArray[np.intp]
    distance: NDArray[np.intp]
    kind: str

    def where(self, mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
        return zip(*self.numbers[mask].T.tolist(), self.distance[mask].tolist(), strict=True)


def _drop_pairs(
    left: _Left, faces: Faces, code: NDArray[np.intp], rows: NDArray[np.intp], theirs: list[str], pairs: _Pairs
) -> None:
    """Leave out one or both of each pair.

    Args:
        rows: of the training set, that the first numbers in `pairs` stand for.
        theirs: images of the evaluation sets, that the numbers beyond stand for.
    """
    ours = pairs.numbers < len(rows)
    for one, other, bits in pairs.where(ours[:, 0] & ~ours[:, 1]):
        reason = "evaluated_near" if pairs.kind else "evaluated_photograph"
        left.drop(rows[[one]], reason, [theirs[other - len(rows)]], bits)

    within = pairs.where(ours[:, 0] & ours[:, 1])
    found = [(int(rows[a]), int(rows[b]), bits) for a, b, bits in within]
    found = [pair for pair in found if not left.reason[pair[0]] and not left.reason[pair[1]]]
    contradictions = [pair for pair in found if code[pair[0]] != code[pair[1]]]
    for a, b, bits in contradictions:
        for row, other in ((a, b), (b, a)):
            left.drop(np.array([row]), "contradiction" + pairs.kind, [faces.image_id[other].as_py()], bits)

    def worth(row: int) -> tuple[float, int]:
        return -faces.size[row], row

    # The best first: each stays, and so those near it go, unless it has gone itself.
    same = ([*sorted((a, b), key=worth), bits] for a, b, bits in found if code[a] == code[b])
    for stays, goes, bits in sorted(same, key=lambda pair: (worth(pair[0]), worth(pair[1]))):
        if not left.reason[stays]:
            reason = "near_duplicate" if pairs.kind else "duplicate"
            left.drop(np.array([goes]), reason, [faces.image_id[stays].as_py()], bits)
