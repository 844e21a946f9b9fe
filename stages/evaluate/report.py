"""`python -m stages.evaluate.report`: what the run left → reports/index.html, which opens offline, and verdict.txt.

The page follows from the run's files and params.yaml alone: no clock, no machine, nothing fetched.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline import pages, tables
from pipeline.entry import stage
from pipeline.pages import data_uri, to_svg
from pipeline.params import SETS, Params, Synthetic, flatten
from pipeline.tracking import training_run_of
from stages.evaluate import figures, scoring
from stages.evaluate.features import blocks, choose_frames, matrix
from stages.evaluate.record import extra_sets, read_json, record
from stages.evaluate.scoring import EXTRA, Scored
from stages.evaluate.verification import EvaluationError, Metrics

PROTOCOLS = {"lfw": "LFW", "ytf": "YTF"}
SHOWN_SECTIONS = (
    "download",
    "align",
    "shard",
    "train",
    "evaluate",
    "audit",
)  # the others change nothing that comes out
WORST = 6
SAMPLE_IDENTITIES, SAMPLE_FACES = 6, 6
MAP_PEOPLE, MAP_FACES = 20, 12
COUNTS = ("images", "detected", "fallback", "no_face", "unreadable", "several_faces")


@dataclass(frozen=True)
class ScoredPair:
    """A pair on the page."""

    left: str
    right: str
    """Image ids, or videos."""
    left_face: str | None
    right_face: str | None
    """Data URI of the aligned face (of a video: its first used frame); None where there is no image."""
    score: float


@dataclass(frozen=True)
class Part:
    """Some of a protocol's pairs."""

    name: str
    pairs: int
    accuracy: float


@dataclass(frozen=True)
class Protocol:
    """A protocol's section of the page."""

    name: str
    title: str
    metrics: Metrics
    found: dict[str, Any]
    """What metrics.json holds."""
    different: int
    """How many pairs show different people: what FAR counts by."""
    charts: dict[str, str]
    """Inline SVG by caption."""
    parts: list[Part]
    false_matches: list[ScoredPair]
    false_non_matches: list[ScoredPair]

    @property
    def accuracy(self) -> str:
        """Mean and standard error in per cent, with as many decimals as the error deserves."""
        digits = 1 if self.metrics.accuracy_se >= 0.001 else 2
        return f"{100 * self.metrics.accuracy:.{digits}f}% ± {100 * self.metrics.accuracy_se:.{digits}f}"

    def interval(self, figure: str, digits: int = 1) -> str:
        """That of a figure, in per cent; empty where there is none."""
        return _interval(self.found["intervals"].get(figure), digits)

    @property
    def verdict(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.title}: {self.accuracy} accuracy (95% interval {self.interval('accuracy') or 'unknown'}), "
            f"AUC {self.metrics.auc:.4f}, EER {self.metrics.eer:.2%} "
            f"({self.metrics.pairs:,} pairs, {len(self.metrics.folds)} folds)"
        )


def _interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    """In per cent; empty where there are none."""
    return f"{100 * bounds[0]:.{digits}f} to {100 * bounds[1]:.{digits}f}%" if bounds else ""


