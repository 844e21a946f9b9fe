from pathlib import Path

import pytest

from stages.download.errors import SourceError
from stages.download.layouts import HARMLESS, Ids, above, alike, ids, why_skipped, within
from stages.download.protocols import Pair, check_pairs, pairs_table, read_pairs


@pytest.mark.parametrize(
    ("set_name", "path", "expected"),
    [
        ("train", "CASIA-WebFace/0000045/001.jpg", Ids("0000045/001", "0000045", None, None)),
        ("train", "./0000045/001.jpg", Ids("0000045/001", "0000045", None, None)),
        (
            "train",
            "home/me//my faces/José Ünal/at.the.beach.JPEG",
            Ids("José Ünal/at.the.beach", "José Ünal", None, None),
        ),
        ("lfw", "lfw/Aaron_Guiel/Aaron_Guiel_0001.jpg", Ids("Aaron_Guiel/Aaron_Guiel_0001", "Aaron_Guiel", None, None)),
        (
            "ytf",
            "YouTubeFaces/frame_images_DB/Abdel_Aziz_Al-Hakim/0/0.15.jpg",
            Ids("Abdel_Aziz_Al-Hakim/0/0.15", "Abdel_Aziz_Al-Hakim", "Abdel_Aziz_Al-Hakim/0", 15),
        ),
        ("ytf", "me/holiday/frame0007.png", Ids("me/holiday/frame0007", "me", "me/holiday", 7)),
    ],
)
def test_paths_become_ids(set_name: str, path: str, expected: Ids) -> None:
    assert why_skipped(set_name, path) is None
    assert ids(set_name, path) == expected


@pytest.mark.parametrize(
    ("set_name", "path", "reason"),
    [
        ("train", "a/readme.txt", "files that are no images"),
        ("train", ".", "files that are no images"),
        ("train", "a/jpg", "files that are no images"),
        ("train", "a/1.HEIC", "photographs of a kind that is not read (.heic)"),
        ("train", "a/.DS_Store", "hidden files"),
        ("train", "a/._1.jpg", "hidden files"),
        ("train", ".thumbs/a/1.jpg", "hidden files"),
        ("train", "__MACOSX/a/1.jpg", "hidden files"),
        ("train", "1.jpg", "images outside <identity>/<image>.jpg"),
        ("ytf", "a/1.jpg", "images outside <identity>/<video>/<frame number>.jpg"),
        ("ytf", "YouTubeFaces/aligned_images_DB/A/0/aligned_detect_0.15.jpg", "aligned copies of frames"),
        ("ytf", "YouTubeFaces/frame_images_DB/A.labeled_faces.txt", "files that are no images"),
    ],
)
def test_what_is_no_photograph_is_skipped_for_a_reason(set_name: str, path: str, reason: str) -> None:
    assert why_skipped(set_name, path) == reason


@pytest.mark.parametrize(
    "extension",
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pnm", "JPG", "Png"],
)
def test_images_are_told_by_extension_in_any_case(extension: str) -> None:
    assert why_skipped("train", f"a/1.{extension}") is None


@pytest.mark.parametrize("path", ["/etc/a/1.jpg", "../a/1.jpg", "a/../1.jpg", "a/b/../../c/1.jpg"])
def test_an_unsafe_path_names_no_photograph(path: str) -> None:
    assert why_skipped("train", path) == "photographs at absolute paths or ones with `..`"


def test_a_name_that_is_no_text_names_no_photograph() -> None:
    latin = b"Jos\xe9/1.jpg".decode("utf-8", "surrogateescape")
    assert why_skipped("train", latin) == "photographs whose names are not UTF-8"


@pytest.mark.parametrize("character", ["\x1b", "\n", "\x7f", "\x9b", "\u2028", "\u202e"])
def test_a_name_that_acts_on_a_terminal_names_no_photograph(character: str) -> None:
    assert why_skipped("train", f"a{character}[2J/1.jpg") == "photographs whose names have control characters"


def test_joiners_and_spaces_of_names_are_no_control_characters() -> None:
    path = "علی\u200cرضا/1\u00a0a.jpg"
    assert why_skipped("train", path) is None
    assert ids("train", path).identity == "علی\u200cرضا"


