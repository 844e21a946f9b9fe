"""The Prefect flow: the DVC graph, a task a stage, in order.

A task runs `dvc repro` for its stage, where DVC says that something changed, and nothing else. What must be recomputed
is DVC's to decide; Prefect decides when, shows what happens, and tries again what the network may have spoilt.
"""

import asyncio
import hashlib
import logging
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from uuid import UUID

import filelock
import httpx
from tenacity import Retrying, retry_if_result, wait_exponential

from pipeline.errors import InputError
from pipeline.params import Absent, Params, Synthetic, is_remote, load_params
from pipeline.servers import (
    GRACE_SECONDS,
    HOST,
    QUIET,
    ServerError,
    answers,
    environment,
    free_port,
    not_by_proxy,
    prefect_answers,
    prefect_server,
    process_group,
)

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)  # read by Prefect when it is imported
os.environ.update(not_by_proxy())

from prefect import Task, flow  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import SyncPrefectClient, get_client  # noqa: E402
from prefect.client.schemas.filters import (  # noqa: E402
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType  # noqa: E402
from prefect.client.schemas.sorting import FlowRunSort  # noqa: E402
from prefect.events.worker import EventsWorker  # noqa: E402
from prefect.exceptions import PrefectException  # noqa: E402
from prefect.logging import get_run_logger  # noqa: E402
from prefect.logging.handlers import APILogWorker  # noqa: E402
from prefect.runner import Runner  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.schedules import Cron  # noqa: E402
from prefect.server.schemas.schedules import CronSchedule  # noqa: E402
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings  # noqa: E402
from prefect.states import Completed, Crashed, Failed, State  # noqa: E402
from prefect.types.entrypoint import EntrypointType  # noqa: E402

log = logging.getLogger(__name__)

LAST_LINES = 20
"""Lines of DVC's output that a failure's message repeats."""
SETTLED_SECONDS = 60
"""Serving that ends sooner has not failed for want of a server, and will not do better the next time."""
STAGE_SECONDS = 320
"""Between asking a stage to end and ending it: a training may be validating before it writes its checkpoint, for which
stages/train/launch.py grants 300."""
RETRY_DELAYS = [10.0, 60.0, 300.0]
"""Seconds before each new attempt at a download."""
LOCK = ".schedule.lock"
"""The file in a project that its schedule holds."""
RETRAIN_LOCK = ".retrain.lock"
"""The file in a project that a retrain holds."""
LOCAL_API = f"http://{HOST}:4200/api"
"""Where `cosface ui` and `prefect server start` put a server, unless told otherwise."""


class FlowError(InputError):
    """The flow cannot run or be scheduled; the message says why."""


def _run_name() -> str:
    return f"{Path.cwd().name} {datetime.now():%Y-%m-%d %H:%M:%S}"


@flow(name="retrain", flow_run_name=_run_name, persist_result=False, validate_parameters=False)
def retrain() -> State[Any]:
    """Bring the models and reports of this folder up to date: every stage of dvc.yaml that something changed for."""
    with _alone(Path.cwd()):
        return _retrain()


@contextmanager
def _alone(project: Path) -> Iterator[None]:
    """Label this flow run as the project's, and tell of earlier ones that are said to run, but were killed.

    Where another retrain of the project runs, nothing is told: DVC decides which of the two goes on.
    """
    lock = filelock.FileLock(project / RETRAIN_LOCK)
    with suppress(filelock.Timeout):
        lock.acquire(timeout=0)
    try:
        own, label = UUID(flow_run.get_id()), deployment(project)
        with get_client(sync_client=True) as client:
            if lock.is_locked:
                running = FlowRunFilter(
                    tags=FlowRunFilterTags(all_=[label]),
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])),
                )
                for run in client.read_flow_runs(flow_run_filter=running):
                    if run.id != own:
                        _crashed(client, run.id)
            client.update_flow_run(own, tags={*client.read_flow_run(own).tags, label})
        yield
    finally:
        lock.release()


def _crashed(client: SyncPrefectClient, run: UUID) -> None:
    """Note that a flow run was killed, and what of it was still to be done."""
    of_it = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    unfinished = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED])
    tasks = client.read_task_runs(
        flow_run_filter=of_it, task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=unfinished))
    )
    state = Crashed(message="it was killed")
    for each in tasks:
        client.set_task_run_state(each.id, state, force=True)
    client.set_flow_run_state(run, state, force=True)


def _retrain() -> State[Any]:
    params = load_params()
    states: dict[str, State[Any]] = {}
    for stage, upstream in stages(Path.cwd()).items():
        states[stage] = _task(stage, params)(stage, wait_for=[states[name] for name in upstream], return_state=True)
        if not states[stage].is_completed():
            return Failed(message=states[stage].message)
    cached = sum(state.name == "Cached" for state in states.values())
    return Completed(message=f"{len(states) - cached} stages ran, {cached} were cached")


