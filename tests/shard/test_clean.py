import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stages.shard.clean import Faces, clean
from stages.shard.errors import ShardError
from stages.shard.names import spellings
from tests.samples import ROOT, shard_section


def faces(*rows: tuple[str, str, str, int], sizes: dict[str, float] | None = None) -> Faces:
    """Rows of (image, identity, content, which of some random hashes); no hash (-1) is no face."""
    rng = np.random.default_rng(0).integers(0, 2**63, (50, 2, 4), dtype=np.uint64)
    hashes = np.stack([rng[number] if number >= 0 else np.zeros((2, 4), np.uint64) for *_, number in rows])
    column = [pa.chunked_array([[row[i] for row in rows]], pa.string()) for i in range(3)]
    status = np.array(["detected" if number >= 0 else "no_face" for *_, number in rows], object)
    size = np.array([(sizes or {}).get(row[0], 80.0) for row in rows])
    return Faces(column[0], column[1], column[2], status, size, hashes)


def near(known: Faces, row: int, to: int, bits: int, *, mirrored: bool = False) -> None:
    """Let the hashes of a row differ from those of another, or from those of its mirror image, in so many bits."""
    assert known.hashes is not None
    known.hashes[row] = known.hashes[to, ::-1] if mirrored else known.hashes[to]
    known.hashes[row, :, 0] ^= np.uint64(2**bits - 1)


def dropped(known: Faces, evaluation: dict[str, Faces] | None = None, **changes: Any) -> dict[str, tuple[Any, ...]]:
    table = clean(known, evaluation or {}, shard_section(clean=changes).clean)
    return {row["image_id"]: (row["reason"], row["of"], row["distance"]) for row in table.to_pylist()}


OTHERS = (("x/1", "x", "x1", 40), ("y/1", "y", "y1", 41))
"""Two identities that nothing befalls."""


def test_nothing_is_left_out_unasked() -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "s", 0), ("b/1", "b", "s", 0), ("b/2", "b", "t", -1), *OTHERS)
    assert dropped(known) == {"b/2": ("no_face", None, None)}


def test_of_copies_within_an_identity_the_largest_face_stays() -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "s", 0), ("a/3", "a", "s", 0), *OTHERS, sizes={"a/2": 90.0})
    assert dropped(known, duplicates=True) == {"a/1": ("duplicate", "a/2", None), "a/3": ("duplicate", "a/2", None)}


def test_copies_that_bear_two_identities_all_go() -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "t", 1), ("b/1", "b", "s", 0), ("b/2", "b", "u", 2))
    assert dropped(known, duplicates=True) == {
        "a/1": ("contradiction", "b/1", None),
        "b/1": ("contradiction", "a/1", None),
    }


def test_who_is_out_for_another_reason_contradicts_still() -> None:
    """One identity's name is a test person's; of the photographs that another has of the same person none may stay."""
    known = faces(
        ("A/1", "Al Gore", "s", 0), ("A/2", "Al Gore", "t", 1), ("n/1", "n", "s", 0), ("n/2", "n", "u", 2), *OTHERS
    )
    near(known, 3, to=1, bits=3)
    theirs = {"lfw": faces(("Q/1", "Al_Gore", "v", 9))}
    assert dropped(known, theirs, same_names=True, duplicates=True, near_duplicates=8) == {
        "A/1": ("evaluated_name", "lfw: Al_Gore", None),
        "A/2": ("evaluated_name", "lfw: Al_Gore", None),
        "n/1": ("contradiction", "A/1", None),
        "n/2": ("contradiction_near", "A/2", 3),
    }


def test_a_near_copy_of_what_is_disputed_is_disputed() -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "t", 0), ("b/1", "b", "s", 0), *OTHERS)
    near(known, 1, to=0, bits=3)
    assert dropped(known, duplicates=True, near_duplicates=8) == {
        "a/1": ("contradiction", "b/1", None),
        "a/2": ("contradiction_near", "b/1", 3),
        "b/1": ("contradiction", "a/1", None),
    }


