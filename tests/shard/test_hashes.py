import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from stages.shard.hashes import _plan, bits_apart, near_pairs, perceptual_hash


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 40),
    distance=st.integers(0, 32),
    spread=st.integers(0, 40),
    groups=st.integers(1, 40),
    candidates=st.integers(1, 100),
    equal=st.integers(1, 3),
)
def test_near_pairs_are_those_of_a_brute_force(
    seed: int, count: int, distance: int, spread: int, groups: int, candidates: int, equal: int
) -> None:
    """Hashes around a few centres, off by up to `spread` bits, compared few at a time."""
    distance //= (1, 3, 6)[equal - 1]  # or there are thousands of keys
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (3, 256), dtype=np.uint8)[rng.integers(0, 3, count)]
    for row in bits:
        row[rng.permutation(256)[: rng.integers(0, spread + 1)]] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64).reshape(count, 4)
    group = rng.integers(0, groups, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.shard.hashes._CANDIDATES", candidates)
        patch.setattr("stages.shard.hashes._EQUAL", (equal,))
        batches = list(near_pairs(hashes, group, distance))
    assert all(len(one) == len(other) <= max(candidates, count) for one, other in batches)
    found = {pair for one, other in batches for pair in zip(one.tolist(), other.tolist(), strict=True)}
    assert found == {
        (i, j)
        for i in range(count)
        for j in range(count)
        if group[i] < group[j] and (bits[i] != bits[j]).sum() <= distance
    }


def test_the_more_hashes_the_more_sets_of_bits_are_equal() -> None:
    for group in (np.arange(4_000_000), np.arange(4_000_000) // 50):
        chosen = [_plan(group[:count].astype(np.uint64), 24)[0] for count in (100, 10_000, 1_000_000, 4_000_000)]
        assert chosen == sorted(chosen)
        assert chosen[0] < chosen[-1]
    assert _plan(np.zeros(1_000_000, np.uint64), 24)[0] == 1  # nothing is to be compared


def test_bits_apart_are_counted_to_the_last() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, 256), dtype=np.uint8)
    bits[1] = 1 - bits[0]
    hashes = np.packbits(bits, axis=1).view(np.uint64)
    assert bits_apart(hashes[:, None], hashes[None]).tolist() == (bits[:, None] != bits[None]).sum(axis=2).tolist()


@pytest.fixture(scope="module")
def face() -> Image.Image:
    return Image.fromarray(data.astronaut()[20:180, 150:300]).convert("L").resize((112, 112), Image.Resampling.LANCZOS)


def apart(a: Image.Image, b: Image.Image) -> int:
    one, other = (perceptual_hash(np.asarray(image, np.uint8)) for image in (a, b))
    return int(np.bitwise_count(one ^ other).sum())


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_a_copy_is_near_and_another_face_is_far(face: Image.Image) -> None:
    copies = [
        recompressed(face, 30),
        face.resize((64, 64)).resize((112, 112)),
        face.point(lambda value: int(value * 0.8 + 20)),
    ]
    assert all(apart(face, copy) <= 24 for copy in copies)
    other = Image.fromarray(data.camera()[60:220, 150:300]).resize((112, 112))
    assert apart(face, other) > 64
    assert apart(face, face.rotate(8)) > 32


def test_bits_are_those_of_the_transform(face: Image.Image) -> None:
    """The sign of each of the 16×16 lowest frequencies of the reduced image, less their median, by scipy itself."""
    from scipy.fft import dct

    small = np.asarray(face.resize((64, 64), Image.Resampling.LANCZOS), float)
    low = dct(dct(small, axis=0), axis=1)[:16, :16]
    expected = np.packbits(low > np.median(low)).view(np.uint64)
    assert (perceptual_hash(np.asarray(face, np.uint8)) == expected).all()
