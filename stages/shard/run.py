"""The shard stage as a function of its folders and parameters."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import tables
from pipeline.executor import run_all
from pipeline.params import Face, Machine, Shard
from stages.align.warp import TEMPLATE
from stages.shard.clean import Faces, clean
from stages.shard.hashes import hash_part
from stages.shard.page import write_page
from stages.shard.reader import FORMAT, File, Index
from stages.shard.split import draw_pairs, make_plan, shuffled
from stages.shard.writer import File as ShardFile
from stages.shard.writer import shard_files, write_shards

log = logging.getLogger(__name__)
_CODE = Path(__file__).parent


def run(
    aligned: Path, evaluation: dict[str, Path], out: Path, report: Path, params: Shard, face: Face, machine: Machine
) -> None:
    """Write shards of the detected faces of a training set, and what became of the others.

    The same faces and parameters give the same bytes, for any number of workers; an interrupted run goes on from the
    files that are missing.

    Args:
        aligned: folder of the aligned training set.
        evaluation: folder of each aligned evaluation set, by its name.
        out: folder of `train-*`, `val-*`, labels.parquet, dropped.parquet, val_pairs.parquet (where validation is by
            identity), and index.json.
        report: folder of metrics.json and index.html.
        params: section shard of params.yaml.
        face: align.face, what every aligned face is.

    Raises:
        ShardError: fewer than two identities remain, or a file that params names cannot be used.
        TableError: an aligned table is absent or incomplete.
        InputError: `out` is a link.
    """
    tables.check_replaceable(out)
    known = {name: Faces.read(path, _hashes(path, params, machine)) for name, path in evaluation.items()}
    faces = Faces.read(aligned, _hashes(aligned, params, machine))
    dropped = clean(faces, known, params.clean)
    reason = np.full(len(faces.status), "", object)
    reason[dropped["row"].to_numpy()] = dropped["reason"].to_pylist()
    plan = make_plan(np.asarray(faces.identity.to_pylist(), object), reason, params)

    inputs = [tables.sha256_file(path) for path in tables.parts(aligned)]
    files = [tables.sha256_file(Path(name)) for name in (params.clean.names, params.clean.exclude)]
    decided = tables.fingerprint(reason.tolist())
    key = tables.fingerprint(params.model_dump(), face.model_dump(), inputs, files, decided, code=(_CODE,))
    with tables.resumable(out, key) as unfinished:
        photographs = faces.digest()
        about = {"cosface": json.dumps(_described(params, face, photographs))}
        splits: dict[str, list[ShardFile]] = {}
        order: list[NDArray[np.intp]] = []
        for number, split in enumerate(("train", "val")):
            start = sum(len(before) for before in order)
            rows = shuffled(plan.rows(split), params.seed + number)
            splits[split] = shard_files(split, len(rows), start, params.shard_rows, about | {"split": split})
            order.append(rows)
        shards = [file for of_split in splits.values() for file in of_split]
        digests = write_shards(
            aligned, unfinished, shards, np.concatenate(order), plan.label, params.row_group_rows, machine
        )
        listed = {
            f.name: File(name=f.name, rows=f.stop - f.start, sha256=d) for f, d in zip(shards, digests, strict=True)
        }
        others = {"labels": (plan.labels, tables.LABELS), "dropped": (dropped.drop(["row"]), tables.DROPPED)}
        if params.validation.by == "identity":
            others["val_pairs"] = draw_pairs(plan.label[order[1]], params), tables.VAL_PAIRS
        for name, (table, schema) in others.items():
            tables.write_table(unfinished / f"{name}.parquet", table, schema)
        index = Index(
            format=FORMAT,
            face=face,
            photographs=photographs,
            row_group_rows=params.row_group_rows,
            files={split: [listed[file.name] for file in of_split] for split, of_split in splits.items()},
            tables={f"{name}.parquet": tables.sha256_file(unfinished / f"{name}.parquet") for name in others},
        )
        with tables.atomic(unfinished / "index.json") as path:
            path.write_text(index.model_dump_json(indent=1) + "\n")
    metrics = write_page(aligned, evaluation, faces, known, plan, dropped, report)
    log.info("shards: %s", ", ".join(f"{name} {count:,}" for name, count in metrics.items() if isinstance(count, int)))
    for name, count in metrics["dropped"].items():
        if count:
            log.info("left out: %s %s", f"{count:,}", name)


def _described(params: Shard, face: Face, photographs: str) -> dict[str, Any]:
    """What each shard says of itself."""
    return {
        "format": FORMAT,
        "align.face": face.model_dump(),
        "align.template": TEMPLATE.tolist(),
        "shard": params.model_dump(),
        "photographs": photographs,
    }


def _hashes(aligned: Path, params: Shard, machine: Machine) -> NDArray[np.uint64] | None:
    """(rows, 2, 4) perceptual hashes of an aligned table; None where they are not asked for."""
    if not params.clean.duplicates or params.clean.near_duplicates is None:
        return None
    parts = tables.parts(aligned)
    hashed = run_all(
        hash_part,
        [(path.resolve(),) for path in parts],
        machine=machine,
        label=f"hashing {aligned.name}",
        unit="images",
        sizes=[tables.rows(path) for path in parts],
    )
    return np.concatenate(hashed)
