import base64
import csv
import json
import re
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


def typical(known: Embedded, rows: range) -> str:
    """Of an identity's images: the nearest to their centre, by float64 arithmetic."""
    units = known.vectors[rows].astype(np.float64)
    return known.image_id[rows[int(np.argmax(units @ units.sum(axis=0)))]]


@pytest.fixture(params=[audit._BLOCK, 3])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many vectors are looked at together."""
    monkeypatch.setattr(audit, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
def test_a_wrong_label_stands_out() -> None:
    """Two people along two axes; the last image of the first is the other's."""
    rng = np.random.default_rng(0)
    vectors = np.repeat([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [5, 5, 1], axis=0) + rng.normal(0, 0.05, (11, 3))
    vectors[4] = [0.05, 1, 0]
    known = embedded(vectors, [0] * 5 + [1] * 5 + [2])
    (found,) = suspected_labels(known, *known.centres(), margin=0.3, least=-1)
    assert (found.image_id, found.identity) == ("p/4", "p0")
    assert found.pictures == [
        ("train", "p/4", "p/4"),
        ("train", typical(known, range(5)), "p0"),
        ("train", typical(known, range(5, 10)), "p1"),
    ]
    # by float64 arithmetic: its own centre without itself, the other's with all
    units = known.vectors.astype(np.float64)
    own, other = units[:4].sum(axis=0), units[5:10].sum(axis=0)
    expected = units[4] @ other / np.linalg.norm(other) - units[4] @ own / np.linalg.norm(own)
    assert found.score == pytest.approx(expected - 0.3, abs=1e-3)
    assert suspected_labels(known, *known.centres(), margin=float(expected) + 0.01, least=-1) == []


@pytest.mark.usefixtures("block")
def test_what_is_like_nobody_stands_out() -> None:
    """Of two people along two axes, an image along a third; one of an identity of its own has no other to be unlike."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.eye(4), [5, 5, 1, 1], axis=0) + rng.normal(0, 0.05, (12, 4))
    known = embedded(vectors, [0] * 5 + [1] * 5 + [0, 2])
    (found,) = suspected_labels(known, *known.centres(), margin=1, least=0.3)
    assert (found.image_id, found.identity) == ("p/10", "p0")
    units = known.vectors.astype(np.float64)
    own, other = units[:5].sum(axis=0), units[5:10].sum(axis=0)
    mine, near = units[10] @ own / np.linalg.norm(own), units[10] @ other / np.linalg.norm(other)
    nearest, whose = max((near, "p1"), (units[10] @ units[11], "p2"))
    assert found.reason == f"cosine {mine:.2f} to its own identity, {nearest:.2f} to {whose}"
    assert found.score == pytest.approx(0.3 - mine, abs=1e-3)
    assert suspected_labels(known, *known.centres(), margin=1, least=float(mine) - 0.01) == []


def test_those_furthest_beyond_a_limit_come_first() -> None:
    """An image whose cosine is 0.4 to its own identity and 0.9 to another's, and one that is like nobody."""
    vectors = np.repeat(np.eye(3), [6, 5, 1], axis=0)
    vectors[5] = 0.4, 0.9, 0
    known = embedded(vectors, [0] * 6 + [1] * 6)
    for margin, least, order in ((0.2, 0.1, ["p/5", "p/11"]), (0.45, 0.3, ["p/11", "p/5"])):
        found = suspected_labels(known, *known.centres(), margin, least)
        assert [each.image_id for each in found] == order


@pytest.mark.usefixtures("block")
def test_people_of_a_test_set_are_recognised() -> None:
    """By an image between two others, which is the most typical one."""
    people = [[1, 0, 0], [1, 0.1, 0], [-1, 0, 0], [0, -1, 0], [0, 1, -0.1], [0, 1, 0], [0, 1, 0.1]]
    train = embedded(np.array(people, float), [0, 0, 1, 2, 3, 3, 3])
    tested = [[0, 0, 1], [0.1, 1, -0.2], [0.1, 1, 0.2], [0.1, 1, 0], [0.3, 1, 0.3]]
    known = embedded(np.array(tested), [0, 1, 1, 1, 2], "q")
    (found,) = suspected_overlaps("lfw", train, train.centres()[1], known, least=0.9)
    assert (found.image_id, found.identity) == ("", "p3")
    assert "lfw: q1" in found.reason  # the nearest of two who would do
    assert found.pictures == [("train", "p/5", "p3"), ("lfw", "q/3", "lfw: q1")]
    assert found.score == pytest.approx(1 / np.sqrt(1.01), abs=1e-3)


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
    section = Audit(label_margin=0.2, label_least=0.1, overlap=0.99)
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
    whose = {row["image"]: row["image_id"] for row in read_parts(tmp_path / "aligned" / "train", ALIGNED).to_pylist()}
    shown = re.findall(r'<img src="data:image/jpeg;base64,(.*?)" alt="(.*?)"', page)  # lfw's are among those of train
    captions = [caption for image, identity in suspects[1:] for caption in (image, identity, looks[image])]
    assert [caption for _, caption in shown] == [*captions, "id002", "lfw: id002"]
    for picture, caption in shown:
        image = whose[base64.b64decode(picture)]
        if caption in looks:
            assert image == caption
        else:
            assert image.split("/")[0] == caption.removeprefix("lfw: ")
            assert image not in looks  # it is not typical
    assert not list((tmp_path / "reports").glob(".audit-*"))
    again = (out / "suspects.csv").read_bytes(), page
    audit.run(*args)
    assert again == ((out / "suspects.csv").read_bytes(), (out / "index.html").read_text())