@pytest.mark.parametrize("file", ["cover.jpg", "0.15b.jpg", "20240101123456.jpg"])
def test_a_frame_needs_a_number(file: str) -> None:
    reason = why_skipped("ytf", f"a/0/{file}")
    assert reason == "frames whose names do not end in a number below 2^31, such as 0.15.jpg"
    assert reason not in HARMLESS
    assert why_skipped("train", f"a/0/{file}") is None


@pytest.mark.parametrize(
    ("set_name", "one", "other", "same"),
    [
        ("train", "Alice/phone/1.jpg", "Bob/phone/2.jpg", False),
        ("train", "a/1.jpg", "more/a/1.jpg", False),
        ("train", "top/a/1.jpg", "./top//a/2.jpg", True),
        ("train", "top/train/a/1.jpg", "top/Val/a/1.jpg", True),
        ("train", "a/train/1.jpg", "b/train/1.jpg", False),
        ("ytf", "top/a/0/1.jpg", "top/a/1/1.jpg", True),
        ("ytf", "Alice/phone/0/1.jpg", "Bob/phone/0/1.jpg", False),
    ],
)
def test_whether_one_folder_is_above_both(set_name: str, one: str, other: str, same: bool) -> None:
    assert ids(set_name, one).identity == ids(set_name, other).identity
    assert (above(set_name, one) == above(set_name, other)) == same


@pytest.mark.parametrize(
    ("set_name", "paths", "nested"),
    [
        ("train", ["a/1.jpg", "a/holiday/1.jpg", "b/1.jpg"], ("a/1.jpg", "a/holiday/1.jpg")),
        ("train", ["b/1.jpg", "top/a/2020/holiday/1.jpg", "top/a/1.jpg"], ("top/a/1.jpg", "top/a/2020/holiday/1.jpg")),
        ("train", ["top/a/1.jpg", "top/b/1.jpg", "top/more/ab/1.jpg"], None),
        ("lfw", ["lfw/lfw.jpg", "lfw/Al/Al_0001.jpg"], ("lfw/lfw.jpg", "lfw/Al/Al_0001.jpg")),
        ("ytf", ["top/a/0/0.1.jpg", "top/b/0/0.1.jpg"], None),
        ("ytf", ["top/a/0/0.1.jpg", "top/a/0/b/0/0.1.jpg"], ("top/a/0/0.1.jpg", "top/a/0/b/0/0.1.jpg")),
    ],
)
def test_whether_a_person_lies_within_another(set_name: str, paths: list[str], nested: tuple[str, str] | None) -> None:
    assert within(set_name, paths) == nested


def test_identities_that_look_alike() -> None:
    names = [
        "Jos\u00e9",
        "Jose\u0301",
        "Jose",
        "John",
        "john",
        "JOHN",
        "a",
        "a ",
        "a b",
        "a  b",
        "ab",
        "Al_Gore",
        "Al Gore",
    ]
    assert alike(names) == [["JOHN", "John", "john"], ["Jose\u0301", "Jos\u00e9"], ["a", "a "], ["a  b", "a b"]]


LFW = "2\t2\nA\t1\t2\nB\t3\t10\nA\t1\tB\t2\nC\t1\tA\t1\nD\t1\t2\nD\t1\t3\nA\t2\tD\t1\nB\t1\tD\t2\n"


def listed(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [LFW, "\ufeff" + LFW, LFW.replace("\n", "\r\n"), LFW.replace("\t", " ") + "\n\n"])
def test_lfws_pairs(tmp_path: Path, text: str) -> None:
    pairs = read_pairs("lfw", listed(tmp_path, text), "pairs.txt")
    assert pairs_table(pairs).to_pydict() == {
        "fold": [0, 0, 0, 0, 1, 1, 1, 1],
        "left": ["A/A_0001", "B/B_0003", "A/A_0001", "C/C_0001", "D/D_0001", "D/D_0001", "A/A_0002", "B/B_0001"],
        "right": ["A/A_0002", "B/B_0010", "B/B_0002", "A/A_0001", "D/D_0002", "D/D_0003", "D/D_0001", "D/D_0002"],
        "same": [True, True, False, False] * 2,
    }


