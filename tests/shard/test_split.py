import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import Shard
from stages.shard.clean import REASONS
from stages.shard.errors import ShardError
from stages.shard.split import draw_pairs, make_plan, shuffled
from tests.samples import shard_section


def section(by: str = "image", share: float = 0.3, pairs: int = 0, seed: int = 1) -> Shard:
    return shard_section(seed=seed, validation={"by": by, "share": share, "pairs": pairs})


ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["", "", "no_face", "duplicate"])), min_size=1)


@given(rows=ROWS, percent=st.integers(0, 99))
def test_laws_of_the_split_by_image(rows: list[tuple[str, str]], percent: int) -> None:
    identities, reason = (np.array(column, object) for column in zip(*rows, strict=True))
    counts = {name: sum(row == (name, "") for row in rows) for name in sorted(set(identities))}
    kept = [name for name, count in counts.items() if count]
    if len(kept) < 2:
        with pytest.raises(ShardError, match="at least 2"):
            make_plan(identities, reason, section(share=percent / 100))
        return
    plan = make_plan(identities, reason, section(share=percent / 100))
    for row, (name, why) in enumerate(rows):
        assert plan.label[row] == (-1 if why else kept.index(name))
    for name in kept:
        in_val = int((plan.val & (identities == name) & (reason == "")).sum())
        assert in_val == min(counts[name] * percent // 100, counts[name] - 1)  # whole-number arithmetic
    assert not plan.val[plan.label < 0].any()
    assert sorted([*plan.rows("train"), *plan.rows("val")]) == np.flatnonzero(plan.label >= 0).tolist()
    table = {row["identity"]: row for row in plan.labels.to_pylist()}
    assert {name for name, row in table.items() if row["dropped"] is None} == set(kept)
    for name, row in table.items():
        assert row["train"] + row["val"] == counts[name]
        assert row["images"] == sum(n == name and why != "no_face" for n, why in rows)


@given(rows=ROWS, percent=st.integers(1, 99))
def test_laws_of_the_split_by_identity(rows: list[tuple[str, str]], percent: int) -> None:
    identities, reason = (np.array(column, object) for column in zip(*rows, strict=True))
    kept = sorted({name for name, why in rows if not why})
    strangers = len(kept) * percent // 100
    params = section("identity", percent / 100, 2)
    if len(kept) - strangers < 2:
        with pytest.raises(ShardError, match="at least 2"):
            make_plan(identities, reason, params)
        return
    plan = make_plan(identities, reason, params)
    train, val = (set(identities[plan.rows(split)]) for split in ("train", "val"))
    assert not train & val
    assert train | val == set(kept)
    assert len(val) == strangers
    assert set(plan.label[plan.rows("train")]) == set(range(len(train)))
    assert set(plan.label[plan.rows("val")]) == set(range(len(train), len(kept)))


@pytest.mark.parametrize(("by", "pairs"), [("image", 0), ("identity", 2)])
def test_the_split_follows_from_the_seed(by: str, pairs: int) -> None:
    identities, reason = np.repeat(np.array(list("abcdefghij"), object), 20), np.full(200, "", object)
    one, again, other = (make_plan(identities, reason, section(by, 0.3, pairs, seed)).val for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_an_identity_of_whom_nothing_is_left_says_why() -> None:
    identities = np.array(["a", "b", "b", "c", "c"], object)
    plan = make_plan(identities, np.array(["few_images", "", "", "", ""], object), section())
    assert plan.labels.to_pylist()[0] == {
        "label": None,
        "identity": "a",
        "images": 1,
        "train": 0,
        "val": 0,
        "dropped": REASONS["few_images"],
    }


def test_the_shuffle_is_a_permutation() -> None:
    rows = np.arange(1000) * 3
    mixed = shuffled(rows, 5)
    assert sorted(mixed) == list(rows)
    # Neighbours of a fair shuffle are about n/3 apart; of a local one, far less.
    assert 250 < np.abs(np.diff(mixed // 3)).mean() < 420
    assert (shuffled(rows, 5) == mixed).all()
    assert (shuffled(rows, 6) != mixed).any()


@given(counts=st.lists(st.integers(1, 6), min_size=2, max_size=8), half=st.integers(1, 12), seed=st.integers(0, 9))
def test_laws_of_the_pairs(counts: list[int], half: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)
    same = sum(n * (n - 1) // 2 for n in counts)
    different = len(labels) * (len(labels) - 1) // 2 - same
    params = section("identity", 0.5, 2 * half, seed)
    if same < half or different < half:
        with pytest.raises(ShardError, match=rf"have {same} and {different}"):
            draw_pairs(labels, params)
        return
    pairs = draw_pairs(labels, params)
    left, right, truth = (pairs[name].to_numpy() for name in ("left", "right", "same"))
    assert ((labels[left] == labels[right]) == truth).all()
    assert truth.sum() == half == (~truth).sum()
    assert (left < right).all()
    assert len(set(zip(left, right, strict=True))) == 2 * half
    assert draw_pairs(labels, params).equals(pairs)


def test_other_pairs_by_another_seed() -> None:
    labels = np.repeat(np.arange(10), 10).astype(np.int32)
    one, other = (draw_pairs(labels, section("identity", 0.5, 40, seed)) for seed in (1, 2))
    for kind in (slice(20), slice(20, 40)):
        assert one.to_pylist()[kind] != other.to_pylist()[kind]


def test_no_one_with_many_images_decides_the_pairs() -> None:
    """Of 21 people, one with 50 images: each is in one of 21 pairs."""
    labels = np.repeat(np.arange(21), [50, *[2] * 20]).astype(np.int32)
    left = draw_pairs(labels, section("identity", 0.5, 42))["left"].to_numpy()
    assert sorted(labels[left[:21]]) == list(range(21))
