"""A picture of faces as the network sees them: each as it is, and then as augmentation changes it, epoch by epoch."""

from pathlib import Path

import cv2
import numpy as np

from pipeline import tables
from pipeline.params import Face, Train
from stages.shard.reader import Rows, Split
from stages.train.augment import ImageAugmenter, crop, draw
from stages.train.faces import HEIGHT, decode_all, mirror

FACES, EPOCHS, GAP = 8, 7, 4
"""A row a face, then a column an epoch; pixels between."""


def write_sheet(path: Path, split: Split, face: Face, params: Train) -> None:
    """Write the picture, atomically; the first examples of the split, and the draws that training itself makes."""
    count, width, size = min(FACES, len(split)), params.backbone.width, face.size
    rows = np.arange(count)
    images, _ = Rows(split, 1).read(rows)
    faces = np.empty((count, *size, 3), np.uint8)
    decode_all(images, faces, split.name)
    top, left = (size[0] - HEIGHT) // 2, (size[1] - width) // 2
    columns = [np.ascontiguousarray(faces[:, top : top + HEIGHT, left : left + width])]
    augmenter = ImageAugmenter(params.augment, width) if params.augment.by_image else None
    for epoch in range(EPOCHS):
        (order,), (draws,) = draw(params.augment, params.seed, np.full((1, count), epoch), rows[None], size, width)
        seen = np.empty((count, HEIGHT, width, 3), np.uint8)
        for i, row in enumerate(order.tolist()):
            crop(faces[row], draws, i, seen[i])
        if draws.flips:
            mirror(seen[: draws.flips])
        if augmenter:
            augmenter(seen, draws.seed)
        columns.append(seen[np.argsort(order)])
    sheet = np.full((count * (HEIGHT + GAP) - GAP, len(columns) * (width + GAP) - GAP, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, pixels in enumerate(column):
            top, left = y * (HEIGHT + GAP), x * (width + GAP)
            sheet[top : top + HEIGHT, left : left + width] = pixels
    with tables.atomic(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1].tobytes())
