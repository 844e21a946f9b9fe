import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from stages.download.archives import archive_members, folder_digest, folder_members
from stages.download.errors import SourceError

RNG = np.random.default_rng(1)
TREE = {
    f"top/{person}/{number:03d}.jpg": RNG.bytes(size)
    for person, number, size in [("b", 1, 5000), ("b", 2, 0), ("a", 1, 512), ("a", 2, 1), ("c d é", 1, 3000)]
}


def zipped(path: Path, tree: dict[str, bytes], compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in tree.items():
            file.writestr(zipfile.ZipInfo(name), content, compression)


def tarred(path: Path, tree: dict[str, bytes], mode: Literal["w:", "w:gz", "w:bz2", "w:xz"]) -> None:
    with tarfile.open(path, mode) as file:
        for name, content in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


WRITERS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "stored.zip": lambda path, tree: zipped(path, tree, zipfile.ZIP_STORED),
    "deflated.zip": lambda path, tree: zipped(path, tree, zipfile.ZIP_DEFLATED),
    "tar": lambda path, tree: tarred(path, tree, "w:"),
    "tgz": lambda path, tree: tarred(path, tree, "w:gz"),
    "tar.bz2": lambda path, tree: tarred(path, tree, "w:bz2"),
    "tar.xz": lambda path, tree: tarred(path, tree, "w:xz"),
}
every_kind = pytest.mark.parametrize("kind", WRITERS)


def read(archive: Path) -> dict[str, bytes]:
    return {member.name: member.read() for member in archive_members(archive) if member.kind == "file"}


