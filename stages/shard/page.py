"""What became of a training set: metrics.json, and a page that shows the faces that were left out."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import pages, tables
from stages.shard.clean import REASONS, WITHOUT_FACE, Faces
from stages.shard.split import Plan

_SHOWN = 36
"""Faces of each reason on the page."""


@dataclass(frozen=True)
class LeftOut:
    """A face on the page, and the one that it repeats."""

    image_id: str
    face: str
    of: str | None
    other_face: str | None
    distance: int | None


@dataclass(frozen=True)
class Group:
    """What was left out for one reason: so many, and some of them."""

    reason: str
    count: int
    faces: list[LeftOut]


def write_page(
    aligned: Path,
    evaluation: dict[str, Path],
    faces: Faces,
    known: dict[str, Faces],
    plan: Plan,
    dropped: pa.Table,
    folder: Path,
) -> dict[str, Any]:
    """Write metrics.json and index.html.

    Args:
        aligned: folder of the aligned training set; `faces` is what is known of it.
        evaluation: folders of the evaluation sets, by name; `known` likewise.
        dropped: from clean.clean.
        folder: where both go.

    Returns:
        The content of metrics.json: identities, training and validation images, and how many images were left out for
        each reason.
    """
    counts = Counter(dropped["reason"].to_pylist())
    labels = plan.labels
    trained = pc.greater(labels["train"], 0)
    metrics = {
        "images": len(plan.label),
        "identities": int(pc.sum(trained).as_py()),
        "identities_validated_only": int(pc.sum(pc.and_(pc.invert(trained), pc.greater(labels["val"], 0))).as_py()),
        "identities_dropped": len(labels["dropped"].drop_null()),
        "train": int(pc.sum(labels["train"]).as_py()),
        "val": int(pc.sum(labels["val"]).as_py()),
        "dropped": {reason: counts[reason] for reason in REASONS},
    }
    with tables.atomic(folder / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    pictures = _Pictures(aligned, evaluation, faces, known)
    pages.render(
        Path(__file__).parent / "page.html.j2",
        folder / "index.html",
        metrics=metrics,
        reasons=REASONS,
        without_face=WITHOUT_FACE,
        groups=[
            _group(reason, dropped.filter(pc.equal(dropped["reason"], reason)), pictures)
            for reason in REASONS
            if counts[reason] and reason not in WITHOUT_FACE
        ],
        identities=labels.filter(labels["dropped"].is_valid()).slice(0, 200).to_pylist(),
        sizes=_sizes(labels),
    )
    return metrics


class _Pictures:
    """Aligned faces by name: of the training set by image id, of evaluation sets by `<set>: <image id>`."""

    def __init__(self, aligned: Path, evaluation: dict[str, Path], faces: Faces, known: dict[str, Faces]) -> None:
        self._folders = {"": aligned} | {f"{name}: ": path for name, path in evaluation.items()}
        self._ids = {"": faces.image_id} | {f"{name}: ": known[name].image_id for name in evaluation}

    def read(self, names: list[str]) -> dict[str, str]:
        """Data URIs of those that are there."""
        shown: dict[str, str] = {}
        for prefix, folder in self._folders.items():
            ids = pa.array([name.removeprefix(prefix) for name in names], pa.string())
            rows = pc.index_in(ids, value_set=self._ids[prefix]).to_pylist()
            places = {
                row: name for row, name in zip(rows, names, strict=True) if row is not None and name.startswith(prefix)
            }
            images = tables.read_images(folder, tables.ALIGNED, list(places)) if places else {}
            shown |= {places[row]: pages.data_uri(image) for row, image in images.items() if image}
        return shown


def _group(reason: str, dropped: pa.Table, pictures: _Pictures) -> Group:
    some = np.sort(np.random.default_rng(0).permutation(len(dropped))[:_SHOWN])
    rows = dropped.take(some).to_pylist()
    shown = pictures.read([row["image_id"] for row in rows] + [row["of"] for row in rows if row["of"]])
    faces = [
        LeftOut(row["image_id"], shown[row["image_id"]], row["of"], shown.get(row["of"]), row["distance"])
        for row in rows
    ]
    return Group(reason, len(dropped), faces)


@mpl.rc_context(pages.STYLE)
def _sizes(labels: pa.Table) -> str:
    """How many images the identities have, as SVG."""
    counts = labels.filter(pc.greater(labels["train"], 0))["train"].to_numpy()
    figure, plot = pages.axes()
    plot.hist(counts, bins=min(50, int(counts.max())), color=pages.SAME)
    plot.set(xlabel="training images of an identity", ylabel="identities")
    return pages.to_svg(figure, "sizes")