def test_what_people_exclude_takes_its_copies_along_and_speaks_against_nobody(tmp_path: Path) -> None:
    rows = (
        ("a/1", "a", "s", 0),
        ("a/2", "a", "s", 0),
        ("a/3", "a", "t", 0),
        ("b/1", "b", "s", 0),
        ("b/2", "b", "u", 1),
    )
    known, listed = faces(*rows, *OTHERS), tmp_path / "exclude.csv"
    near(known, 2, to=0, bits=3)
    listed.write_text("image_id,identity,reason\na/1,a,is b\n")
    assert dropped(known, duplicates=True, near_duplicates=8, exclude=str(listed)) == {
        "a/1": ("excluded", None, None),
        "a/2": ("excluded", "a/1", None),
        "a/3": ("excluded", "a/1", 3),
    }


def test_near_copies() -> None:
    known = faces(
        ("a/1", "a", "1", 0),
        ("a/2", "a", "2", 1),
        ("a/3", "a", "3", 2),
        ("b/1", "b", "4", 3),
        ("b/2", "b", "5", 4),
        *OTHERS,
    )
    near(known, 1, to=0, bits=7)
    near(known, 3, to=2, bits=8, mirrored=True)
    assert dropped(known, duplicates=True, near_duplicates=8) == {
        "a/2": ("near_duplicate", "a/1", 7),
        "a/3": ("contradiction_near", "b/1", 8),
        "b/1": ("contradiction_near", "a/3", 8),
    }
    assert dropped(known, duplicates=True, near_duplicates=7) == {"a/2": ("near_duplicate", "a/1", 7)}
    assert dropped(known, duplicates=True, near_duplicates=None) == {}


def test_a_chain_of_near_copies_keeps_what_is_far_from_what_stays() -> None:
    """1 and 2 are near, 2 and 3 are near, 1 and 3 are not: 2 goes, 1 and 3 stay."""
    known = faces(("a/1", "a", "1", 0), ("a/2", "a", "2", 1), ("a/3", "a", "3", 2), *OTHERS)
    assert known.hashes is not None
    known.hashes[1] = known.hashes[2] = known.hashes[0]
    known.hashes[1, :, 0] ^= np.uint64(0b1111)
    known.hashes[2, :, 0] ^= np.uint64(0b11111111)
    assert dropped(known, duplicates=True, near_duplicates=4) == {"a/2": ("near_duplicate", "a/1", 4)}


class Photograph(NamedTuple):
    image: str
    identity: str
    content: str
    hash: NDArray[np.uint64]
    size: float


def photographs(known: Faces, prefix: str = "") -> list[Photograph]:
    """Those with a face."""
    assert known.hashes is not None
    ids, identities, contents = (column.to_pylist() for column in (known.image_id, known.identity, known.sha256))
    return [
        Photograph(prefix + ids[row], identities[row], contents[row], known.hashes[row], known.size[row])
        for row in np.flatnonzero(known.status == "detected").tolist()
    ]


