import os
import shutil
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import httpx
import psutil
import pytest
from dvc.repo import Repo
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running
from torch.distributed import run as torchrun

from pipeline import flow, servers
from pipeline.cli import RECIPES
from pipeline.flow import FlowError
from pipeline.params import load_params
from stages.train import launch
from tests.pipeline.command import cosface

REPORT = """\
  report:
    cmd: cat model > report
    deps: [model]
    outs: [report]
"""
DOWNLOAD = """\
  download:
    matrix:
      set: [train, lfw]
    cmd: echo photographs > raw-${item.set}
    outs: ["raw-${item.set}"]
"""
TRAIN = """\
  train:
    cmd: python -c "import sys; print('loss 1.5'); open('model', 'w').write(sys.prefix)"
    deps: [raw-train, code]
    outs: [model]
"""
GRAPH = f"stages:\n{REPORT}{DOWNLOAD}{TRAIN}"
"""The report comes before what it needs."""
ENDLESS = "sh -c 'echo $$ > shell.pid; sleep 600 & echo $! > child.pid; wait'"
BROKEN = "sh -c 'echo the disk is full; exit 3'"
NOBODY = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Ui:
    folder: Path
    process: subprocess.Popen[str]
    mlflow: str
    prefect: str
    said: list[str]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    """`cosface ui` with stores of its own, so that nothing of the user's is touched; the flows here use its server.

    In the end Ctrl-C ends it, and all that it has started.
    """
    folder = tmp_path_factory.mktemp("ui")
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    ports = [servers.free_port(), servers.free_port()]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "ui", f"--mlflow-port={ports[0]}", f"--prefect-port={ports[1]}"],
        cwd=folder,
        # a proxy that is not there, as one elsewhere could not reach this machine's loopback
        env={**env, "PREFECT_HOME": str(folder / "prefect"), "HTTP_PROXY": NOBODY, "http_proxy": NOBODY},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        said = [process.stdout.readline() for _ in range(3)]
        assert all(said), "cosface ui has not started what it shows"
        yield Ui(folder, process, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", said)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert_gone(below)
    finally:
        process.kill()


@pytest.fixture
def api(ui: Ui) -> str:
    return f"{ui.prefect}/api"


@pytest.fixture
def client(api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy graph in a repository of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the interpreter's folder is not on it
    subprocess.run(["git", "init", "-q"], check=True)
    Repo.init().close()
    shutil.copy(RECIPES / "quickstart.yaml", "params.yaml")
    Path("dvc.yaml").write_text(GRAPH)
    Path("code").write_text("1")
    return tmp_path


def train_by(command: str) -> None:
    """A graph of a training alone."""
    Path("dvc.yaml").write_text(f"stages:\n  train:\n    cmd: {command}\n    outs: [model]\n")


def run(client: SyncPrefectClient) -> tuple[str, str, dict[str, str], str]:
    """Run the flow; its state and message, the states of its tasks in the order they began, and its log."""
    state = flow.retrain(return_state=True)  # pyrefly: ignore[no-matching-overload]
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    flow.APILogWorker.drain_all()
    in_run = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run_id]))
    tasks = sorted(client.read_task_runs(task_run_filter=in_run), key=lambda task: str(task.start_time))
    logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200)
    log = "\n".join(entry.message for entry in logs)
    return state.name or "", state.message or "", {task.name: task.state_name or "" for task in tasks}, log


def test_the_graph_is_dvc_s_in_an_order_that_runs(project: Path) -> None:
    graph = flow.stages(project)
    assert graph == {
        "download@train": [],
        "download@lfw": [],
        "train": ["download@train"],
        "report": ["train"],
    }
    order = list(graph)
    assert all(order.index(below) < order.index(name) for name, needed in graph.items() for below in needed)


def test_a_folder_without_a_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlowError, match="not inside of a DVC repository"):
        flow.stages(tmp_path)
    Repo.init(str(tmp_path), no_scm=True).close()
    with pytest.raises(FlowError, match=r"no dvc\.yaml with stages; run this in the project's folder"):
        flow.stages(tmp_path)


