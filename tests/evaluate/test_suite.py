"""Any model by all protocols: the same as the stages, somewhere else."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline import tables
from pipeline.params import Params
from pipeline.tracking import MODEL_TAG
from stages.evaluate.models import Embedder, load_embedder
from stages.evaluate.scoring import Scored
from stages.evaluate.suite import evaluate_model, text
from stages.evaluate.verification import EvaluationError
from stages.train.export import export
from tests.evaluate.conftest import EVALUATE, Workspace
from tests.work import HERE

CPU = torch.device("cpu")
ALL = ("lfw", "ytf", "megaface")


@pytest.fixture
def project(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as this one, with the workspace's sets and model."""
    (tmp_path / "data").mkdir()
    for name, target in (
        ("data/raw", workspace.raw),
        ("data/aligned", workspace.aligned),
        ("data/shards", workspace.shards),
        ("models", workspace.models),
    ):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(params: Params, workspace: Workspace) -> Params:
    clean = params.shard.clean.model_copy(update={"names": str(workspace.trained.names)})
    shard = params.shard.model_copy(update={"clean": clean})
    return params.model_copy(
        update={"machine": HERE, "evaluate": EVALUATE.model_copy(update={"batch": 4}), "shard": shard}
    )


@pytest.fixture
def model(workspace: Workspace) -> Embedder:
    return load_embedder(workspace.models, CPU)


def test_the_model_of_the_stages_gets_their_metrics(
    project: Path, reports: Path, model: Embedder, here: Params
) -> None:
    """Byte by byte, in batches of the same size; and only `out` is written to."""
    before = sorted(path for path in project.rglob("*"))
    evaluate_model(model, ALL, project / "own", here)
    for name in ALL:
        assert (project / "own" / name / "metrics.json").read_bytes() == (reports / name / "metrics.json").read_bytes()
    assert json.loads((project / "own" / "model.json").read_text()) == {"name": model.name, "sha256": model.digest}
    assert sorted(path for path in project.rglob("*") if "own" not in path.parts[-4:]) == before
    said = text(project / "own", ALL)
    accuracy = json.loads((reports / "lfw" / "metrics.json").read_text())["accuracy"]
    assert f"lfw\naccuracy             {accuracy:.2%}" in said
    found = json.loads((reports / "megaface" / "metrics.json").read_text())["distractors"]
    told = re.findall(r"^ *(\S+) distractors: rank-1 (\S+)%, ", said.partition("megaface\n")[2], re.M)
    assert told == [(count, f"{100 * found[count]['rank_1']:.2f}") for count in ("5", "30")]


def test_an_onnx_file_gets_the_same_scores(project: Path, reports: Path, workspace: Workspace, here: Params) -> None:
    export(workspace.models, project / "model.onnx")
    (project / "models").unlink()  # so that nothing tells whom it was trained on
    evaluate_model(load_embedder(project / "model.onnx", CPU), ["lfw"], project / "own", here)
    paths = [folder / "lfw" / "scores.parquet" for folder in (project / "own", reports)]
    own, expected = (Scored.read(path).scores for path in paths)
    np.testing.assert_allclose(own, expected, atol=1e-4)
    digests = [tables.metadata(path, MODEL_TAG) for path in paths]
    assert digests[0] == digests[1] == tables.sha256_file(workspace.models / "backbone.safetensors")
    assert json.loads((project / "own" / "lfw" / "metrics.json").read_text())["leaked_identities"] is None