def by_definition(
    known: Faces, evaluation: dict[str, Faces], bits: int, excluded: set[str]
) -> dict[str, tuple[Any, ...]]:
    """What is left out because people have said so, or as a copy, photograph by photograph."""

    def equal(one: Photograph, other: Photograph) -> tuple[bool, None]:
        return one.content == other.content, None

    def near(one: Photograph, other: Photograph) -> tuple[bool, int]:
        apart = min(int(np.bitwise_count(a ^ b).sum()) for a in one.hash for b in other.hash)
        return apart <= bits, apart

    left = photographs(known)
    theirs = [each for name, of_set in evaluation.items() for each in photographs(of_set, f"{name}: ")]
    gone: dict[str, tuple[Any, ...]] = {one.image: ("excluded", None, None) for one in left if one.image in excluded}

    def look(one: Photograph, others: Iterable[Photograph], copy: Any, reason: str) -> None:
        """Note that one is to go if it is a copy of any of the others."""
        for other in others:
            if (found := copy(one, other))[0]:
                gone[one.image] = (reason, other.image, found[1])
                break

    def still() -> list[Photograph]:
        return [one for one in left if one.image not in gone]

    wrong = [one for one in left if one.image in excluded]
    for copy in (equal, near):
        for one in still():
            look(one, [other for other in wrong if other.identity == one.identity], copy, "excluded")
    witnesses = still()
    for copy, evaluated, contradiction, duplicate in (
        (equal, "evaluated_photograph", "contradiction", "duplicate"),
        (near, "evaluated_near", "contradiction_near", "near_duplicate"),
    ):
        for one in still():
            look(one, theirs, copy, evaluated)
        for one in still():
            look(one, [other for other in witnesses if other.identity != one.identity], copy, contradiction)
        stays = list[Photograph]()
        for one in sorted(still(), key=lambda each: -each.size):
            look(one, [other for other in stays if other.identity == one.identity], copy, duplicate)
            stays += [] if one.image in gone else [one]
    return gone


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 40),
    centres=st.integers(1, 20),
    spread=st.integers(0, 16),
    people=st.integers(1, 12),
    theirs=st.integers(0, 6),
    cells=st.integers(1, 300),
    wrong=st.integers(0, 4),
)
def test_copies_by_definition(
    seed: int, count: int, centres: int, spread: int, people: int, theirs: int, cells: int, wrong: int
) -> None:
    """Chains, cliques and ties among people and evaluation sets, compared a few at a time."""
    rng = np.random.default_rng(seed)
    middles = rng.integers(0, 2, (centres, 256), dtype=np.uint8)

    def some(count: int) -> Faces:
        rows = [
            (f"{i}", f"p{rng.integers(people)}", f"{rng.integers(3 * count)}", int(rng.integers(-1, 15)))
            for i in range(count)
        ]
        known = faces(*rows, sizes={f"{i}": float(rng.integers(40, 44)) for i in range(count)})
        bits = middles[rng.integers(0, centres, (count, 2))]
        for row in bits.reshape(-1, 256):
            row[rng.permutation(256)[: rng.integers(0, spread + 1)]] ^= 1
        return replace(known, hashes=np.packbits(bits, axis=2).view(np.uint64).reshape(count, 2, 4))

    evaluation = {"lfw": some(theirs // 2), "ytf": some(theirs - theirs // 2)} if theirs > 1 else {}
    known, rest = some(count), faces(*OTHERS)  # or fewer than two people might be left
    ids, identities, contents = (
        pa.chunked_array(getattr(known, column).chunks + getattr(rest, column).chunks)
        for column in ("image_id", "identity", "sha256")
    )
    arrays = (np.concatenate([getattr(known, name), getattr(rest, name)]) for name in ("status", "size", "hashes"))
    excluded = {str(i) for i in rng.permutation(count)[:wrong]}
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr("stages.shard.copies._CELLS", cells)
        listed = Path(folder) / "exclude.csv"
        listed.write_text("\n".join(["image_id,identity,reason", *(f"{image},," for image in sorted(excluded))]))
        changes = {"duplicates": True, "near_duplicates": 8, "exclude": str(listed)}
        found = dropped(Faces(ids, identities, contents, *arrays), evaluation, **changes)
    found = {image: why for image, why in found.items() if why[0] != "no_face"}
    assert found == by_definition(known, evaluation, 8, excluded)


@pytest.mark.parametrize("near_duplicates", [None, 24])
@pytest.mark.parametrize("identities", [1, 5000])
def test_thousands_of_copies_of_one_photograph(identities: int, near_duplicates: int | None) -> None:
    """Of which there are fifty million pairs."""
    count = 10_000
    number = np.arange(count)
    known = faces(*((f"{i}", f"p{i % identities}", "s", 0) for i in number), *OTHERS)
    found = dropped(known, duplicates=True, near_duplicates=near_duplicates)
    assert len(found) == count - (identities == 1)
    assert found["9999"] == (("duplicate", "0", None) if identities == 1 else ("contradiction", "0", None))


def test_thousands_of_near_copies_of_one_photograph() -> None:
    known = faces(*((f"{i}", "p", f"{i}", 0) for i in range(5000)), *OTHERS)
    for row in range(1, 5000):
        near(known, row, to=0, bits=1 + row % 12)
    found = dropped(known, duplicates=True, near_duplicates=24)
    assert len(found) == 4999
    assert found["4999"] == ("near_duplicate", "0", 1 + 4999 % 12)


def test_photographs_of_an_evaluation_set() -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "t", 1), ("a/3", "a", "u", 2), *OTHERS)
    theirs = faces(("Q/1", "Q", "s", 0), ("Q/2", "Q", "v", 1), ("Q/3", "Q", "w", 3), ("Q/4", "Q", "w", 3))
    assert dropped(known, {"lfw": theirs}, duplicates=True, near_duplicates=3) == {
        "a/1": ("evaluated_photograph", "lfw: Q/1", None),
        "a/2": ("evaluated_near", "lfw: Q/2", 0),
    }


