"""dlib's side of benchmarks/published.py, which runs this in an environment of its own.

`python published_peer.py align FOLDER NAMES OUT` cuts the faces of photographs as dlib's examples do; `python
published_peer.py embed CHIPS NAMES OUT JITTERS FLIP` embeds faces already cut; `python published_peer.py versions` says
what this is. Imports nothing of this project.
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dlib
import numpy as np

SIDE, PADDING = 150, 0.25
"""What the network was trained on: the face in the middle of a square, a quarter of its size around it."""
BATCH = 64
LFW_ENLARGED = 2.2
"""By how much LFW's makers enlarged the detected face to the photograph: where none is found, it is taken back."""


def model(name: str) -> str:
    found = importlib.util.find_spec("face_recognition_models")
    assert found
    assert found.submodule_search_locations
    return str(Path(found.submodule_search_locations[0]) / "models" / name)


def nearest(boxes: Any, height: int, width: int) -> int:
    """Which box is nearest to the photograph's centre: the person whom an LFW photograph is of."""
    centres = [((box.left() + box.right()) / 2, (box.top() + box.bottom()) / 2) for box in boxes]
    return int(np.argmin([(x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2 for x, y in centres]))


def middle(height: int, width: int) -> Any:
    side = min(height, width) / LFW_ENLARGED
    left, top = (width - side) / 2, (height - side) / 2
    return dlib.rectangle(round(left), round(top), round(left + side) - 1, round(top + side) - 1)


def align(folder: Path, names: list[str], out: Path) -> dict[str, Any]:
    """Chips as an array (N, 150, 150, 3) uint8 in OUT, and how many faces were found in each photograph.

    The HOG detector looks at the photograph twice as large, as in dlib's own examples; chips lie by 68 landmarks (the
    model for five is younger than the figure that the authors report).
    """
    detector = dlib.get_frontal_face_detector()
    predictor = dlib.shape_predictor(model("shape_predictor_68_face_landmarks.dat"))
    chips = np.lib.format.open_memmap(out, "w+", np.uint8, (len(names), SIDE, SIDE, 3))
    faces = []
    for i, name in enumerate(names):
        photograph = dlib.load_rgb_image(str(folder / f"{name}.jpg"))
        height, width = photograph.shape[:2]
        boxes = detector(photograph, 1)
        box = boxes[nearest(boxes, height, width)] if len(boxes) else middle(height, width)
        chips[i] = dlib.get_face_chip(photograph, predictor(photograph, box), SIDE, PADDING)
        faces.append(len(boxes))
    chips.flush()
    return {"faces": faces}


def embed(chips: Path, names: list[str], out: Path, jitters: int, flip: bool) -> dict[str, Any]:
    """128-d descriptors of chips, N×128 float64, in OUT as `emb`; with FLIP also those of the mirror images, `flip`.

    With JITTERS, each is the mean over so many slightly moved, turned, scaled and (half of them) mirrored copies.
    """
    network = dlib.face_recognition_model_v1(model("dlib_face_recognition_resnet_model_v1.dat"))
    faces = np.load(chips, mmap_mode="r")

    def descriptors(mirrored: bool) -> np.ndarray:
        found = []
        for start in range(0, len(faces), BATCH):
            batch = faces[start : start + BATCH, :, ::-1] if mirrored else faces[start : start + BATCH]
            found.extend(network.compute_face_descriptor([np.ascontiguousarray(face) for face in batch], jitters))
        return np.array(found)

    if flip:
        np.savez(out, keys=np.array(names), emb=descriptors(False), flip=descriptors(True))
    else:
        np.savez(out, keys=np.array(names), emb=descriptors(False))
    return {}


def main() -> None:
    what, *details = sys.argv[1:]
    if what == "align":
        folder, names, out = details
        answer = align(Path(folder), json.loads(Path(names).read_text()), Path(out))
    elif what == "embed":
        chips, names, out, jitters, flip = details
        answer = embed(Path(chips), json.loads(Path(names).read_text()), Path(out), int(jitters), flip == "flip")
    else:
        answer = {name: version(name) for name in ("dlib-bin", "face_recognition_models", "numpy")}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