def test_whom_it_was_trained_on_is_not_told_by_other_shards(
    project: Path, workspace: Workspace, model: Embedder, here: Params, caplog: pytest.LogCaptureFixture
) -> None:
    """Those may leave out the very people that it was trained on; or it was trained on shards that lie elsewhere."""
    elsewhere = shutil.copytree(workspace.shards, project / "elsewhere")
    (project / "data" / "shards").unlink()
    (project / "data" / "shards").mkdir()

    def leaked(params: Params) -> int | None:
        evaluate_model(model, ["lfw"], project / "own", params)
        found: int | None = json.loads((project / "own" / "lfw" / "metrics.json").read_text())["leaked_identities"]
        return found

    assert leaked(here) is None
    assert "data/shards/labels.parquet: no such file" in caplog.text
    others = [{"label": 0, "identity": "somebody else", "images": 4, "train": 4, "val": 0}]
    tables.write_table(Path("data/shards/labels.parquet"), pa.Table.from_pylist(others, tables.LABELS), tables.LABELS)
    assert leaked(here) is None
    assert "data/shards/labels.parquet: of other shards than the model in models was trained on; whether" in caplog.text
    caplog.clear()
    assert leaked(here.model_copy(update={"train": here.train.model_copy(update={"data": "nosuch://shards"})})) is None
    assert "nosuch://shards: not an address that can be read here" in caplog.text
    train = here.train.model_copy(update={"data": str(elsewhere)})
    assert leaked(here.model_copy(update={"train": train})) == 0


def with_extra(params: Params, folder: str) -> Params:
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"extra": folder})})


def test_a_folder_has_the_results_of_one_model(project: Path, model: Embedder, here: Params) -> None:
    evaluate_model(model, ["lfw", "ytf"], Path("own"), here)
    evaluate_model(replace(model, name="moved"), ["lfw"], Path("own"), here)
    before = {path: path.read_bytes() for path in Path("own").rglob("*.*")}
    other = replace(model, digest="0" * 64)
    with pytest.raises(EvaluationError, match=rf"--out: own holds results of another model \({model.digest[:12]}\)"):
        evaluate_model(other, ["lfw"], Path("own"), here)
    assert {path: path.read_bytes() for path in Path("own").rglob("*.*")} == before


def test_no_photographs_are_lost(project: Path, model: Embedder, here: Params) -> None:
    """Wherever they lie: where more sets are, where results would come, or where features would."""
    (project / "mine" / "extra").mkdir(parents=True)
    (project / "mine" / "extra" / "pairs.csv").write_text("left,right,same\n")
    for own, sets, out, problem in (
        ("mine/extra", ["extra"], "mine", "--out: mine/extra overlaps evaluate.extra, mine/extra; take another folder"),
        ("mine/extra", ["extra"], "mine/extra/out", "--out: mine/extra/out/extra overlaps evaluate.extra, mine/extra"),
        ("mine/extra", ["lfw"], "mine", "--out: mine holds files that are no results of an evaluation; take a new"),
    ):
        with pytest.raises(EvaluationError, match=problem):
            evaluate_model(model, sets, Path(out), with_extra(here, own))
        assert [path.name for path in project.glob("mine/**/*.*")] == ["pairs.csv"]


def test_what_cannot_be_evaluated_is_said(project: Path, model: Embedder, here: Params) -> None:
    here = with_extra(here, "mine")
    Path("mine").mkdir()
    for sets, out, problem in (
        (["lfw", "cfp"], "own", "--sets: some of lfw, ytf, megaface, extra, not cfp"),
        ([], "own", "--sets: some of lfw, ytf, megaface, extra, not none"),
        (["lfw"], "reports", "--out: reports lies in reports, which is the pipeline's; take a folder of your own"),
        (["lfw"], "models/new", "--out: models/new lies in models"),
        (["extra"], "own", "mine: no NAME.bin and no NAME.csv in it, though --sets asks for extra"),
    ):
        with pytest.raises(EvaluationError, match=problem):
            evaluate_model(model, sets, Path(out), here)
        assert not Path("own").exists()
    Path("data/aligned").unlink()
    with pytest.raises(tables.TableError, match=r"data/aligned/lfw: no part-\*\.parquet; run `dvc repro` to make them"):
        evaluate_model(model, ["lfw"], Path("own"), here)