def test_names_of_an_evaluation_set(tmp_path: Path) -> None:
    known = faces(("1/1", "José  Núñez", "s", 0), ("2/1", "0042", "t", 1), ("3/1", "0043", "u", 2), *OTHERS)
    theirs = {"lfw": faces(("Q/1", "Jose_Nunez", "q", 5)), "ytf": faces(("R/1", "Al_Gore", "r", 6))}
    (tmp_path / "names.txt").write_text("# numbers and names\n0042 Al Gore\n0043\tTipper_Gore\n")
    assert dropped(known, theirs, same_names=True) == {"1/1": ("evaluated_name", "lfw: Jose_Nunez", None)}
    assert dropped(known, theirs, same_names=True, names=str(tmp_path / "names.txt")) == {
        "1/1": ("evaluated_name", "lfw: Jose_Nunez", None),
        "2/1": ("evaluated_name", "ytf: Al_Gore", None),
    }


def test_a_number_is_no_name_unless_the_list_has_it(tmp_path: Path) -> None:
    known = faces(
        ("1/1", "0042", "s", 0), ("2/1", "17", "t", 1), ("3/1", "__", "u", 2), ("4/1", "p17", "v", 3), *OTHERS
    )
    theirs = {
        "probes": faces(("Q/1", "0042", "q", 5), ("Q/2", "17", "q", 6), ("Q/3", "..", "q", 7), ("Q/4", "p17", "r", 8))
    }
    named = {"4/1": ("evaluated_name", "probes: p17", None)}
    assert dropped(known, theirs, same_names=True) == named
    (tmp_path / "names.txt").write_text("0042 17\n17 ?\n")
    assert dropped(known, theirs, same_names=True, names=str(tmp_path / "names.txt")) == named | {
        "1/1": ("evaluated_name", "probes: 17", None)
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zoë_O'Neill", "ZOE ONEILL"),
        ("Jelena Đokić", "Jelena_Dokic"),  # as LFW spells them
        ("Lech Wałęsa", "Lech_Walesa"),
        ("Zoran Đinđić", "Zoran_Djindjic"),
        ("Gerhard Schröder", "Gerhard_Schroeder"),
        ("Gerhard Schröder", "Gerhard Schroder"),
        ("Thomas Bjørn", "Thomas_Bjorn"),
        ("Ǿ. Ǽrø", "O_Aero"),
        ("Rıza Yıldız", "Riza_Yildiz"),
        ("İbrahim", "ibrahim"),
        ("Андрей Королёв", "андреи королев"),
        ("مُحَمَّد", "محمد"),
        ("Ａｎｎａ", "anna"),
    ],
)
def test_one_name_in_two_spellings(one: str, other: str) -> None:
    for form in ("NFC", "NFD"):
        assert set(spellings(unicodedata.normalize(form, one))) & set(spellings(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Müller", "Möller"),
        ("Muller", "Mueller"),
        ("सीमा", "समी"),
        ("राम", "रमा"),
        ("かわだ", "かわた"),
        ("はら", "ばら"),
    ],
)
def test_two_names(one: str, other: str) -> None:
    assert not set(spellings(one)) & set(spellings(other))


