"""The `cosface` command. Everything slow is imported by the command that needs it."""

import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from pipeline.errors import InputError, said

RECIPES = Path(__file__).parent / "recipes"
PARAMS = Path("params.yaml")
MLFLOW_PAGE = "#/experiments?workflowType=machine_learning"
"""The experiments; MLflow's own front page shows chat applications."""

app = typer.Typer(
    name="cosface",
    help="Face verification trained with the Large Margin Cosine Loss. Run it in the project's folder.",
    epilog="More machines for data work: see Scaling out in README.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


shards = typer.Typer(help="What training reads.", no_args_is_help=True)
app.add_typer(shards, name="shards")


Model = Annotated[
    str | None,
    typer.Option(
        help="A folder, an ONNX file, or an address in MLflow: models:/cosface@champion, models:/m-<id>, runs:/<id>. "
        "By default the champion; where there is none, the folder models."
    ),
]


def _port(what: str) -> Any:
    return typer.Option(help=what, min=1, max=65535)


class CommandError(InputError):
    """A command cannot do what it was asked to; the message says why."""


def main() -> None:
    """Run the command line; an expected failure is one message on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except (InputError, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _exit_status(status: int) -> Iterator[None]:
    """End by this status on any exception, where 1, Python's own, would be taken for an answer."""
    try:
        yield
    except (InputError, OSError) as error:
        print(f"error: {said(error)}", file=sys.stderr)
        sys.exit(status)
    except Exception:
        traceback.print_exc()
        sys.exit(status)


@app.command()
def retrain() -> None:
    """Bring models and reports up to date, now: the DVC graph as a Prefect flow."""
    from pipeline.params import load_params

    load_params()  # before Prefect's import, which takes seconds
    from pipeline import flow

    flow.stages(Path.cwd())
    state = flow.retrain_now()
    if not state.is_completed():
        raise CommandError(state.message)
    print(state.message)


@app.command()
def schedule(
    cron: Annotated[
        str, typer.Option(help='Five fields: minute, hour, day, month, weekday; "0 3 * * 0" is Sundays, 3:00.')
    ],
    timezone: Annotated[str, typer.Option(help="In which the five fields are read, such as Europe/Berlin.")] = "UTC",
    start_server: Annotated[bool, typer.Option("--start-server", help="Start a Prefect server for it.")] = False,
    prefect_port: Annotated[int, _port("Of the server that --start-server starts.")] = 4200,
) -> None:
    """Retrain on a schedule, for as long as this command runs."""
    from pipeline import flow, servers
    from pipeline.params import load_params

    flow.check_schedule(cron, timezone)
    load_params()
    flow.stages(Path.cwd())
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        stack.enter_context(flow.only_schedule(Path.cwd()))
        server = stack.enter_context(servers.prefect_server(prefect_port)) if start_server else None
        api = f"{server.address}/api" if server else flow.running_server()
        if not api:
            raise CommandError(
                "no Prefect server answers, and a schedule needs one: start it by `cosface ui` or "
                "`prefect server start`, or give --start-server"
            )
        where = f"{api.removesuffix('/api')} shows it as retrain/{flow.deployment(Path.cwd())}"
        print(f"retraining by {cron!r} ({timezone}); {where}; Ctrl-C ends it", flush=True)
        flow.serve(cron, timezone, api, server.check if server else lambda: None)


@app.command()
def ui(
    mlflow_port: Annotated[int, _port("Of the MLflow UI.")] = 5000,
    prefect_port: Annotated[int, _port("Of the Prefect UI.")] = 4200,
) -> None:
    """Show runs (MLflow) and retrains (Prefect) in the browser, on this machine only, until Ctrl-C.

    Where MLFLOW_TRACKING_URI is a server, runs are shown there; a Prefect server that answers on the port already, as
    that of `cosface schedule --start-server` does, is left as it is.
    """
    from pipeline import servers, tracking
    from pipeline.params import shown

    with suppress(KeyboardInterrupt), ExitStack() as stack:
        if tracking.served():
            started, runs = [], f"{shown(tracking.store_uri()).rstrip('/')}/{MLFLOW_PAGE} (MLFLOW_TRACKING_URI)"
        else:
            started = [stack.enter_context(servers.mlflow_server(mlflow_port))]
            runs = f"{started[0].address}/{MLFLOW_PAGE}"
        retrains = f"http://{servers.HOST}:{prefect_port}"
        if servers.prefect_answers(f"{retrains}/api"):
            retrains += " (which ran already)"
        else:
            started.append(stack.enter_context(servers.prefect_server(prefect_port)))
        print(f"MLflow   {runs}\nPrefect  {retrains}", flush=True)
        if started:
            print("Ctrl-C ends what was started", flush=True)
        while started:
            for server in started:
                server.check()
            time.sleep(1)


@app.command()
def recipe(name: Annotated[str | None, typer.Argument(help="Which; without it they are listed.")] = None) -> None:
    """Replace params.yaml by a ready one."""
    recipes = {path.stem: path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))}
    if name is None:
        print("\n".join(recipes))
        return
    if name not in recipes:
        raise CommandError(f"no recipe {name!r}; there are: {', '.join(recipes)}")
    if PARAMS.exists() and PARAMS.read_bytes() not in recipes.values():
        names = chain(["params.yaml.bak"], (f"params.yaml.bak.{number}" for number in count(1)))
        backup = shutil.copy2(PARAMS, next(path for path in map(PARAMS.with_name, names) if not path.exists()))
        print(f"params.yaml was edited; the old one is kept as {backup}")
    from pipeline.tables import atomic

    with atomic(PARAMS) as temporary:
        temporary.write_bytes(recipes[name])
    print(f"params.yaml is now the recipe {name}")
    _tell_absent()


