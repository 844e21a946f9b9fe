"""`python -m stages.evaluate.audit`: what the trained model makes of the data it was trained on → reports/audit.

Things that only a model sees: training images that look more like another identity than like their own, or not even
like that; and training identities that look like people of the test sets. All are suspicions, listed with pictures for
a person to judge. suspects.csv has the columns of `shard.clean.exclude`: what is copied there is left out next time.
"""

import csv
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import pages, tables
from pipeline.entry import stage
from pipeline.params import PAIRED, Audit, Params
from stages.evaluate import features

log = logging.getLogger(__name__)

_BLOCK, _COSINES = 4096, 1 << 26
"""Vectors that are looked at together, and how many cosines of theirs at most."""
_PER_IDENTITY = 10
"""Images of a person of a test set, at most, that make up their centre; evenly spaced."""
_SHOWN = 60
"""Suspicions of each kind on the page; suspects.csv has all."""


@dataclass(frozen=True)
class Embedded:
    """The faces of a set, (n, D) float16 unit vectors, identity by identity."""

    image_id: list[str]
    names: list[str]
    """Of the identities, in order."""
    code: NDArray[np.intp]
    """(n,) the identity of each image."""
    vectors: NDArray[np.float16]

    def centres(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(identities, D) sums of the vectors, and these normalised."""
        sums = np.zeros((len(self.names), self.vectors.shape[1]), np.float32)
        for start in range(0, len(self.code), _BLOCK):
            np.add.at(sums, self.code[start : start + _BLOCK], self.vectors[start : start + _BLOCK].astype(np.float32))
        return sums, _normalised(sums)

    def typical(self, identity: int, centre: NDArray[np.float32]) -> str:
        """The image of an identity that is nearest to its centre."""
        mine = np.flatnonzero(self.code == identity)
        return self.image_id[int(mine[np.argmax(self.vectors[mine].astype(np.float32) @ centre)])]


Picture = tuple[str, str, str]
"""Set, image id, caption."""


@dataclass(frozen=True)
class Suspicion:
    """An image (or, by its most typical image, an identity), and what it looks like."""

    image_id: str
    """Empty where the whole identity is meant."""
    identity: str
    reason: str
    score: float
    """By which they are ordered, the strongest first."""
    pictures: list[Picture]
    """What to compare; of those that the page shows."""


def run(embedded: Path, aligned: Path, sets: Sequence[str], shards: Path, out: Path, params: Audit) -> dict[str, Any]:
    """Write suspects.csv, metrics.json and index.html.

    Args:
        embedded: folder of the embedded sets, `train` among them.
        aligned: folder of the aligned sets, for the page.
        sets: names of the evaluation sets there.
        shards: folder with dropped.parquet; what is left out already is not suspected again.
        out: where they go.

    Returns:
        The content of metrics.json.

    Raises:
        TableError: a table is absent or incomplete, or there is not one detected face to train on.
    """
    dropped = tables.read_table(shards / "dropped.parquet", tables.DROPPED, ["image_id"])["image_id"]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".audit-") as folder:
        train = _embedded(embedded / "train", Path(folder), without=dropped)
        if not train.image_id:
            raise tables.TableError(f"{embedded / 'train'}: not one detected face")
        sums, centres = train.centres()
        labels = suspected_labels(train, sums, centres, params.label_margin, params.label_least)
        overlaps = []
        for name in sets:
            known = _embedded(embedded / name, Path(folder), most=_PER_IDENTITY)
            if known.image_id:
                overlaps += suspected_overlaps(name, train, centres, known, params.overlap)
    overlaps.sort(key=lambda item: -item.score)
    _list(out / "suspects.csv", [*overlaps, *labels])
    metrics = {"images": len(train.code), "suspected_labels": len(labels), "suspected_overlaps": len(overlaps)}
    with tables.atomic(out / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    log.info("audit: %d labels and %d identities are suspect: %s", len(labels), len(overlaps), out / "index.html")
    pages.render(
        Path(__file__).parent / "audit.html.j2",
        out / "index.html",
        metrics=metrics,
        params=params,
        labels=_shown(labels, aligned),
        overlaps=_shown(overlaps, aligned),
    )
    return metrics


def _block(others: int) -> int:
    """How many vectors to compare with so many others at a time."""
    return min(_BLOCK, max(1, _COSINES // others))


def suspected_labels(
    train: Embedded, sums: NDArray[np.float32], centres: NDArray[np.float32], margin: float, least: float
) -> list[Suspicion]:
    """Images whose cosine to the centre of another identity is at least `margin` above that to their own, or whose
    cosine to their own is below `least`; those that are furthest beyond either come first.

    An identity's own centre is computed without the image itself; one of a single image has none, and is not suspected.
    """
    found = []
    counts = np.bincount(train.code, minlength=len(train.names))
    block = _block(len(centres))
    for start in range(0, len(train.code), block):
        vectors = train.vectors[start : start + block].astype(np.float32)
        code = train.code[start : start + block]
        own = np.einsum("nd,nd->n", vectors, _normalised(sums[code] - vectors))
        cosines = vectors @ centres.T
        cosines[np.arange(len(code)), code] = -np.inf
        other = cosines.argmax(axis=1)
        theirs = cosines[np.arange(len(code)), other]
        beyond = np.maximum(theirs - own - margin, least - own)
        for i in np.flatnonzero(((theirs - own >= margin) | (own < least)) & (counts[code] > 1)).tolist():
            found.append((float(beyond[i]), start + i, float(own[i]), float(theirs[i]), int(other[i])))
    found.sort(key=lambda item: (-item[0], item[1]))
    suspicions: list[Suspicion] = []
    for score, row, mine, near, other in found:
        image, own_name, looks = train.image_id[row], train.names[train.code[row]], train.names[other]
        reason = f"cosine {mine:.2f} to its own identity, {near:.2f} to {looks}"
        pictures: list[Picture] = []
        if len(suspicions) < _SHOWN:
            pictures = [
                ("train", image, image),
                ("train", train.typical(int(train.code[row]), centres[train.code[row]]), own_name),
                ("train", train.typical(other, centres[other]), looks),
            ]
        suspicions.append(Suspicion(image, own_name, reason, score, pictures))
    return suspicions


def suspected_overlaps(
    name: str, train: Embedded, centres: NDArray[np.float32], known: Embedded, least: float
) -> list[Suspicion]:
    """Training identities whose centre has a cosine of at least `least` to that of a person of an evaluation set.

    Each by the person who is nearest.
    """
    _, theirs = known.centres()
    found = []
    block = _block(len(theirs))
    for start in range(0, len(centres), block):
        cosines = centres[start : start + block] @ theirs.T
        person = cosines.argmax(axis=1)
        score = cosines[np.arange(len(person)), person]
        found += [(float(score[i]), start + i, int(person[i])) for i in np.flatnonzero(score >= least).tolist()]
    found.sort(key=lambda item: (-item[0], item[1]))
    suspicions: list[Suspicion] = []
    for score_of, identity, whom in found:
        pictures: list[Picture] = []
        if len(suspicions) < _SHOWN:
            pictures = [
                ("train", train.typical(identity, centres[identity]), train.names[identity]),
                (name, known.typical(whom, theirs[whom]), f"{name}: {known.names[whom]}"),
            ]
        reason = f"cosine {score_of:.2f} to {name}: {known.names[whom]}"
        suspicions.append(Suspicion("", train.names[identity], reason, score_of, pictures))
    return suspicions


def _embedded(
    embedded: Path, folder: Path, without: pa.ChunkedArray | None = None, most: int | None = None
) -> Embedded:
    """The detected faces of a set but those `without`, at most `most` of each identity; vectors lie in a file."""
    table = tables.read_parts(embedded, tables.EMBEDDED, ["image_id", "identity", "status"])
    wanted = pc.equal(table["status"], "detected").to_numpy()
    if without is not None:
        wanted &= ~pc.is_in(table["image_id"], without.combine_chunks()).to_numpy()
    if most is not None:
        wanted[wanted] = _spread(np.asarray(table["identity"].filter(pa.array(wanted)).to_pylist(), object), most)
    table = table.filter(pa.array(wanted))
    if not len(table):
        return Embedded([], [], np.empty(0, np.intp), np.empty((0, 0), np.float16))
    names, code = np.unique(np.asarray(table["identity"].to_pylist(), object), return_inverse=True)
    frames = features.choose_frames(embedded, table["image_id"].to_pylist(), tables.EMBEDDED, by_image=True)
    vectors: NDArray[np.float16] | None = None
    for block in features.blocks(embedded, frames):
        if vectors is None:
            shape = len(table), block.emb.shape[1]
            vectors = np.memmap(folder / f"{embedded.name}.float16", np.float16, "w+", shape=shape)
        vectors[block.template] = _normalised(block.emb).astype(np.float16)
    assert vectors is not None
    return Embedded(table["image_id"].to_pylist(), names.tolist(), code, vectors)


def _spread(identities: NDArray[np.object_], most: int) -> NDArray[np.bool_]:
    """At most `most` rows of each identity, evenly spaced among its rows."""
    _, code, counts = np.unique(identities, return_inverse=True, return_counts=True)
    order = np.argsort(code, kind="stable")
    rank = np.empty(len(code), np.intp)
    rank[order] = np.arange(len(code)) - np.repeat(np.cumsum(counts) - counts, counts)
    step = counts[code]
    # the first row of each of `most` equal stretches
    chosen: NDArray[np.bool_] = (step <= most) | (rank * most // step != (rank - 1) * most // step)
    return chosen


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def _list(path: Path, suspicions: list[Suspicion]) -> None:
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["image_id", "identity", "reason"])
    writer.writerows([item.image_id, item.identity, item.reason] for item in suspicions)
    with tables.atomic(path) as temporary:
        temporary.write_text(lines.getvalue(), encoding="utf-8")


def _shown(suspicions: list[Suspicion], aligned: Path) -> list[dict[str, Any]]:
    """The first of them with their pictures as data URIs."""
    shown = suspicions[:_SHOWN]
    wanted = {(of, image) for item in shown for of, image, _ in item.pictures}
    uris: dict[tuple[str, str], str] = {}
    for name in {of for of, _ in wanted}:
        ids = tables.read_parts(aligned / name, tables.ALIGNED, ["image_id"])["image_id"]
        images = [image for of, image in wanted if of == name]
        rows = pc.index_in(pa.array(images), value_set=ids.combine_chunks()).to_pylist()
        pictures = tables.read_images(aligned / name, tables.ALIGNED, rows)
        uris |= {(name, image): pages.data_uri(pictures[row]) for image, row in zip(images, rows, strict=True)}
    return [
        {"item": item, "pictures": [(uris[of, image], caption) for of, image, caption in item.pictures]}
        for item in shown
    ]


def main(params: Params) -> None:
    """Audit the training set by the model of this folder."""
    aligned, embedded, out = Path("data/aligned"), Path("data/embedded"), Path("reports/audit")
    out.mkdir(parents=True, exist_ok=True)
    run(embedded, aligned, (*PAIRED, "probes"), Path("data/shards"), out, params.audit)


if __name__ == "__main__":
    stage(main)
