import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import servers
from pipeline.cli import MLFLOW_PAGE, RECIPES
from pipeline.params import Archive, load_params

QUICKSTART = (RECIPES / "quickstart.yaml").read_bytes()


def cosface(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PREFECT_HOME": str(folder / "prefect"), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """One message on stderr, exit status 1, no traceback."""
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_help_lists_the_commands(tmp_path: Path) -> None:
    said = cosface(tmp_path, "--help").stdout
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
    assert_error(cosface(tmp_path, "params"), "params.yaml", "train.head.margin", "-1", "marginn: unknown key")


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
def test_a_prefect_server_that_does_not_answer_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "params.yaml").write_bytes(QUICKSTART)
    (tmp_path / "dvc.yaml").write_text("stages: {download: {cmd: echo}}\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    nobody = "http://127.0.0.1:9/api"
    assert_error(cosface(tmp_path, *command, PREFECT_API_URL=nobody), f"PREFECT_API_URL={nobody}: no answer")


def test_schedule_without_a_server_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline import cli, flow

    monkeypatch.setattr(flow, "running_server", lambda: None)
    monkeypatch.setattr(sys, "argv", ["cosface", "schedule", "--cron", "0 3 * * 0"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr().err
    assert "prefect server start" in said
    assert "--start-server" in said


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


def test_runs_on_a_server_are_shown_there(tmp_path: Path) -> None:
    """And Prefect is started alone."""
    port = servers.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "ui", f"--prefect-port={port}"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "MLFLOW_TRACKING_URI": "https://me:SECRET@mlflow.example.org/team/",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert said[0].split() == ["MLflow", f"https://mlflow.example.org/team/{MLFLOW_PAGE}", "(MLFLOW_TRACKING_URI)"]
    assert said[1].split() == ["Prefect", f"http://127.0.0.1:{port}"]


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
