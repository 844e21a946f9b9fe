"""Embeddings to scores by hand, foreign files good and bad, and runs compared from what they left."""

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from pipeline import cli
from pipeline.cli import RECIPES
from pipeline.params import Params
from stages.evaluate import comparison, foreign, scoring
from stages.evaluate.features import Block
from stages.evaluate.scoring import Options, Scored
from stages.evaluate.uncertainty import compare, intervals
from stages.evaluate.verification import EvaluationError, best_threshold

FARS = [0.1, 0.001]


def unit(vector: NDArray) -> NDArray[np.float64]:
    return np.asarray(vector, np.float64) / np.sqrt(np.sum(np.square(vector, dtype=np.float64)))


@pytest.fixture
def lfw(tmp_path: Path) -> tuple[Path, dict[str, NDArray], dict[str, NDArray]]:
    """pairs.txt of 3 folds × 8 pairs among 24 images of 12 people, embeddings of all and of their mirror images."""
    random = np.random.default_rng(1)
    lines, features = ["3\t4"], {}
    for fold in range(3):
        people = [f"P{fold}_{k}" for k in range(4)]
        for person in people:
            typical = random.normal(0.3, 1, 5)
            for image in (1, 2):
                features[f"{person}/{person}_{image:04d}"] = 3 * (typical + random.normal(0, 1.5, 5))
        lines += [f"{person}\t1\t2" for person in people]
        lines += [f"{people[k]}\t1\t{people[(k + 1) % 4]}\t2" for k in range(4)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.txt", features, {key: vector[::-1] * 0.9 for key, vector in features.items()}


def save(path: Path, images: dict[str, NDArray], mirrored: dict[str, NDArray] | None = None, **changes: Any) -> Path:
    arrays: dict[str, Any] = {"keys": np.array(list(images)), "emb": np.array(list(images.values()))}
    if mirrored:
        arrays["flip"] = np.array(list(mirrored.values()))
    np.savez(path, **arrays | changes)
    return path


def score(path: Path, pairs: Path, options: Options) -> Scored:
    return foreign.score_pairs(foreign.Embeddings(path), foreign.read_pairs("lfw", pairs, "pairs.txt"), options)


@pytest.mark.parametrize("flip", ["concatenate", "sum", "none"])
def test_cosines_by_hand(tmp_path: Path, lfw: Any, flip: scoring.Flip) -> None:
    pairs, emb, mirrored = lfw
    scored = score(save(tmp_path / "e.npz", emb, mirrored), pairs, Options(flip))
    for left, right, value in zip(scored.left, scored.right, scored.scores, strict=True):
        one, other = (
            {"concatenate": np.append(emb[key], mirrored[key]), "sum": emb[key] + mirrored[key], "none": emb[key]}[flip]
            for key in (left, right)
        )
        assert value == pytest.approx(unit(one) @ unit(other), abs=1e-6)
    assert scored.own is scored.scores


def test_the_mean_is_that_of_the_other_folds(tmp_path: Path, lfw: Any) -> None:
    """Centred scores, thresholds and accuracies of each fold, all by loops."""
    pairs, emb, _ = lfw
    scored = score(save(tmp_path / "e.npz", emb), pairs, Options("none", centre=True))
    metrics = scored.verification(FARS).measure()
    for fold in range(3):
        training = {
            key
            for side in (scored.left, scored.right)
            for key, number in zip(side, scored.fold, strict=True)
            if number != fold
        }
        assert len(training) == 16
        mean = np.mean([unit(emb[key]) for key in sorted(training)], axis=0)
        cosines = np.array(
            [
                unit(unit(emb[left]) - mean) @ unit(unit(emb[right]) - mean)
                for left, right in zip(scored.left, scored.right, strict=True)
            ]
        ).astype(np.float32)
        np.testing.assert_allclose(scored.scores[fold], cosines, atol=1e-6)
        others = np.flatnonzero(scored.fold != fold)
        order = others[np.argsort(scored.scores[fold][others], kind="stable")]
        threshold = best_threshold(scored.scores[fold][order].astype(np.float64), scored.same[order])
        held_out = scored.fold == fold
        right = (scored.scores[fold][held_out] >= threshold) == scored.same[held_out]
        assert metrics.fold_threshold[fold] == threshold
        assert metrics.fold_accuracy[fold] == right.mean()
        np.testing.assert_array_equal(scored.own[held_out], scored.scores[fold][held_out])


def test_a_common_offset_is_what_centring_takes_away(tmp_path: Path, lfw: Any) -> None:
    """At a right angle to all embeddings, it raises plain cosines towards 1 and leaves centred ones as they were."""
    pairs, emb, _ = lfw
    offset = {key: np.append(unit(vector), 3) for key, vector in emb.items()}
    (plain, centred), (plain_offset, centred_offset) = (
        [score(save(tmp_path / "e.npz", images), pairs, Options("none", centre)).scores for centre in (False, True)]
        for images in (emb, offset)
    )
    np.testing.assert_allclose(plain_offset, (plain.astype(np.float64) + 9) / 10, atol=1e-6)
    np.testing.assert_allclose(centred_offset, centred, atol=1e-6)


def test_a_video_is_the_mean_of_its_frames(tmp_path: Path) -> None:
    splits = tmp_path / "splits.txt"
    rows = [(1, "A/0", "A/1", 1), (1, "A/0", "B/0", 0), (2, "C/0", "C/1", 1), (2, "C/0", "D/0", 0)]
    splits.write_text("".join(f"{split}, 1, {left}, {right}, {same}\n" for split, left, right, same in rows))
    random = np.random.default_rng(1)
    emb = {
        f"{video}/{frame}": random.normal(0, 2, 4) for video in ("A/0", "A/1", "B/0", "C/0", "D/0") for frame in "12"
    }
    emb |= {"C/1": random.normal(0, 2, 4), "E/0/1": np.ones(4)}  # a video's own template; and one that no pair names
    given = foreign.Embeddings(save(tmp_path / "e.npz", emb))
    scored = foreign.score_pairs(given, foreign.read_pairs("ytf", splits, "splits.txt"), Options("none"))
    video = {
        name: unit(unit(emb[f"{name}/1"]) + unit(emb[f"{name}/2"])) for name in ("A/0", "A/1", "B/0", "C/0", "D/0")
    }
    video["C/1"] = unit(emb["C/1"])
    expected = [video[left] @ video[right] for _, left, right, _ in rows]
    np.testing.assert_allclose(scored.scores, expected, atol=1e-6)
    assert scored.people is not None


def test_an_unusable_side_has_the_lowest_score() -> None:
    vectors, usable = scoring.templates([Block(np.eye(2, dtype=np.float32), None, np.array([0, 2]))], "none", 3)
    assert usable.tolist() == [True, False, True]
    one, other, fold = np.array([0, 0]), np.array([1, 2]), np.array([0, 1])
    assert scoring.score(vectors, usable, one, other, fold).tolist() == [-1, 0]
    assert (scoring.score(vectors, usable, one, other, fold, centre=True)[:, 0] == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb": np.full((24, 5), np.nan)}, r"emb is not finite, or all zero, for 24: .*P0_0/P0_0_0001.* and 14 more"),
        ({"emb": np.zeros((24, 5))}, "not finite, or all zero, for 24: "),
        ({"emb": np.ones((23, 5))}, r"emb must be 24×D numbers"),
        ({"emb": np.ones(24)}, r"emb must be 24×D numbers"),
        ({"emb": np.array([["a"]] * 24)}, "emb must be 24×D numbers"),
        ({"flip": np.ones((24, 4))}, r"flip is \(24, 4\), emb \(24, 5\)"),
        ({"keys": np.arange(24)}, "keys must be N strings"),
        (
            {"keys": np.array([f"k{n}" for n in range(24)])},
            "lacks embeddings of the pairs: 24: P0_0/P0_0_0001, .* 14 more",
        ),
        ({"keys": np.array(["twice", "twice", *(f"k{n}" for n in range(22))])}, "more than once: 1: twice"),
        ({"keys": np.array([{}] * 24)}, "not an .npz of plain arrays"),  # would have to be unpickled
    ],
)
def test_unusable_embeddings(tmp_path: Path, lfw: Any, changes: dict[str, Any], message: str) -> None:
    pairs, emb, _ = lfw
    with pytest.raises(EvaluationError, match=message):
        score(save(tmp_path / "e.npz", emb, **changes), pairs, Options("none"))


