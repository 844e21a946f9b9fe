"""The page: offline, complete, and right about the worst errors."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.params import SETS, Local, Params, load_params
from pipeline.tables import ALIGNED, read_parts, read_table
from stages.evaluate import report
from stages.evaluate.report import COUNTS, build, worst_errors
from stages.evaluate.scoring import SCORES, Scored
from stages.evaluate.verification import EvaluationError
from tests.conftest import ROOT
from tests.evaluate.conftest import Workspace
from tests.evaluate.test_evaluate_stage import write_embedded


class Page(HTMLParser):
    """What a browser would fetch, and the ids that pictures refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def built(workspace: Workspace, reports: Path, out: Path, params: Params) -> tuple[str, list[str]]:
    """The page and the verdict's lines."""
    lines = build(reports, workspace.models, workspace.aligned, workspace.embedded, out, params)
    return out.read_text(encoding="utf-8"), lines


@pytest.fixture(scope="module")
def made(workspace: Workspace, reports: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Of the workspace, by the repository's own params.yaml; it takes seconds."""
    return built(workspace, reports, tmp_path_factory.mktemp("page") / "index.html", load_params(ROOT / "params.yaml"))


@pytest.fixture
def page(made: tuple[str, list[str]]) -> str:
    return made[0]


def assert_pictures_refer_to_themselves(text: str) -> None:
    page = Page(text)
    for reference in set(re.findall(r"url\(#([^)]+)\)", text)) | {v[1:] for v in page.fetched if v.startswith("#")}:
        assert page.ids.count(reference) == 1, reference


def scored(rows: list[tuple[int, float, bool]]) -> Scored:
    fold, score, same = zip(*rows, strict=True)
    names = [f"{i}" for i in range(len(rows))]
    return Scored(names, names, np.array(same), np.array(fold, np.int32), np.array(score, np.float32))


def test_worst_errors_are_those_furthest_on_the_wrong_side() -> None:
    rng = np.random.default_rng(1)
    rows = [(i // 20, 0.6 if i % 2 else 0.1, bool(i % 2)) for i in range(200)]
    wrong_different = {3: 0.9, 41: 0.8, 100: 0.95, 122: 0.7, 140: 0.85, 160: 0.75, 180: 0.65}
    wrong_same = {11: -0.2, 51: 0.0, 131: -0.3}
    for i, score in wrong_different.items():
        rows[i] = (i // 20, score, False)
    for i, score in wrong_same.items():
        rows[i] = (i // 20, score, True)
    order = rng.permutation(200)
    table = scored([rows[i] for i in order])
    verification = table.verification([0.1])
    false_matches, false_non_matches = worst_errors(table, verification.decided(verification.measure()))
    assert [order[i] for i in false_matches] == [100, 3, 140, 41, 160, 122]
    assert [order[i] for i in false_non_matches] == [131, 11, 51]


def test_errors_are_judged_by_the_threshold_of_their_fold() -> None:
    table = scored([(0, 0.2, False), (0, 0.4, True), (1, 0.5, False), (1, 0.7, True)])
    verification = table.verification([0.1])
    metrics = verification.measure()
    assert metrics.fold_threshold == pytest.approx((0.6, 0.3))
    assert worst_errors(table, verification.decided(metrics)) == ([2], [1])


def test_page_fetches_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []  # every element is closed
    beside = {f"align/{name}/index.html" for name in SETS} | {"shard/index.html", "audit/index.html"}
    assert all(value.startswith(("data:", "#")) or value in beside for value in parsed.fetched)
    assert not re.findall(r"url\((?!#)|@import|<script|<iframe|<object", page)
    assert_pictures_refer_to_themselves(page)


def test_page_shows_worst_pairs_and_their_faces(workspace: Workspace, reports: Path, page: str) -> None:
    sections = re.split(r"<h2>", page)
    for name, index in (("lfw", 2), ("ytf", 3)):
        rows = read_table(reports / name / "scores.parquet", SCORES).to_pylist()
        highest = max((row for row in rows if not row["same"]), key=lambda row: row["score"])
        shown = re.search(
            r"Worst false matches.*?<small title=\"(.*?)\".*?<small title=\"(.*?)\"", sections[index], re.S
        )
        assert shown is not None
        assert shown.groups() == (highest["left"], highest["right"])
        key = "image_id" if name == "lfw" else "video"
        aligned = read_parts(workspace.aligned / name, ALIGNED, [key, "status", "image"]).to_pylist()
        faces = re.findall(r'<img src="data:image/jpeg;base64,(.*?)" alt="(.*?)"', sections[index])
        for shown_face, side in zip(faces[:2], ("left", "right"), strict=True):
            frames = [row for row in aligned if row[key] == highest[side] and row["image"]]
            used = [row for row in frames if row["status"] == "detected"] or frames
            assert shown_face == (base64.b64encode(used[0]["image"]).decode(), highest[side])


def decided_rightly(rows: list[dict[str, Any]]) -> NDArray[np.bool_]:
    """By a threshold that decides most of the other folds' pairs rightly, the middle one of those: every cut tried."""
    fold, score, same = (np.array([row[name] for row in rows]) for name in ("fold", "score", "same"))
    score = score.astype(np.float64)
    right = np.empty(len(rows), bool)
    for number in np.unique(fold):
        others = fold != number
        distinct = np.unique(score[others])
        cuts = [distinct[0], *((distinct[1:] + distinct[:-1]) / 2), np.nextafter(distinct[-1], np.inf)]
        hits = [int(((score[others] >= cut) == same[others]).sum()) for cut in cuts]
        best = [cut for cut, hit in zip(cuts, hits, strict=True) if hit == max(hits)]
        own = fold == number
        right[own] = (score[own] >= best[(len(best) - 1) // 2]) == same[own]
    return right


@pytest.mark.parametrize(("name", "index", "key"), [("lfw", 2, "image_id"), ("ytf", 3, "video")])
def test_accuracy_by_part_is_that_of_its_pairs(
    workspace: Workspace, reports: Path, page: str, name: str, index: int, key: str
) -> None:
    """From scores.parquet and the aligned faces' boxes: a video's size is the mean of its detected frames'."""
    sizes: dict[str, list[float]] = {}
    for row in read_parts(workspace.aligned / name, ALIGNED, [key, "status", "box"]).to_pylist():
        if row["status"] == "detected":
            left, top, right, bottom = row["box"]
            sizes.setdefault(row[key], []).append((right - left + bottom - top) / 2)
    size = {each: sum(of_frames) / len(of_frames) for each, of_frames in sizes.items()}
    rows = read_table(reports / name / "scores.parquet", SCORES).to_pylist()
    decided = decided_rightly(rows)
    metrics = json.loads((reports / name / "metrics.json").read_text())
    by_fold = [decided[[row["fold"] == number for row in rows]].mean() for number in {row["fold"] for row in rows}]
    assert metrics["fold_accuracy"] == pytest.approx(by_fold, abs=1e-9)
    smaller = np.array([min(size.get(row["left"], 0), size.get(row["right"], 0)) for row in rows])
    both = smaller > 0
    low, high = np.quantile(smaller[both], [1 / 3, 2 / 3])
    expected = {
        "a face found on both sides": both,
        "no face found on a side": ~both,
        f"smaller face below {low:.0f} pixels": both & (smaller < low),
        f"{low:.0f} to {high:.0f} pixels": (smaller >= low) & (smaller < high),
        f"{high:.0f} pixels and more": smaller >= high,
    }
    text = re.split(r"<h2>", page)[index]
    table = re.search(r"<h3>By detection and by face size</h3>.*?<tbody>(.*?)</tbody>", text, re.S)
    assert table is not None
    told = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td></tr>", table[1])
    assert told == [(part, str(own.sum()), f"{100 * decided[own].mean():.1f}%") for part, own in expected.items()]
    assert len({accuracy for _, _, accuracy in told}) > 2


def test_the_map_is_of_the_people_with_the_most_faces(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five people, three; those whose face was not found do not count, however many photographs they have."""
    monkeypatch.setattr(report, "MAP_PEOPLE", 3)
    monkeypatch.setattr(report, "MAP_FACES", 4)
    people, status = list("abbcccddddeeeeeeeee"), ["detected"] * 12 + ["fallback"] * 7
    mixed = np.random.default_rng(1).permutation(len(people))
    write_embedded(tmp_path, [people[i] for i in mixed], [status[i] for i in mixed], 0.01, 2)
    (axes,) = report._map(tmp_path, params).axes
    shown = [np.array(each.get_offsets()) for each in axes.collections if isinstance(each, PathCollection)]
    assert [len(points) for points in shown] == [4, 3, 2]  # d, c, and one of two who have two faces
    points, whose = np.concatenate(shown), np.repeat([0, 1, 2], [4, 3, 2])
    apart = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([np.inf] * len(points))
    assert (whose[apart.argmin(axis=1)] == whose).all()


def test_training_charts_show_the_columns_of_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, dict[str, list[list[float]]]] = {}

    def keep(figure: Figure, name: str) -> str:
        (axes,) = figure.axes
        drawn[name] = {str(line.get_label()): np.array(line.get_xydata()).tolist() for line in axes.lines}
        return name

    monkeypatch.setattr(report, "to_svg", keep)
    (tmp_path / "history.csv").write_text(
        "iteration,val_auc,val_accuracy,learning_rate,accuracy,loss\n10,,,0.1,0.2,20.5\n20,0.8,0.5,0.01,0.6,12\n"
    )
    charts = report._training_charts(tmp_path / "history.csv")
    assert charts == {
        "Loss (LMCL)": "loss",
        "Accuracy among training identities": "accuracy",
        "AUC among validation identities": "auc",
        "Learning rate": "rate",
    }
    assert drawn == {
        "loss": {"loss": [[10, 20.5], [20, 12]]},
        "accuracy": {"training": [[10, 0.2], [20, 0.6]], "validation": [[20, 0.5]]},
        "auc": {"validation": [[20, 0.8]]},
        "rate": {"rate": [[10, 0.1], [20, 0.01]]},
    }


def test_page_says_what_it_was_measured_on(
    workspace: Workspace, reports: Path, tmp_path: Path, params: Params, page: str
) -> None:
    assert "Procedural faces." in page
    assert "LFW-style pairs" in page
    folder = Local(source="folder", watch=["x"], location="mine<b>", pairs=None, pairs_sha256=None)
    own = params.model_copy(update={"download": params.download.model_copy(update={"lfw": folder, "ytf": folder})})
    text, _ = built(workspace, reports, tmp_path / "index.html", own)
    assert "Mixed data." in text
    assert "LFW-style" not in text
    assert "mine&lt;b&gt;" in text  # nothing from outside becomes markup
    rest = dict.fromkeys(("train", "probes", "distractors"), folder)
    every = own.model_copy(update={"download": own.download.model_copy(update=rest)})
    assert "Photographs." in built(workspace, reports, tmp_path / "index.html", every)[0]


def test_page_has_the_figures(made: tuple[str, list[str]]) -> None:
    text, lines = made
    assert len(lines) == 3
    assert re.fullmatch(r"MegaFace-style identification: .*% rank-1 among 30 distractors \(95% interval .*\)", lines[2])
    for line in lines[:2]:
        assert line.split(": ")[1].split(" accuracy")[0] in text
    assert "1,234 faces of 8 identities" in text
    for place, name in enumerate(SETS):
        counts = [f"4,{100 * place + column:03d}" for column in range(len(COUNTS))]
        row = re.search(rf'<tr><th><a href="align/{name}/index.html">.*?</th>(.*?)</tr>', text)
        assert row is not None
        assert re.findall("<td>(.*?)</td>", row[1]) == counts
    assert "—<small>only 30 different pairs</small>" in text  # FAR 0.1%
    assert "train.head.margin" in text
    assert "machine.workers" not in text
    assert text.count("<svg") == 2 * 4 + 2 + 3


def test_a_set_of_ones_own_and_an_interval_that_is_not_known(
    workspace: Workspace, reports: Path, tmp_path: Path, params: Params
) -> None:
    own = shutil.copytree(reports, tmp_path / "reports")
    shutil.copytree(reports / "ytf", own / "extra" / "lfw")
    metrics = json.loads((own / "megaface" / "metrics.json").read_text())
    for of_count in metrics["distractors"].values():
        of_count["intervals"]["rank_1"] = None
    (own / "megaface" / "metrics.json").write_text(json.dumps(metrics))
    text, lines = built(workspace, own, tmp_path / "index.html", params)
    assert [line.split(":")[0] for line in lines[:3]] == ["LFW-style pairs", "YTF-style pairs", "extra/lfw pairs"]
    assert lines[-1].endswith(" rank-1 among 30 distractors (95% interval unknown)")
    assert_pictures_refer_to_themselves(text)


def test_page_is_the_same_every_time(
    workspace: Workspace, reports: Path, tmp_path: Path, params: Params, page: str
) -> None:
    assert built(workspace, reports, tmp_path / "again.html", params)[0] == page


def test_pair_without_image_is_shown_as_such(page: str) -> None:
    # 4/0 is unreadable, so its same pairs score -1 and are the worst false non-matches
    assert "<span>no image</span>" in page
    assert "−1.000" in page


def test_missing_history_is_named(workspace: Workspace, reports: Path, tmp_path: Path, params: Params) -> None:
    for name in ("train.json", "model.json", "faces.png"):
        (tmp_path / name).write_bytes((workspace.models / name).read_bytes())
    (tmp_path / "history.csv").write_text("iteration,loss\n1,2\n")
    with pytest.raises(EvaluationError, match=r"history\.csv: has columns"):
        build(reports, tmp_path, workspace.aligned, workspace.embedded, tmp_path / "index.html", params)
    assert not (tmp_path / "index.html").exists()


def test_table_of_scores_is_checked(workspace: Workspace, reports: Path, tmp_path: Path, params: Params) -> None:
    scored([(0, 0.5, True), (1, 0.6, True)]).write(tmp_path / "lfw" / "scores.parquet")
    with pytest.raises(EvaluationError, match="2 of the same person"):
        build(tmp_path, workspace.models, workspace.aligned, workspace.embedded, tmp_path / "index.html", params)
