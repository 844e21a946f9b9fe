""".bin sets and pairs of one's own."""

import csv
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from pipeline.params import Params
from pipeline.tables import LABELS
from stages.align.decode import decode
from stages.download import synthetic
from stages.evaluate.comparison import compare_runs, stored_scores
from stages.evaluate.extra import read_bin, run
from stages.evaluate.leaks import Trained
from stages.evaluate.models import Embedder
from stages.evaluate.photographs import align_files
from stages.evaluate.scoring import Scored
from stages.evaluate.verification import EvaluationError
from tests.samples import face_like, jpeg
from tests.work import HERE

BY_HAND = b"(lp0\nS'one'\np1\naS'two'\np2\naS'one'\np3\naS'one'\np4\na(lp5\nI00\naI01\na\x86p6\n."
"""Two lists as Python 2 writes them, in protocol 0 but for the tuple: four strings; False and True."""


def colour(images: Tensor) -> Tensor:
    """Faces of face_like differ by colour, so that it tells identities apart."""
    return images.float().mean(dim=(2, 3)) - 127


MODEL = Embedder("colour", "0" * 64, 112, 3, colour)


@pytest.fixture
def here(params: Params) -> Params:
    section = params.evaluate.model_copy(update={"replicates": 100, "fars": [0.1]})
    return params.model_copy(update={"evaluate": section, "machine": HERE})


def write_bin(path: Path, pairs: int, protocol: int) -> list[bool]:
    same = [i % 2 == 0 for i in range(pairs)]
    images = []
    for i, one in enumerate(same):
        images += [jpeg(face_like(i, 0)), jpeg(face_like(i if one else i + 1, 1))]
    path.write_bytes(pickle.dumps((images, same), protocol))
    return same


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bin_is_ten_folds_of_aligned_faces(tmp_path: Path, here: Params, protocol: int) -> None:
    (tmp_path / "in").mkdir()
    same = write_bin(tmp_path / "in" / "cfp_fp.bin", 40, protocol)
    (tmp_path / "in" / "README.md").write_text("passed over")
    (tmp_path / "in" / "._pairs.csv").write_bytes(b"what macOS keeps \xff")
    run(tmp_path / "in", MODEL, None, tmp_path / "out", here)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cfp_fp"]
    metrics = json.loads((tmp_path / "out" / "cfp_fp" / "metrics.json").read_text())
    assert (metrics["pairs"], metrics["bootstrap_over"], metrics["undetected"]) == (40, "pairs", None)
    scored = Scored.read(tmp_path / "out" / "cfp_fp" / "scores.parquet")
    assert scored.same.tolist() == same
    assert scored.fold.tolist() == [i // 4 for i in range(40)]
    images, _ = read_bin(tmp_path / "in" / "cfp_fp.bin")
    with torch.no_grad():
        for i in (0, 1, 39):
            sides = []
            for image in images[2 * i : 2 * i + 2]:
                decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
                assert decoded is not None
                pixels = torch.from_numpy(decoded[..., ::-1].copy())
                found = colour(pixels.permute(2, 0, 1)[None])[0].double()
                sides.append(torch.cat([found, found]))  # a mean of colours does not see a mirror
            cosine = torch.nn.functional.cosine_similarity(sides[0], sides[1], dim=0).item()
            assert scored.own[i] == pytest.approx(cosine, abs=1e-3)


def test_a_bin_that_python_2_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(BY_HAND)
    assert read_bin(tmp_path / "a.bin") == ([b"one", b"two", b"one", b"one"], [False, True])


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("harm",))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps(_Harm()), "asks for builtins.print, which such a file has no need of"),
        (b"no pickle", "not a .bin of images and pairs"),
        (b"", "not a .bin of images and pairs"),
        (b"\x80\x04\x95" + b"\xff" * 8, "not a .bin of images and pairs: FRAME length exceeds"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", "not a .bin of images and pairs"),
        (pickle.dumps([1, 2, 3]), "holds no list of images beside a list of pairs"),
        (pickle.dumps(([b"a"], [True])), "1 images for 1 pairs, which need two each"),
        (pickle.dumps((["a", "b"], [True])), "expected encoded images and truth values"),
        (pickle.dumps(([b"a", b"b"], [7])), "expected encoded images and truth values"),
    ],
)
def test_a_bin_with_anything_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, told: str
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(EvaluationError, match=told):
        read_bin(tmp_path / "a.bin")
    assert "harm" not in capsys.readouterr().out