def test_unusable_files(tmp_path: Path, lfw: Any) -> None:
    pairs, emb, _ = lfw
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "lacking.npz", emb=np.ones((3, 3)))
    (tmp_path / "text.npz").write_text("no")
    np.savez_compressed(tmp_path / "damaged.npz", keys=np.array(["a"]), emb=np.ones((1, 3)))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[30 + content[26] + content[28]] = 0xFF  # behind the first header: a block of no kind that deflate has
    (tmp_path / "damaged.npz").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("keys", "a")
        file.writestr("emb", "1 2 3")
    for name, message in (
        ("one.npy", "not an .npz"),
        ("lacking.npz", "lacks keys"),
        ("text.npz", "not an .npz"),
        ("damaged.npz", "not an .npz of plain arrays .*: Error -3 while decompressing data"),
        ("zip.npz", r"zip\.npz: keys is no array"),
    ):
        with pytest.raises(EvaluationError, match=message):
            foreign.Embeddings(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        foreign.Embeddings(tmp_path / "absent.npz")
    with pytest.raises(EvaluationError, match="flip: sum needs embeddings of the mirror images"):
        score(save(tmp_path / "e.npz", emb), pairs, Options("sum"))


def test_pairs_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("left,right,same,note\n" + "".join(f"a{n}.jpg,b{n}.jpg,{int(n < 20)},x\n" for n in range(50)))
    pairs = foreign.read_csv(path)
    counts = np.zeros((10, 2), int)
    for pair in pairs:
        counts[pair.fold, int(pair.same)] += 1
    assert (counts == [3, 2]).all()
    path.write_text("same,right,fold,left\n1,b,4,a\n0,d,7,c\n")
    assert [(pair.fold, pair.left, pair.right, pair.same) for pair in foreign.read_csv(path)] == [
        (4, "a", "b", True),
        (7, "c", "d", False),
    ]
    path.write_text("left,right,same\na,b,1\n", encoding="utf-8-sig")
    assert [pair.left for pair in foreign.read_csv(path)] == ["a"]
    for text, message in (
        ("left,right\na,b\n", "lacks the columns same"),
        ("left,right,same\na,b,yes\n", r"csv:2: expected two keys and same 0 or 1"),
        ("left,right,same\na,,1\n", r"csv:2: expected two keys"),
        ("left,right,same,fold\na,b,1,x\n", r"csv:2: expected a fold from 0, .*found 'x'"),
        ("left,right,same,fold\na,b,1,2147483648\n", r"csv:2: expected a fold from 0, of 9 digits at most, found '21"),
        ("left,right,same\n\na,b,1\n\n\nc,d,maybe\n", r"csv:6: expected two keys and same 0 or 1"),
        ('left,right,same,note\na,b,1,"two\nlines"\nc,d,maybe,\n', r"csv:4: expected two keys and same 0 or 1"),
        ("left,right,same\n", "holds no pairs"),
    ):
        path.write_text(text)
        with pytest.raises(EvaluationError, match=message):
            foreign.read_csv(path)


FOLDERS = "left,right,same\n" + "".join(f"{n}/a.jpg,{n}/b.jpg,1\n{n}/a.jpg,{(n + 1) % 4}/b.jpg,0\n" for n in range(4))
"""A folder a person."""


@pytest.mark.parametrize(
    ("row", "wrong", "told"),
    [
        ("0/a.jpg,0/b.jpg,1", "0/a.jpg,0/b.jpg,0", r"csv:2: 0/a\.jpg and 0/b\.jpg lie in one folder, yet same is 0"),
        ("3/a.jpg,0/b.jpg,0", "3/a.jpg,0/b.jpg,1", r"csv:9: 3/a\.jpg and 0/b\.jpg lie in two folders, yet same is 1"),
    ],
)
def test_a_row_that_contradicts_the_folders_of_the_others_is_named(
    tmp_path: Path, row: str, wrong: str, told: str
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(FOLDERS)
    assert len(foreign.read_csv(path)) == 8
    path.write_text(FOLDERS.replace(row, wrong))
    with pytest.raises(EvaluationError, match=told + r"; .* not in 1 of 8: correct same, or the folders"):
        foreign.read_csv(path)


def test_folders_that_are_no_people_contradict_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    for left, right in (("photos", "photos"), ("before", "after")):
        path.write_text(
            "left,right,same\n" + "".join(f"{left}/{n}.jpg,{right}/{n + 9}.jpg,{n % 2}\n" for n in range(8))
        )
        assert len(foreign.read_csv(path)) == 8


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("a,b,1,0\nb,a,0,0\n", r"csv:3: b and a are a pair in \S*csv:2 already, as same = 1; keep one of them"),
        ("a,b,1,0\nc,d,0,0\nb,a,1,1\n", r"csv:4: b and a are a pair in \S*csv:2 already, in another fold"),
    ],
)
def test_a_pair_has_one_truth_and_one_fold(tmp_path: Path, rows: str, told: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("left,right,same,fold\n" + rows)
    with pytest.raises(EvaluationError, match=told):
        foreign.read_csv(path)
    path.write_text("left,right,same,fold\na,b,1,0\nb,a,1,0\n")
    assert len(foreign.read_csv(path)) == 2


def test_a_list_that_is_given_twice_is_refused(tmp_path: Path, lfw: Any, params: Params) -> None:
    pairs, emb, _ = lfw
    path, again = save(tmp_path / "e.npz", emb), tmp_path / "again.txt"
    again.write_bytes(pairs.read_bytes())
    with pytest.raises(EvaluationError, match=rf"again\.txt:2: .* are a pair in {pairs}:2 already, in another fold"):
        foreign.score("lfw", path, [pairs, again], None, False, params.evaluate)


def command(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: object) -> None:
    """By quickstart's params.yaml, but for the bootstrap."""
    text = (RECIPES / "quickstart.yaml").read_text().replace("replicates: 1000 ", "replicates: 100 ")
    (folder / "params.yaml").write_text(re.sub(r"seed: 1( +# of the bootstrap)", r"seed: 7\1", text))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["cosface", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code, left.value.code


def test_cosface_score(
    tmp_path: Path, lfw: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, emb, mirrored = lfw
    path = save(tmp_path / "e.npz", emb, mirrored)
    arguments = ("score", "lfw", "--embeddings", path, "--pairs", pairs)
    command(monkeypatch, tmp_path, *arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    scored = score(path, pairs, Options())
    verification = scored.verification([0.1, 0.01, 0.001])
    assert found["accuracy"] == pytest.approx(verification.measure().accuracy, abs=1e-9)
    assert (found["flip"], found["centre"], found["bootstrap_over"]) == ("concatenate", False, "identities")
    assert found["tar_at_far"]["0.001"] is None
    assert found["intervals"]["tar_at_far_0.001"] is None
    assert "12 different pairs" in found["unresolved"]["tar_at_far_0.001"]
    low, high = found["intervals"]["auc"]
    assert low < found["auc"] < high
    drawn = intervals(verification, scored.people, replicates=100, seed=7)
    assert found["intervals"] == {
        figure: each and pytest.approx(list(each), abs=1e-9) for figure, each in drawn.bounds.items()
    }
    command(monkeypatch, tmp_path, *arguments, "--flip", "none", "--centre")
    said = capsys.readouterr().out
    assert "flip: none, centre: true" in said
    command(monkeypatch, tmp_path, *arguments, "--flip", "none", "--centre", "--json")
    found = json.loads(capsys.readouterr().out)
    figures = {name: found[name] for name in ("accuracy", "auc", "eer")} | {
        "tar_at_far_0.1": found["tar_at_far"]["0.1"]
    }
    bounds = {figure: found["intervals"][figure] for figure in figures}
    told = re.findall(r"^(\S+) +(\S+)%   95% interval (\S+)% to (\S+)%", said, re.M)
    assert told == [
        (figure, *(f"{100 * value:.2f}" for value in (figures[figure], *each)))
        for figure, each in bounds.items()
        if each
    ]
    save(path, emb)
    command(monkeypatch, tmp_path, *arguments, "--json")
    assert json.loads(capsys.readouterr().out)["flip"] == "none"


@pytest.fixture
def runs(tmp_path: Path, lfw: Any) -> tuple[Path, Path, Scored]:
    """Reports of two runs: with noise, centred and in another order; and better."""
    pairs, emb, _ = lfw
    random = np.random.default_rng(2)
    noisy = {key: unit(vector) + random.normal(0, 0.5, 5) for key, vector in emb.items()}
    a = score(save(tmp_path / "a.npz", noisy), pairs, Options("none", centre=True))
    b = score(save(tmp_path / "b.npz", emb), pairs, Options("none"))
    mixed = random.permutation(24)
    a = Scored(
        [a.left[n] for n in mixed], [a.right[n] for n in mixed], a.same[mixed], a.fold[mixed], a.scores[:, mixed]
    )
    a.write(tmp_path / "one" / "lfw" / "scores.parquet")
    b.write(tmp_path / "two" / "lfw" / "scores.parquet")
    return tmp_path / "one", tmp_path / "two", b


def test_stored_scores_are_read_as_they_were(runs: tuple[Path, Path, Scored]) -> None:
    one, two, b = runs
    read = Scored.read(two / "lfw" / "scores.parquet")
    assert (read.left, read.right) == (b.left, b.right)
    np.testing.assert_array_equal(read.scores, b.scores)
    centred = Scored.read(one / "lfw" / "scores.parquet")
    assert centred.scores.shape == (3, 24)


def test_cosface_compare(
    runs: tuple[Path, Path, Scored], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, _ = runs
    command(monkeypatch, one, "compare", one, two / "lfw" / "scores.parquet", "--json")
    found = json.loads(capsys.readouterr().out)["lfw"]
    right = {}
    for side, of_run in (("a", one), ("b", two)):
        scored = Scored.read(of_run / "lfw" / "scores.parquet").in_order()
        threshold = np.array(scored.verification(FARS).measure().fold_threshold)
        right[side] = (scored.own >= threshold[scored.fold]) == scored.same
        assert found[side]["accuracy"] == pytest.approx(right[side].mean(), abs=1e-9)
        assert found[side]["auc"] == pytest.approx(roc_auc_score(scored.same, scored.own), abs=1e-9)
    for figure, difference in found["difference"].items():
        a, b = (found[side][figure] for side in "ab")
        assert difference == (None if a is None else pytest.approx(b - a, abs=1e-9))
    only = {"only_a": int((right["a"] & ~right["b"]).sum()), "only_b": int((right["b"] & ~right["a"]).sum())}
    assert found["mcnemar"].items() > only.items()
    assert found["bootstrap_over"] == "identities"
    command(monkeypatch, one, "compare", one / "lfw", two)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == found["verdict"]
    assert "LFW" in said
    assert "12 different pairs" in said
    told = re.findall(r"^  (\S+) +A +(\S+)%   B +(\S+)%   B - A (\S+)   ", said, re.M)
    assert told == [
        (figure, f"{100 * found['a'][figure]:.2f}", f"{100 * found['b'][figure]:.2f}", f"{100 * difference:+.2f}")
        for figure, difference in found["difference"].items()
        if difference is not None
    ]
    assert f"decided rightly by one alone: A {only['only_a']}, B {only['only_b']} of 24 pairs" in said


def test_what_is_no_run(tmp_path: Path, params: Params) -> None:
    with pytest.raises(EvaluationError, match=r"reprots/lfw: no such folder or file, and no run's id"):
        comparison.scores_of("reprots/lfw", tmp_path, params)


def test_all_that_both_have_is_compared_and_the_rest_is_told(
    runs: tuple[Path, Path, Scored], tmp_path: Path, params: Params, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, b = runs
    for name in (one / "extra" / "lfw", two / "extra" / "lfw", one / "ytf", two / "extra" / "mine"):
        b.write(name / "scores.parquet")
    a, other = (comparison.stored_scores(run) for run in (one, two))
    assert list(a) == ["lfw", "ytf", "extra/lfw"]
    section = params.evaluate.model_copy(update={"replicates": 100})
    assert list(comparison.compare_runs(a, other, section)) == ["lfw", "extra/lfw"]
    assert [record.message for record in caplog.records] == ["only A has ytf", "only B has extra/mine"]
    assert list(comparison.stored_scores(two / "extra")) == ["extra/lfw", "extra/mine"]
    for path in (two / "extra" / "mine", two / "extra" / "mine" / "scores.parquet"):
        assert list(comparison.stored_scores(path)) == ["extra/mine"]


def test_a_comparison_is_drawn_as_params_yaml_says(runs: tuple[Path, Path, Scored], params: Params) -> None:
    a, b = (comparison.stored_scores(run) for run in runs[:2])
    changed = params.evaluate.model_copy(update={"replicates": 100, "seed": 7})
    found = comparison.compare_runs(a, b, changed)["lfw"].difference
    scored = [Scored.read(run / "lfw" / "scores.parquet").in_order() for run in runs[:2]]
    drawn = [each.verification(changed.fars) for each in scored]
    assert found == compare(drawn[0], drawn[1], scored[0].people, replicates=100, seed=7).difference
    assert found != comparison.compare_runs(a, b, changed.model_copy(update={"seed": 8}))["lfw"].difference


def test_pairs_that_are_not_the_same(runs: tuple[Path, Path, Scored], tmp_path: Path, params: Params) -> None:
    one, _, b = runs
    section = params.evaluate.model_copy(update={"replicates": 100})

    def against(**changes: Any) -> None:
        Scored(**vars(b) | changes).write(tmp_path / "three" / "lfw" / "scores.parquet")
        a, other = (comparison.stored_scores(run) for run in (one, tmp_path / "three"))
        comparison.compare_runs(a, other, section)

    against()
    for changes, message in (
        ({"left": ["nobody/1", *b.left[1:]]}, r"one/lfw/scores.parquet has 1 that .* lacks, as P0_0/P0_0_0001 – P0_0"),
        ({"fold": np.where(b.fold == 2, 3, b.fold).astype(np.int32)}, "8 pairs differ in fold"),
        ({"same": np.append(b.same[:-1], True)}, "1 pairs differ in truth"),
        ({"left": [*b.left[:-1], b.left[0]], "right": [*b.right[:-1], b.right[0]]}, "that .* lacks"),
    ):
        with pytest.raises(EvaluationError, match=message):
            against(**changes)
    repeated = np.flatnonzero((b.same == b.same[0]) & (b.fold == b.fold[0]))[:2]
    for name, row in zip(("first", "second"), repeated.tolist(), strict=True):
        again = np.append(np.arange(len(b.same)), row)
        left, right = ([side[i] for i in again] for side in (b.left, b.right))
        twice = Scored(left, right, b.same[again], b.fold[again], b.scores[again])
        twice.write(tmp_path / name / "lfw" / "scores.parquet")
    a, other = (comparison.stored_scores(tmp_path / name) for name in ("first", "second"))
    with pytest.raises(
        EvaluationError, match=r"first/lfw/scores\.parquet \(\d+ rows\) lists some of them more or less"
    ):
        comparison.compare_runs(a, other, params.evaluate)
    with pytest.raises(EvaluationError, match=r"neither scores\.parquet nor folders with one"):
        comparison.stored_scores(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no protocol in common: A has lfw, B has cfp_fp, ytf"):
        comparison.compare_runs({"lfw": one}, {"cfp_fp": one, "ytf": one}, params.evaluate)


def test_view_1_of_lfw_is_two_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chosen on pairsDevTrain.txt, the threshold decides pairsDevTest.txt, and the other way round."""
    cosines = {"A": 0.9, "B": 0.7, "C": 0.3, "D": 0.65, "E": 0.2, "F": 0.4}  # of each one's second image to all firsts
    emb = {f"{name}/{name}_0001": np.array([1.0, 0.0]) for name in cosines}
    emb |= {f"{name}/{name}_0002": np.array([c, (1 - c**2) ** 0.5]) for name, c in cosines.items()}
    (tmp_path / "pairsDevTrain.txt").write_text("2\nA\t1\t2\nB\t1\t2\nA\t1\tC\t2\nB\t1\tE\t2\n")
    (tmp_path / "pairsDevTest.txt").write_text("1\nD\t1\t2\nA\t1\tF\t2\n")
    lists = ("--pairs", tmp_path / "pairsDevTrain.txt", "--pairs", tmp_path / "pairsDevTest.txt")
    path = save(tmp_path / "e.npz", emb)
    command(monkeypatch, tmp_path, "score", "lfw", "--embeddings", path, *lists, "--json")
    found = json.loads(capsys.readouterr().out)
    # thresholds at (0.3 + 0.7) / 2 and (0.4 + 0.65) / 2: all are right
    assert (found["pairs"], found["fold_accuracy"]) == (6, [1.0, 1.0])
    assert found["threshold"] == pytest.approx((0.5 + 0.525) / 2)
