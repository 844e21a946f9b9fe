"""From embeddings to scores, and from scores to what metrics.json holds: one way for our models and for any other.

The usual is the paper's: features of the image and of its mirror image one after the other, then normalised (CosFace,
section 4.1), then cosines. What departs from it is named in the output.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import tables
from stages.evaluate import uncertainty
from stages.evaluate.features import Block
from stages.evaluate.verification import EvaluationError, Flags, Floats, Metrics, Verification

Flip = Literal["concatenate", "sum", "none"]

SCORES = pa.schema(
    [
        ("fold", pa.int32()),
        ("left", pa.string()),
        ("right", pa.string()),
        ("score", pa.float32()),  # cosine
        ("same", pa.bool_()),
    ]
)
FLIP = "flip"
"""What the metadata of stored scores call `Options.flip`."""
BY_FOLD = pa.field("by_fold", pa.list_(pa.float32()))
"""Of centred scores only: the pair's score with each fold's mean in turn, folds in increasing order."""
EXTRA = "extra/{}"
"""What a set of `evaluate.extra` is called, whatever its file is called: extra/lfw is not lfw."""
FIGURES = ("roc.png", "det.png", "scores.png", "folds.png")
FILES = ("metrics.json", "scores.parquet", "roc.csv")
"""What a set's results are, beside its figures."""
UNUSABLE_SCORE = -1.0
"""The lowest cosine: what a pair gets when one side has no image at all. The pair is counted, as LFW asks for."""
DIGITS = 10
"""Decimals of a figure in metrics.json."""
_BLOCK = 4096


@dataclass(frozen=True)
class Options:
    """How embeddings become scores."""

    flip: Flip = "concatenate"
    """What becomes of the mirror image's features: put behind the image's, added to them, or not used."""
    centre: bool = False
    """Subtract the mean template of the folds that a fold's threshold is chosen on, and normalise again."""


@dataclass(frozen=True)
class Scored:
    """Pairs with their scores."""

    left: list[str]
    right: list[str]
    same: Flags
    fold: NDArray[np.int32]
    scores: NDArray[np.float32]
    """(N,) cosines; or (F, N), by whose mean they are centred: the folds in increasing order."""

    @property
    def own(self) -> NDArray[np.float32]:
        """(N,) the score of each pair in its own fold."""
        if self.scores.ndim == 1:
            return self.scores
        return self.scores[np.unique(self.fold, return_inverse=True)[1], np.arange(len(self.fold))]

    def verification(self, fars: Sequence[float]) -> Verification:
        """To be measured.

        Raises:
            EvaluationError: the pairs cannot be measured.
        """
        return Verification(self.scores, self.same, self.fold, fars)

    @property
    def people(self) -> uncertainty.People | None:
        """Who is on the pairs, where names tell."""
        return uncertainty.people(self.left, self.right, self.same)

    def in_order(self) -> "Scored":
        """The same by name of the left side, of the right, fold and truth: lists of the same pairs become alike."""
        order = sorted(
            range(len(self.left)), key=lambda row: (self.left[row], self.right[row], self.fold[row], self.same[row])
        )
        return Scored(
            [self.left[row] for row in order],
            [self.right[row] for row in order],
            self.same[order],
            self.fold[order],
            self.scores[..., order],
        )

    def write(self, path: Path, about: dict[str, str] | None = None) -> None:
        """As a table by `SCORES`, with `BY_FOLD` where the scores are centred; its metadata say what it is `about`."""
        columns = {"fold": self.fold, "left": self.left, "right": self.right, "score": self.own, "same": self.same}
        table, schema = pa.table(columns).cast(SCORES), SCORES
        if self.scores.ndim == 2:
            schema = SCORES.append(BY_FOLD)
            table = table.append_column(BY_FOLD, pa.array(list(self.scores.T), BY_FOLD.type))
        tables.write_table(path, table, schema, metadata=about)

    @classmethod
    def read(cls, path: Path) -> "Scored":
        """Read what `write` has written.

        Raises:
            TableError: the file is absent or of another form.
        """
        centred = path.exists() and path.suffix == ".parquet" and BY_FOLD.name in _columns(path)
        table = tables.read_table(path, SCORES.append(BY_FOLD) if centred else SCORES)
        scores = np.stack(table[BY_FOLD.name].to_pylist(), axis=1) if centred else table["score"].to_numpy()
        return cls(
            table["left"].to_pylist(),
            table["right"].to_pylist(),
            table["same"].to_numpy(),
            table["fold"].to_numpy(),
            scores.astype(np.float32),
        )


