import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import Shard
from stages.shard.split import ShardError, make_plan, shuffled


def shard(min_images: int = 1, val_fraction: float = 0.3, seed: int = 1) -> Shard:
    return Shard(seed=seed, min_images=min_images, val_fraction=val_fraction, shard_rows=8, row_group_rows=4)


@given(
    rows=st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), min_size=1, max_size=80),
    min_images=st.integers(1, 4),
    percent=st.integers(0, 99),
)
def test_laws_of_the_split(rows: list[tuple[str, bool]], min_images: int, percent: int) -> None:
    identities, usable = np.array([r[0] for r in rows], object), np.array([r[1] for r in rows])
    counts = {name: int(((identities == name) & usable).sum()) for name in sorted(set(identities))}
    kept = [name for name, count in counts.items() if count >= min_images]
    if len(kept) < 2:
        with pytest.raises(ShardError, match="training needs at least 2"):
            make_plan(identities, usable, shard(min_images, percent / 100))
        return
    plan = make_plan(identities, usable, shard(min_images, percent / 100))
    for row, (name, good) in enumerate(rows):
        assert plan.label[row] == (kept.index(name) if good and name in kept else -1)
    for name in kept:
        mine = (identities == name) & usable
        in_val = int((plan.val & mine).sum())
        assert in_val == min(counts[name] * percent // 100, counts[name] - 1)  # whole-number arithmetic
    assert not plan.val[plan.label < 0].any()
    table = {row["identity"]: row for row in plan.labels.to_pylist()}
    assert {name: row["images"] for name, row in table.items()} == counts
    assert {name for name, row in table.items() if row["dropped"] is None} == set(kept)
    assert all(row["train"] + row["val"] == (counts[name] if name in kept else 0) for name, row in table.items())


def test_the_split_follows_from_the_seed() -> None:
    identities, usable = np.repeat(np.array(["a", "b", "c"], object), 20), np.ones(60, bool)
    one, again, other = (make_plan(identities, usable, shard(seed=seed)).val for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_a_dropped_identity_says_why() -> None:
    identities = np.array(["a", "b", "b", "c", "c"], object)
    plan = make_plan(identities, np.ones(5, bool), shard(min_images=2))
    assert plan.labels.to_pylist()[0] == {
        "label": None,
        "identity": "a",
        "images": 1,
        "train": 0,
        "val": 0,
        "dropped": "1 faces, fewer than 2",
    }


def test_the_shuffle_is_a_permutation() -> None:
    rows = np.arange(1000) * 3
    mixed = shuffled(rows, 5)
    assert sorted(mixed) == list(rows)
    # Neighbours of a fair shuffle are about n/3 apart; of a local one, far less.
    assert 250 < np.abs(np.diff(mixed // 3)).mean() < 420
