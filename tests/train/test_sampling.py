from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from stages.train import sampling
from stages.train.sampling import Balanced, Uniform, uniforms

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=70)


def starts(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


@given(sizes=SIZES, seed=st.integers(0, 5), batch=st.integers(1, 40), first=st.integers(0, 30))
def test_every_row_once_an_epoch_wherever_one_begins(sizes: list[int], seed: int, batch: int, first: int) -> None:
    total = sum(sizes)
    stream = Uniform(starts(sizes), seed)
    rows, epochs = stream.rows(np.arange(3 * total))
    assert (epochs == np.repeat([0, 1, 2], total)).all()
    for epoch in range(3):
        assert sorted(rows[epochs == epoch]) == list(range(total))
    begin = min(first * batch, 2 * total)
    some, _ = Uniform(starts(sizes), seed).rows(np.arange(begin, begin + batch))
    assert (some == stream.rows(np.arange(begin + batch))[0][begin:]).all()
    apart = np.arange(0, 3 * total, 1 + first)  # as ranks and processes take theirs
    assert (np.stack(stream.rows(apart)) == np.stack([rows, epochs])[:, apart]).all()


@given(sizes=SIZES, seed=st.integers(0, 5), place=st.integers(0, 500))
def test_pools_are_what_is_read_next(sizes: list[int], seed: int, place: int) -> None:
    stream = Uniform(starts(sizes), seed)
    now, after = stream.pools(place, 2)
    rows, _ = stream.rows(np.array([place]))
    assert np.searchsorted(starts(sizes), rows[0], side="right") - 1 in now
    assert len(now) <= sampling.POOL_GROUPS
    following, _ = stream.rows(place + np.arange(sum(sizes[g] for g in after) + 1))
    groups = np.searchsorted(starts(sizes), following, side="right") - 1
    assert set(groups) <= {*now, *after}


def test_epochs_and_seeds_differ() -> None:
    one, other = Uniform(starts([8] * 40), 1), Uniform(starts([8] * 40), 2)
    first, second = np.split(one.rows(np.arange(640))[0], 2)
    assert (first != second).any()
    assert (first != other.rows(np.arange(320))[0]).any()


def test_a_pool_mixes_what_the_writer_left_together() -> None:
    """Neighbours in the stream come from all of a pool's 16 groups: the chance that two share one is about 1/16."""
    groups = np.searchsorted(starts([64] * 64), Uniform(starts([64] * 64), 1).rows(np.arange(4096))[0], side="right")
    assert 0.04 < (groups[1:] == groups[:-1]).mean() < 0.09


@given(
    counts=st.lists(st.integers(1, 7), min_size=2, max_size=12),
    identities=st.integers(1, 13),
    images=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_laws_of_balanced_sampling(counts: list[int], identities: int, images: int, seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    if identities > len(counts):
        with pytest.raises(InputError, match=f"the training split has only {len(counts)} identities"):
            Balanced(labels, identities, images, seed)
        return
    stream = Balanced(labels, identities, images, seed)
    batch, batches = identities * images, 2 * (len(counts) // identities)
    rows, laps = stream.rows(np.arange(batches * batch))
    assert len({*zip(rows.tolist(), laps.tolist(), strict=True)}) == len(rows)  # a row comes once a lap
    of = labels[rows].reshape(batches, identities, images)
    assert (of == of[:, :, :1]).all()  # `images` of the same identity together
    assert all(len(set(people)) == identities for people in of[:, :, 0])  # no identity twice in a batch
    for of_round in of[:, :, 0].reshape(2, -1):
        assert len(set(of_round)) == len(of_round)  # nor in a round
    half = len(rows) // 2
    for again, whole in zip(
        Balanced(labels, identities, images, seed).rows(np.arange(half, len(rows))), (rows, laps), strict=True
    ):
        assert (again == whole[half:]).all()


def test_every_image_of_an_identity_comes_before_any_comes_again() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), [4, 6, 12])
    rows, laps = Balanced(labels, 3, 2, 1).rows(np.arange(3 * 2 * 6))
    assert laps.tolist() == [rows[:place].tolist().count(row) for place, row in enumerate(rows.tolist())]
    for identity, count in enumerate((4, 6, 12)):
        times = Counter(rows[labels[rows] == identity].tolist())
        assert set(times.values()) == {12 // count}
        assert len(times) == count


def test_random_numbers_belong_to_the_example() -> None:
    rows, laps = np.arange(2000), np.zeros(2000, int)
    u = uniforms(1, laps, rows, 3)
    assert u.shape == (2000, 3)
    assert (uniforms(1, laps[7:9], rows[7:9], 3) == u[7:9]).all()
    assert (u >= 0).all()
    assert (u < 1).all()
    for other in (uniforms(2, laps, rows, 3), uniforms(1, laps + 1, rows, 3), uniforms(1, laps, rows + 5000, 3)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.06  # five standard errors of independence
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.12
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 300) ** 2 / 300).sum() < 60  # chi-squared of 19 degrees: 1 in a million above 63


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs for the seed 1234567, as the reference implementation by Vigna prints them."""
    state, outputs = np.uint64(1234567), []
    with np.errstate(over="ignore"):
        for _ in range(3):
            state = state + sampling._GOLDEN
            outputs.append(int(sampling._mix(state)))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
