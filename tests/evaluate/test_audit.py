import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.params import Audit
from pipeline.tables import ALIGNED, DROPPED, parts, read_parts, read_table, write_table
from stages.evaluate import audit
from stages.evaluate.audit import Embedded, _spread, suspected_labels, suspected_overlaps
from stages.evaluate.embed import embed_set
from stages.evaluate.models import Embedder
from tests.samples import write_aligned


def embedded(vectors: np.ndarray, code: list[int], prefix: str = "p") -> Embedded:
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"{prefix}{i}" for i in range(max(code) + 1)]
    return Embedded([f"{prefix}/{i}" for i in range(len(code))], names, np.array(code), units.astype(np.float16))


def test_a_wrong_label_stands_out() -> None:
    """Two people along two axes; the last image of the first is the other's."""
    rng = np.random.default_rng(0)
    vectors = np.repeat([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [5, 5, 1], axis=0) + rng.normal(0, 0.05, (11, 3))
    vectors[4] = [0.05, 1, 0]
    known = embedded(vectors, [0] * 5 + [1] * 5 + [2])
    (found,) = suspected_labels(known, *known.centres(), margin=0.3)
    assert (found.image_id, found.identity) == ("p/4", "p0")
    assert found.pictures[0][1] == "p/4"
    # by float64 arithmetic: its own centre without itself, the other's with all
    units = known.vectors.astype(np.float64)
    own, other = units[:4].sum(axis=0), units[5:10].sum(axis=0)
    expected = units[4] @ other / np.linalg.norm(other) - units[4] @ own / np.linalg.norm(own)
    assert found.score == pytest.approx(expected, abs=1e-3)
    assert suspected_labels(known, *known.centres(), margin=float(expected) + 0.01) == []


def test_people_of_a_test_set_are_recognised() -> None:
    train = embedded(np.array([[1, 0, 0], [1, 0.1, 0], [0, 1, 0], [0, 1, 0.1]], float), [0, 0, 1, 1])
    known = embedded(np.array([[0, 0, 1], [0.1, 1, 0], [0.3, 1, 0.3]], float), [0, 1, 2], "q")
    (found,) = suspected_overlaps("lfw", train, train.centres()[1], known, least=0.9)
    assert (found.image_id, found.identity) == ("", "p1")
    assert "lfw: q1" in found.reason  # the nearest of two who would do
    assert [(of, image[0]) for of, image, _ in found.pictures] == [("train", "p"), ("lfw", "q")]


def test_a_few_images_of_each_are_spread_evenly() -> None:
    identities = np.array(["a"] * 7 + ["b"] * 2 + ["c"] * 20, object)
    chosen = _spread(identities, 4)
    counts = {name: np.flatnonzero(chosen & (identities == name)) for name in "abc"}
    assert {name: len(rows) for name, rows in counts.items()} == {"a": 4, "b": 2, "c": 4}
    assert np.diff(counts["c"]).tolist() == [5, 5, 5]


def colour(images: torch.Tensor) -> torch.Tensor:
    """Faces of face_like differ by colour, so that it tells identities apart."""
    return images.float().mean(dim=(2, 3)) - 127


def exchange(folder: Path, one: str, other: str) -> None:
    """Give each of two rows of an aligned table the other's picture."""
    images = {row["image_id"]: row["image"] for row in read_parts(folder, ALIGNED).to_pylist()}
    images[one], images[other] = images[other], images[one]
    for path in parts(folder):
        rows = read_table(path, ALIGNED).to_pylist()
        changed = [row | {"image": images[row["image_id"]]} for row in rows]
        write_table(path, pa.Table.from_pylist(changed, ALIGNED), ALIGNED)


def test_the_whole(tmp_path: Path) -> None:
    """One person, id002, is in the test set, too, under the same name; two others have a photograph of each other's;
    what is left out already is not looked at.
    """
    write_aligned(tmp_path / "aligned" / "train", [6, 6, 6])
    exchange(tmp_path / "aligned" / "train", "id000/0001", "id001/0004")
    write_aligned(tmp_path / "aligned" / "lfw", [0, 0, 5])
    model = Embedder("colour", "0" * 64, 112, 3, colour)
    for name in ("train", "lfw"):
        embed_set(tmp_path / "aligned" / name, model, tmp_path / "embedded" / name, batch=8, flip=False)
    gone = pa.Table.from_pylist([{"image_id": "id000/0003", "identity": "id000", "reason": "duplicate"}], DROPPED)
    write_table(tmp_path / "shards" / "dropped.parquet", gone, DROPPED)
    (tmp_path / "reports" / "audit").mkdir(parents=True)
    out = tmp_path / "reports" / "audit"
    section = Audit(label_margin=0.2, overlap=0.99)
    args = (tmp_path / "embedded", tmp_path / "aligned", ("lfw",), tmp_path / "shards", out, section)
    metrics = audit.run(*args)
    assert metrics == {"images": 17, "suspected_labels": 2, "suspected_overlaps": 1}
    assert json.loads((out / "metrics.json").read_text()) == metrics
    with (out / "suspects.csv").open() as file:
        rows = list(csv.DictReader(file))
    suspects = [(row["image_id"], row["identity"]) for row in rows]
    assert suspects[0] == ("", "id002")
    assert sorted(suspects[1:]) == [("id000/0001", "id000"), ("id001/0004", "id001")]
    looks = {row["image_id"]: row["reason"].split(" to ")[-1] for row in rows}
    assert looks == {"": "lfw: id002", "id000/0001": "id001", "id001/0004": "id000"}
    page = (out / "index.html").read_text()
    assert page.count("data:image/jpeg") == 2 + 3 * 2
    assert not list((tmp_path / "reports").glob(".audit-*"))
    again = (out / "suspects.csv").read_bytes(), page
    audit.run(*args)
    assert again == ((out / "suspects.csv").read_bytes(), (out / "index.html").read_text())
