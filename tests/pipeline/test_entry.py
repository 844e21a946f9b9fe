import re
import sys
from pathlib import Path

import pytest

from pipeline.cli import RECIPES
from pipeline.entry import stage
from pipeline.errors import InputError
from pipeline.params import SETS, Params
from stages.shard.__main__ import main as shard


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((RECIPES / "quickstart.yaml").read_bytes())
    return tmp_path


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", *arguments])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--help",), 0, r"usage: .*Shard the aligned training set"),
        (("extra", "args"), 2, "unrecognized arguments: extra args"),
        (("--force",), 2, "unrecognized arguments: --force"),
    ],
)
def test_a_stage_without_arguments_takes_none(
    project: Path,
    arguments: tuple[str, ...],
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked(monkeypatch, *arguments)
    with pytest.raises(SystemExit, match=str(status)):
        stage(shard)
    assert re.search(words, "".join(capsys.readouterr()), re.DOTALL)
    assert [path.name for path in project.iterdir()] == ["params.yaml"]


def test_a_stage_of_sets_takes_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def main(params: Params, name: str) -> None:
        done.append((params.train.seed, name))

    for arguments in ((), ("lfw", "ytf"), ("cfp",)):
        asked(monkeypatch, *arguments)
        with pytest.raises(SystemExit, match="2"):
            stage(main, SETS)
    assert "choose from" in capsys.readouterr().err
    assert done == []
    asked(monkeypatch, "lfw")
    stage(main, SETS)
    assert done == [(1, "lfw")]


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (InputError("faces.zip: no faces"), 1, "error: faces.zip: no faces\n"),
        (PermissionError(13, "Permission denied", "lfw.tgz"), 1, "error: lfw.tgz: Permission denied\n"),
        (TimeoutError("the host does not answer"), 1, "error: the host does not answer\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from what is finished\n"),
    ],
)
def test_what_is_expected_ends_in_one_line(
    raised: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main(_: Params) -> None:
        raise raised

    asked(monkeypatch)
    with pytest.raises(SystemExit, match=str(status)):
        stage(main)
    assert capsys.readouterr().err == said
