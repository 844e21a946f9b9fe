"""From identities to labels, and from images to train or validation: decided on names, before any image is read."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.params import Shard
from pipeline.tables import LABELS


class ShardError(InputError):
    """The aligned faces cannot be made into a training set; the message says why."""


@dataclass(frozen=True)
class Plan:
    """Where every row of the aligned table goes."""

    label: np.ndarray
    """Rows int32: the label, −1 for rows that are dropped."""
    val: np.ndarray
    """Rows bool: in the validation split."""
    labels: pa.Table
    """One row an identity, schema tables.LABELS."""


def make_plan(identities: np.ndarray, usable: np.ndarray, params: Shard) -> Plan:
    """Label identities in the order of their names, and split the images of each by seed.

    An identity with n faces gives ⌊n · val_fraction⌋ of them to validation, never all, chosen at random by seed.

    Args:
        identities: rows of str: the identity of each aligned row.
        usable: rows of bool: whether the row has a detected face.
        params: min_images, val_fraction and seed.

    Raises:
        ShardError: fewer than two identities remain.
    """
    names, code = np.unique(identities, return_inverse=True)
    counts = np.bincount(code[usable], minlength=len(names))
    kept = counts >= params.min_images
    if kept.sum() < 2:
        raise ShardError(
            f"{kept.sum()} of {len(names)} identities have at least shard.min_images = {params.min_images} faces; "
            "training needs at least 2"
        )
    label_of = np.full(len(names), -1, np.int32)
    label_of[kept] = np.arange(kept.sum(), dtype=np.int32)
    label = np.where(usable, label_of[code], -1).astype(np.int32)

    # Random ranks within each identity; the first ⌊n · fraction⌋ are validation.
    rows = np.flatnonzero(label >= 0)
    rows = rows[np.random.default_rng([params.seed, 0]).permutation(len(rows))]
    rows = rows[np.argsort(label[rows], kind="stable")]
    kept_counts = counts[kept]
    starts = np.cumsum(kept_counts) - kept_counts
    rank = np.arange(len(rows)) - np.repeat(starts, kept_counts)
    # 1e-9: 0.3 of 10 is 3, though the nearest floats multiply to just below it
    take = np.minimum(np.floor(kept_counts * params.val_fraction + 1e-9).astype(int), kept_counts - 1)
    val = np.zeros(len(label), bool)
    val[rows] = rank < np.repeat(take, kept_counts)

    val_of = np.zeros(len(names), np.int32)
    val_of[kept] = take
    return Plan(
        label,
        val,
        pa.table(
            {
                "label": pa.array(label_of, mask=~kept),
                "identity": names.astype(str),
                "images": counts.astype(np.int32),
                "train": np.where(kept, counts - val_of, 0).astype(np.int32),
                "val": val_of,
                "dropped": pa.array(
                    [
                        None if keep else f"{n} faces, fewer than {params.min_images}"
                        for keep, n in zip(kept, counts, strict=True)
                    ],
                    pa.string(),
                ),
            },
            schema=LABELS,
        ),
    )


def shuffled(rows: np.ndarray, seed: int) -> np.ndarray:
    """The one global shuffle: `rows` in an order that follows from the seed alone."""
    return rows[np.random.default_rng([seed, 1]).permutation(len(rows))]