def templates(blocks: Iterable[Block], how: Flip, count: int) -> tuple[Floats, Flags]:
    """Unit vectors of templates: the normalised mean of their frames' unit vectors; a still is a template of one frame.

    Args:
        blocks: features of the frames, of any scale.
        how: what becomes of those of mirror images.
        count: T, how many templates there are.

    Returns:
        T×D vectors (T×2D, concatenated), and T flags: there is a frame; zero where not.

    Raises:
        EvaluationError: features are not finite numbers, or all zero; there are none of mirror images to use; or there
            is not one frame.
    """
    sums: Floats | None = None
    usable = np.zeros(count, np.bool_)
    for block in blocks:
        for start in range(0, len(block.template), _BLOCK):
            some = slice(start, start + _BLOCK)
            vectors = unit(block.emb[some], None if block.flip is None else block.flip[some], how)
            if sums is None:
                sums = np.zeros((count, vectors.shape[1]))
            np.add.at(sums, block.template[some], vectors)
            usable[block.template[some]] = True
    if sums is None:
        raise EvaluationError("not one image of the pairs can be used")
    return _normalised(sums), usable


def unit(emb: NDArray, flip: NDArray | None, how: Flip) -> Floats:
    """Unit vectors of faces: N×D, or N×2D where both features are concatenated (CosFace, section 4.1).

    Args:
        emb: N×D features, of any scale.
        flip: N×D, of the mirror images; None where there are none.
        how: what becomes of those.

    Raises:
        EvaluationError: features are not finite numbers, or all zero; or there is no `flip` to use.
    """
    features = emb.astype(np.float64)
    if how != "none":
        if flip is None:
            raise EvaluationError(f"flip: {how} needs embeddings of the mirror images, and there are none")
        mirrored = flip.astype(np.float64)
        features = np.hstack([features, mirrored]) if how == "concatenate" else features + mirrored
    length = np.linalg.norm(features, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise EvaluationError(f"{len(bad)} embeddings without a direction: not finite numbers, or all zero")
    return features / length


def score(
    vectors: Floats,
    usable: Flags,
    left: NDArray[np.integer],
    right: NDArray[np.integer],
    fold: NDArray[np.integer],
    centre: bool = False,
) -> NDArray[np.float32]:
    """Cosines of pairs of templates, given by index; UNUSABLE_SCORE where a side has no image.

    Centred, they depend on the fold: the mean is that of the templates in the pairs of all other folds, each template
    once, so that nothing of a fold has a part in its own mean.

    Args:
        vectors: T×D unit vectors.
        usable: T flags.
        left, right: N template indices each.
        fold: N fold numbers.
        centre: whether to subtract a mean.

    Returns:
        (N,), or (F, N) where centred.
    """
    both = usable[left] & usable[right]
    if not centre:
        return np.where(both, _cosines(vectors, left, right), UNUSABLE_SCORE).astype(np.float32)
    rows = []
    for number in np.unique(fold):
        others = fold != number
        known = np.unique(np.concatenate([left[others], right[others]]))
        centred = _normalised(vectors - vectors[known[usable[known]]].mean(axis=0))
        rows.append(np.where(both, _cosines(centred, left, right), UNUSABLE_SCORE).astype(np.float32))
    return np.stack(rows)


def summary(
    metrics: Metrics,
    intervals: uncertainty.Intervals,
    options: Options,
    undetected: int | None,
    leaked: int | None = None,
) -> dict[str, Any]:
    """What metrics.json holds.

    Args:
        metrics: of the pairs.
        intervals: of the same pairs.
        options: how their scores came about.
        undetected: pairs that touch an image or video without a detected face; None where that is not known.
        leaked: people who are in the training set, too; None where that is not known.
    """
    return {
        "accuracy": rounded(metrics.accuracy),
        "accuracy_std": rounded(metrics.accuracy_std),
        "accuracy_se": rounded(metrics.accuracy_se),
        "auc": rounded(metrics.auc),
        "bootstrap_over": intervals.over,
        "centre": options.centre,
        "eer": rounded(metrics.eer),
        "flip": options.flip,
        "fold_accuracy": [rounded(share) for share in metrics.fold_accuracy],
        "intervals": {
            name: bounds and [rounded(bounds[0]), rounded(bounds[1])] for name, bounds in intervals.bounds.items()
        },
        "leaked_identities": leaked,
        "pairs": metrics.pairs,
        "tar_at_far": {far: tar if tar is None else rounded(tar) for far, tar in metrics.tar_at_far.items()},
        "threshold": rounded(metrics.threshold),
        "undetected": undetected,
        "unresolved": intervals.unresolved,
    }


def as_json(content: dict[str, Any]) -> str:
    """As metrics.json has it, and as commands print it."""
    return json.dumps(content, indent=2, sort_keys=True)


def rounded(value: float) -> float:
    """To `DIGITS`."""
    return round(float(value), DIGITS)


def _cosines(vectors: Floats, left: NDArray[np.integer], right: NDArray[np.integer]) -> Floats:
    blocks = (slice(start, start + _BLOCK) for start in range(0, len(left), _BLOCK))
    return np.concatenate([np.einsum("nd,nd->n", vectors[left[each]], vectors[right[each]]) for each in blocks])


def _normalised(vectors: Floats) -> Floats:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _columns(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except pa.ArrowInvalid:
        return []  # read_table says what is wrong
