"""Features and templates against float64 recomputation by hand."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import tables
from pipeline.errors import InputError
from pipeline.tables import EMBEDDED
from stages.evaluate import features, scoring
from stages.evaluate.embed import embed, embed_set
from stages.evaluate.features import choose_frames
from stages.evaluate.models import Embedder
from stages.evaluate.verification import EvaluationError
from stages.train.faces import decode_face
from tests.evaluate.conftest import row, write_rows
from tests.samples import face_like, jpeg


def corners(images: Tensor) -> Tensor:
    """Features whose mirror image differs: the mean of each channel's left half, less 100."""
    return images[..., :56].float().mean((2, 3)) - 100


def model(function: Callable[[Tensor], Tensor] = corners) -> Embedder:
    return Embedder("mine", "0" * 64, 112, 3, function)


def by_hand(image: object, flip: bool = True) -> NDArray[np.float64]:
    assert isinstance(image, bytes)
    pixels = decode_face(image, 112).astype(np.float64)
    found = pixels[:, :56].mean((0, 1)) - 100
    return np.concatenate([found, pixels[:, ::-1][:, :56].mean((0, 1)) - 100]) if flip else found


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.sqrt((vector**2).sum())


@pytest.mark.parametrize("flip", [True, False])
def test_a_face_and_its_mirror_image(flip: bool) -> None:
    images = [jpeg(face_like(i, 0)) for i in range(5)]
    found = embed(model(), np.stack([decode_face(image, 112) for image in images]), flip=flip)
    assert found.shape == (5, 1 + flip, 3)
    np.testing.assert_allclose(found.reshape(5, -1), [by_hand(image, flip) for image in images], atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 128])
def test_a_set_is_embedded_row_by_row_and_once(tmp_path: Path, batch: int) -> None:
    rows = [row(f"{i}/0", "unreadable" if i == 4 else "detected") for i in range(7)]
    write_rows(tmp_path / "aligned", rows, part_rows=3)
    seen = []

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return corners(images)

    embed_set(tmp_path / "aligned", model(counting), tmp_path / "out", batch=batch, flip=True)
    assert sum(seen) == 2 * 6
    assert max(seen) <= batch
    assert [tables.rows(path) for path in tables.parts(tmp_path / "out")] == [3, 3, 1]
    for given, found in zip(rows, tables.read_parts(tmp_path / "out", EMBEDDED).to_pylist(), strict=True):
        assert [found[key] for key in features.KEYS] == [given[key] for key in features.KEYS]
        if given["image"] is None:
            assert found["emb"] is None
            assert found["flip"] is None
        else:
            np.testing.assert_allclose([*found["emb"], *found["flip"]], by_hand(given["image"]), atol=1e-4)
    embed_set(tmp_path / "aligned", model(), tmp_path / "single", batch=batch, flip=False)
    single = tables.read_parts(tmp_path / "single", EMBEDDED)
    assert single["flip"].null_count == 7
    assert single["emb"].equals(tables.read_parts(tmp_path / "out", EMBEDDED)["emb"])


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    write_rows(tmp_path / "aligned", [row(f"{i}/0") for i in range(9)], part_rows=3)
    seen = []

    class Killed(BaseException):
        pass

    def dying(images: Tensor) -> Tensor:
        seen.append(len(images))
        if len(seen) == 5:  # image and mirror image of the second part are the third and fourth
            raise Killed
        return corners(images)

    for _ in range(2):
        try:
            embed_set(tmp_path / "aligned", model(dying), tmp_path / "out", batch=8, flip=True)
        except Killed:
            (unfinished,) = (tmp_path / ".out.unfinished").iterdir()
            assert len(tables.parts(unfinished)) == 2
    assert len(seen) == 5 + 2
    embed_set(tmp_path / "aligned", model(), tmp_path / "whole", batch=8, flip=True)
    for path in tables.parts(tmp_path / "whole"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_video_is_the_mean_of_its_detected_frames(tmp_path: Path) -> None:
    rows = [
        row("1/a/0", "fallback", "1/a", 0),
        row("1/a/1", "detected", "1/a", 1),
        row("1/a/2", "detected", "1/a", 2),
        row("2/b/0", "fallback", "2/b", 3),
        row("2/b/1", "fallback", "2/b", 4),
        row("3/c/0", "unreadable", "3/c"),
    ]
    write_rows(tmp_path / "aligned", rows, part_rows=2)
    embed_set(tmp_path / "aligned", model(), tmp_path / "out", batch=2, flip=True)
    frames = choose_frames(tmp_path / "out", ["3/c", "2/b", "1/a"], EMBEDDED)
    assert frames.detected.tolist() == [False, False, True]
    assert sum(int((rows >= 0).sum()) for rows in frames.template) == 4
    vectors, usable = scoring.templates(features.blocks(tmp_path / "out", frames), "concatenate", 3)
    assert usable.tolist() == [False, True, True]
    crops, faces = ([unit(by_hand(rows[i]["image"])) for i in chosen] for chosen in ((3, 4), (1, 2)))
    np.testing.assert_allclose(vectors[1], unit(np.mean(crops, 0)), atol=1e-6)
    np.testing.assert_allclose(vectors[2], unit(np.mean(faces, 0)), atol=1e-6)
    assert not vectors[0].any()
    added, _ = scoring.templates(features.blocks(tmp_path / "out", frames), "sum", 3)
    halves = [unit(by_hand(rows[i]["image"])[:3] + by_hand(rows[i]["image"])[3:]) for i in (1, 2)]
    np.testing.assert_allclose(added[2], unit(np.mean(halves, 0)), atol=1e-6)


def test_absent_image_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, [row("1/0")])
    with pytest.raises(EvaluationError, match="1 images or videos of the pairs are not there, as '9/9'"):
        choose_frames(tmp_path, ["1/0", "9/9"])


def test_broken_image_names_its_part(tmp_path: Path) -> None:
    write_rows(tmp_path / "aligned", [row("1/0") | {"image": b"\xff\xd8 no picture"}])
    with pytest.raises(EvaluationError, match=r"part-00000.parquet: 13 bytes that are no JPEG"):
        embed_set(tmp_path / "aligned", model(), tmp_path / "out", batch=2, flip=True)


def test_diverged_model_is_reported(tmp_path: Path) -> None:
    write_rows(tmp_path / "aligned", [row("1/0")])
    diverged = model(lambda images: torch.full((len(images), 3), torch.nan))
    with pytest.raises(EvaluationError, match="mine: its features are not finite numbers"):
        embed_set(tmp_path / "aligned", diverged, tmp_path / "out", batch=2, flip=True)


def test_a_gpu_too_small_is_told_with_what_to_change() -> None:
    def full(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")

    told = (
        r"^the GPU's memory is too small: lower evaluate\.batch, or .* \(CUDA out of memory\. Tried to allocate 2\.00 G"
    )
    with pytest.raises(InputError, match=told):
        embed(model(full), np.zeros((2, 112, 112, 3), np.uint8))


def test_no_usable_image_at_all(tmp_path: Path) -> None:
    write_rows(tmp_path / "aligned", [row("1/0", "unreadable")])
    embed_set(tmp_path / "aligned", model(), tmp_path / "out", batch=2, flip=True)
    frames = choose_frames(tmp_path / "out", ["1/0"], EMBEDDED)
    with pytest.raises(EvaluationError, match="not one image"):
        scoring.templates(features.blocks(tmp_path / "out", frames), "none", 1)
