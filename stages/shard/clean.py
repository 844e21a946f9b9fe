"""What is left out of the training set, and why: each step a parameter, each image left out a row with its reason."""

import csv
import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import tables
from pipeline.params import Clean
from stages.shard.copies import Copies, Equal, Found, Near, Rows
from stages.shard.errors import ShardError
from stages.shard.hashes import WORDS
from stages.shard.names import check_names, name_of, read_lines, read_names, spellings

log = logging.getLogger(__name__)

REASONS = {
    "unreadable": "the photograph cannot be read",
    "no_face": "no face was found",
    "excluded": "listed in shard.clean.exclude, or a copy of one of the same identity that is",
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
    """(rows, 2, 4), of the aligned faces, as hashes.perceptual_hash; None where nobody wants them."""

    @property
    def pictured(self) -> NDArray[np.bool_]:
        """Which have an aligned face."""
        return ~np.isin(self.status, WITHOUT_FACE)

    def digest(self) -> str:
        """SHA-256 of the photographs, as `sha256sum` lists files: a line `<SHA-256>  <image_id>` for each, in order."""
        digest = hashlib.sha256()
        for photograph in zip(self.sha256.to_pylist(), self.image_id.to_pylist(), strict=True):
            digest.update("{}  {}\n".format(*photograph).encode())
        return digest.hexdigest()

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

    def drop(self, rows: Rows, reason: str, of: str | None = None) -> None:
        """Leave out those of `rows` that are still in."""
        rows = rows[self.reason[rows] == ""]
        self.reason[rows], self.of[rows] = reason, of

    def drop_copies(self, rows: Rows, reason: str, found: Found, names: pa.Array) -> None:
        """Leave out those of `rows` that are copies and still in; `names` has what they may be of."""
        copies = (found.of >= 0) & self.alive[rows]
        rows = rows[copies]
        self.reason[rows], self.distance[rows] = reason, found.distance[copies]
        self.of[rows] = names.take(pa.array(found.of[copies])).to_pylist()


def clean(faces: Faces, evaluation: dict[str, Faces], params: Clean) -> pa.Table:
    """What is to be left out.

    Of copies within an identity the one with the largest face stays, the first of those. Copies that bear different
    identities all go, also where one has gone for another reason: at most one label is right, and nobody knows which.
    Unless people have said so: an image that they exclude speaks against none of another identity, and takes its copies
    within its own along.

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
        listed = _rows_of(code, names, _listed(name))
        left.drop(listed, "published_list")
        if not len(listed):
            log.warning(
                "shard.clean.lists: the training set has none of the identities of %s, such as %r; the set's are "
                "written as %r. If it has these people by other names, list them in %s",
                *(name, _listed(name)[0], next(iter(names), ""), params.exclude),
            )
    if params.same_names:
        called = read_names(Path(params.names))
        check_names(called, names.tolist(), params.names)
        spelt = [name_of(identity, called) for identity in names]
        nameless = [identity for identity, own in zip(names, spelt, strict=True) if not own]
        if nameless:
            log.warning(
                "shard.clean.same_names: %d of the training set's %d identities, such as %r, are numbers without a "
                "name in %s: whether they are people of the test sets is not known by name",
                *(len(nameless), len(names), nameless[0], params.names),
            )
        _drop_names(left, code, spelt, evaluation)
    if params.duplicates:
        _drop_copies(left, faces, code, evaluation, params.near_duplicates)
    counts = np.bincount(code[left.alive], minlength=len(names))
    left.drop(np.flatnonzero(counts[code] < params.min_images), "few_images")
    kept = int((counts >= params.min_images).sum())
    if kept < 2:
        raise ShardError(
            f"{kept} of {len(names)} identities have at least shard.clean.min_images = {params.min_images} faces left; "
            f"training needs at least 2. Images left out: {_summary(left, faces.image_id)}"
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


def _summary(left: _Left, image_id: pa.ChunkedArray) -> str:
    """How many images are left out for each reason, with the first of them for an example."""
    told = []
    for reason, why in REASONS.items():
        rows = np.flatnonzero(left.reason == reason)
        if len(rows):
            example = f"{image_id[int(rows[0])]}" + (f": {left.of[rows[0]]}" if left.of[rows[0]] else "")
            told.append(f"{len(rows)} {reason} ({why}; such as {example})")
    return ", ".join(told)


def read_exclude(path: Path, faces: Faces) -> tuple[NDArray[np.intp], list[str]]:
    """The rows and the identities that people have decided to leave out.

    A line with an image_id leaves out that image; one with an identity alone, the identity.

    Raises:
        ShardError: there is no such file, it has other columns, or names what is not in the set.
    """
    reader = csv.DictReader(read_lines(path, "shard.clean.exclude"))
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


def _listed(name: str) -> list[str]:
    lines = (_LISTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if re.fullmatch(r"\w+", line)]


def _rows_of(code: NDArray[np.intp], names: NDArray[np.object_], identities: Iterable[str]) -> NDArray[np.intp]:
    return np.flatnonzero(np.isin(names, list(identities))[code])


def _drop_names(
    left: _Left, code: NDArray[np.intp], spelt: list[tuple[str, ...]], evaluation: dict[str, Faces]
) -> None:
    """Identities of which a spelling, of those that each has by its code, is of a person of an evaluation set."""
    theirs = {
        spelling: f"{name}: {identity}"
        for name, known in reversed(evaluation.items())
        for identity in sorted(set(known.identity.to_pylist()))
        for spelling in spellings(identity)
    }
    for number, spellings_of in enumerate(spelt):
        same = [theirs[spelling] for spelling in spellings_of if spelling in theirs]
        if same:
            left.drop(np.flatnonzero(code == number), "evaluated_name", same[0])


def _drop_copies(
    left: _Left, faces: Faces, code: NDArray[np.intp], evaluation: dict[str, Faces], near: int | None
) -> None:
    """Those of what people have excluded; then equal photographs, and nearly equal faces."""
    pictured = {name: np.flatnonzero(known.pictured) for name, known in evaluation.items()}
    theirs = pa.array(
        [
            f"{name}: {image}"
            for name, known in evaluation.items()
            for image in known.image_id.take(pictured[name]).to_pylist()
        ]
    )
    contents = [known.sha256.take(pictured[name]) for name, known in evaluation.items()]
    equal = Equal(faces.sha256, contents)
    kinds: dict[tuple[str, str, str], Copies] = {("evaluated_photograph", "contradiction", "duplicate"): equal}
    if near is not None:
        assert faces.hashes is not None
        hashes = [known.hashes[pictured[name]] for name, known in evaluation.items() if known.hashes is not None]
        kinds["evaluated_near", "contradiction_near", "near_duplicate"] = Near(
            faces.hashes, np.concatenate([np.empty((0, 2, WORDS), np.uint64), *hashes]), near
        )
    excluded = np.flatnonzero(faces.pictured & (left.reason == "excluded"))
    for copies in kinds.values():
        rows = np.flatnonzero(left.alive)
        left.drop_copies(rows, "excluded", copies.among(rows, excluded, code), faces.image_id)
    witnesses = np.flatnonzero(faces.pictured & (left.reason != "excluded"))
    best_first = np.argsort(-faces.size, kind="stable")
    for (evaluated, contradiction, duplicate), copies in kinds.items():
        rows = np.flatnonzero(left.alive)
        left.drop_copies(rows, evaluated, copies.evaluated(rows), theirs)
        left.drop_copies(witnesses, contradiction, copies.contradicting(witnesses, code), faces.image_id)
        speaks = left.alive
        speaks[equal.apart(witnesses, code)] = True
        witnesses = np.flatnonzero(speaks)
        rows = best_first[left.alive[best_first]]
        left.drop_copies(rows, duplicate, copies.better(rows, code), faces.image_id)
