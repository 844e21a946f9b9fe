"""A folder of photographs to a file of embeddings, against the same done step by step."""

import os
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from pipeline.params import Params
from stages.align.run import align_images
from stages.evaluate import photographs
from stages.evaluate.models import Embedder, load_embedder
from stages.evaluate.photographs import PhotographsError, embed_folder, find_photographs
from stages.train.faces import decode_face
from tests.align.scenes import scenes
from tests.evaluate.conftest import Workspace
from tests.samples import face_like, jpeg
from tests.work import HERE

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(params: Params) -> Params:
    return params.model_copy(update={"machine": HERE})


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> Embedder:
    return load_embedder(workspace.models, CPU)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs of a face, one in a folder of its own; one without, one unreadable, and what is no photograph."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "Eileen" / "space").mkdir(parents=True)
    pictures = scenes()
    (folder / "top.jpg").write_bytes(jpeg(pictures["cut by the border"]))
    cv2.imwrite(str(folder / "Eileen" / "space" / "suit.PNG"), cv2.cvtColor(pictures["whole"], cv2.COLOR_RGB2BGR))
    (folder / "blank.jpg").write_bytes(jpeg(np.zeros((120, 120, 3), np.uint8)))
    (folder / "broken.jpg").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("none")
    return folder


def test_a_folder_that_cannot_be_read_is_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its path is longer than the system takes, which stops root, too."""
    for name in ("a", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").touch()
    within = os.open(tmp_path / "a", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=within)
        within, above = os.open("d" * 250, os.O_RDONLY, dir_fd=within), within
        os.close(above)
    os.close(within)
    assert [each.image_id for each in find_photographs(tmp_path)] == ["a/1", "z/1"]
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path}/a/ddd")
    assert told.endswith("d: File name too long")


def expected(file: Path, model: Embedder, here: Params) -> NDArray[np.float32]:
    """Features of a photograph's face and of its mirror image, 2×D."""
    (row,) = align_images([file.read_bytes()], here.align, False, "cpu")
    face = torch.from_numpy(decode_face(row["image"], 112).copy()).permute(2, 0, 1)[None]
    return np.stack([model(face)[0].numpy(), model(face.flip(3))[0].numpy()])


def test_parquet_has_a_row_for_every_photograph(
    album: Path, model: Embedder, here: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "faces.parquet"
    found = embed_folder(album, out, model, here)
    assert (dict(found.statuses), found.embedded) == ({"detected": 2, "no_face": 1, "unreadable": 1}, 2)
    table = pq.read_table(out)
    assert table.schema.metadata[b"model.sha256"].decode() == model.digest
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert list(rows) == ["Eileen/space/suit", "blank", "broken", "top"]
    assert [row["identity"] for row in rows.values()] == ["space", None, None, None]
    assert [row["status"] for row in rows.values()] == ["detected", "no_face", "unreadable", "detected"]
    for image_id, file in (("Eileen/space/suit", "Eileen/space/suit.PNG"), ("top", "top.jpg")):
        both = np.array([rows[image_id]["emb"], rows[image_id]["flip"]], np.float32)
        np.testing.assert_allclose(both, expected(album / file, model, here), rtol=1e-4, atol=1e-5)
    for image_id in ("blank", "broken"):
        assert rows[image_id]["emb"] is rows[image_id]["flip"] is rows[image_id]["box"] is None
    left, top, right, bottom = rows["Eileen/space/suit"]["box"]
    assert left < 226 < right  # where the astronaut's face is
    assert top < 118 < bottom
    assert "blank.jpg: no face found" in caplog.text
    assert "broken.jpg: none of JPEG" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["faces.parquet"]


def test_npz_has_the_faces_alone(album: Path, model: Embedder, here: Params, tmp_path: Path) -> None:
    embed_folder(album, tmp_path / "faces.npz", model, here)
    with np.load(tmp_path / "faces.npz", allow_pickle=False) as content:
        assert content["keys"].tolist() == ["Eileen/space/suit", "top"]
        both = np.stack([content["emb"], content["flip"]], axis=1)
    wanted = [expected(album / file, model, here) for file in ("Eileen/space/suit.PNG", "top.jpg")]
    np.testing.assert_allclose(both, wanted, rtol=1e-4, atol=1e-5)
    embed_folder(album, tmp_path / "all.npz", model, here, fallback=True)
    with np.load(tmp_path / "all.npz", allow_pickle=False) as content:
        assert content["keys"].tolist() == ["Eileen/space/suit", "blank", "top"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "faces.npz"]


def test_aligned_faces_are_taken_as_they_are(
    model: Embedder, here: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several parts, in both formats, with a margin or without; one that is too small is listed."""
    monkeypatch.setattr("pipeline.tables.PART_ROWS", 3)
    folder = tmp_path / "aligned"
    folder.mkdir()
    faces = [face_like(i, 0) for i in range(7)]
    for i, face in enumerate(faces):
        framed = np.pad(face, ((4, 4), (6, 6), (0, 0))) if i % 2 else face
        cv2.imwrite(str(folder / f"{i}.png"), cv2.cvtColor(framed, cv2.COLOR_RGB2BGR))
    (folder / "7.jpg").write_bytes(jpeg(faces[0]))
    (folder / "8.jpg").write_bytes(jpeg(faces[0][:100]))
    found = embed_folder(folder, tmp_path / "faces.parquet", model, here, aligned=True)
    assert (dict(found.statuses), found.embedded) == ({"aligned": 8, "unreadable": 1}, 8)
    rows = pq.read_table(tmp_path / "faces.parquet").to_pylist()
    faces.append(decode_face((folder / "7.jpg").read_bytes(), 112))
    images = torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2)
    np.testing.assert_allclose([row["emb"] for row in rows[:8]], model(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([row["flip"] for row in rows[:8]], model(images.flip(3)), rtol=1e-4, atol=1e-5)
    assert "100×112 pixels is too small" in rows[8]["detail"]


def test_what_cannot_be_embedded_is_said(album: Path, model: Embedder, here: Params, tmp_path: Path) -> None:
    def fails(folder: Path, out: str, match: str) -> None:
        with pytest.raises(PhotographsError, match=match):
            embed_folder(folder, tmp_path / out, model, here)
        assert not [path for path in tmp_path.iterdir() if path.suffix not in (".jpg", ".jpeg")]

    fails(album, "faces.csv", r"faces\.csv: must end in \.parquet or \.npz")
    fails(album / "nosuch", "faces.npz", "nosuch: no such folder")
    fails(album / "top.jpg", "faces.npz", r"top\.jpg: not a folder")
    fails(tmp_path, "faces.npz", "no photographs in it")
    (tmp_path / "blank.jpg").write_bytes((album / "blank.jpg").read_bytes())
    fails(tmp_path, "faces.npz", "not one face in 1 photographs")
    for name in ("a.jpg", "a.jpeg"):
        (tmp_path / name).write_bytes((album / "blank.jpg").read_bytes())
    fails(tmp_path, "faces.npz", r"a\.jpeg and .*a\.jpg would both be a; keep one of them")


@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_an_interrupted_run_leaves_nothing(
    album: Path, model: Embedder, here: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / f"faces.{form}"
    out.write_bytes(b"of an earlier run")

    def interrupted(*_: Any) -> NDArray[np.float32]:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr(photographs, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_folder(album, out, model, here)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"of an earlier run"