@given(name=st.text())
def test_a_name_has_one_or_two_spellings_of_letters_and_digits_alone(name: str) -> None:
    found = spellings(name)
    assert len(found) <= 2
    assert all(found)
    assert all(unicodedata.category(c)[0] in "LMN" for spelling in found for c in spelling)
    assert spellings(f"{name}.") == found


def test_published_lists() -> None:
    # Hillary Clinton, Randy Jackson; the first and the last of FaceScrub's
    known = faces(
        ("a/1", "0166921", "s", 0),
        ("b/1", "1193098", "t", 1),
        ("c/1", "0166922", "u", 2),
        ("d/1", "0111013", "v", 3),
        ("e/1", "1842439", "w", 4),
        *OTHERS,
    )
    listed = ("published_list", None, None)
    assert dropped(known, lists=["casia-webface-lfw"]) == {"a/1": listed, "b/1": listed}
    assert dropped(known, lists=["casia-webface-facescrub"]) == {"d/1": listed, "e/1": listed}
    assert len(dropped(known, lists=["casia-webface-lfw", "casia-webface-facescrub"])) == 4


@pytest.mark.parametrize(("name", "people"), [("casia-webface-lfw", 16), ("casia-webface-facescrub", 42)])
def test_a_published_list_has_as_many_people_as_its_source(name: str, people: int) -> None:
    lines = (ROOT / "stages" / "shard" / "lists" / f"{name}.txt").read_text().splitlines()
    identities = [line for line in lines if not line.startswith("#")]
    assert all(len(identity) == 7 and identity.isdigit() for identity in identities)
    assert len(set(identities)) == len(identities) == people


def test_who_has_no_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = faces(("1/1", "0042", "s", 0), ("2/1", "17", "t", 1), *OTHERS)
    names = tmp_path / "names.txt"
    names.write_text("0042 Al Gore\n")
    dropped(known, same_names=True, names=str(names))
    assert caplog.messages == [
        "shard.clean.same_names: 1 of the training set's 4 identities, such as '17', are numbers without a name in "
        f"{names}: whether they are people of the test sets is not known by name"
    ]
    caplog.clear()
    names.write_text("0042 Al Gore\n17 Tipper Gore\n")
    dropped(known, same_names=True, names=str(names))
    assert caplog.messages == []


def test_a_published_list_of_which_the_set_has_nobody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    known = faces(("a/1", "166921", "s", 0), *OTHERS)
    assert dropped(known, lists=["casia-webface-lfw"]) == {}
    assert caplog.messages == [
        "shard.clean.lists: the training set has none of the identities of casia-webface-lfw, such as '0000513'; the "
        "set's are written as '166921'. If it has these people by other names, list them in "
        f"{ROOT / 'data' / 'exclude.csv'}"
    ]
    caplog.clear()
    dropped(faces(("a/1", "0166921", "s", 0), *OTHERS), lists=["casia-webface-lfw"])
    assert caplog.messages == []


def test_what_people_have_decided(tmp_path: Path) -> None:
    known = faces(("a/1", "a", "s", 0), ("a/2", "a", "t", 1), ("b/1", "b", "u", 2), *OTHERS)
    listed = tmp_path / "exclude.csv"
    listed.write_text("image_id,identity,reason\na/2,a,a drawing\n,b,is x\n")
    assert dropped(known, exclude=str(listed)) == {"a/2": ("excluded", None, None), "b/1": ("excluded", None, None)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,identity\n", "its first line must be 'image_id,identity,reason', not 'image_id,identity'"),
        ("image_id,identity,reason\na/1,a,x\nnobody/1,a,x\n", "line 3: the training set has no image 'nobody/1'"),
        ("image_id,identity,reason\n,nobody,x\n", "line 2: the training set has no identity 'nobody'"),
        (None, "no such file, though shard.clean.exclude in params.yaml names it"),
    ],
)
def test_a_wrong_list_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    listed = tmp_path / "exclude.csv"
    if content is not None:
        listed.write_text(content)
    with pytest.raises(ShardError, match=message):
        dropped(faces(("a/1", "a", "s", 0), *OTHERS), exclude=str(listed))