@pytest.mark.parametrize("header", ["", "split, pair, first, second, same\n"])
def test_ytfs_splits(tmp_path: Path, header: str) -> None:
    text = f"{header}1, 1, A/0, A/3, 1\n1, 2, A/1, B_C/2, 0\n\n10, 5000, B_C/0,D/5 ,0\n"
    pairs = read_pairs("ytf", listed(tmp_path, text), "splits.txt")
    assert pairs_table(pairs).to_pydict() == {
        "fold": [0, 0, 9],
        "left": ["A/0", "A/1", "B_C/0"],
        "right": ["A/3", "B_C/2", "D/5"],
        "same": [True, False, False],
    }
    offset = 2 if header else 1
    assert [pair.line for pair in pairs] == [offset, offset + 1, offset + 3]


@pytest.mark.parametrize(
    ("set_name", "text", "message"),
    [
        ("lfw", "", "list:1: expected a header `folds<TAB>pairs of each kind`, found ''"),
        ("lfw", "A\t1\t2\n", "list:1: expected a header `folds<TAB>pairs of each kind`, found 'A\\t1\\t2'"),
        ("lfw", LFW + "A\t1\tB\t1\n", "list: holds 9 pairs, but its header '2\\t2' means 2 × 2 × 2 = 8"),
        (
            "lfw",
            LFW.replace("3\t10", "3\tten"),
            "list:3: expected `name i j` or `name1 i name2 j`, found 'B\\t3\\tten'",
        ),
        ("lfw", LFW.replace("B\t3\t10", "B\t3"), "list:3: expected `name i j` or `name1 i name2 j`, found 'B\\t3'"),
        (
            "lfw",
            "1\t1\nA\t1\tB\t2\nA\t1\t2\n",
            "list:2: by the header a pair of the same person stands here, found 'A\\t1\\tB\\t2'",
        ),
        (
            "lfw",
            "1\t1\nA\t1\t2\nA\t1\t3\n",
            "list:3: by the header a pair of different people stands here, found 'A\\t1\\t3'",
        ),
        ("lfw", "0\t300\n", "list: holds no pairs"),
        ("ytf", "split, n, first, second, same\n", "list: holds no pairs"),
        *(
            (
                "ytf",
                f"1, 1, A/0, A/3, 1\n{line}\n",
                "list:2: expected `split, n, name/video, name/video, same` with split from 1 and same 0 or 1, "
                f"found {line!r}",
            )
            for line in (
                "0, 2, A/0, B/0, 0",
                "one, 2, A/0, B/0, 0",
                "1, 2, A, B/0, 0",
                "1, 2, A/0, B/0, 2",
                "1, 2, A/0",
            )
        ),
    ],
)
def test_a_malformed_list_is_refused_by_file_and_line(tmp_path: Path, set_name: str, text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_pairs(set_name, listed(tmp_path, text), "list")
    assert str(caught.value) == message


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(SourceError, match=r"^pairs.txt: not a text file: "):
        read_pairs("lfw", path, "pairs.txt")


def test_absent_images_are_counted_and_the_first_named() -> None:
    pairs = [Pair(2, 0, "a", "b", True), Pair(3, 0, "x", "a", False), Pair(4, 0, "y", "x", False)]
    check_pairs(pairs, {"a", "b", "x", "y"}, "pairs.txt", "lfw.tgz")
    with pytest.raises(SourceError) as caught:
        check_pairs(pairs, {"a", "b"}, "pairs.txt", "lfw.tgz")
    assert str(caught.value) == "pairs.txt: names 2 that lfw.tgz lacks: x (line 3), y (line 4)"
    with pytest.raises(SourceError) as caught:
        check_pairs(pairs, set(), "pairs.txt", "lfw.tgz")
    assert str(caught.value) == "pairs.txt: names 4 that lfw.tgz lacks: a (line 2), b (line 2), x (line 3) and 1 more"
