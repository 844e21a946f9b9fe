import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from dvc.repo import Repo
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipeline import flow, servers
from pipeline.cli import MLFLOW_PAGE, RECIPES
from pipeline.params import Archive, load_params
from tests.pipeline.command import cosface

QUICKSTART = (RECIPES / "quickstart.yaml").read_bytes()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of DVC, with a stage."""
    folder = tmp_path_factory.mktemp("repository")
    Repo.init(str(folder), no_scm=True).close()
    (folder / "params.yaml").write_bytes(QUICKSTART)
    (folder / "dvc.yaml").write_text("stages: {download: {cmd: echo}}\n")
    return folder


def process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cosface` as a process of its own."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def assert_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message on stderr, exit status 1, no traceback."""
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_help_lists_the_commands(tmp_path: Path) -> None:
    said = process(tmp_path, "--help").stdout
    assert all(command in said for command in ("retrain", "schedule", "promote", "evaluate", "verify", "embed"))


def test_nothing_slow_is_imported_for_help(tmp_path: Path) -> None:
    code = "import sys, pipeline.cli; print([m for m in ('prefect', 'mlflow', 'torch', 'dvc') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_params_prints_every_value_by_dotted_name(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    said = cosface(tmp_path, "params").stdout.splitlines()
    assert "train.head.scale = 64.0" in said
    assert "train.head.margin = 0.35" in said


def test_params_names_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART.replace(b"margin: 0.35", b"margin: -1") + b"marginn: 0.3\n")
    assert_error(process(tmp_path, "params"), "params.yaml", "train.head.margin", "-1", "marginn: unknown key")


def test_files_that_are_named_and_not_there_are_told_by_key(tmp_path: Path) -> None:
    for name in ("names.txt", "exclude.csv", "noise.txt"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data" / "extra").mkdir()
    assert cosface(tmp_path, "recipe", "quickstart").stderr == ""
    (tmp_path / "data" / "noise.txt").unlink()
    told = cosface(tmp_path, "recipe", "cosface-casia")
    assert told.returncode == 0
    casia = load_params(tmp_path / "params.yaml").download
    assert isinstance(casia.train, Archive)
    assert f"warning: download.train.location: {casia.train.location} is not there\n" in told.stderr
    assert "warning: evaluate.megaface.noise: data/noise.txt is not there\n" in told.stderr
    assert "http" not in told.stderr
    assert cosface(tmp_path, "params").stderr == told.stderr


def test_recipes_are_listed(tmp_path: Path) -> None:
    assert cosface(tmp_path, "recipe").stdout.split() == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_changes_nothing(tmp_path: Path) -> None:
    assert_error(cosface(tmp_path, "recipe", "arcface"), "no recipe 'arcface'", "cosface-casia", "quickstart")
    assert list(tmp_path.iterdir()) == []


def test_recipes_replace_each_other(tmp_path: Path) -> None:
    for name in ("quickstart", "cosface-casia", "quickstart"):
        assert cosface(tmp_path, "recipe", name).returncode == 0
        assert (tmp_path / "params.yaml").read_bytes() == (RECIPES / f"{name}.yaml").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_an_edited_params_yaml_is_kept(tmp_path: Path) -> None:
    """However often: an earlier copy is never written over."""
    kept = {}
    for margin, backup in ((b"0.2", "params.yaml.bak"), (b"0.3", "params.yaml.bak.1"), (b"0.4", "params.yaml.bak.2")):
        kept[backup] = QUICKSTART.replace(b"margin: 0.35", b"margin: " + margin)
        (tmp_path / "params.yaml").write_bytes(kept[backup])
        assert cosface(tmp_path, "recipe", "quickstart").stdout.splitlines()[0].endswith(f" {backup}")
        assert (tmp_path / "params.yaml").read_bytes() == QUICKSTART
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.bak*")} == kept


@pytest.mark.parametrize("command", [("promote",), ("promote", "0" * 32), ("compare", "0" * 32, "1" * 32)])
def test_looking_for_a_run_makes_no_store(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    assert_error(cosface(tmp_path, *command, MLFLOW_TRACKING_URI=""), "there is no MLflow store sqlite:///")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        (("embed", ".", "--out", "faces.csv"), "faces.csv: must end in .parquet or .npz"),
        (("embed", ".", "--out", "reports/lfw/scores.parquet"), "--out: reports/lfw/scores.parquet lies in reports"),
        (("evaluate", "--sets", "lfw,cfp"), "--sets: some of lfw, ytf, megaface, extra, not cfp"),
        (("evaluate", "--sets", "lfw", "--out", "data/mine"), "--out: data/mine lies in data"),
        (("evaluate", "--sets", "extra"), "data/extra: no such folder"),
    ],
)
def test_what_can_be_told_without_the_model_is_told_first(
    tmp_path: Path, command: tuple[str, ...], problem: str
) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    assert_error(cosface(tmp_path, *command, "--model", "nosuch"), problem)