def build(reports: Path, models: Path, aligned: Path, embedded: Path, out: Path, params: Params) -> list[str]:
    """Write the page, and map.png beside it; return the verdict, a line a protocol.

    Args:
        reports: folder with `align/<set>/metrics.json`, `shard/metrics.json`, `audit/metrics.json`, `megaface/`, and,
        for
            each protocol, `<set>/scores.parquet` and `metrics.json`; those of more sets lie in `extra/`.
        models: folder with history.csv, train.json and faces.png.
        aligned: folder of the aligned sets.
        embedded: folder of the embedded sets.
        out: the page.
        params: all of params.yaml.

    Raises:
        EvaluationError, TableError, OSError: something the page shows is absent or unreadable.
    """
    protocols = [_protocol(name, reports / name, aligned / name, params) for name in PROTOCOLS]
    protocols += [_protocol(EXTRA.format(each.name), each, None, params) for each in extra_sets(reports)]
    megaface = read_json(reports / "megaface" / "metrics.json")
    plane = _map(embedded / "lfw", params)
    pages.save_png(plane, out.with_name("map.png"))
    pages.render(
        Path(__file__).parent / "report.html.j2",
        out,
        protocols=protocols,
        by_pairs=[each.title for each in protocols if each.found["bootstrap_over"] == "pairs"],
        procedural=[name for name in SETS if isinstance(getattr(params.download, name), Synthetic)],
        megaface=megaface,
        interval=_interval,
        cmc=_cmc(reports / "megaface" / "cmc.csv") if "why" not in megaface else None,
        map=to_svg(plane, "map"),
        trained=read_json(models / "train.json"),
        head=params.train.head,
        backbone=params.train.backbone,
        training=_training_charts(models / "history.csv"),
        counts=[{"set": name} | _counts(_alignment(reports, name)) for name in SETS],
        left_out={name: count for name, count in _shards(reports)["dropped"].items() if count},
        shards=_shards(reports),
        audit=read_json(reports / "audit" / "metrics.json"),
        seen=pages.data_uri((models / "faces.png").read_bytes(), "image/png"),
        samples=_samples(aligned / "train"),
        parameters={name: flatten(getattr(params, name), name) for name in SHOWN_SECTIONS},
    )
    lines = [protocol.verdict for protocol in protocols]
    if "why" not in megaface:
        style = "-style" if isinstance(params.download.probes, Synthetic) else ""
        count, last = list(_by_count(megaface))[-1]
        lines.append(
            f"MegaFace{style} identification: {last['rank_1']:.1%} rank-1 among {count:,} distractors "
            f"(95% interval {_interval(last['intervals']['rank_1']) or 'unknown'})"
        )
    return lines