def test_an_image_that_is_none_is_named(tmp_path: Path, here: Params) -> None:
    good = jpeg(face_like(0, 0))
    (tmp_path / "a.bin").write_bytes(pickle.dumps(([good, b"\xff\xd8 none"] * 20, [True, False] * 10)))
    with pytest.raises(EvaluationError, match=r"a\.bin: image 1: "):
        run(tmp_path, MODEL, None, tmp_path / "out", here)


def test_pairs_of_ones_own_photographs(tmp_path: Path, here: Params) -> None:
    """Procedural people; a wall: it is compared by its middle, and counted; and a file before them that is no picture.

    Scores are the cosines of each photograph's own face, aligned by itself.
    """
    folder = tmp_path / "in"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "broken.jpg").write_bytes(b"none")
    for person in range(4):
        for photo in range(2):
            image = synthetic.render(9, person, photo, 160)
            (folder / "photos" / f"{person}_{photo}.jpg").write_bytes(synthetic.encode(image, 95))
    (folder / "photos" / "wall.jpg").write_bytes(jpeg(np.full((160, 160, 3), (160, 120, 90), np.uint8)))
    rows = [("photos/broken.jpg", "photos/0_0.jpg", 0, 0)]
    rows += [(f"photos/{i}_0.jpg", f"photos/{i}_1.jpg", 1, i % 2) for i in range(4)]
    rows += [(f"photos/{i}_0.jpg", f"photos/{(i + 1) % 4}_1.jpg", 0, i % 2) for i in range(4)]
    rows += [("photos/0_0.jpg", "photos/wall.jpg", 0, 1)]
    with (folder / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("left", "right", "same", "fold"), *rows])
    run(folder, MODEL, None, tmp_path / "out", here)
    metrics = json.loads((tmp_path / "out" / "mine" / "metrics.json").read_text())
    assert (metrics["pairs"], metrics["undetected"]) == (10, 2)
    scored = Scored.read(tmp_path / "out" / "mine" / "scores.parquet")
    assert list(zip(scored.left, scored.right, scored.same.astype(int), scored.fold, strict=True)) == rows

    faces = {}
    for name in {name for row in rows[1:] for name in row[:2]}:
        (aligned,) = align_files([folder / name], here.align, fallback=True, device="cpu")
        found = decode(aligned["image"]).mean(axis=(0, 1)) - 127
        faces[name] = found / np.sqrt(found @ found)  # a mean of colours does not see a mirror
    expected = [-1.0, *(float(faces[left] @ faces[right]) for left, right, _, _ in rows[1:])]
    np.testing.assert_allclose(scored.scores, expected, atol=1e-5)
    (folder / "photos" / "wall.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"mine\.csv: 1 photographs are not there, as .*wall\.jpg"):
        run(folder, MODEL, None, tmp_path / "again", here)


def test_people_who_are_trained_on_are_looked_for_where_folders_tell_them(tmp_path: Path, here: Params) -> None:
    folder = tmp_path / "in"
    names = ("Ada", "Bob", "Cleo", "Dan")
    rows = [(f"photos/{name}/0.jpg", f"photos/{name}/1.jpg", 1, i % 2) for i, name in enumerate(names)]
    rows += [(f"photos/{name}/0.jpg", f"photos/{names[i - 1]}/1.jpg", 0, i % 2) for i, name in enumerate(names)]
    for image in {image for row in rows for image in row[:2]}:
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(jpeg(face_like(names.index(image.split("/")[1]), int(image[-5]))))
    with (folder / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("left", "right", "same", "fold"), *rows])
    people = [{"label": 0, "identity": "0000045", "train": 3}, {"label": 1, "identity": "bob", "train": 2}]
    trained = Trained(pa.Table.from_pylist(people, LABELS), tmp_path / "names.txt")
    trained.names.write_text("0000045 Ada\n")
    with pytest.raises(EvaluationError, match=r"^\S*mine\.csv: 2 of its people are trained on: Ada \(0000045\), Bob"):
        run(folder, MODEL, trained, tmp_path / "out", here)
    text = (folder / "mine.csv").read_text()
    (folder / "mine.csv").write_text(text.replace("/0.jpg", "/a/0.jpg").replace("/1.jpg", "/a/1.jpg"))
    with pytest.raises(EvaluationError, match=r"^\S*mine\.csv: 2 of its people are trained on: Ada \(0000045\), Bob"):
        run(folder, MODEL, trained, tmp_path / "out", here)  # below a person's folder there may be one for each session
    with (folder / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("left", "right", "same", "fold"), *rows])
    report = here.model_copy(update={"evaluate": here.evaluate.model_copy(update={"leaks": "report"})})
    for whom, leaked in ((trained, 2), (None, None)):
        run(folder, MODEL, whom, tmp_path / "out", report)
        metrics = json.loads((tmp_path / "out" / "mine" / "metrics.json").read_text())
        assert (metrics["leaked_identities"], metrics["bootstrap_over"]) == (leaked, "identities")