@every_kind
def test_every_kind_is_told_by_its_content_and_read_in_its_order(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / "download"  # a name that says nothing
    WRITERS[kind](archive, TREE)
    assert list(read(archive).items()) == list(TREE.items())
    assert [member.size for member in archive_members(archive)] == [len(content) for content in TREE.values()]


@every_kind
def test_nothing_is_written_to_disk(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "archive"
    WRITERS[kind](archive, TREE | {"../escaped.jpg": b"x", "/tmp/absolute.jpg": b"x"})
    monkeypatch.chdir(tmp_path)
    read(archive)
    assert [path.name for path in tmp_path.rglob("*")] == ["archive"]
    assert not (tmp_path.parent / "escaped.jpg").exists()


@every_kind
def test_an_archive_cut_short_anywhere_never_reads_as_a_smaller_one(kind: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    WRITERS[kind](whole, TREE)
    content = whole.read_bytes()
    # what follows the first of the empty blocks that end a tar is padding
    end = -(-len(content.rstrip(b"\0")) // 512) * 512 + 1 if kind == "tar" else len(content)
    for size in {*range(0, end, 191), *range(0, end, 512), end - 1}:
        cut.write_bytes(content[:size])
        with pytest.raises(
            SourceError, match=rf"^{cut}: cannot (read |be read).*If it is cut short or damaged, get it"
        ):
            read(cut)


@pytest.mark.parametrize("kind", ["stored.zip", "deflated.zip", "tgz", "tar.bz2", "tar.xz"])
def test_damaged_content_is_noticed(kind: str, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    WRITERS[kind](archive, TREE)
    content = bytearray(archive.read_bytes())
    content[3000] ^= 0xFF  # in the middle of the first image
    archive.write_bytes(content)
    with pytest.raises(SourceError, match=rf"^{archive}: .*If it is cut short or damaged, get it again$"):
        read(archive)


@pytest.mark.parametrize("mode", ["w:", "w:gz", "w:xz"])
def test_tars_put_behind_one_another_are_refused(mode: Literal["w:", "w:gz", "w:xz"], tmp_path: Path) -> None:
    """Of which tarfile, as tar itself, reads the first."""
    for name in ("a", "b"):
        tarred(tmp_path / name, {f"{name}/1.jpg": b"x"}, mode)
    both = tmp_path / "both.tar"
    both.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    with pytest.raises(SourceError, match=r"both\.tar: cannot be read beyond 'a/1\.jpg': more follows its end"):
        read(both)


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    WRITERS["stored.zip"](archive, TREE)
    content = bytearray(archive.read_bytes())
    content[content.index(TREE["top/a/001.jpg"])] ^= 1
    archive.write_bytes(content)
    with pytest.raises(SourceError, match=rf"^{archive}: cannot read 'top/a/001.jpg': Bad CRC-32"):
        read(archive)
    WRITERS["tar"](archive, TREE)
    content = bytearray(archive.read_bytes())
    content[content.index(b"top/a/001.jpg")] ^= 1  # its header no longer has its checksum
    archive.write_bytes(content)
    with pytest.raises(SourceError, match=rf"^{archive}: cannot be read beyond 'top/b/002.jpg': bad checksum"):
        read(archive)


def test_an_encrypted_member_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    WRITERS["stored.zip"](archive, {"a/1.jpg": b"image"})
    content = bytearray(archive.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # bit 0: encrypted (APPNOTE 4.4.4)
        content[content.index(header) + flags] |= 1
    archive.write_bytes(content)
    with pytest.raises(SourceError, match=r"cannot read 'a/1\.jpg': .*encrypted"):
        read(archive)


@pytest.mark.parametrize("content", [b"", b"Rar!\x1a\x07\x01\x00" + b"x" * 2000, RNG.bytes(3000)])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "faces.zip"
    archive.write_bytes(content)
    with pytest.raises(SourceError, match=rf"^{archive}: cannot be read: neither a zip nor a tar "):
        read(archive)


def test_names_in_a_zip_are_utf_8_whether_or_not_its_flag_says_so(tmp_path: Path) -> None:
    """Unix's zip does not set the flag; a name that is no UTF-8 is in DOS's code page."""
    archive = tmp_path / "archive"
    names = ["Zoë/1.jpg", "José/1.jpg", "Дарья/1.jpg", "ann/1.jpg"]
    zipped(archive, dict.fromkeys(names, b"x"), zipfile.ZIP_STORED)
    assert list(read(archive)) == names
    content = bytearray(archive.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # bit 11: names are UTF-8 (APPNOTE 4.4.4)
        start = -1
        while (start := content.find(header, start + 1)) >= 0:
            content[start + flags + 1] &= ~0x08
    archive.write_bytes(content)
    assert list(read(archive)) == names
    archive.write_bytes(bytes(content).replace("José".encode(), b"Jos\x82x"))
    assert list(read(archive)) == ["Zoë/1.jpg", "Joséx/1.jpg", "Дарья/1.jpg", "ann/1.jpg"]


def test_what_is_no_file_is_told_apart(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w") as file:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("a/1.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    kinds = [member.kind for member in archive_members(archive)]
    assert kinds == ["folder", "link", "hard link", "device", "device"]
    with zipfile.ZipFile(archive, "w") as zip_file:
        zip_file.mkdir("a")
        link = zipfile.ZipInfo("a/1.jpg")
        link.external_attr = 0o120777 << 16
        zip_file.writestr(link, "/etc/passwd")
    assert [member.kind for member in archive_members(archive)] == ["folder", "link"]


def test_a_folder_is_read_in_sorted_order_without_following_links(tmp_path: Path) -> None:
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "top" / "circle").symlink_to(tmp_path)
    members = [(member.name, member.read()) for member in folder_members(tmp_path) if member.kind == "file"]
    assert members == sorted(TREE.items())
    assert [member.name for member in folder_members(tmp_path) if member.kind == "link"] == ["top/circle"]


def test_a_folders_digest_changes_with_its_content(tmp_path: Path) -> None:
    image = tmp_path / "a" / "1.jpg"
    image.parent.mkdir()
    digests: list[str] = []
    for content, written in ((b"one", 1), (b"one", 1), (b"two", 2), (b"three", 2)):
        image.write_bytes(content)
        os.utime(image, (written, written))
        digests.append(folder_digest(tmp_path))
    image.rename(tmp_path / "a" / "2.jpg")
    digests.append(folder_digest(tmp_path))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
