"""Procedural faces: the pictures are reproducible, the sets and their protocols as documented."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import astuple, fields
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.params import Synthetic
from pipeline.tables import PAIRS
from stages.download import synthetic


def make_params(**changes: Any) -> Synthetic:
    values = {"seed": 5, "identities": 6, "images": 3, "videos": 2, "folds": 2, "pairs": 4, "size": 96}
    return Synthetic(source="synthetic", watch=[], **{**values, **changes})


def test_same_arguments_give_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from stages.download.synthetic import encode, render\n"
        "images = [render(7, 3, 2, 160), render(7, 3, 2, 160, video=1)]\n"
        "print(hashlib.sha256(b''.join(encode(image, 80) for image in images)).hexdigest())"
    )
    images = [synthetic.render(7, 3, 2, 160), synthetic.render(7, 3, 2, 160, video=1)]
    here = hashlib.sha256(b"".join(synthetic.encode(image, 80) for image in images)).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_rendering_depends_neither_on_threads_nor_on_what_was_rendered_before() -> None:
    alone = synthetic.render(7, 3, 2, 160)
    threads = cv2.getNumThreads()
    try:
        for count in (1, 4):
            cv2.setNumThreads(count)
            synthetic.render(8, 1, 1, 64)
            np.testing.assert_array_equal(synthetic.render(7, 3, 2, 160), alone)
    finally:
        cv2.setNumThreads(threads)


def test_every_argument_changes_the_picture() -> None:
    pictures = [
        synthetic.render(1, 2, 3, 96),
        synthetic.render(2, 2, 3, 96),
        synthetic.render(1, 3, 3, 96),
        synthetic.render(1, 2, 4, 96),
        synthetic.render(1, 2, 3, 96, video=0),
        synthetic.render(1, 2, 3, 96, video=1),
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@pytest.mark.parametrize("size", [64, 161, 320])
def test_a_picture_is_square_rgb_and_fills_its_range(size: int) -> None:
    picture = synthetic.render(1, 0, 0, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert np.ptp(picture) > 60


def test_a_small_and_a_large_picture_show_the_same_scene() -> None:
    """Reduced to one size they agree, but for noise."""
    small, large = (synthetic.render(1, 4, 4, size).astype(np.float32) for size in (128, 512))
    reduced = cv2.resize(large, (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(cv2.GaussianBlur(small, (0, 0), 2) - cv2.GaussianBlur(reduced, (0, 0), 2)).mean() < 4


def test_a_person_has_one_face_and_many_views() -> None:
    drawn = [synthetic._draw(1, person, photo, None)[:2] for person in range(4) for photo in range(5)]
    assert len({face for face, _ in drawn}) == 4
    assert len({view for _, view in drawn}) == 20


def test_people_spread_over_the_whole_space_of_faces() -> None:
    """Each trait has the mean and deviation it is declared with, where nothing cuts it off but two deviations."""
    faces = np.array([astuple(synthetic._draw(1, person, 0, None)[0]) for person in range(1500)])
    for values, item in zip(faces.T, fields(synthetic.Face), strict=True):
        (mean, spread), (low, high) = item.metadata["normal"], item.metadata["range"]
        assert values.std() > 0, item.name
        assert values.min() >= max(low, mean - 2 * spread) - 1e-9, item.name
        assert values.max() <= min(high, mean + 2 * spread) + 1e-9, item.name
        if low == -np.inf and high == np.inf:
            # a normal distribution cut at two deviations has 0.92 of its variance, 0.959 of its deviation
            assert values.mean() == pytest.approx(mean, abs=0.13 * spread), item.name
            assert values.std() == pytest.approx(0.959 * spread, rel=0.1), item.name


def test_frames_of_a_video_are_nearer_to_each_other_than_videos_are() -> None:
    frames = {
        (film, frame): cv2.GaussianBlur(synthetic.render(3, 0, frame, 96, video=film).astype(np.float32), (0, 0), 3)
        for film in range(4)
        for frame in (1, 2)
    }
    within = [np.abs(frames[film, 1] - frames[film, 2]).mean() for film in range(4)]
    between = [np.abs(frames[film, 1] - frames[(film + 1) % 4, 1]).mean() for film in range(4)]
    assert max(within) < min(between)
    faces = [synthetic._draw(3, 0, frame, film) for film in range(2) for frame in (1, 2)]
    assert len({face for face, *_ in faces}) == 1
    assert faces[0][2].glasses == faces[1][2].glasses
    assert faces[0][1].yaw != faces[1][1].yaw


@pytest.mark.parametrize(
    ("set_name", "count", "first", "last"),
    [
        ("train", 18, "p5_00000/p5_00000_0001", "p5_00005/p5_00005_0003"),
        ("lfw", 18, "p5_00000/p5_00000_0001", "p5_00005/p5_00005_0003"),
        ("ytf", 36, "p5_00000/0/0.1", "p5_00005/1/1.3"),
    ],
)
def test_a_set_lists_every_image_once_under_its_hosts_names(set_name: str, count: int, first: str, last: str) -> None:
    photographs = synthetic.photographs(make_params(), set_name)
    ids = [photograph.image_id for photograph in photographs]
    assert len(ids) == len(set(ids)) == count
    assert (ids[0], ids[-1]) == (first, last)
    for photograph in photographs:
        assert photograph.image_id.startswith((photograph.video or photograph.identity) + "/")
        assert (photograph.video is None) == (photograph.frame is None) == (set_name != "ytf")
    assert set(Counter(photograph.identity for photograph in photographs).values()) == {count // 6}


def test_identity_name() -> None:
    assert synthetic.identity_name(1, 42) == "p1_00042"
    assert synthetic.identity_name(2, 42) != synthetic.identity_name(1, 42)


@pytest.mark.parametrize("set_name", ["train", "ytf"])
def test_parts_decode_to_the_pictures_however_the_set_is_divided(set_name: str) -> None:
    params = make_params(identities=2, size=64)
    photographs = synthetic.photographs(params, set_name)
    together = synthetic.render_part(params, photographs)
    assert together == synthetic.render_part(params, photographs[:2]) + synthetic.render_part(params, photographs[2:])
    assert len(set(together)) == len(photographs)
    for photograph, data in zip(photographs, together, strict=True):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert decoded is not None
        assert decoded.shape == (64, 64, 3)
        picture = synthetic.render(params.seed, photograph.person, photograph.photo, 64, video=photograph.film)
        # red and blue changed places would be far off; JPEG keeps the mean of each channel
        np.testing.assert_allclose(decoded.mean(axis=(0, 1)), picture.mean(axis=(0, 1)), atol=2)


@pytest.mark.parametrize("set_name", ["lfw", "ytf"])
@pytest.mark.parametrize("folds", [2, 7, 10])
def test_protocol(set_name: str, folds: int) -> None:
    params = make_params(identities=53, images=4, videos=3, folds=folds, pairs=14)
    table = synthetic.protocol(params, set_name)
    assert table.schema.equals(PAIRS)
    rows = table.to_pylist()
    photographs = synthetic.photographs(params, set_name)
    known = {photograph.video if set_name == "ytf" else photograph.image_id for photograph in photographs}
    owner: dict[str, int] = {}
    seen = set()
    for row in rows:
        assert {row["left"], row["right"]} <= known
        assert row["left"] != row["right"]
        people = [row[side].split("/")[0] for side in ("left", "right")]
        assert (people[0] == people[1]) == row["same"]
        for person in people:
            assert owner.setdefault(person, row["fold"]) == row["fold"], "a person is in two folds"
        pair = frozenset((row["left"], row["right"]))
        assert pair not in seen, "a pair comes twice"
        seen.add(pair)
    assert Counter((row["fold"], row["same"]) for row in rows) == {
        (fold, same): 7 for fold in range(folds) for same in (True, False)
    }


def test_protocol_follows_from_the_seed() -> None:
    params = make_params(identities=40, folds=4)
    assert synthetic.protocol(params, "lfw").equals(synthetic.protocol(params, "lfw"))
    assert not synthetic.protocol(params, "lfw").equals(
        synthetic.protocol(make_params(identities=40, folds=4, seed=6), "lfw")
    )


def test_protocol_can_use_every_pair_there_is() -> None:
    """Two people of three images in each fold: 6 pairs of one person, 9 of two."""
    table = synthetic.protocol(make_params(identities=4, images=3, folds=2, pairs=12), "lfw")
    assert table.num_rows == 24


@pytest.mark.parametrize(
    ("set_name", "changes", "message"),
    [
        (
            "lfw",
            {"identities": 4, "pairs": 14},
            r"download\.lfw: fold 0 .* 6 pairs of one person, but pairs = 14 needs 7",
        ),
        ("lfw", {"images": 1}, "0 pairs of one person"),
        ("lfw", {"identities": 2}, "0 pairs of two people"),
        ("lfw", {"identities": 3, "folds": 4}, "fold 0 has 1 of the 3 identities .* 0 pairs of two people"),
        ("ytf", {"videos": 1}, r"download\.ytf: .* 1 videos each: they give 0 pairs of one person"),
        ("ytf", {"identities": 4, "pairs": 6}, "2 pairs of one person, .* raise identities or videos"),
    ],
)
def test_too_few_images_for_the_pairs(set_name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.protocol(make_params(**changes), set_name)