def test_a_project_that_has_lost_its_repository_is_told_the_remedy(project: Path) -> None:
    shutil.rmtree(project / ".git")
    with pytest.raises(FlowError, match=r"is not a git repository; DVC needs one: run `git init` there"):
        flow.stages(project)
    subprocess.run(["git", "init", "-q"], check=True)
    assert flow.stages(project)


def test_only_what_changed_runs_and_the_rest_shows_as_cached(project: Path, client: SyncPrefectClient) -> None:
    Path("dvc.yaml").write_text(GRAPH.replace("[train, lfw]", "[train]"))
    name, message, tasks, log = run(client)
    assert (name, message) == ("Completed", "3 stages ran, 0 were cached")
    assert tasks == dict.fromkeys(["download@train", "train", "report"], "Completed")
    assert list(tasks) == list(flow.stages(project))
    assert "loss 1.5" in log
    assert (project / "report").read_text() == sys.prefix

    Path("code").write_text("2")
    _, message, tasks, log = run(client)
    assert tasks == {"download@train": "Cached", "train": "Completed", "report": "Cached"}
    assert message == "1 stages ran, 2 were cached"
    assert "Stage 'download@train' didn't change, skipping" in log


def test_a_failed_stage_fails_the_flow_with_its_last_words(project: Path, client: SyncPrefectClient) -> None:
    """And what needs it is not run."""
    train_by(BROKEN)
    with Path("dvc.yaml").open("a") as file:
        file.write(REPORT)
    name, message, tasks, log = run(client)
    assert name == "Failed"
    assert message.startswith("stage train failed")
    assert "the disk is full" in message
    assert "exited with 3" in message
    assert tasks == {"train": "Failed"}
    assert "Retry" not in log


def test_nothing_outlives_a_flow_and_one_that_was_killed_does_not_run_for_ever(
    project: Path, api: str, client: SyncPrefectClient
) -> None:
    """And a run of another project, or of this one while it runs, is left alone."""
    train_by(ENDLESS)

    def retraining() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
        """`cosface retrain`, and what it has started once a stage runs."""
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "retrain"],
            env={**os.environ, "PREFECT_API_URL": api, "http_proxy": NOBODY},
        )
        shell, child = (int(wait_for_text(project / name)) for name in ("shell.pid", "child.pid"))
        between = psutil.Process(shell).parents()  # dvc repro, and above it the flow
        above = between.index(psutil.Process(process.pid))
        return process, [psutil.Process(child), psutil.Process(shell), *between[:above]]

    def runs() -> list[FlowRun]:
        """Of the project, by the names of their states."""
        of_project = FlowRunFilter(tags=FlowRunFilterTags(all_=[flow.deployment(project)]))
        return sorted(client.read_flow_runs(flow_run_filter=of_project), key=lambda run: run.state_name or "")

    first, group = retraining()
    other = client.create_flow_run(flow.retrain, tags=["faces-of-others"], state=Running())
    (begun,) = runs()
    assert begun.name.startswith(f"{project.name} ")
    flow.retrain(return_state=True)  # pyrefly: ignore[no-matching-overload]  # DVC is busy with the first
    assert [run.state_name for run in runs()] == ["Failed", "Running"]
    first.kill()
    first.wait()
    assert_gone(group)
    for name in ("shell.pid", "child.pid"):
        (project / name).unlink()

    second, group = retraining()
    assert [run.state_name for run in runs()] == ["Crashed", "Failed", "Running"]
    assert runs()[0].id == begun.id
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[begun.id]))
    assert {task.state_name for task in client.read_task_runs(flow_run_filter=of_it)} == {"Crashed"}
    assert client.read_flow_run(other.id).state_name == "Running"
    second.terminate()
    assert second.wait(timeout=60) == 128 + signal.SIGTERM
    assert_gone(group)