def _tell_absent() -> None:
    """Warn of files that params.yaml names and `dvc repro` would miss."""
    from pipeline.params import absent, load_params

    for line in absent(load_params()):
        print(f"warning: {line}", file=sys.stderr)


@app.command()
def promote(
    run_id: Annotated[
        str, typer.Argument(help="A run's id in MLflow; latest; or best: by validation, on the latest one's data.")
    ] = "latest",
) -> None:
    """Register a run's model in MLflow and make it the champion."""
    from pipeline import registry
    from pipeline.params import load_params

    run, version = registry.promote(run_id, load_params())
    print(f"{registry.NAME} version {version}, of run {run}, is now the {registry.CHAMPION}")


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The file, NAME.onnx.")] = Path("model.onnx"),
    models: Annotated[Path, typer.Option(help="Folder of the model.")] = Path("models"),
) -> None:
    """Write the trained model as ONNX: uint8 faces in, embeddings of length 1 out."""
    if out.suffix != ".onnx":
        raise CommandError(f"{out}: must end in .onnx")
    from stages.train.export import export

    model = export(models, out)
    print(f"{out}: images N×3×112×{model.width} uint8, RGB, aligned; embeddings of length 1")


@app.command("verify")
def verify_photographs(
    left: Annotated[Path, typer.Argument(metavar="A.JPG", help="A photograph.")],
    right: Annotated[Path, typer.Argument(metavar="B.JPG", help="Another one.")],
    model: Model = None,
    far: Annotated[float, typer.Option(help="False accept rate of the threshold, above 0 and below 1.")] = 0.001,
    scores: Annotated[
        Path | None, typer.Option(help="The scores.parquet that the threshold is chosen by, of the same model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say whether two photographs show the same person.

    Exit status: 0 the same person, 1 different people, 2 it cannot be decided:
    a photograph unreadable or without a face, no threshold, or an error.

    The threshold is chosen by the scores that the model's evaluation has left:
    of its run in MLflow, or reports/lfw/scores.parquet if they are this model's.
    """
    with _exit_status(2):
        if not 0 < far < 1:
            raise CommandError(f"--far: must be above 0 and below 1, not {far:g}")
        import json

        from pipeline import registry
        from pipeline.executor import choose_device
        from pipeline.params import load_params
        from stages.evaluate import models, verify

        params = load_params()
        with registry.located(model, params) as place:
            embedder = models.load_embedder(place.path, choose_device(params.machine.device), place.name)
            threshold = verify.find_threshold(embedder, far, scores, place.scores)
            verdict = verify.verify(left, right, embedder, params, threshold)
        if as_json:
            print(json.dumps(verdict.as_json(), indent=2))
        else:
            print(verdict.describe(params.align.choose))
        sys.exit(2 if verdict.same is None else 0 if verdict.same else 1)


@app.command()
def evaluate(
    model: Model = None,
    sets: Annotated[str, typer.Option(help="Some of lfw, ytf, megaface and extra, with commas.")] = "lfw,ytf,megaface",
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for this model's results alone; by default evaluations/<the model's SHA-256>."),
    ] = None,
) -> None:
    """Evaluate any model on the sets of this project, without training; reports/ stays as it is.

    `cosface compare` then says which of two is better.
    """
    from pipeline import registry
    from pipeline.executor import choose_device
    from pipeline.params import load_params
    from pipeline.progress import configure_logging
    from stages.evaluate import suite
    from stages.evaluate.models import load_embedder

    configure_logging()
    params, protocols = load_params(), list(dict.fromkeys(filter(None, map(str.strip, sets.split(",")))))
    suite.check(protocols, out, params)
    with registry.located(model, params) as place:
        embedder = load_embedder(place.path, choose_device(params.machine.device), place.name)
        folder = out or Path("evaluations") / embedder.digest[:12]
        suite.evaluate_model(embedder, protocols, folder, params)
    print(f"{suite.text(folder, protocols)}\n\n{folder}: {embedder.name}")


@app.command()
def embed(
    folder: Annotated[Path, typer.Argument(help="Its photographs, at any depth.")],
    out: Annotated[Path, typer.Option(help="A .parquet file, or an .npz file as `cosface score` reads it.")],
    model: Model = None,
    aligned: Annotated[bool, typer.Option("--aligned", help="They are aligned faces: nothing is detected.")] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Crop the centre where no face is found, as evaluation does.")
    ] = False,
) -> None:
    """Embed all photographs of a folder, each face and its mirror image.

    One without a face, or that cannot be read, is listed and costs nothing else.
    """
    from pipeline import registry
    from pipeline.executor import choose_device
    from pipeline.params import load_params
    from pipeline.progress import configure_logging
    from stages.evaluate.models import load_embedder
    from stages.evaluate.photographs import check_out, embed_folder

    configure_logging()
    params = load_params()
    check_out(out)  # before the model, which takes its time to load
    with registry.located(model, params) as place:
        embedder = load_embedder(place.path, choose_device(params.machine.device), place.name)
        found = embed_folder(folder, out, embedder, params, aligned=aligned, fallback=fallback)
    statuses = ", ".join(f"{count:,} {status}" for status, count in sorted(found.statuses.items()))
    print(f"{out}: {found.embedded:,} of {found.statuses.total():,} photographs ({statuses}), by {embedder.name}")


@app.command()
def score(
    protocol: Annotated[Literal["lfw", "ytf", "csv"], typer.Argument(help="What the pair list is.")],
    embeddings: Annotated[Path, typer.Option(help="An .npz: keys (N strings), emb (N×D), perhaps flip (N×D).")],
    pairs: Annotated[
        list[Path],
        typer.Option(
            help="pairs.txt, splits.txt, or a CSV: left, right, same, perhaps fold. Both lists of LFW's view 1."
        ),
    ],
    flip: Annotated[
        Literal["concatenate", "sum", "none"] | None,
        typer.Option(help="What becomes of the mirror images' embeddings; concatenate where there are some."),
    ] = None,
    centre: Annotated[bool, typer.Option("--centre", help="Subtract the mean of the training folds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what metrics.json would hold.")] = False,
) -> None:
    """Score any model's embeddings by the protocol of a set, as our own are."""
    from pipeline.params import load_params
    from stages.evaluate import foreign, scoring

    found = foreign.score(protocol, embeddings, pairs, flip, centre, load_params().evaluate)
    print(scoring.as_json(found) if as_json else foreign.text(found))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A folder of reports, a scores.parquet, or a run's id in MLflow.")],
    b: Annotated[str, typer.Argument(help="Another.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Which of two runs is better, judged on the same pairs from their stored scores."""
    import tempfile

    from pipeline.params import load_params
    from stages.evaluate import comparison, scoring

    loaded = load_params()
    with tempfile.TemporaryDirectory() as folder:
        one, other = (comparison.scores_of(run, Path(folder) / side, loaded) for side, run in (("a", a), ("b", b)))
        found = comparison.compare_runs(one, other, loaded.evaluate)
    if as_json:
        print(scoring.as_json({name: comparison.summary(name, each) for name, each in found.items()}))
    else:
        print("\n".join(comparison.text(name, each) for name, each in found.items()))


@app.command()
def params() -> None:
    """Check params.yaml, and print every value by its dotted name."""
    from pipeline.params import flatten, load_params

    for key, value in flatten(load_params()).items():
        print(f"{key} = {value}")
    _tell_absent()


@shards.command()
def verify(
    location: Annotated[str, typer.Argument(help="Of the shards: a folder, or an address.")] = "data/shards",
) -> None:
    """Check every file against its SHA-256, and every row's image and label."""
    from pipeline.params import load_params, shown
    from pipeline.progress import configure_logging
    from stages.shard.verify import verify

    configure_logging()
    seen = verify(location, load_params().machine)
    print(f"{shown(location)}: {seen.files} files, {seen.rows:,} examples, all as index.json says")


def _terminate(*_: Any) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)  # an exception, so that what was started is stopped


if __name__ == "__main__":
    main()
