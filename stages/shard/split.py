"""From identities to labels, and from images to train or validation: decided on names, before any image is read."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.params import Shard, Validation
from pipeline.tables import LABELS, VAL_PAIRS
from stages.shard.clean import REASONS, WITHOUT_FACE
from stages.shard.errors import ShardError


@dataclass(frozen=True)
class Plan:
    """Where every row of the aligned table goes."""

    label: NDArray[np.int32]
    """Rows: the label, −1 for rows that are left out."""
    val: NDArray[np.bool_]
    """Rows: in the validation split."""
    labels: pa.Table
    """One row an identity, schema tables.LABELS."""

    def rows(self, split: str) -> NDArray[np.intp]:
        """The rows of `train` or `val`, ascending."""
        return np.flatnonzero((self.label >= 0) & (self.val == (split == "val")))


def make_plan(identities: NDArray[np.object_], reason: NDArray[np.object_], params: Shard) -> Plan:
    """Label identities in the order of their names, and choose what is kept back for validation by seed.

    By image, an identity with n images gives ⌊n · share⌋ of them, never all. By identity, ⌊identities · share⌋ of them
    are kept back whole; their labels follow those of the others.

    Args:
        identities: rows of str: the identity of each aligned row.
        reason: rows: why it is left out (one of clean.REASONS), empty for one that is left in.
        params: validation and seed.

    Raises:
        ShardError: fewer than two identities are left to train on.
    """
    names, code = np.unique(identities, return_inverse=True)
    kept, faces = np.asarray(reason == "", bool), ~np.isin(reason, WITHOUT_FACE)
    counts = np.bincount(code[kept], minlength=len(names))
    strangers = np.zeros(len(names), bool)
    if params.validation.by == "identity":
        strangers[_chosen(np.flatnonzero(counts), params)] = True
    trained = (counts > 0) & ~strangers
    if trained.sum() < 2:
        raise ShardError(f"{trained.sum()} of {len(names)} identities are left to train on; it needs at least 2")
    label_of = np.full(len(names), -1, np.int32)
    label_of[trained] = np.arange(trained.sum())
    label_of[strangers] = trained.sum() + np.arange(strangers.sum())
    label = np.where(kept, label_of[code], -1).astype(np.int32)
    val = kept & strangers[code] if params.validation.by == "identity" else _some_of_each(label, params)

    of_each = np.split(reason[np.argsort(code, kind="stable")], np.cumsum(np.bincount(code))[:-1])
    val_of = np.bincount(code[val], minlength=len(names)).astype(np.int32)
    columns = {
        "label": pa.array(label_of, mask=label_of < 0),
        "identity": names.astype(str),
        "images": np.bincount(code[faces], minlength=len(names)).astype(np.int32),
        "train": (counts - val_of).astype(np.int32),
        "val": val_of,
        "dropped": pa.array([None if n else _most(why) for n, why in zip(counts, of_each, strict=True)], pa.string()),
    }
    return Plan(label, val, pa.table(columns, schema=LABELS))


def _most(reasons: NDArray[np.object_]) -> str:
    """Why an identity has nothing left: what holds for most of its images."""
    (reason, _), *_ = Counter(reasons.tolist()).most_common(1)
    return REASONS[reason]


def _chosen(identities: NDArray[np.intp], params: Shard) -> NDArray[np.intp]:
    count = _share(len(identities), params.validation)
    return np.random.default_rng([params.seed, 2]).permutation(identities)[:count]


def _share(count: int, validation: Validation) -> int:
    # 1e-9: 0.3 of 10 is 3, though the nearest floats multiply to just below it
    return int(count * validation.share + 1e-9)


def _some_of_each(label: NDArray[np.int32], params: Shard) -> NDArray[np.bool_]:
    """Random ranks within each identity; the first ⌊n · share⌋ are validation."""
    rows = np.flatnonzero(label >= 0)
    rows = rows[np.random.default_rng([params.seed, 0]).permutation(len(rows))]
    rows = rows[np.argsort(label[rows], kind="stable")]
    counts = np.bincount(label[rows])
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    take = np.asarray([min(_share(n, params.validation), n - 1) for n in counts.tolist()])
    val = np.zeros(len(label), bool)
    val[rows] = rank < np.repeat(take, counts)
    return val


def shuffled(rows: NDArray[np.intp], seed: int) -> NDArray[np.intp]:
    """The one global shuffle: `rows` in an order that follows from the seed alone."""
    return rows[np.random.default_rng([seed, 1]).permutation(len(rows))]


def draw_pairs(labels: NDArray[np.int32], params: Shard) -> pa.Table:
    """Verification pairs of validation rows, half of the same person, each pair at most once.

    Pairs of the same person are drawn person by person, so that no one with many images decides.

    Args:
        labels: of the validation rows, in the order of their shards.

    Returns:
        Schema tables.VAL_PAIRS: those of the same person first.

    Raises:
        ShardError: there are not so many pairs.
    """
    rng = np.random.default_rng([params.seed, 3])
    half = params.validation.pairs // 2
    order = np.argsort(labels, kind="stable")
    people = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    several = [rows for rows in people if len(rows) > 1]
    possible = sum(len(rows) * (len(rows) - 1) // 2 for rows in several)
    apart = len(labels) * (len(labels) - 1) // 2 - possible
    if possible < half or apart < half:
        raise ShardError(
            f"shard.validation.pairs: {params.validation.pairs} need {half} pairs of the same and {half} of different "
            f"people; the {len(labels)} validation images of {len(people)} people have {possible} and {apart}: lower "
            "it, or raise shard.validation.share"
        )
    same: set[tuple[int, int]] = set()
    while len(same) < half:
        for person in rng.permutation(len(several)).tolist():
            a, b = sorted(rng.choice(several[person], 2, replace=False).tolist())
            if len(same) < half:
                same.add((a, b))
    different: set[tuple[int, int]] = set()
    while len(different) < half:
        a, b = sorted(rng.integers(len(labels), size=2).tolist())
        if labels[a] != labels[b]:
            different.add((a, b))
    pairs = np.array(sorted(same) + sorted(different), np.int32)
    truth = np.arange(len(pairs)) < half
    return pa.table({"left": pairs[:, 0], "right": pairs[:, 1], "same": truth}, schema=VAL_PAIRS)