def test_lists_from_windows_begin_with_a_mark(tmp_path: Path) -> None:
    known = faces(("1/1", "0042", "s", 0), ("a/1", "a", "t", 1), *OTHERS)
    theirs = {"lfw": faces(("R/1", "Al_Gore", "r", 6))}
    names, exclude = tmp_path / "names.txt", tmp_path / "exclude.csv"
    names.write_text("0042 Al Gore\n", encoding="utf-8-sig")
    exclude.write_text("image_id,identity,reason\na/1,a,a drawing\n", encoding="utf-8-sig")
    assert dropped(known, theirs, same_names=True, names=str(names), exclude=str(exclude)) == {
        "1/1": ("evaluated_name", "lfw: Al_Gore", None),
        "a/1": ("excluded", None, None),
    }


def test_names_of_another_set_are_refused(tmp_path: Path) -> None:
    known, names = faces(("1/1", "0042", "s", 0), *OTHERS), tmp_path / "names.txt"
    names.write_text("# CASIA-WebFace\n42 Al Gore\n43 Tipper Gore\n")
    with pytest.raises(ShardError, match=r"names\.txt: the training set has none of its identities, such as '42'"):
        dropped(known, same_names=True, names=str(names))
    names.write_text("43 Tipper Gore\n0042 Al Gore\n")  # a list may be longer than the set
    assert dropped(known, same_names=True, names=str(names)) == {}
    names.write_text("# nobody yet\n")
    assert dropped(known, same_names=True, names=str(names)) == {}


def test_a_line_without_a_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("0042 Al Gore\n0043\n")
    with pytest.raises(ShardError, match=r"names\.txt: line 2: expected `<identity> <name>`, not '0043'"):
        dropped(faces(("a/1", "a", "s", 0), *OTHERS), same_names=True, names=str(tmp_path / "names.txt"))


def test_two_names_of_one_identity_are_refused(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("0042 Al Gore\n0043 Tipper Gore\n0042 Al Gore\n0043 Al Gore\n")
    with pytest.raises(
        ShardError, match=r"names\.txt: line 4: '0043' would be 'Al Gore', but is 'Tipper Gore' by an ea"
    ):
        dropped(faces(("1/1", "0042", "s", 0), *OTHERS), same_names=True, names=str(names))


def test_an_identity_with_spaces_needs_a_tab_behind_it(tmp_path: Path) -> None:
    known, names = faces(("1/1", "person 1", "s", 0), ("2/1", "person 22", "t", 1), *OTHERS), tmp_path / "names.txt"
    theirs = {"lfw": faces(("R/1", "Al_Gore", "r", 6))}
    names.write_text("person 1 Al Gore\nx y\n")
    with pytest.raises(
        ShardError, match=r"'person' is called '1 Al Gore', but the training set has 'person 1'; put a tab"
    ):
        dropped(known, theirs, same_names=True, names=str(names))
    names.write_text("person 1 Al Gore\nperson 22 Tipper Gore\n")
    with pytest.raises(
        ShardError, match=r"line 2: 'person' would be '22 Tipper Gore', .* put a tab behind each identity"
    ):
        dropped(known, theirs, same_names=True, names=str(names))
    names.write_text("person 1\tAl Gore\nperson 22\t Tipper Gore\n")
    assert dropped(known, theirs, same_names=True, names=str(names)) == {
        "1/1": ("evaluated_name", "lfw: Al_Gore", None)
    }


def test_identities_of_whom_too_little_is_left_go_last() -> None:
    known = faces(
        ("a/1", "a", "s", 0),
        ("a/2", "a", "s", 0),
        ("b/1", "b", "u", 2),
        ("b/2", "b", "v", 3),
        ("c/1", "c", "w", 4),
        ("c/2", "c", "x", 5),
    )
    assert dropped(known, duplicates=True, min_images=2) == {
        "a/1": ("few_images", None, None),
        "a/2": ("duplicate", "a/1", None),
    }
    with pytest.raises(
        ShardError,
        match=r"0 of 3 identities have at least shard\.clean\.min_images = 3 faces left; .* out: 6 few_images \(",
    ):
        dropped(known, min_images=3)
