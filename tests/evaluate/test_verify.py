"""Two photographs: the verdict, and all that may keep from one; thresholds against a brute force."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli, tables
from pipeline.params import Params
from pipeline.tracking import MODEL_TAG, model_digest
from stages.evaluate.models import load_embedder
from stages.evaluate.scoring import FLIP, SCORES, Flip, Scored
from stages.evaluate.verification import evaluate, threshold_at
from stages.evaluate.verify import Threshold, verify
from tests.align.scenes import FACE_CENTRE, scenes
from tests.conftest import ROOT
from tests.evaluate.conftest import Workspace
from tests.evaluate.test_photographs import expected
from tests.samples import jpeg
from tests.work import HERE

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def project(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parameters (no tracking), a model, its scores of 400 pairs, and photographs."""
    folder = tmp_path_factory.mktemp("project")
    text = (ROOT / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("enabled: true", "enabled: false"))
    shutil.copytree(workspace.models, folder / "models")
    write_scores(folder / "reports" / "lfw" / "scores.parquet", model_digest(workspace.models))
    pictures = scenes()
    for name, picture in (
        ("whole", pictures["whole"]),
        ("cut", pictures["cut by the border"]),
        ("group", pictures["a group"]),
        ("blank", np.zeros((120, 120, 3), np.uint8)),
    ):
        (folder / f"{name}.jpg").write_bytes(jpeg(picture))
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def write_scores(path: Path, digest: str, most: float = 0.0) -> None:
    """200 different pairs score from -1 to `most`, and 200 same ones from 0 to 1, evenly."""
    score = np.concatenate([np.linspace(-1, most, 200), np.linspace(0.005, 1, 200)]).astype(np.float32)
    columns = [np.zeros(400, np.int32), ["a"] * 400, ["b"] * 400, score, np.arange(400) >= 200]
    table = pa.table(
        [pa.array(column, type_) for column, type_ in zip(columns, SCORES.types, strict=True)], SCORES.names
    )
    tables.write_table(path, table, SCORES, metadata={MODEL_TAG: digest, FLIP: "concatenate"})


@pytest.fixture
def cosface(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in that folder: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", ["cosface", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


Cosface = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("flip", ["concatenate", "none"])
def test_score_is_the_cosine_of_the_flip_test(project: Path, params: Params, flip: Flip) -> None:
    here = params.model_copy(update={"machine": HERE, "evaluate": params.evaluate.model_copy(update={"flip": flip})})
    model = load_embedder(project / "models", CPU)
    left, right = (expected(project / f"{name}.jpg", model, here).astype(np.float64) for name in ("whole", "cut"))
    if flip == "none":
        left, right = left[0], right[0]
    cosine = (left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum())
    for threshold, same in ((cosine - 0.001, True), (cosine + 0.001, False)):
        chosen = Threshold(float(threshold), 1, 1000, flip, "somewhere")
        verdict = verify(project / "whole.jpg", project / "cut.jpg", model, here, chosen)
        assert verdict.score == pytest.approx(cosine, abs=1e-5)
        assert verdict.same is same


def test_exit_status_is_the_verdict(cosface: Cosface, project: Path, tmp_path: Path) -> None:
    status, said, _ = cosface("verify", "whole.jpg", "cut.jpg", "--far", "0.01")
    assert status == 0
    assert "accepts 2 of 200 pairs of different people (FAR 0.01), by reports/lfw/scores.parquet" in said
    assert said.endswith("verdict: the same person\n")
    strict = tmp_path / "strict.parquet"  # by which no score reaches the threshold
    write_scores(strict, model_digest(project / "models"), most=1.01)
    status, said, _ = cosface("verify", "whole.jpg", "cut.jpg", "--far", "0.005", "--scores", str(strict))
    assert status == 1
    assert said.endswith("verdict: different people\n")


def test_json_tells_all(cosface: Cosface, project: Path) -> None:
    status, said, _ = cosface("verify", "whole.jpg", "group.jpg", "--far", "0.01", "--json")
    found = json.loads(said)
    assert status == 0
    assert found["same"] is True
    assert found["digest"] == model_digest(project / "models")
    assert (found["threshold"]["false_accepts"], found["threshold"]["different"]) == (2, 200)
    assert found["threshold"]["far"] == 0.01
    assert found["score"] >= found["threshold"]["value"]
    left, top, right, bottom = found["left"]["box"]
    assert left < FACE_CENTRE[0] < right
    assert top < FACE_CENTRE[1] < bottom
    assert found["left"]["others"] == []
    assert len(found["right"]["others"]) == 5


def test_of_several_faces_it_is_said_which(cosface: Cosface) -> None:
    said = cosface("verify", "whole.jpg", "group.jpg")[1]
    assert "whole.jpg: one face, x 18" in said
    assert "group.jpg: 6 faces; the nearest to the centre is taken, x " in said


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (("blank.jpg",), ["blank.jpg: no face found", "cannot be decided: no face to compare in blank.jpg"]),
        (("nosuch.jpg",), ["nosuch.jpg: No such file or directory", "no face to compare in nosuch.jpg"]),
        (("broken.jpg",), ["broken.jpg: none of JPEG"]),
        (("models",), ["models: Is a directory"]),
        (
            ("cut.jpg", "--far", "0.001"),
            ["score: ", "200 pairs of different people, too few for FAR 0.001", "the least is 0.005"],
        ),
    ],
)
def test_what_cannot_be_decided_ends_by_two(cosface: Cosface, arguments: tuple[str, ...], reasons: list[str]) -> None:
    status, said, _ = cosface("verify", "whole.jpg", *arguments)
    assert status == 2
    for reason in reasons:
        assert reason in said
    status, said, _ = cosface("verify", "whole.jpg", *arguments, "--json")
    assert status == 2
    assert json.loads(said)["same"] is None


