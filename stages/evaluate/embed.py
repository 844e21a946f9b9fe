"""Templates: one unit vector for each image (stills) or video that the pairs name.

A template is the normalised mean of the normalised embeddings of its frames; a still is a template of one frame.
Only frames with a detected face are used. A template without any falls back to the centre crops that alignment left
for undetected frames, and counts as undetected; where not even these exist (every frame unreadable), it has no vector.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline import tables
from pipeline.executor import cores
from pipeline.progress import bar
from stages.evaluate.verification import EvaluationError
from stages.train.faces import FaceError, decode_face
from stages.train.model import FaceModel

log = logging.getLogger(__name__)

KEYS = ["image_id", "video", "status"]
UNUSABLE_SCORE = -1.0
"""The lowest cosine: what a pair gets when one side has no image at all. The pair is counted, as LFW asks for."""


@dataclass(frozen=True)
class Frames:
    """Which rows of an aligned table make up which template."""

    names: list[str]
    """T image ids or videos."""
    template: list[NDArray[np.int64]]
    """For each part, for each row: which template it belongs to, or -1 when it is not used."""
    detected: NDArray[np.bool_]
    """T flags: at least one frame has a detected face."""
    usable: NDArray[np.bool_]
    """T flags: at least one frame has an image."""

    @property
    def count(self) -> int:
        """How many rows are used."""
        return sum(int((rows >= 0).sum()) for rows in self.template)


def choose_frames(aligned: Path, names: list[str], *, by_image: bool = False) -> Frames:
    """Find the frames of each named template, without reading an image.

    Args:
        aligned: folder of an aligned table.
        names: image ids (stills) or videos, each once.
        by_image: names are image ids even where there are videos.

    Raises:
        EvaluationError: a name is not in the table.
        TableError: the table cannot be read.
    """
    wanted = pa.array(names, pa.string())
    template, status = [], []
    for path in tables.parts(aligned):
        part = tables.read_table(path, tables.ALIGNED, KEYS)
        key = part["image_id"] if by_image else pc.coalesce(part["video"], part["image_id"])
        index = pc.index_in(key, value_set=wanted)
        template.append(index.fill_null(-1).to_numpy().astype(np.int64))
        status.append(np.asarray(part["status"].to_pylist(), object))

    def having(condition: str) -> NDArray[np.bool_]:
        flags = np.zeros(len(names) + 1, bool)  # the last stands for -1
        for index, of_row in zip(template, status, strict=True):
            flags[index[of_row == condition]] = True
        return flags[:-1]

    present = np.zeros(len(names), bool)
    for index in template:
        present[index[index >= 0]] = True
    if not present.all():
        absent = [name for name, there in zip(names, present, strict=True) if not there]
        raise EvaluationError(f"{aligned}: {len(absent)} images or videos of the pairs are not there, as {absent[0]!r}")

    detected, fallback = having("detected"), having("fallback")
    use_fallback = np.append(fallback & ~detected, False)
    for index, of_row in zip(template, status, strict=True):
        used = (of_row == "detected") | ((of_row == "fallback") & use_fallback[index])
        index[~used] = -1
    return Frames(names, template, detected, detected | fallback)


def batches(
    aligned: Path, frames: Frames, batch: int, width: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """The used frames in order: their templates (B) and pixels (B×3×112×width uint8, RGB), B <= batch.

    One part is in memory at a time; while the caller works on a batch, threads decode the next ones of its part.
    """
    with ThreadPoolExecutor(cores()) as threads:
        for path, template in zip(tables.parts(aligned), frames.template, strict=True):
            rows = np.flatnonzero(template >= 0)
            if not len(rows):
                continue
            images = tables.read_table(path, tables.ALIGNED, ["image"])["image"].take(rows).to_pylist()
            decoded = threads.map(decode_face, images, repeat(width))
            for start in range(0, len(rows), batch):
                of_batch = rows[start : start + batch]
                try:
                    pixels = np.stack([next(decoded) for _ in of_batch])
                except FaceError as error:
                    raise EvaluationError(f"{path}: {error}; delete {aligned} and run `dvc repro`") from error
                yield template[of_batch], pixels.transpose(0, 3, 1, 2)


@torch.inference_mode()
def embed(model: nn.Module, images: torch.Tensor, flip: bool) -> torch.Tensor:
    """L2-normalised embeddings, N×D float64 (N×2D with the flip-test).

    The flip-test concatenates the features of the image and its mirror image, then normalises (CosFace, section 4.1).

    Args:
        model: from N×3×112×112 uint8 RGB to N×D features.
        images: N×3×112×112 uint8.
        flip: whether to use the mirror image.
    """
    features = [model(images)]
    if flip:
        features.append(model(images.flip(3)))
    return nn.functional.normalize(torch.cat(features, dim=1).double(), dim=1)


def templates(
    model: FaceModel, aligned: Path, frames: Frames, *, batch: int, flip: bool, device: torch.device
) -> NDArray[np.float64]:
    """Unit vectors of all templates, T×D; zero for one without any usable frame. Each frame is embedded once.

    Raises:
        EvaluationError: the model's features are not finite numbers, or an image cannot be decoded.
    """
    sums: NDArray[np.float64] | None = None
    with bar(total=frames.count, label=f"{aligned.name}: embedding", unit="images") as shown:
        for template, pixels in batches(aligned, frames, batch, model.width):
            embeddings = embed(model, torch.from_numpy(np.ascontiguousarray(pixels)).to(device), flip).cpu().numpy()
            if not np.isfinite(embeddings).all():
                raise EvaluationError("the model's features are not finite numbers: its training has diverged")
            if sums is None:
                sums = np.zeros((len(frames.names), embeddings.shape[1]))
            np.add.at(sums, template, embeddings)
            shown.update(len(template))
    if sums is None:
        raise EvaluationError(f"{aligned}: not one image of the pairs can be used")
    # the normalised sum is the normalised mean
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def score_pairs(
    vectors: NDArray[np.float64], usable: NDArray[np.bool_], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Cosine of each pair of templates, given by index; UNUSABLE_SCORE where a side has no image.

    Args:
        vectors: T×D unit vectors.
        usable: T flags.
        left, right: N template indices each.
    """
    cosine = np.concatenate(
        [
            np.einsum("nd,nd->n", vectors[left[start : start + 4096]], vectors[right[start : start + 4096]])
            for start in range(0, len(left), 4096)
        ]
    )
    return np.where(usable[left] & usable[right], cosine, UNUSABLE_SCORE).astype(np.float32)
