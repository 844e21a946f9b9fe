"""`cosface evaluate`: any model by the protocols of this project's sets, into a folder of its own.

What the stages do, by the same functions; the model is embedded with anew, and nothing that DVC tracks is touched.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import tables
from pipeline.executor import choose_device
from pipeline.params import PAIRED, Params
from pipeline.tracking import model_digest
from stages.evaluate import extra, foreign, identify
from stages.evaluate.embed import embed_set
from stages.evaluate.leaks import Trained
from stages.evaluate.models import Embedder
from stages.evaluate.run import run
from stages.evaluate.verification import EvaluationError

MEGAFACE = ("probes", "distractors")
PROTOCOLS = (*PAIRED, "megaface", "extra")


def evaluate_model(model: Embedder, protocols: Sequence[str], out: Path, params: Params) -> None:
    """Write metrics.json and the other results of each protocol into a folder of `out` that is named after it.

    Features lie in `out/embedded` afterwards. `out/model.json` says which model it was.

    Args:
        model: any model.
        protocols: some of PROTOCOLS.
        out: the folder.
        params: sections align, evaluate, machine; train.data and shard.clean.names.

    Raises:
        EvaluationError: what `check` refuses, `out` holds anything but results of this model, or a set cannot be
            evaluated.
        TableError: a set is absent; the message says how it is made.
    """
    check(protocols, out, params)
    _claim(out, model)
    trained = _trained(model, params)

    def embedded(name: str) -> Path:
        embed_set(Path("data/aligned") / name, model, out / "embedded" / name, batch=params.evaluate.batch, flip=True)
        return out / "embedded" / name

    for name in protocols:
        if name == "megaface":
            device = choose_device(params.machine.device)
            probes, distractors = map(embedded, MEGAFACE)
            identify.run(probes, distractors, trained, out / name, params.evaluate, device)
        elif name == "extra":
            extra.run(Path(params.evaluate.extra), model, trained, out / name, params)
        else:
            run(Path("data/raw") / name, embedded(name), trained, out / name, params.evaluate)


def check(protocols: Sequence[str], out: Path | None, params: Params) -> None:
    """What can be told without the model, which takes its time to load.

    Args:
        protocols: as of `evaluate_model`.
        out: the same; None for a folder that is named after the model.
        params: section evaluate.

    Raises:
        EvaluationError: a protocol is unknown, `out` lies where the graph writes, or where more sets lie, or these are
            asked for and there are none.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise EvaluationError(f"--sets: some of {', '.join(PROTOCOLS)}, not {', '.join(unknown) or 'none'}")
    if out is not None and (name := tables.output_folder(out)):
        raise EvaluationError(f"--out: {out} lies in {name}, which is the pipeline's; take a folder of your own")
    if "extra" in protocols:
        _check_extra(Path(params.evaluate.extra), out)


def _check_extra(folder: Path, out: Path | None) -> None:
    if not extra.find_sets(folder):
        raise EvaluationError(f"{folder}: no NAME.bin and no NAME.csv in it, though --sets asks for extra")
    if out is not None:
        own, results = folder.resolve(), (out / "extra").resolve()
        if results.is_relative_to(own) or own.is_relative_to(results):
            raise EvaluationError(f"--out: {out / 'extra'} overlaps evaluate.extra, {folder}; take another folder")


def _claim(out: Path, model: Embedder) -> None:
    """Say in `out/model.json` whose results lie there: the folder is ours from then on, and that model's."""
    file = out / "model.json"
    if out.exists() and any(out.iterdir()) and (found := _digest(file)) != model.digest:
        holds = f"results of another model ({found[:12]})" if found else "files that are no results of an evaluation"
        raise EvaluationError(
            f"--out: {out} holds {holds}; take a new folder, or one with results of this model ({model.digest[:12]})"
        )
    out.mkdir(parents=True, exist_ok=True)
    with tables.atomic(file) as path:
        path.write_text(json.dumps({"name": model.name, "sha256": model.digest}, indent=2) + "\n")


def _digest(file: Path) -> str | None:
    """Of the model whose results lie beside such a file; None where it is none that `_claim` wrote."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    digest = content.get("sha256") if isinstance(content, dict) else None
    return digest if isinstance(digest, str) else None


def text(out: Path, protocols: Sequence[str]) -> str:
    """What `evaluate_model` has found, for people."""
    shown = []
    for name in protocols:
        files = sorted(out.glob("extra/*/metrics.json")) if name == "extra" else [out / name / "metrics.json"]
        for file in files:
            found = json.loads(file.read_text())
            title = file.parent.relative_to(out).as_posix()
            shown.append(f"{title}\n{_megaface(found) if name == 'megaface' else foreign.text(found)}")
    return "\n\n".join(shown)


def _megaface(found: dict[str, Any]) -> str:
    if "why" in found:
        return f"not measured: {found['why']}"
    lines = []
    for count, each in sorted(found["distractors"].items(), key=lambda of_count: int(of_count[0])):
        bounds, why = each["intervals"]["rank_1"], each["unresolved"].get("rank_1")
        around = f"95% interval {bounds[0]:.2%} to {bounds[1]:.2%}" if bounds else f"({why})"
        lines.append(f"{int(count):>9,} distractors: rank-1 {each['rank_1']:.2%}, {around}")
    return "\n".join(lines)


def _trained(model: Embedder, params: Params) -> Trained | None:
    """Whom the model has learnt from, if it is the one that was trained here; otherwise that is not known."""
    models = Path("models")
    if not (models / "backbone.safetensors").exists() or model_digest(models) != model.digest:
        return None
    return Trained.read(models, params)
