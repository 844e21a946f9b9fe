"""Small tables and pictures that several test folders share."""

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from pipeline.tables import ALIGNED, part_path, write_table


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


def write_aligned(folder: Path, photos: list[int], rejected: int = 0, part_rows: int = 10) -> None:
    """An aligned table: identity i has photos[i] faces; the first `rejected` rows have no face."""
    rows: list[dict[str, object]] = []
    for identity, count in enumerate(photos):
        for photo in range(count):
            missing = len(rows) < rejected
            rows.append(
                {
                    "image_id": f"id{identity:03d}/{photo:04d}",
                    "identity": f"id{identity:03d}",
                    "status": "no_face" if missing else "detected",
                    "image": None if missing else jpeg(face_like(identity, photo)),
                }
            )
    for index in range(0, len(rows), part_rows):
        table = pa.Table.from_pylist(rows[index : index + part_rows], schema=ALIGNED)
        write_table(part_path(folder, index // part_rows), table, ALIGNED)
