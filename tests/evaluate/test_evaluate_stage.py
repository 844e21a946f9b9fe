"""The whole stage on a small run."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from pipeline.params import Evaluate, MegaFace
from pipeline.tables import ALIGNED, EMBEDDED, LABELS, PAIRS, part_path, read_parts, read_table, write_table
from stages.evaluate import identify, suite
from stages.evaluate.run import Trained, run
from stages.evaluate.scoring import SCORES, Scored
from stages.evaluate.uncertainty import intervals
from stages.evaluate.verification import EvaluationError
from stages.train.model import load_model
from tests.evaluate.conftest import EVALUATE, Workspace
from tests.evaluate.test_identification import brute_force

RESULTS = {"metrics.json", "scores.parquet", "roc.csv", "roc.png", "det.png", "scores.png", "folds.png"}
KEYS = {"accuracy", "accuracy_se", "accuracy_std", "auc", "eer", "pairs", "tar_at_far", "threshold", "undetected"}
KEYS |= {"bootstrap_over", "centre", "flip", "fold_accuracy", "intervals", "leaked_identities", "unresolved"}


@pytest.mark.parametrize("name", ["lfw", "ytf"])
def test_results_agree_with_each_other_and_with_the_input(workspace: Workspace, reports: Path, name: str) -> None:
    out = reports / name
    assert {path.name for path in out.iterdir()} == RESULTS
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == KEYS
    assert metrics["leaked_identities"] == 0
    stored = Scored.read(out / "scores.parquet")
    drawn = intervals(stored.verification(EVALUATE.fars), stored.people, replicates=100, seed=7)
    assert metrics["intervals"] == {
        figure: each and pytest.approx(list(each), abs=1e-9) for figure, each in drawn.bounds.items()
    }
    for figure in ("accuracy", "auc", "eer"):
        low, high = metrics["intervals"][figure]
        assert low <= metrics[figure] <= high
    scored = read_table(out / "scores.parquet", SCORES)
    pairs = read_table(workspace.raw / name / "pairs.parquet", PAIRS)
    assert scored.drop_columns("score").equals(pairs)
    assert metrics["pairs"] == len(pairs)
    assert metrics["auc"] == pytest.approx(roc_auc_score(pairs["same"], scored["score"]), abs=1e-9)
    lacking = {"lfw": {"3/1", "4/0"}, "ytf": {"2/1"}}[name]
    sides = zip(pairs["left"].to_pylist(), pairs["right"].to_pylist(), strict=True)
    assert metrics["undetected"] == sum(bool(lacking & set(pair)) for pair in sides) > 0


def test_scores_by_hand(workspace: Workspace, reports: Path) -> None:
    """Every image by itself, in float64 after the network."""
    model = load_model(workspace.models, torch.device("cpu"))
    features = {}
    for item in read_parts(workspace.aligned / "lfw", ALIGNED, ["image_id", "image"]).to_pylist():
        if item["image"]:
            bgr = cv2.imdecode(np.frombuffer(item["image"], np.uint8), cv2.IMREAD_COLOR)
            assert bgr is not None
            pixels = bgr[..., ::-1]
            both = np.stack([pixels, pixels[:, ::-1]]).transpose(0, 3, 1, 2).copy()
            with torch.no_grad():
                features[item["image_id"]] = model(torch.from_numpy(both)).numpy().astype(np.float64).ravel()
    for pair in read_table(reports / "lfw" / "scores.parquet", SCORES).to_pylist():
        if "4/0" in (pair["left"], pair["right"]):  # unreadable
            assert pair["score"] == -1
        else:
            left, right = features[pair["left"]], features[pair["right"]]
            cosine = left @ right / np.sqrt((left @ left) * (right @ right))
            assert pair["score"] == pytest.approx(cosine, abs=1e-5)


def test_again_the_same_bytes(workspace: Workspace, reports: Path, tmp_path: Path) -> None:
    run(workspace.raw / "lfw", workspace.embedded / "lfw", workspace.trained, tmp_path, EVALUATE)
    for name in RESULTS:
        assert (tmp_path / name).read_bytes() == (reports / "lfw" / name).read_bytes(), name


def test_roc_csv_is_scikit_learns_curve(reports: Path) -> None:
    with (reports / "lfw" / "roc.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    curve = np.array([[float(row["far"]), float(row["tar"])] for row in rows])
    assert curve[0].tolist() == [0, 0]
    assert curve[-1].tolist() == [1, 1]
    scored = read_table(reports / "lfw" / "scores.parquet", SCORES)
    far, tar, _ = roc_curve(scored["same"], scored["score"], drop_intermediate=False)
    np.testing.assert_allclose(curve, np.stack([far, tar], axis=1), atol=1e-9)


def test_pairs_name_an_absent_image(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="images or videos of the pairs are not there"):
        run(workspace.raw / "lfw", workspace.embedded / "ytf", None, tmp_path / "out", EVALUATE)
    assert not (tmp_path / "out").exists()


def test_people_who_are_trained_on_are_refused_or_told(workspace: Workspace, tmp_path: Path) -> None:
    """By their names in letters and digits alone; those that are only validated count for nothing, nor do numbers that
    names.txt does not have for names.
    """
    people = [{"label": 0, "identity": "0000045", "train": 3}, {"label": 1, "identity": "5", "train": 2}]
    people += [{"label": 2, "identity": "2", "train": 0, "val": 3}, {"label": 3, "identity": "4", "train": 3}]
    (tmp_path / "names.txt").write_text("0000045 3.\n5 5\n2 2\n")
    trained = Trained(pa.Table.from_pylist(people, LABELS), tmp_path / "names.txt")
    folders = (workspace.raw / "lfw", workspace.embedded / "lfw", trained, tmp_path / "out")
    with pytest.raises(EvaluationError, match=r"lfw: 2 of its people are trained on: 3 \(0000045\), 5\. Leave them"):
        run(*folders, EVALUATE)
    assert not (tmp_path / "out").exists()
    run(*folders, EVALUATE.model_copy(update={"leaks": "report"}))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["leaked_identities"] == 2
    trained.names.write_text("# nobody yet\n")  # whether numbers are people of the set is not known, rather than 0
    run(*folders, EVALUATE)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["leaked_identities"] is None


def features_of(folder: Path, how: str) -> tuple[list[str], NDArray[np.float64]]:
    """Who is on each usable face of an embedded set, and its unit vector, in float64."""
    rows = read_parts(folder, EMBEDDED).to_pylist()
    rows = [row for row in rows if row["status"] in ("detected", "fallback")]
    emb, flip = (np.array([row[name] for row in rows], np.float64) for name in ("emb", "flip"))
    vectors = {"concatenate": np.hstack([emb, flip]), "sum": emb + flip, "none": emb}[how]
    return [row["identity"] for row in rows], vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))


def assert_identified(out: Path, probes: Path, distractors: Path, section: Evaluate) -> dict[str, Any]:
    """What metrics.json and cmc.csv say is the brute force on the embedded tables; strangers join by their draw."""
    metrics = json.loads((out / "metrics.json").read_text())
    people, known = features_of(probes, section.flip)
    _, unordered = features_of(distractors, section.flip)
    strangers = np.empty_like(unordered)
    strangers[np.random.default_rng(section.megaface.seed).permutation(len(unordered))] = unordered
    counts, fars = section.megaface.distractors, section.megaface.fars
    ranks, rates = brute_force(known, np.array(people), strangers, counts, fars)
    assert metrics["probes"] == len(people)
    assert list(map(int, sorted(metrics["distractors"], key=int))) == counts
    curve = {
        (row["distractors"], row["rank"]): row["share"]
        for row in csv.DictReader((out / "cmc.csv").read_text().splitlines())
    }
    for count, rank, rate in zip(counts, ranks, rates, strict=True):
        found = metrics["distractors"][str(count)]
        for name, within in (("rank_1", 1), ("rank_10", 10)):
            assert found[name] == pytest.approx(np.mean([each <= within for each in rank]), abs=1e-9)
        assert found["tar_at_far"] == {
            f"{far:g}": each if each is None else pytest.approx(each, abs=1e-9)
            for far, each in zip(fars, rate, strict=True)
        }
        for within in range(1, 101):
            share = np.mean([each <= within for each in rank])
            assert float(curve[str(count), str(within)]) == pytest.approx(share, abs=1e-9)
    assert len(curve) == 100 * len(counts)
    return metrics


def write_embedded(folder: Path, identities: list[str], status: list[str], noise: float, seed: int) -> None:
    """Features around a direction for each identity, of any length, those of the mirror image around another."""
    rng = np.random.default_rng(seed)
    towards = {name: rng.standard_normal((2, 6)) for name in sorted(set(identities))}
    rows: list[dict[str, object]] = []
    for number, (name, condition) in enumerate(zip(identities, status, strict=True)):
        both = rng.uniform(0.2, 5) * (towards[name] + noise * rng.standard_normal((2, 6)))
        emb, flip = both.astype(np.float32).tolist() if condition in ("detected", "fallback") else (None, None)
        key = {"image_id": f"{name}/{number}", "identity": name, "video": None, "status": condition}
        rows.append(key | {"emb": emb, "flip": flip})
    for index in range(0, len(rows), 7):
        table = pa.Table.from_pylist(rows[index : index + 7], EMBEDDED)
        write_table(part_path(folder, index // 7), table, EMBEDDED)


@pytest.mark.parametrize("flip", ["concatenate", "sum", "none"])
def test_identification_is_the_brute_force_on_what_is_embedded(flip: str, tmp_path: Path) -> None:
    """People in no order, one of them without a mate; faces that were not found, and photographs without any."""
    people = ["b", "a", "c", "b", "lone", "d", "a", "c", "c", "b", "d", "a", "d", "b", "c", "a"]
    status = ["detected"] * len(people)
    status[3], status[7] = "fallback", "unreadable"
    strangers = ["detected"] * 60
    strangers[4], strangers[30], strangers[31] = "no_face", "fallback", "fallback"
    probes, distractors = tmp_path / "probes", tmp_path / "distractors"
    write_embedded(probes, people, status, 0.7, 1)
    write_embedded(distractors, [f"s{i}" for i in range(60)], strangers, 0.0, 2)
    megaface = MegaFace(distractors=[3, 20, 59], seed=5, fars=[0.1, 0.01, 0.0001], noise=EVALUATE.megaface.noise)
    section = EVALUATE.model_copy(update={"flip": flip, "megaface": megaface})
    people_trained_on = [{"label": 0, "identity": "e", "train": 3}]
    (tmp_path / "names.txt").write_text("")
    trained = Trained(pa.Table.from_pylist(people_trained_on, LABELS), tmp_path / "names.txt")
    identify.run(probes, distractors, trained, tmp_path / "out", section, torch.device("cpu"))
    metrics = assert_identified(tmp_path / "out", probes, distractors, section)
    assert (metrics["people"], metrics["pairs"]) == (4, 4 * 3 + 4 * 3 + 3 * 2 + 3 * 2)
    assert (metrics["undetected"], metrics["leaked_identities"], metrics["flip"]) == (3, 0, flip)
    rank_1 = [metrics["distractors"][count]["rank_1"] for count in ("3", "20", "59")]
    assert 1 > rank_1[0] > rank_1[1] > rank_1[2] > 0
    tar = metrics["distractors"]["59"]["tar_at_far"]
    assert 1 > tar["0.1"] > tar["0.01"] > 0
    assert tar["0.0001"] is None


def test_probes_who_are_trained_on_are_refused_or_told(workspace: Workspace, tmp_path: Path) -> None:
    """By their names in letters and digits alone; those that are only validated count for nothing."""
    people = [{"label": 0, "identity": "0000045", "train": 3}, {"label": 1, "identity": "b", "train": 2}]
    people += [{"label": 2, "identity": "11", "train": 0, "val": 3}, {"label": 3, "identity": "13x", "train": 4}]
    (tmp_path / "names.txt").write_text("0000045 10.\nb 1-2\n11 11\n")
    trained = Trained(pa.Table.from_pylist(people, LABELS), tmp_path / "names.txt")
    sets, cpu = (workspace.embedded / "probes", workspace.embedded / "distractors"), torch.device("cpu")
    with pytest.raises(
        EvaluationError, match=r"probes: 2 of its people are trained on: 10 \(0000045\), 12 \(b\)\. Leave them"
    ):
        identify.run(*sets, trained, tmp_path / "out", EVALUATE, cpu)
    assert not (tmp_path / "out").exists()
    report = EVALUATE.model_copy(update={"leaks": "report"})
    assert identify.run(*sets, trained, tmp_path / "out", report, cpu)["leaked_identities"] == 2
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["leaked_identities"] == 2
    assert identify.run(*sets, None, tmp_path / "out", EVALUATE, cpu)["leaked_identities"] is None


def test_identification_of_the_embedded_sets(workspace: Workspace, reports: Path, tmp_path: Path) -> None:
    probes, distractors = workspace.embedded / "probes", workspace.embedded / "distractors"
    metrics = assert_identified(reports / "megaface", probes, distractors, EVALUATE)
    assert metrics["leaked_identities"] == 0
    assert (metrics["probes"], metrics["people"], metrics["pairs"]) == (12, 4, 4 * 3 * 2)
    assert list(metrics["distractors"]) == ["30", "5"]
    for count, of_count in metrics["distractors"].items():
        assert of_count["impostors"] == 12 * int(count)
        assert of_count["tar_at_far"]["0.0001"] is None
        assert "comparisons with strangers" in of_count["unresolved"]["tar_at_far_0.0001"]
        low, high = of_count["intervals"]["rank_1"] or [0, 1]
        assert low <= of_count["rank_1"] <= high
        assert set(of_count["unresolved"]) == {name for name, each in of_count["intervals"].items() if each is None}
    curve = (reports / "megaface" / "cmc.csv").read_text().splitlines()
    assert curve[0] == "distractors,rank,share"
    assert len(curve) == 1 + 2 * 100
    assert curve[-1] == "30,100,1.0"  # of 31 in the gallery, everyone is among the first 100
    # again, the same bytes
    sets = (workspace.embedded / "probes", workspace.embedded / "distractors", workspace.trained)
    identify.run(*sets, tmp_path / "again", EVALUATE, torch.device("cpu"))
    for path in (reports / "megaface").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def without(
    noise: str | bytes, folder: Path, workspace: Workspace, distractors: tuple[int, ...] = (5, 29)
) -> dict[str, Any]:
    """Identification but for what a list names."""
    path = folder / "noise.txt"
    path.write_bytes(noise if isinstance(noise, bytes) else noise.encode())
    megaface = EVALUATE.megaface.model_copy(update={"noise": str(path), "distractors": list(distractors)})
    section = EVALUATE.model_copy(update={"megaface": megaface})
    sets = (workspace.embedded / "probes", workspace.embedded / "distractors", workspace.trained)
    return identify.run(*sets, folder / "out", section, torch.device("cpu"))


def test_noise_is_left_out_as_published_lists_name_it(workspace: Workspace, tmp_path: Path) -> None:
    """By id, by path (behind a tab, too), and of probes by the file's name; lines that name nothing are counted."""
    found = without("# a comment\n\n10/0\n11/1\n", tmp_path, workspace)
    assert (found["probes"], found["noise"]) == (10, {"listed": 2, "found": 2})
    found = without("375/10/0.jpg\n7\tFaceScrub/10/1.PNG\n375/20/0.jpg\n12/nosuch.jpg\n", tmp_path, workspace)
    assert (found["probes"], found["people"], found["pairs"]) == (10, 3, 3 * 3 * 2)
    assert found["noise"] == {"listed": 4, "found": 3}
    found = without("\ufeff10/0\n".encode(), tmp_path, workspace)  # as Windows begins it
    assert (found["probes"], found["noise"]) == (11, {"listed": 1, "found": 1})
    found = without("2.png\n", tmp_path, workspace)  # of each of the four; strangers are all called 0
    assert (found["probes"], found["noise"]) == (8, {"listed": 1, "found": 1})
    found = without("0.png\n", tmp_path, workspace, (5, 30))
    assert found["probes"] == 8


