"""Two photographs: do they show the same person?"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pipeline import tables
from pipeline.executor import choose_device
from pipeline.params import Params
from pipeline.tracking import MODEL_TAG
from stages.align.decode import decode
from stages.evaluate.embed import embed
from stages.evaluate.models import Embedder
from stages.evaluate.photographs import align_files
from stages.evaluate.scoring import FLIP, Flip, Scored, unit
from stages.evaluate.verification import EvaluationError, threshold_at
from stages.train.faces import middle

LOCAL = Path("reports/lfw/scores.parquet")
"""The scores that thresholds are chosen by: of the model in this folder, as a rule."""
_CHOICES = {
    "centre": "nearest to the centre",
    "largest": "largest",
    "weighted": "best by size and nearness to the centre",
}
"""Of `align.choose`, in words."""


@dataclass(frozen=True)
class Side:
    """What was found in a photograph."""

    path: str
    status: str
    """detected, no_face or unreadable."""
    detail: str | None
    """Why it is unreadable."""
    box: list[float] | None
    """Of the face that was taken: left, top, right, bottom in pixels."""
    others: list[list[float]]
    """The boxes of other faces."""

    def describe(self, choose: str) -> str:
        """One line for people; `choose` is the rule by which one of several faces is taken."""
        if self.box is None:
            return f"{self.path}: {self.detail or 'no face found'}"
        if not self.others:
            return f"{self.path}: one face, {_words(self.box)}"
        others = "; ".join(_words(box) for box in self.others)
        taken = f"the {_CHOICES[choose]} is taken, {_words(self.box)}"
        return f"{self.path}: {1 + len(self.others)} faces; {taken}; not {others}"


@dataclass(frozen=True)
class Threshold:
    """From which score on two photographs are taken for the same person."""

    value: float
    false_accepts: int
    """Pairs of different people that reach it ..."""
    different: int
    """... of so many."""
    flip: Flip
    """How those scores came about."""
    source: str
    """Whose scores they are."""

    @property
    def far(self) -> float:
        """The false accept rate that is to be expected of photographs like those."""
        return self.false_accepts / self.different

    def describe(self) -> str:
        """Half a line for people."""
        counts = f"{self.false_accepts:,} of {self.different:,} pairs of different people"
        return f"{self.value:.4f} accepts {counts} (FAR {self.far:.2g}), by {self.source}"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of two photographs."""

    left: Side
    right: Side
    model: str
    digest: str
    score: float | None
    """Cosine; None without a face on either side."""
    threshold: Threshold | None
    same: bool | None
    """None where it cannot be decided."""
    reason: str | None
    """Why not."""

    def describe(self, choose: str) -> str:
        """A few lines for people; `choose` is the rule by which one of several faces is taken."""
        lines = [side.describe(choose) for side in (self.left, self.right)]
        lines.append(f"model: {self.model}")
        if self.threshold is not None:
            lines.append(f"threshold: {self.threshold.describe()}")
        if self.score is not None:
            lines.append(f"score: {self.score:.4f}")
        answers = {True: "the same person", False: "different people", None: f"cannot be decided: {self.reason}"}
        lines.append(f"verdict: {answers[self.same]}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found = asdict(self)
        if self.threshold is not None:
            found["threshold"]["far"] = self.threshold.far
        return found


def verify(left: Path, right: Path, model: Embedder, params: Params, threshold: Threshold | str) -> Verdict:
    """Compare the faces in two photographs, with the flip-test as the threshold's scores have it.

    Args:
        threshold: as from `find_threshold`, or why there is none; then the flip-test is that of params.evaluate.
    """
    device = choose_device(params.machine.device).type
    rows = list(align_files([left, right], params.align, fallback=False, device=device))
    sides = [_side(str(path), row) for path, row in zip((left, right), rows, strict=True)]
    verdict = partial(Verdict, sides[0], sides[1], model=model.name, digest=model.digest)
    chosen, reason = (None, threshold) if isinstance(threshold, str) else (threshold, None)
    if missing := [side.path for side in sides if side.box is None]:
        reason = f"no face to compare in {' and '.join(missing)}"
        return verdict(score=None, threshold=chosen, same=None, reason=reason)
    faces = np.stack([middle(decode(row["image"]), model.width) for row in rows])
    both = embed(model, faces)
    vectors = unit(both[:, 0], both[:, 1], chosen.flip if chosen else params.evaluate.flip)
    score = float(vectors[0] @ vectors[1])
    return verdict(score=score, threshold=chosen, same=score >= chosen.value if chosen else None, reason=reason)


def find_threshold(model: Embedder, far: float, given: Path | None, recorded: Path | None) -> Threshold | str:
    """The threshold at a false accept rate by the scores that are at hand, or why there is none.

    Args:
        model: whose scores they must be.
        far: above 0 and below 1.
        given: a scores.parquet that the user names.
        recorded: one that the model's run in MLflow has kept; without either, that of reports/lfw counts.

    Raises:
        EvaluationError: the user's scores are of another model.
        TableError: they are absent or no scores.
    """
    path = given or recorded or LOCAL
    if path == LOCAL and not path.exists():
        return f"no threshold: {path} is not there; `dvc repro` makes it, or --scores names another"
    scored = Scored.read(path)
    made = tables.metadata(path, MODEL_TAG) or "unknown"
    flip = next((each for each in get_args(Flip) if each == tables.metadata(path, FLIP)), None)
    if made != model.digest or flip is None:
        problem = f"{path} has the scores of another model ({made[:12]}) than {model.name} ({model.digest[:12]})"
        if given:
            raise EvaluationError(problem)
        return f"no threshold: {problem}; `dvc repro` makes its own, or `cosface evaluate` for --scores"
    source = "lfw, as its run in MLflow has kept it" if path == recorded else str(path)
    if scored.scores.ndim == 2:
        return f"no threshold: the scores of {source} are centred by fold, which two photographs cannot be"
    score, different = scored.scores.astype(np.float64), int(np.count_nonzero(~scored.same))
    value = threshold_at(far, score, scored.same)
    if value is None:
        least = f"the least is {1 / max(1, different):.2g}"
        return f"no threshold: {source} has {different:,} pairs of different people, too few for FAR {far:g}; {least}"
    return Threshold(value, int(np.count_nonzero(score[~scored.same] >= value)), different, flip, source)


def _side(path: str, row: dict[str, Any]) -> Side:
    if row["status"] != "detected":
        return Side(path, row["status"], row.get("detail"), None, [])
    others = [[float(edge) for edge in box] for box in np.reshape(row["others"], (-1, 4))]
    return Side(path, "detected", None, [float(edge) for edge in row["box"]], others)


def _words(box: list[float]) -> str:
    left, top, right, bottom = (round(edge) for edge in box)
    return f"x {left} to {right}, y {top} to {bottom}"