def test_export_writes_over_nothing_but_a_model(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    assert_error(cosface(tmp_path, "export", "params.yaml"), "params.yaml: must end in .onnx")
    assert (tmp_path / "params.yaml").read_bytes() == QUICKSTART


@pytest.mark.parametrize("command", [("schedule", "--cron", "0 3 * * 0", "--start-server"), ("retrain",)])
def test_retraining_outside_a_project(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert_error(cosface(tmp_path, *command), "params.yaml: no such file")
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    assert_error(cosface(tmp_path, *command), "not inside of a DVC repository")


@pytest.mark.parametrize("command", [("schedule", "--cron", "0 3 * * 0"), ("retrain",)])
def test_a_prefect_server_that_does_not_answer_is_named(repository: Path, command: tuple[str, ...]) -> None:
    nobody = "http://127.0.0.1:9/api"
    with temporary_settings({PREFECT_API_URL: nobody}):
        assert_error(cosface(repository, *command), f"PREFECT_API_URL={nobody}: no answer")


def test_schedule_without_a_server_says_how_to_start_one(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "LOCAL_API", "http://127.0.0.1:9/api")
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        told = cosface(repository, "schedule", "--cron", "0 3 * * 0")
    assert_error(told, "prefect server start", "--start-server")


def test_a_bad_schedule_is_refused(tmp_path: Path) -> None:
    assert_error(cosface(tmp_path, "schedule", "--cron", "0 3 * *"), "'0 3 * *'", "five fields")


@pytest.mark.parametrize("command", [("ui", "--mlflow-port"), ("ui", "--prefect-port"), ("schedule", "--prefect-port")])
def test_a_port_that_is_none_is_refused(tmp_path: Path, command: tuple[str, str]) -> None:
    found = cosface(tmp_path, *command, "99999")
    assert found.returncode == 2
    assert command[1] in found.stderr
    assert "65535" in found.stderr
    assert "Traceback" not in found.stderr


def test_a_port_that_is_not_ours_is_told_from_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "HOST", "192.0.2.1")  # kept for documentation: no machine has it
    with (
        pytest.raises(servers.ServerError, match=r"port 5000 of 192\.0\.2\.1 \(Cannot assign .*\): give --mlflow-port"),
        servers.mlflow_server(5000),
    ):
        pass


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_error(cosface(tmp_path, "ui", "--mlflow-port", str(port)), f"port {port}", "in use", "--mlflow-port")


def test_runs_on_a_server_are_shown_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Prefect is started alone, here something that is at its end by then."""

    @contextmanager
    def ended(port: int) -> Iterator[servers.Server]:
        with subprocess.Popen(["true"], text=True) as process, TemporaryFile("w+") as log:
            process.wait()
            yield servers.Server("Prefect", f"http://127.0.0.1:{port}", process, log)

    monkeypatch.setattr(servers, "prefect_server", ended)
    port = servers.free_port()
    uri = "https://me:SECRET@mlflow.example.org/team/"
    shown = cosface(tmp_path, "ui", f"--prefect-port={port}", MLFLOW_TRACKING_URI=uri)
    said = [line.split() for line in shown.stdout.splitlines()]
    assert said[0] == ["MLflow", f"https://mlflow.example.org/team/{MLFLOW_PAGE}", "(MLFLOW_TRACKING_URI)"]
    assert said[1] == ["Prefect", f"http://127.0.0.1:{port}"]
    assert_error(shown, f"Prefect on http://127.0.0.1:{port} has ended")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_no_database_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("Not what SQLite has written, at the very least not in these bytes. " * 20)
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    for command in (["ui", f"--mlflow-port={servers.free_port()}"], ["promote"]):
        found = cosface(tmp_path, *command, MLFLOW_TRACKING_URI="")
        assert_error(
            found, f"MLflow store sqlite:///{tmp_path}/mlflow.db: file is not a database; make it a database that"
        )
        assert "Traceback" not in found.stdout + found.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "example.org, localhost"}, "example.org,localhost,127.0.0.1"),
        ({"NO_PROXY": "ignored", "no_proxy": "example.org"}, "example.org,127.0.0.1,localhost"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_loopback_is_not_reached_by_a_proxy(
    before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    child = servers.environment()
    assert child["NO_PROXY"] == child["no_proxy"] == after
