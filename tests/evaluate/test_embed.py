"""Templates and scores against float64 recomputation by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages.evaluate import embed
from stages.evaluate.verification import EvaluationError
from stages.train.faces import decode_face
from stages.train.model import FaceModel
from tests.evaluate.conftest import row, write_rows
from tests.samples import face_like, jpeg

CPU = torch.device("cpu")


class Corners(FaceModel):
    """Features whose mirror image differs: the mean of each channel's left half, less 100."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images[..., :56].float().mean((2, 3)) - 100


def by_hand(image: object, flip: bool = True) -> NDArray[np.float64]:
    assert isinstance(image, bytes)
    pixels = decode_face(image, 112).astype(np.float64)
    features = pixels[:, :56].mean((0, 1)) - 100
    if flip:
        features = np.concatenate([features, pixels[:, ::-1][:, :56].mean((0, 1)) - 100])
    return features / np.sqrt((features**2).sum())


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / np.sqrt((vector**2).sum())


@pytest.mark.parametrize("flip", [True, False])
def test_flip_test_concatenates_before_normalising(flip: bool) -> None:
    images = [jpeg(face_like(i, 0)) for i in range(5)]
    batch = torch.from_numpy(np.stack([decode_face(image, 112) for image in images])).permute(0, 3, 1, 2)
    expected = np.stack([by_hand(image, flip) for image in images])
    np.testing.assert_allclose(embed.embed(Corners(), batch, flip).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 128])
def test_stills_are_embedded_once_each_and_only_if_wanted(tmp_path: Path, batch: int) -> None:
    rows = [row(f"{i}/0") for i in range(7)]
    write_rows(tmp_path, rows, part_rows=3)
    model = Corners()
    frames = embed.choose_frames(tmp_path, ["5/0", "1/0", "4/0"])
    vectors = embed.templates(model, tmp_path, frames, batch=batch, flip=True, device=CPU)
    np.testing.assert_allclose(vectors, [by_hand(rows[i]["image"]) for i in (5, 1, 4)], atol=1e-6)
    assert model.seen == 2 * 3
    assert frames.detected.all()
    assert frames.usable.all()


def test_video_is_the_mean_of_its_detected_frames(tmp_path: Path) -> None:
    rows = [
        row("1/a/0", "fallback", "1/a", 0),
        row("1/a/1", "detected", "1/a", 1),
        row("1/a/2", "detected", "1/a", 2),
        row("2/b/0", "fallback", "2/b", 3),
        row("2/b/1", "fallback", "2/b", 4),
        row("3/c/0", "unreadable", "3/c"),
    ]
    write_rows(tmp_path, rows, part_rows=2)
    frames = embed.choose_frames(tmp_path, ["3/c", "2/b", "1/a"])
    assert frames.detected.tolist() == [False, False, True]
    assert frames.usable.tolist() == [False, True, True]
    assert frames.count == 4
    vectors = embed.templates(Corners(), tmp_path, frames, batch=2, flip=True, device=CPU)
    crops, faces = ([by_hand(rows[i]["image"]) for i in chosen] for chosen in ((3, 4), (1, 2)))
    np.testing.assert_allclose(vectors[1], unit(np.mean(crops, 0)), atol=1e-6)
    np.testing.assert_allclose(vectors[2], unit(np.mean(faces, 0)), atol=1e-6)
    assert not vectors[0].any()


def test_scores_are_cosines_and_minus_one_without_an_image() -> None:
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 0.0]])
    usable = np.array([True, True, False])
    scores = embed.score_pairs(vectors, usable, np.array([0, 0, 1, 2]), np.array([1, 0, 2, 2]))
    np.testing.assert_allclose(scores, [0.6, 1, -1, -1], atol=1e-7)
    assert scores.dtype == np.float32


def test_absent_image_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, [row("1/0")])
    with pytest.raises(EvaluationError, match="1 images or videos of the pairs are not there, as '9/9'"):
        embed.choose_frames(tmp_path, ["1/0", "9/9"])


def test_broken_image_names_its_part(tmp_path: Path) -> None:
    write_rows(tmp_path, [row("1/0") | {"image": b"\xff\xd8 no picture"}])
    frames = embed.choose_frames(tmp_path, ["1/0"])
    with pytest.raises(EvaluationError, match=r"part-00000.parquet: 13 bytes that are no JPEG"):
        embed.templates(Corners(), tmp_path, frames, batch=2, flip=True, device=CPU)


def test_diverged_model_is_reported(tmp_path: Path) -> None:
    class Diverged(FaceModel):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 4), torch.nan)

    write_rows(tmp_path, [row("1/0")])
    frames = embed.choose_frames(tmp_path, ["1/0"])
    with pytest.raises(EvaluationError, match="diverged"):
        embed.templates(Diverged(nn.Identity()), tmp_path, frames, batch=2, flip=True, device=CPU)


def test_no_usable_image_at_all(tmp_path: Path) -> None:
    write_rows(tmp_path, [row("1/0", "unreadable")])
    frames = embed.choose_frames(tmp_path, ["1/0"])
    with pytest.raises(EvaluationError, match="not one image"):
        embed.templates(Corners(), tmp_path, frames, batch=2, flip=True, device=CPU)