def stages(root: Path) -> dict[str, list[str]]:
    """The stages of the project's DVC graph in an order in which they can run, each with those it depends on.

    Raises:
        FlowError: there is no DVC project here, its dvc.yaml cannot be read, or it has no stages.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph  # an edge leads from a stage to one that it depends on
            names = [stage.addressing for stage in repo.index.stages if stage.cmd]
            below = {stage.addressing: {other.addressing for other in graph.successors(stage)} for stage in graph}
    except DvcException as error:
        no_git = "is not a git repository" in str(error)
        hint = "; DVC needs one: run `git init` there, or `dvc config core.no_scm true`" if no_git else ""
        raise FlowError(f"{root}: {error}{hint}") from error
    if not names:
        raise FlowError(f"{root}: no dvc.yaml with stages; run this in the project's folder")
    upstream = {name: [other for other in names if other in below[name]] for name in names}
    return {name: upstream[name] for name in TopologicalSorter(upstream).static_order()}


def retries(stage: str, params: Params) -> int:
    """How often a failed stage is tried again: downloads from afar are, nothing else gets better by repetition."""
    name, _, which = stage.partition("@")
    source = getattr(params.download, which, None) if name == "download" else None
    if source is None or isinstance(source, Synthetic | Absent):
        return 0
    return len(RETRY_DELAYS) if any(is_remote(place) for place in (source.location, source.pairs or "")) else 0


def _task(stage: str, params: Params) -> "Task[[str], State[Any]]":
    return Task(
        reproduce,
        name=stage,
        task_run_name=stage,
        retries=retries(stage, params),
        retry_delay_seconds=RETRY_DELAYS,
        cache_policy=NO_CACHE,
        persist_result=False,
    )


def reproduce(stage: str) -> State[Any]:
    """Run `dvc repro` for one stage, its output in the task's log; `Cached` where DVC found nothing to do."""
    logger = get_run_logger()
    cached: State[Any] = Completed(name="Cached", message="nothing that it depends on has changed")
    if not _changed(stage):
        logger.info("Stage '%s' didn't change, skipping", stage)
        return cached
    lines: deque[str] = deque(maxlen=LAST_LINES)
    ran = False
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    with process_group(command, environment(), grace=STAGE_SECONDS) as process:
        assert process.stdout is not None
        for line in filter(None, map(str.rstrip, process.stdout)):
            logger.info("%s", line)
            lines.append(line)
            ran |= line.startswith("Running stage")
        code = process.wait()
    if code:
        return Failed(message=f"stage {stage} failed (dvc repro ended with {code}):\n" + "\n".join(lines))
    return Completed() if ran else cached


def _changed(stage: str) -> bool:
    """Whether `dvc repro` would do anything for a stage; asked here, for a process takes longer to start."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return bool(repo.status([stage]))
    except DvcException:
        return True  # and `dvc repro` says what is wrong


def retrain_now() -> State[Any]:
    """Run the flow here, recorded by the Prefect server that answers, or else by one of our own while it lasts.

    Prefect would start one by itself, but leave it behind when the flow is killed.

    Raises:
        ServerError: the configured server does not answer, or none can be started.
    """
    with ExitStack() as stack:
        api = running_server() or stack.enter_context(prefect_server(free_port())).address + "/api"
        stack.enter_context(temporary_settings({PREFECT_API_URL: api}))
        for worker in (APILogWorker, EventsWorker):
            stack.callback(worker.drain_all)  # they send in the background, and must be done before the server stops
        return retrain(return_state=True)  # pyrefly: ignore[no-matching-overload]


def running_server() -> str | None:
    """The API of the configured Prefect server, else of the one on this machine's usual port; None without either.

    Raises:
        ServerError: the configured server does not answer, or it is not Prefect's API that does.
    """
    settings = get_current_settings()
    configured = settings.api.url
    if configured is None:
        return LOCAL_API if prefect_answers(LOCAL_API) else None
    if not answers(configured):
        raise ServerError(f"PREFECT_API_URL={configured}: no answer; start that server, or unset the variable")
    if not configured.startswith(settings.cloud.api_url) and not prefect_answers(configured, by_proxy=True):
        raise ServerError(
            f"PREFECT_API_URL={configured}: what answers there is not Prefect's API, whose address ends in /api, as "
            f"{LOCAL_API} does"
        )
    return configured


def check_schedule(cron: str, timezone: str) -> None:
    """Whether a schedule has five fields, Prefect understands it, and a date for it will come.

    Raises:
        FlowError: it is not so; the message says what a schedule looks like.
    """
    problem = FlowError(
        f"--cron {cron!r} --timezone {timezone!r}: not a schedule; five fields (minute, hour, day, month, weekday) "
        'of dates that there are, such as "0 3 * * 0", and a zone such as UTC or Europe/Berlin'
    )
    if len(cron.split()) != 5 or not timezone:  # Prefect would take the last of six for seconds, and no zone for UTC
        raise problem
    try:
        asyncio.run(CronSchedule(cron=cron, timezone=timezone).get_dates(1))
    except ValueError as error:
        raise problem from error


def deployment(project: Path) -> str:
    """What a project's schedule is called on a Prefect server, which may have those of other projects too."""
    path = project.resolve()
    name = re.sub(r"[^\w.-]", "_", path.name)  # Prefect admits no slashes, per cent signs and the like
    return f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