def _by_count(megaface: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results by number of distractors, the fewest first."""
    yield from sorted((int(count), values) for count, values in megaface["distractors"].items())


def _cmc(path: Path) -> str:
    with path.open(newline="") as file:
        rows = [(int(row["distractors"]), int(row["rank"]), float(row["share"])) for row in csv.DictReader(file)]
    curves = {count: [share for own, _, share in rows if own == count] for count in sorted({row[0] for row in rows})}
    return to_svg(figures.cmc_figure(curves), "cmc")


def _map(embedded: Path, params: Params) -> Figure:
    """Faces of the people with the most photographs, brought onto a plane by t-SNE (van der Maaten and Hinton,
    2008)."""
    from sklearn.manifold import TSNE

    table = tables.read_parts(embedded, tables.EMBEDDED, ["image_id", "identity", "status"])
    table = table.filter(pc.equal(table["status"], "detected"))
    _, code, counts = np.unique(table["identity"].to_numpy(), return_inverse=True, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:MAP_PEOPLE]
    rows = [_spread(np.flatnonzero(code == person), MAP_FACES) for person in most]
    chosen = [table["image_id"][int(row)].as_py() for row in np.concatenate(rows)]
    frames = choose_frames(embedded, chosen, tables.EMBEDDED, by_image=True)
    vectors, _ = scoring.templates(blocks(embedded, frames), params.evaluate.flip, len(chosen))
    # not its faster approximation, whose threads add up in no particular order
    perplexity = min(10.0, (len(chosen) - 1) / 3)
    plane = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0, method="exact")
    people = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    return figures.map_figure(plane.fit_transform(vectors), people)


def worst_errors(scored: Scored, decided: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
    """Rows of the worst false matches (highest scores first) and false non-matches (lowest first), WORST of each.

    Args:
        decided: of each pair, whether rightly, as Verification.decided has it.
    """
    order = np.argsort(scored.own, kind="stable")
    false_non_matches = order[(scored.same & ~decided)[order]][:WORST]
    order = np.argsort(-scored.own, kind="stable")
    false_matches = order[(~scored.same & ~decided)[order]][:WORST]
    return false_matches.tolist(), false_non_matches.tolist()


def _protocol(name: str, results: Path, aligned: Path | None, params: Params) -> Protocol:
    scored = Scored.read(results / "scores.parquet")
    verification = scored.verification(params.evaluate.fars)
    metrics = verification.measure()
    decided = verification.decided(metrics)
    rows = worst_errors(scored, decided)
    false_matches, false_non_matches = (_pairs(scored, chosen, aligned) for chosen in rows)
    return Protocol(
        name=name,
        title=f"{_title(name, params)} pairs",
        metrics=metrics,
        found=read_json(results / "metrics.json"),
        different=int((~scored.same).sum()),
        charts={
            "ROC": to_svg(figures.roc_figure(metrics), f"{name}-roc"),
            "DET": to_svg(figures.det_figure(metrics), f"{name}-det"),
            f"Scores, threshold {metrics.threshold:.3f}": to_svg(
                figures.scores_figure(scored.own, scored.same, metrics.threshold), f"{name}-scores"
            ),
            "Accuracy of each fold": to_svg(figures.folds_figure(metrics), f"{name}-folds"),
        },
        parts=[] if aligned is None else _parts(scored, decided, aligned),
        false_matches=false_matches,
        false_non_matches=false_non_matches,
    )


def _title(name: str, params: Params) -> str:
    """As papers write it, where it is a protocol of papers, and procedural faces are not taken for its photographs."""
    if name not in PROTOCOLS:
        return name
    return PROTOCOLS[name] + ("-style" if isinstance(getattr(params.download, name), Synthetic) else "")


def _parts(scored: Scored, decided: NDArray[np.bool_], aligned: Path) -> list[Part]:
    """Accuracy where a face was found on both sides and where not, and by the size of the smaller face."""
    names = list(dict.fromkeys([*scored.left, *scored.right]))
    number = {name: i for i, name in enumerate(names)}
    frames = choose_frames(aligned, names)
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for path, template in zip(tables.parts(aligned), frames.template, strict=True):
        boxes = tables.read_table(path, tables.ALIGNED, ["box"])["box"]
        used = np.flatnonzero((template >= 0) & boxes.is_valid().to_numpy())
        if len(used):
            box = matrix(boxes.take(pa.array(used)))
            np.add.at(sums, template[used], (box[:, 2:] - box[:, :2]).mean(axis=1))
            np.add.at(counts, template[used], 1)
    size = np.divide(sums, counts, out=np.zeros(len(names)), where=counts > 0)
    left, right = (np.array([number[name] for name in side]) for side in (scored.left, scored.right))
    both, smaller = frames.detected[left] & frames.detected[right], np.minimum(size[left], size[right])
    low, high = np.quantile(smaller[both], (1 / 3, 2 / 3)) if both.any() else (0.0, 0.0)
    groups = {
        "a face found on both sides": both,
        "no face found on a side": ~both,
        f"smaller face below {low:.0f} pixels": both & (smaller < low),
        f"{low:.0f} to {high:.0f} pixels": both & (smaller >= low) & (smaller < high),
        f"{high:.0f} pixels and more": both & (smaller >= high),
    }
    return [Part(name, int(own.sum()), float(decided[own].mean())) for name, own in groups.items() if own.any()]


def _pairs(scored: Scored, rows: list[int], aligned: Path | None) -> list[ScoredPair]:
    sides = [(scored.left[row], scored.right[row]) for row in rows]
    faces = _faces(aligned, sorted({name for pair in sides for name in pair})) if aligned else {}
    return [
        ScoredPair(left, right, faces.get(left), faces.get(right), round(float(scored.own[row]), 6))
        for row, (left, right) in zip(rows, sides, strict=True)
    ]


def _faces(aligned: Path, names: list[str]) -> dict[str, str]:
    """The face of each image, or the first used frame of each video, as data URI; without those that have none."""
    frames = choose_frames(aligned, names)
    faces: dict[str, str] = {}
    for path, template in zip(tables.parts(aligned), frames.template, strict=True):
        which, first_row = np.unique(template, return_index=True)
        new = [(names[i], row) for i, row in zip(which, first_row, strict=True) if i >= 0 and names[i] not in faces]
        if new:
            images = tables.read_table(path, tables.ALIGNED, ["image"])["image"]
            faces |= {name: data_uri(images[int(row)].as_py()) for name, row in new}
    return faces


def _samples(aligned: Path) -> list[list[str]]:
    """Faces of a few identities, both spread evenly over what there is; identities with many faces first choice."""
    table = tables.read_parts(aligned, tables.ALIGNED, ["image_id", "identity", "status"])
    table = table.filter(pc.equal(table["status"], "detected"))
    ids = table["image_id"].to_numpy()
    identities, of_row, counts = np.unique(table["identity"].to_numpy(), return_inverse=True, return_counts=True)
    if not len(identities):
        raise EvaluationError(f"{aligned}: not one detected face")
    rich = np.flatnonzero(counts >= min(SAMPLE_FACES, int(counts.max())))
    chosen = [ids[_spread(np.flatnonzero(of_row == i), SAMPLE_FACES)] for i in _spread(rich, SAMPLE_IDENTITIES)]
    faces = _faces(aligned, sorted(name for row in chosen for name in row))
    return [[faces[name] for name in row] for row in chosen]


def _spread(items: NDArray, count: int) -> NDArray:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return items
    return items[np.arange(count) * len(items) // count]


def _training_charts(history: Path) -> dict[str, str]:
    with history.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {key: [float(row[key]) if row[key] else None for row in rows] for key in rows[0]} if rows else {}
    needed = {"iteration", "loss", "accuracy", "learning_rate", "val_accuracy", "val_auc"}
    if not needed <= columns.keys():
        raise EvaluationError(f"{history}: has columns {sorted(columns)}, expected {sorted(needed)} and at least a row")
    iteration = [int(value or 0) for value in columns["iteration"]]
    loss = figures.training_figure(iteration, ("loss", columns["loss"], pages.SAME))
    accuracy = figures.training_figure(
        iteration,
        ("training", columns["accuracy"], pages.SAME),
        ("validation", columns["val_accuracy"], pages.DIFFERENT),
        share=True,
    )
    rate = figures.training_figure(iteration, ("rate", columns["learning_rate"], pages.SAME), log=True)
    charts = {
        "Loss (LMCL)": to_svg(loss, "loss"),
        "Accuracy among training identities": to_svg(accuracy, "accuracy"),
    }
    if any(value is not None for value in columns["val_auc"]):
        auc = figures.training_figure(iteration, ("validation", columns["val_auc"], pages.SAME))
        charts["AUC among validation identities"] = to_svg(auc, "auc")
    return charts | {"Learning rate": to_svg(rate, "rate")}


def _counts(alignment: dict[str, Any]) -> dict[str, int]:
    return {key: alignment[key] for key in COUNTS}


def _alignment(reports: Path, name: str) -> dict[str, Any]:
    return read_json(reports / "align" / name / "metrics.json")


def _shards(reports: Path) -> dict[str, Any]:
    return read_json(reports / "shard" / "metrics.json")


def main(params: Params) -> None:
    """Build the page, and leave and print the verdict."""
    reports = Path("reports")
    page = reports / "index.html"
    lines = [
        *build(reports, Path("models"), Path("data/aligned"), Path("data/embedded"), page, params),
        f"the whole report: {page}",
    ]
    verdict = "\n".join(lines) + "\n"
    with tables.atomic(reports / "verdict.txt") as path:
        path.write_text(verdict, encoding="utf-8")
    with training_run_of(Path("models"), params) as tracker:
        record(reports, tracker)
    print(verdict, end="")


if __name__ == "__main__":
    stage(main)