def test_errors_end_by_two(cosface: Cosface) -> None:
    for arguments, error in (
        (("--model", "nosuch"), "error: nosuch: no such model"),
        (("--far", "1"), "error: --far: must be above 0 and below 1, not 1"),
        (("--scores", "nosuch.parquet"), "error: nosuch.parquet: no such file"),
        (("--scores", "whole.jpg"), "error: whole.jpg: not a readable Parquet file"),
    ):
        status, _, said = cosface("verify", "whole.jpg", "cut.jpg", *arguments)
        assert status == 2
        assert said.startswith(error)


def test_scores_must_be_the_model_s(cosface: Cosface, project: Path, tmp_path: Path) -> None:
    """Given ones are refused; ones that happen to lie there, because of a newer model, give no threshold."""
    write_scores(tmp_path / "other.parquet", "0" * 64)
    status, _, said = cosface("verify", "whole.jpg", "cut.jpg", "--scores", str(tmp_path / "other.parquet"))
    assert status == 2
    assert "other.parquet has the scores of another model (000000000000) than models" in said
    centred = Scored(
        ["a"] * 4, ["b"] * 4, np.arange(4) > 1, np.arange(4, dtype=np.int32) % 2, np.eye(2, 4, dtype=np.float32)
    )
    about = {MODEL_TAG: model_digest(project / "models"), FLIP: "none"}
    centred.write(tmp_path / "centred.parquet", about)
    status, said, _ = cosface("verify", "whole.jpg", "cut.jpg", "--scores", str(tmp_path / "centred.parquet"))
    assert status == 2
    assert "centred by fold" in said
    usual = project / "reports" / "lfw" / "scores.parquet"
    content = usual.read_bytes()
    try:
        write_scores(usual, "0" * 64)
        status, said, _ = cosface("verify", "whole.jpg", "cut.jpg", "--far", "0.01")
        assert status == 2
        assert "score: " in said
        assert "reports/lfw/scores.parquet has the scores of another model" in said
        usual.unlink()
        status, said, _ = cosface("verify", "whole.jpg", "cut.jpg")
        assert status == 2
        assert "no threshold: reports/lfw/scores.parquet is not there; `dvc repro` makes it" in said
    finally:
        usual.write_bytes(content)


@given(
    pairs=st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=30).filter(
        lambda pairs: len({same for _, same in pairs}) == 2
    ),
    far=st.sampled_from([0.1, 0.25, 0.29, 0.5, 0.9]),
)
def test_threshold_is_the_best_at_its_far(pairs: list[tuple[int, bool]], far: float) -> None:
    """No threshold that accepts as few different pairs accepts more same ones; and TAR@FAR is what it gives."""
    score, same = np.array([s / 6 for s, _ in pairs]), np.array([t for _, t in pairs])
    different = int((~same).sum())
    found = threshold_at(far, score, same)
    if found is None:
        assert different < 1 / far
        return
    cuts = np.unique(np.concatenate([score - 0.01, score + 0.01]))
    allowed = [cut for cut in cuts if (score[~same] >= cut).sum() <= far * different + 1e-9]
    best = max((score[same] >= cut).mean() for cut in allowed)
    assert (score[same] >= found).mean() == best
    assert (score[~same] >= found).mean() <= far
    # two folds
    metrics = evaluate(np.tile(score, 2), np.tile(same, 2), np.repeat([0, 1], len(score)), [far])
    assert metrics.tar_at_far[str(far)] == pytest.approx(best)