@contextmanager
def only_schedule(project: Path) -> Iterator[None]:
    """Hold the project's schedule for as long as the block lasts.

    Raises:
        FlowError: another process holds it.
    """
    lock = filelock.FileLock(project / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise FlowError(
            f"{project}: another `cosface schedule` runs here; end it first, for a project has one schedule"
        ) from error
    try:
        yield
    finally:
        lock.release()


def serve(cron: str, timezone: str, api: str, check: Callable[[], None] = lambda: None) -> None:
    """Register the schedule with a Prefect server, and run what it calls for, one at a time, until interrupted.

    In a process group of its own, because Prefect leaves a flow behind that still runs when serving ends. Prefect gives
    serving up, and asks a flow that runs to end, where the server is away for minutes; the server is then waited for,
    and served again.

    Args:
        cron: when.
        timezone: where that is so.
        api: of the Prefect server.
        check: raises where there is no use in waiting for the server.

    Raises:
        FlowError: serving ended by itself as soon as it had begun.
    """
    command = [sys.executable, "-c", "import sys; from pipeline import flow; flow.serve_here(*sys.argv[1:])"]
    env = environment(PREFECT_API_URL=api)
    grace = STAGE_SECONDS + GRACE_SECONDS
    try:
        while True:
            begun = time.monotonic()
            with process_group([*command, cron, timezone], env, output=None, grace=grace) as process:
                code = process.wait()
            if time.monotonic() - begun < SETTLED_SECONDS:
                raise FlowError(f"serving the schedule ended by itself, with {code}")
            log.warning("serving the schedule ended; a retrain that ran goes on from its last checkpoint the next time")
            _await(api, check)
    finally:
        _pause(api)


def _await(api: str, check: Callable[[], None]) -> None:
    """Wait until a Prefect server answers."""

    def answered() -> bool:
        check()
        return answers(api)

    waiting = Retrying(
        retry=retry_if_result(lambda there: not there),
        wait=wait_exponential(max=60),
        before_sleep=lambda _: log.warning("%s does not answer; waiting for it", api),
    )
    waiting(answered)
    log.warning("%s answers: the schedule goes on", api)


def _pause(api: str) -> None:
    """Pause the project's schedule, or runs that nobody runs would pile up.

    Prefect's runner would do so only where no flow runs, and fail where the server is busy with the end of one.
    """
    with (
        suppress(PrefectException, httpx.HTTPError),  # the server is gone, or the schedule has never got there
        temporary_settings({PREFECT_API_URL: api}),
        get_client(sync_client=True) as client,
    ):
        client.pause_deployment(client.read_deployment_by_name(f"retrain/{deployment(Path.cwd())}").id)


def _forget_missed(name: str) -> None:
    """Delete runs that a deployment's schedule has called for while nobody served it."""
    with get_client(sync_client=True) as client:
        scheduled = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[client.read_deployment_by_name(f"retrain/{name}").id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        )
        now = datetime.now(UTC)

        def due() -> list[FlowRun]:
            first = client.read_flow_runs(flow_run_filter=scheduled, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
            return [
                run for run in first if run.auto_scheduled and run.expected_start_time and run.expected_start_time < now
            ]

        while found := due():
            for run in found:
                client.delete_flow_run(run.id)


class _Runner(Runner):
    """Prefect's, which ends in the same way on SIGTERM as on Ctrl-C; its own way leaves half of that undone."""

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)


def serve_here(cron: str, timezone: str) -> None:
    """Serve the schedule in this process, for the configured server."""
    # two flows at once would wait for each other's DVC locks; who started this process pauses the schedule in the end
    runner = _Runner(name=deployment(Path.cwd()), limit=1, pause_on_shutdown=False)
    runner.add_flow(
        retrain,
        name=runner.name,
        schedule=Cron(cron, timezone=timezone),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    _forget_missed(runner.name)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what begins in the background ignores it
    with suppress(KeyboardInterrupt):
        asyncio.run(runner.start())
