"""A finished run in small: aligned sets, pairs, a model with random weights, and what align and train report."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from pipeline.params import SETS, Backbone, MegaFace, load_params
from pipeline.tables import ALIGNED, LABELS, PAIRS, part_path, sha256_file, write_table
from stages.evaluate import identify
from stages.evaluate.embed import embed_set
from stages.evaluate.leaks import Trained
from stages.evaluate.models import load_embedder
from stages.evaluate.report import COUNTS
from stages.evaluate.run import run
from stages.train.model import build_model, save_model
from tests.conftest import ROOT
from tests.samples import face_like, jpeg

EVALUATE = load_params(ROOT / "params.yaml").evaluate.model_copy(
    update={
        "replicates": 100,
        "seed": 7,
        "megaface": MegaFace(distractors=[5, 30], seed=1, fars=[0.1, 0.0001], noise=str(ROOT / "data" / "noise.txt")),
    }
)
BACKBONE = Backbone(name="small", width=112, embedding=4)
"""Of so few numbers, and untrained, that it mistakes people in both sets: there are errors to show."""


@dataclass(frozen=True)
class Workspace:
    raw: Path
    aligned: Path
    shards: Path
    embedded: Path
    models: Path
    reports: Path
    trained: Trained


def row(image_id: str, status: str = "detected", video: str | None = None, photo: int = 0) -> dict[str, object]:
    """An aligned row; the identity is the id's first part. Faces have as many sizes as there are ids."""
    identity = image_id.split("/")[0]
    shown = status in ("detected", "fallback")
    side = 40.0 + zlib.crc32(image_id.encode()) % 200
    return {
        "image_id": image_id,
        "identity": identity,
        "video": video,
        "status": status,
        "image": jpeg(face_like(int(identity), photo)) if shown else None,
        "box": [3.0, 5.0, 3.0 + side, 5.0 + 1.5 * side] if status == "detected" else None,
    }


def write_rows(folder: Path, rows: list[dict[str, object]], part_rows: int = 5) -> None:
    for index in range(0, len(rows), part_rows):
        table = pa.Table.from_pylist(rows[index : index + part_rows], schema=ALIGNED)
        write_table(part_path(folder, index // part_rows), table, ALIGNED)


def write_pairs(path: Path, names: list[str], count: int, folds: int) -> None:
    """Same and different pairs in turn, drawn by seed; the identity is a name's first part."""
    rng = np.random.default_rng(1)
    pairs: list[dict[str, object]] = []
    while len(pairs) < count:
        left, right = rng.choice(names, 2, replace=False)
        same = left.split("/")[0] == right.split("/")[0]
        if same == (len(pairs) % 2 == 0):
            pairs.append({"fold": len(pairs) * folds // count, "left": left, "right": right, "same": same})
    write_table(path, pa.Table.from_pylist(pairs, PAIRS), PAIRS)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Read it, do not write into it: it serves all tests."""
    root = tmp_path_factory.mktemp("workspace")
    people = [{"label": i, "identity": f"trained{i}", "images": 4, "train": 4, "val": 0} for i in range(8)]
    trained = Trained(pa.Table.from_pylist(people, LABELS), root / "names.txt")
    raw, aligned, embedded, models, into = (root / name for name in ("raw", "aligned", "embedded", "models", "reports"))
    made = Workspace(raw, aligned, root / "shards", embedded, models, into, trained)
    write_table(made.shards / "labels.parquet", trained.labels, LABELS)
    trained.names.write_text("trained0 Somebody Else\n")
    write_rows(made.aligned / "train", [row(f"{i}/{k}", photo=k) for i in range(8) for k in range(4)])

    status = {"3/1": "fallback", "4/0": "unreadable"}
    stills = [row(f"{i}/{k}", status.get(f"{i}/{k}", "detected"), photo=k) for i in range(6) for k in range(3)]
    write_rows(made.aligned / "lfw", stills)
    write_pairs(made.raw / "lfw" / "pairs.parquet", [f"{i}/{k}" for i in range(6) for k in range(3)], 60, 3)

    videos = {f"{i}/{v}": "fallback" if (i, v) == (2, 1) else "detected" for i in range(5) for v in range(2)}
    frames = [
        row(f"{video}/{k}", "fallback" if k == 0 else usual, video, photo=10 * int(video[-1]) + k)
        for video, usual in videos.items()
        for k in range(3)
    ]
    write_rows(made.aligned / "ytf", frames)
    write_pairs(made.raw / "ytf" / "pairs.parquet", list(videos), 24, 2)

    write_rows(made.aligned / "probes", [row(f"1{i}/{k}", photo=k) for i in range(4) for k in range(3)])
    write_rows(made.aligned / "distractors", [row(f"{i}/0", photo=7) for i in range(20, 50)])

    torch.manual_seed(1)
    data = {"labels.parquet": sha256_file(made.shards / "labels.parquet")}
    description = {"backbone": BACKBONE.model_dump(), "data": data}
    save_model(made.models, build_model(BACKBONE), nn.Linear(2, 2), description)
    (made.models / "train.json").write_text(json.dumps({"iterations": 30, "images": 1234, "identities": 8}))
    (made.models / "history.csv").write_text(
        "iteration,loss,accuracy,learning_rate,val_accuracy,val_auc\n"
        "10,20.5,0.2,0.1,,\n20,12,0.6,0.1,0.5,\n30,9,0.8,0.01,0.7,\n"
    )
    cv2.imwrite(str(made.models / "faces.png"), face_like(0, 0))
    for name, found in (
        ("shard", {"train": 1234, "val": 56, "identities": 8, "dropped": {"no_face": 6, "duplicate": 0}}),
        ("audit", {"images": 1234, "suspected_labels": 9, "suspected_overlaps": 2}),
    ):
        (made.reports / name).mkdir(parents=True)
        (made.reports / name / "metrics.json").write_text(json.dumps(found))
    model = load_embedder(made.models, torch.device("cpu"))
    for place, name in enumerate(SETS):
        embed_set(made.aligned / name, model, made.embedded / name, batch=4, flip=name != "train")
        counts = {key: 4000 + 100 * place + column for column, key in enumerate(COUNTS)}
        (made.reports / "align" / name).mkdir(parents=True, exist_ok=True)
        (made.reports / "align" / name / "metrics.json").write_text(json.dumps(counts))
    return made


@pytest.fixture(scope="session")
def reports(workspace: Workspace) -> Path:
    """The reports folder with both sets evaluated."""
    for name in ("lfw", "ytf"):
        out = workspace.reports / name
        run(workspace.raw / name, workspace.embedded / name, workspace.trained, out, EVALUATE)
    sets = (workspace.embedded / "probes", workspace.embedded / "distractors")
    identify.run(*sets, workspace.trained, workspace.reports / "megaface", EVALUATE, torch.device("cpu"))
    (workspace.reports / "extra").mkdir()
    return workspace.reports
