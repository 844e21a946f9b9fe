import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
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
    bits = rng.integers(0, 2, (3, 256), dtype=np.uint8)[rng.integers(0, 3, (count, 2))]
    for row in bits.reshape(-1, 256):
        row[rng.permutation(256)[: rng.integers(0, spread + 1)]] ^= 1
    hashes = np.packbits(bits, axis=2).view(np.uint64).reshape(count, 2, 4)
    group = rng.integers(0, groups, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.shard.hashes._CANDIDATES", candidates)
        patch.setattr("stages.shard.hashes._EQUAL", (equal,))
        batches = list(near_pairs(hashes, group, distance))
    assert all(len(one) == len(other) <= max(candidates, 2 * count) for one, other in batches)
    found = {pair for one, other in batches for pair in zip(one.tolist(), other.tolist(), strict=True)}
    assert found == {
        (i, j)
        for i in range(count)
        for j in range(count)
        if group[i] < group[j] and (bits[i, :, None] != bits[j]).sum(axis=-1).min() <= distance
    }


def test_the_more_hashes_the_more_sets_of_bits_are_equal() -> None:
    for group in (np.arange(4_000_000), np.arange(4_000_000) // 50):
        chosen = [_plan(group[:count].astype(np.uint64), 24)[0] for count in (100, 10_000, 1_000_000, 4_000_000)]
        assert chosen == sorted(chosen)
        assert chosen[0] < chosen[-1]
    assert _plan(np.zeros(1_000_000, np.uint64), 24)[0] == 1  # nothing is to be compared


def test_bits_apart_are_counted_to_the_last() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (4, 2, 256), dtype=np.uint8)
    hashes = np.packbits(bits, axis=2).view(np.uint64)
    one, other = bits[:, None, :, None], bits[None, :, None]
    assert bits_apart(hashes[:, None], hashes[None]).tolist() == (one != other).sum(axis=-1).min(axis=(2, 3)).tolist()
    all_apart = np.stack([np.zeros((2, 4), np.uint64), np.full((2, 4), 2**64 - 1, np.uint64)])
    assert bits_apart(all_apart[0], all_apart[1]) == 256


@pytest.fixture(scope="module")
def face() -> Image.Image:
    return Image.fromarray(data.astronaut()[20:180, 150:300]).convert("L").resize((112, 112), Image.Resampling.LANCZOS)


def apart(a: Image.Image, b: Image.Image) -> int:
    one, other = (perceptual_hash(np.asarray(image, np.uint8)) for image in (a, b))
    return int(bits_apart(one, other))


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
    for copy in copies:
        assert apart(face, copy) <= 24
        assert apart(face, ImageOps.mirror(copy)) <= 24
    other = Image.fromarray(data.camera()[60:220, 150:300]).resize((112, 112))
    assert apart(face, other) > 64
    assert apart(face, face.rotate(8)) > 32
    assert apart(face, ImageOps.flip(face)) > 64


@pytest.mark.parametrize("size", [(112, 112), (96, 112), (152, 152)])
def test_bits_are_those_of_the_transform(face: Image.Image, size: tuple[int, int]) -> None:
    """The sign of each of the 16×16 lowest frequencies less their median, of image and mirror image, by scipy."""
    from scipy.fft import dct

    image = face.resize(size)
    for made, seen in zip(perceptual_hash(np.asarray(image, np.uint8)), (image, ImageOps.mirror(image)), strict=True):
        low = dct(dct(np.asarray(seen, float), axis=0), axis=1)[:16, :16]
        assert (made == np.packbits(low > np.median(low)).view(np.uint64)).all()
