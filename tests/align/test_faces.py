"""Which face is chosen, and the further looks at photographs in which none was found."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import Align, Detector, Face
from stages.align import faces as module
from stages.align.faces import Found, choose, find
from tests.align.scenes import scenes

SCENES = scenes()
DETECTOR = Detector(
    min_face=40,
    min_face_share=0,
    factor=0.709,
    thresholds=(0.6, 0.7, 0.7),
    overlaps=(0.5, 0.7, 0.7, 0.7),
    max_side=1024,
)


def params(**changes: Any) -> Align:
    detector = DETECTOR.model_copy(update=changes.pop("detector", {}))
    face = Face(width=112, margin=0, quality=95)
    plain: dict[str, Any] = {"detector": detector, "looks": [], "choose": "centre", "face": face}
    return Align(**plain | changes)


def one(image: np.ndarray, **changes: Any) -> Found:
    return find([image], params(**changes), "cpu")[0]


def square(x: float, y: float, side: int) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2 - 1, y + side / 2 - 1]


@pytest.mark.parametrize(("rule", "chosen"), [("centre", 0), ("largest", 1), ("weighted", 2)])
def test_each_rule_chooses_its_face(rule: str, chosen: int) -> None:
    # 50 wide at 10 pixels from the centre; 120 wide at 100; 100 wide at 20: 2500 − 200, 14400 − 20000, 10000 − 800
    boxes = np.array([square(210, 150, 50), square(300, 150, 120), square(200, 130, 100)])
    assert choose(boxes, 300, 400, rule) == chosen


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 300), st.integers(1, 200)), min_size=1, max_size=6))
def test_the_rules_are_what_they_say(faces: list[tuple[int, int, int]]) -> None:
    boxes = np.array([[x, y, x + side - 1, y + side - 1] for x, y, side in faces], float)
    centre = [(x + (side - 1) / 2 - 200.5) ** 2 + (y + (side - 1) / 2 - 150.5) ** 2 for x, y, side in faces]
    area = [side**2 for _, _, side in faces]
    assert choose(boxes, 300, 400, "centre") == int(np.argmin(centre))
    assert choose(boxes, 300, 400, "largest") == int(np.argmax(area))
    assert choose(boxes, 300, 400, "weighted") == int(np.argmax(np.array(area) - 2 * np.array(centre)))


def small_face() -> np.ndarray:
    """The astronaut, so small that only half the smallest face finds hers, which is about 20 pixels wide then."""
    return cv2.resize(SCENES["whole"], (80, 80), interpolation=cv2.INTER_AREA).astype(np.uint8)


def dark() -> np.ndarray:
    """The astronaut at a fortieth of the contrast: six grey levels, of which equalisation makes a photograph."""
    return (SCENES["whole"] / 40).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "look"),
    [
        (small_face(), "smaller"),
        (np.ascontiguousarray(np.rot90(SCENES["whole"])), "rotated"),
        (dark(), "equalised"),
    ],
)
def test_a_further_look_finds_what_the_first_does_not(image: np.ndarray, look: str) -> None:
    assert not len(one(image).faces.scores)
    for looks in ([look], ["rotated", "equalised", "smaller"]):
        found = one(image, looks=looks)
        assert found.look == look
        assert len(found.faces.scores) == 1
    others = [other for other in ("smaller", "rotated", "equalised") if other != look]
    assert not len(one(image, looks=others).faces.scores)


def test_a_look_for_smaller_faces_halves_the_share_that_they_have_at_least() -> None:
    """Hers is a quarter of the photograph wide."""
    half = {"min_face": 12, "min_face_share": 0.5}
    assert not len(one(small_face(), detector=half).faces.scores)
    found = one(small_face(), detector=half, looks=["smaller"])
    assert found.look == "smaller"
    assert len(found.faces.scores) == 1


@pytest.mark.parametrize("turns", [1, 3])
def test_a_face_found_turned_is_where_it_is_in_the_photograph(turns: int) -> None:
    """Against the face of the upright photograph, its points turned by hand."""
    upright = one(SCENES["whole"]).faces
    (found,) = module._turned([np.ascontiguousarray(np.rot90(SCENES["whole"], turns))], DETECTOR, "cpu")
    x, y = upright.landmarks[0].T
    expected = np.stack([y, 511 - x] if turns == 1 else [511 - y, x], axis=1)
    np.testing.assert_allclose(found.landmarks[0], expected, atol=1e-3)
    left, top, right, bottom = upright.boxes[0]
    box = [top, 513 - right, bottom, 513 - left] if turns == 1 else [513 - bottom, left, 513 - top, right]
    np.testing.assert_allclose(found.boxes[0], box, atol=1e-3)


def test_only_photographs_without_a_face_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = module._LOOKS["rotated"]

    def counted(images: Any, *rest: Any) -> Any:
        seen.append(len(images))
        return original(images, *rest)

    monkeypatch.setitem(module._LOOKS, "rotated", counted)
    turned = np.ascontiguousarray(np.rot90(SCENES["whole"]))
    found = find([SCENES["whole"], turned, SCENES["a group"]], params(looks=["rotated"]), "cpu")
    assert [own.look for own in found] == ["first", "rotated", "first"]
    assert seen == [1]


def test_a_large_photograph_is_reduced_and_its_face_is_in_its_own_pixels() -> None:
    """Twice as large, reduced to the half: the same pixels, hence the same face, at pixel centres twice as far."""
    twice = SCENES["whole"].repeat(2, axis=0).repeat(2, axis=1)
    found = one(twice, detector={"max_side": 512}).faces
    single = one(SCENES["whole"]).faces
    np.testing.assert_allclose(found.landmarks, 2 * single.landmarks + 0.5, atol=1e-3)
    # pixels 3 to 4, counted from 1, are pixels 5 to 8 of the large one
    np.testing.assert_allclose(found.boxes[:, 2:], 2 * single.boxes[:, 2:] - 0.5, atol=1e-3)