def test_a_training_may_take_all_the_time_to_end_that_it_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks another to end waits for longer than that one does in turn: torchrun, the flow, the schedule."""
    granted: list[float] = []

    @contextmanager
    def noted(*_: object, grace: float = servers.GRACE_SECONDS, **__: object) -> Iterator[SimpleNamespace]:
        granted.append(grace)
        yield SimpleNamespace(stdout=[], wait=lambda: 0)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which a launch would set
    monkeypatch.setattr(torchrun, "run", lambda arguments: granted.append(arguments.shutdown_timeout))
    monkeypatch.setattr(flow, "process_group", noted)
    monkeypatch.setattr(flow, "_changed", lambda _: True)
    monkeypatch.setattr(flow, "_pause", lambda _: None)
    launch.launch(2, "stages.train")
    with disable_run_logger():
        flow.reproduce("train")
    with pytest.raises(FlowError, match="ended by itself"):
        flow.serve("0 3 * * 0", "UTC", NOBODY)
    assert len(granted) == 3
    assert launch._PATIENCE == granted[0] < granted[1] < granted[2]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert [left for left in alive if left.status() != psutil.STATUS_ZOMBIE] == []


def wait_for_text(path: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().strip():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


def test_only_downloads_from_afar_are_tried_again() -> None:
    params = load_params(RECIPES / "cosface-casia.yaml")
    stages = ["download@lfw", "download@train", "download@ytf", "align@lfw", "train"]
    assert [flow.retries(stage, params) > 0 for stage in stages] == [True, False, False, False, False]


def test_schedules_are_checked() -> None:
    flow.check_schedule("0 3 * * 0", "Europe/Berlin")
    flow.check_schedule("0 3 29 2 *", "UTC")  # seldom, but it comes
    for cron, timezone in (
        ("0 3 * *", "UTC"),
        ("0 0 3 * * 0", "UTC"),  # which some read with seconds first, and others last
        ("0 3 31 2 *", "UTC"),
        ("every sunday", "UTC"),
        ("0 3 * * 0", "Mars/Olympus"),
        ("0 3 * * 0", ""),
    ):
        with pytest.raises(FlowError, match="not a schedule"):
            flow.check_schedule(cron, timezone)


def test_each_project_has_a_schedule_of_its_own(tmp_path: Path) -> None:
    for name in ("a/faces", "b/faces", "b/50 % <new>"):
        (tmp_path / name).mkdir(parents=True)
    names = [flow.deployment(tmp_path / name) for name in ("a/faces", "b/faces", "b/50 % <new>", "b/../a/faces")]
    assert [name.rpartition("-")[0] for name in names] == ["faces", "faces", "50____new_", "faces"]
    assert len(set(names)) == 3
    assert names[0] == names[3]


@contextmanager
def forwarded(port: int, to: int) -> Iterator[None]:
    """A port of loopback by which another one is reached, for as long as the block lasts."""
    ends: list[socket.socket] = []

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((servers.HOST, to)) as there:
                ends.extend([self.request, there])
                back = threading.Thread(target=pass_on, args=(there, self.request))
                back.start()
                pass_on(self.request, there)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server((servers.HOST, port), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        yield
        server.shutdown()
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_a_schedule_calls_for_runs_which_are_run_until_it_ends(
    project: Path, ui: Ui, client: SyncPrefectClient
) -> None:
    """And outlives its server, which is away for a while; what runs in the end is ended."""
    train_by("sh -c 'echo begun > model; exec sleep 600'")
    name = f"retrain/{flow.deployment(project)}"
    port, to = servers.free_port(), int(ui.prefect.rpartition(":")[2])
    code = "from pipeline import cli, flow; flow.SETTLED_SECONDS = 1; cli.main()"
    schedule = ["schedule", "--cron", "* * * * *", "--timezone", "Europe/Berlin"]
    hasty = {"PREFECT_CLIENT_MAX_RETRIES": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with ExitStack() as stack:
        with forwarded(port, to):
            process = subprocess.Popen(
                [sys.executable, "-c", code, *schedule],
                env={**os.environ, **hasty, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "http_proxy": NOBODY},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            assert name in process.stdout.readline()
            first, *_ = wait_for(lambda: scheduled(client, name))
        assert first.state_type == StateType.SCHEDULED
        assert any("does not answer; waiting for it" in line for line in process.stdout)
        (project / "model").unlink(missing_ok=True)  # a minute may have begun meanwhile
        with forwarded(port, to):
            assert any("answers: the schedule goes on" in line for line in process.stdout)
            second = cosface(project, *schedule)
            assert second.returncode == 1
            assert f"{project}: another `cosface schedule` runs here; end it first" in second.stderr

            assert wait_for_text(project / "model", seconds=180) == "begun\n"
            deployment = client.read_deployment_by_name(name)
            (made,) = deployment.schedules
            assert isinstance(made.schedule, CronSchedule)
            assert (made.schedule.cron, made.schedule.timezone) == ("* * * * *", "Europe/Berlin")
            assert made.active
            assert not deployment.paused
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    assert "Traceback" not in said
    assert "Warning" not in said
    assert client.read_deployment_by_name(name).paused
    with flow.only_schedule(project):  # free again
        pass


def test_runs_that_a_schedule_missed_are_not_made_up_for(project: Path, api: str, client: SyncPrefectClient) -> None:
    name = flow.deployment(project)
    made = flow.Runner(name=name).add_flow(
        flow.retrain, name=name, interval=1, entrypoint_type=flow.EntrypointType.MODULE_PATH
    )
    assert isinstance(made, UUID)
    try:
        asked = client.create_flow_run_from_deployment(made)

        def missed(when: datetime) -> list[FlowRun]:
            runs = scheduled(client, f"retrain/{name}")
            return [run for run in runs if run.id != asked.id and due(run) < when]

        wait_for(lambda: missed(datetime.now(UTC)))
        begun = datetime.now(UTC)
        flow._forget_missed(name)
        assert not missed(begun)
        assert asked.id in {run.id for run in scheduled(client, f"retrain/{name}")}
    finally:
        client.delete_deployment(made)


def due(run: FlowRun) -> datetime:
    assert run.expected_start_time is not None
    return run.expected_start_time


def scheduled(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    """The runs that the schedule of a deployment calls for; none while there is no such deployment."""
    try:
        deployment = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return []
    of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    return client.read_flow_runs(deployment_filter=of_it)


def wait_for(look: Callable[[], list[FlowRun]], seconds: float = 60) -> list[FlowRun]:
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found
    return found


def test_only_prefect_s_api_is_taken_for_it(ui: Ui) -> None:
    for address in (f"{ui.prefect}/api", f"{ui.prefect}/api/"):
        with temporary_settings({PREFECT_API_URL: address}):
            assert flow.running_server() == address
    for address in (ui.prefect, ui.mlflow, f"{ui.mlflow}/api"):
        with (
            temporary_settings({PREFECT_API_URL: address}),
            pytest.raises(
                servers.ServerError, match=rf"PREFECT_API_URL={address}: .* is not Prefect's API, .* ends in /api"
            ),
        ):
            flow.running_server()


def test_the_ui_does_with_a_prefect_server_that_runs(ui: Ui, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is nothing else to start, so that it ends."""
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, NOBODY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = ui.prefect.rpartition(":")[2]
    found = cosface(tmp_path, "ui", f"--prefect-port={port}", MLFLOW_TRACKING_URI="https://mlflow.example.org")
    assert found.returncode == 0
    assert found.stdout.splitlines()[1:] == [f"Prefect  {ui.prefect} (which ran already)"]


def test_a_server_keeps_its_store_to_itself(ui: Ui) -> None:
    """What a command line says every user of the machine can see; the server must find its store all the same."""
    run = {"experiment_id": "0", "run_name": "of the server"}
    assert httpx.post(f"{ui.mlflow}/api/2.0/mlflow/runs/create", json=run).is_success
    path = ui.folder / "mlflow.db"
    with closing(sqlite3.connect(path)) as store:
        assert store.execute("SELECT name FROM runs").fetchall() == [("of the server",)]
    lines = [" ".join(each.cmdline()) for each in psutil.Process(ui.process.pid).children(recursive=True)]
    assert any("mlflow" in line for line in lines)
    assert str(path) not in "\n".join(lines)


def test_the_ui_shows_both(ui: Ui) -> None:
    assert [line.split()[0] for line in ui.said] == ["MLflow", "Prefect", "Ctrl-C"]
    assert ui.mlflow in ui.said[0]
    assert ui.prefect in ui.said[1]
    assert "<title>MLflow</title>" in httpx.get(ui.mlflow).text
    assert "Prefect" in httpx.get(ui.prefect, follow_redirects=True).text