def test_one_person_says_nothing_about_others(workspace: Workspace, tmp_path: Path) -> None:
    """And metrics.json is JSON: other people without mates make no NaN of it."""
    others = "".join(f"1{person}/{photo}\n" for person in (0, 2, 3) for photo in (1, 2))
    found = without(others, tmp_path, workspace)
    assert (found["probes"], found["people"]) == (6, 1)
    text = (tmp_path / "out" / "metrics.json").read_text()
    assert "NaN" not in text
    for of_count in json.loads(text)["distractors"].values():
        assert set(of_count["intervals"].values()) == {None}
        for figure in ("rank_1", "tar_at_far_0.1"):
            assert of_count["unresolved"][figure] == "the same in all 100 replicates, which therefore bound nothing"
        assert "comparisons with strangers" in of_count["unresolved"]["tar_at_far_0.0001"]
    (tmp_path / "out").rename(tmp_path / "megaface")
    assert "(the same in all 100 replicates" in suite.text(tmp_path, ["megaface"])


def test_noise_that_cannot_be_left_out_is_said(workspace: Workspace, tmp_path: Path) -> None:
    for noise, message in (
        (
            "Aaron_Eckhart_136.png\n",
            r"noise\.txt: none of its 1 lines names a photograph of .*: the first has Aaron_Eckhart_136, wh",
        ),
        (b"\xff\xfe\n", r"noise\.txt: not text in UTF-8"),
        ("0.jpg\n1.jpg\n2.jpg\n", r"noise\.txt: names every photograph of the probes"),
        ("1/20/0.jpg\n", r"evaluate\.megaface\.distractors: 30, but .*distractors has 29 photographs that can be used"),
    ):
        with pytest.raises(EvaluationError, match=message):
            without(noise, tmp_path, workspace, (5, 30))
    assert not (tmp_path / "out").exists()


def test_without_photographs_there_is_no_identification(workspace: Workspace, tmp_path: Path) -> None:
    write_table(tmp_path / "none" / "part-00000.parquet", EMBEDDED.empty_table(), EMBEDDED)
    sets = (workspace.embedded / "probes", tmp_path / "none", None)
    found = identify.run(*sets, tmp_path / "out", EVALUATE, torch.device("cpu"))
    assert found == {"why": "download.distractors has no photographs"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "cmc.csv", "cmc.png"}


def test_command_line_says_what_is_missing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "stages.evaluate", "lfw"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml: no such file")
