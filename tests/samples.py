"""Small tables and pictures that several test folders share."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from torch import nn

from pipeline.params import Augment, Face, Shard
from pipeline.tables import ALIGNED, part_path, write_table
from stages.shard import run as shard
from stages.train.backbones import improved_residual
from tests.work import HERE

ROOT = Path(__file__).parents[1]
FACE = Face(width=112, margin=0, quality=95)
NARROW = partial(improved_residual, (1, 1, 1), channels=(16, 32, 64), strides=(2, 2, 2), stem=((16, 2),))
"""A smaller network than `small`, where what is asked is the same of any with batch normalisation and convolutions."""
NO_AUGMENTATION: dict[str, Any] = {
    "horizontal_flip": 0.0,
    "shift": 0,
    "crop": 0.0,
    "low_resolution": 0.0,
    "colour": 0.0,
    "blur": 0.0,
    "jpeg": 0.0,
}


def mean_colours(embedding: int, width: int) -> nn.Sequential:
    """In place of a network, where it does not matter: quick, and without batch normalisation."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(48, embedding))


def augment(**changes: Any) -> Augment:
    """No augmentation but that."""
    return Augment.model_validate(NO_AUGMENTATION | changes)


def shard_section(clean: dict[str, Any] | None = None, **changes: Any) -> Shard:
    """Section shard: no cleaning, 30 % of each identity's images to validation, tiny files; but for the changes."""
    plain = {
        "seed": 1,
        "clean": {
            "min_images": 1,
            "duplicates": False,
            "near_duplicates": None,
            "same_names": False,
            "names": str(ROOT / "data" / "names.txt"),
            "lists": [],
            "exclude": str(ROOT / "data" / "exclude.csv"),
        }
        | (clean or {}),
        "validation": {"by": "image", "share": 0.3, "pairs": 0},
        "shard_rows": 8,
        "row_group_rows": 4,
    }
    return Shard.model_validate(plain | changes)


def write_shards(folder: Path, photos: list[int], section: Shard, face: Face = FACE) -> Path:
    """Shards of an aligned table as write_aligned makes it."""
    write_aligned(folder / "aligned", photos, part_rows=1000, margin=face.margin)
    shard.run(folder / "aligned", {}, folder / "shards", folder / "report", section, face, HERE)
    return folder / "shards"


def jpeg(pixels: np.ndarray) -> bytes:
    """RGB pixels as JPEG."""
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def face_like(identity: int, photo: int) -> np.ndarray:
    """112×112 RGB: a colour and a stripe for the identity, noise for the photograph."""
    base = np.random.default_rng([1, identity]).integers(40, 215, 3)
    noise = np.random.default_rng([2, identity, photo]).integers(-30, 31, (112, 112, 3))
    pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
    pixels[:, 5 * (identity % 20) : 5 * (identity % 20) + 10] = 255 - base
    return pixels


def write_aligned(folder: Path, photos: list[int], rejected: int = 0, part_rows: int = 10, margin: int = 0) -> None:
    """An aligned table: identity i has photos[i] faces; the first `rejected` rows have no face."""

    def face(identity: int, photo: int) -> bytes:
        border = np.pad(face_like(identity, photo), ((margin, margin), (margin, margin), (0, 0)), "reflect")
        return jpeg(border)

    rows: list[dict[str, object]] = []
    for identity, count in enumerate(photos):
        for photo in range(count):
            missing = len(rows) < rejected
            image_id = f"id{identity:03d}/{photo:04d}"
            rows.append(
                {
                    "image_id": image_id,
                    "identity": f"id{identity:03d}",
                    "sha256": hashlib.sha256(image_id.encode()).hexdigest(),
                    "box": None if missing else [10.0, 10.0, 90.0, 90.0],
                    "status": "no_face" if missing else "detected",
                    "image": None if missing else face(identity, photo),
                }
            )
    for index in range(0, len(rows), part_rows):
        table = pa.Table.from_pylist(rows[index : index + part_rows], schema=ALIGNED)
        write_table(part_path(folder, index // part_rows), table, ALIGNED)