def test_it_is_told_where_nobody_is_looked_for(tmp_path: Path, here: Params, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        for side in (0, 1):
            (tmp_path / f"{i}{side}.jpg").write_bytes(jpeg(face_like(i, side)))
    rows = "".join(f"{i}0.jpg,{i}1.jpg,1\n{i}0.jpg,{(i + 1) % 4}1.jpg,0\n" for i in range(4))
    (tmp_path / "MINE.CSV").write_text("left,right,same\n" + rows)
    with caplog.at_level("INFO"):
        run(tmp_path, MODEL, Trained(LABELS.empty_table(), tmp_path / "absent"), tmp_path / "out", here)
    assert f"{tmp_path}: passed over 8 .jpg" in caplog.messages
    assert any("MINE.CSV: people who are trained on are not looked for" in line for line in caplog.messages)
    assert json.loads((tmp_path / "out" / "MINE" / "metrics.json").read_text())["leaked_identities"] is None


def test_a_set_that_cannot_be_measured_is_named(tmp_path: Path, here: Params) -> None:
    write_bin(tmp_path / "a.bin", 40, 4)
    images, _ = read_bin(tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes(pickle.dumps((images, [True] * 40)))
    with pytest.raises(EvaluationError, match=r"^.*/a\.bin: 40 pairs, 40 of the same person"):
        run(tmp_path, MODEL, None, tmp_path / "out", here)


def test_two_sets_of_one_shape_are_not_the_same_pairs(tmp_path: Path, here: Params) -> None:
    """As lfw and agedb_30 are: so many pairs, alike in truth and folds."""
    (tmp_path / "in").mkdir()
    write_bin(tmp_path / "in" / "agedb_30.bin", 40, 4)
    write_bin(tmp_path / "in" / "again.bin", 40, 4)
    images, same = read_bin(tmp_path / "in" / "again.bin")
    (tmp_path / "in" / "lfw.bin").write_bytes(pickle.dumps((images[4:] + images[:4], same)))
    run(tmp_path / "in", MODEL, None, tmp_path / "out", here)
    one, again, other = (stored_scores(tmp_path / "out" / name) for name in ("agedb_30", "again", "lfw"))
    compare_runs(one, again, here.evaluate)
    with pytest.raises(EvaluationError, match=r"the pairs are not the same: .*agedb_30/scores\.parquet has 40 that"):
        compare_runs(one, other, here.evaluate)


def test_nothing_there_is_no_error(tmp_path: Path, here: Params) -> None:
    run(tmp_path, MODEL, None, tmp_path / "out", here)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(
        EvaluationError, match=r"nosuch: no such folder, though evaluate\.extra in params\.yaml names it"
    ):
        run(tmp_path / "nosuch", MODEL, None, tmp_path / "out", here)


def test_of_what_lies_in_the_folder_of_results_only_results_are_removed(tmp_path: Path, here: Params) -> None:
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        write_bin(tmp_path / "in" / f"{name}.bin", 40, 4)
    (tmp_path / "out" / "photos").mkdir(parents=True)
    (tmp_path / "out" / "photos" / "a.jpg").write_bytes(b"mine")
    run(tmp_path / "in", MODEL, None, tmp_path / "out", here)
    (tmp_path / "out" / "two" / "notes.txt").write_text("mine")
    for name in ("one", "two"):
        (tmp_path / "in" / f"{name}.bin").unlink()
    run(tmp_path / "in", MODEL, None, tmp_path / "out", here)
    left = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert left == {"photos/a.jpg", "two/notes.txt"}
