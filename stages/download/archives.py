"""A folder, zip or tar becomes a stream of members, one in memory at a time. Nothing is ever unpacked to disk."""

import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile  # pyrefly: ignore[missing-module-attribute]
from typing import Literal, Self

from stages.download.errors import DamagedError

# RuntimeError is how zipfile refuses encrypted members and unknown compression, ValueError names that are no text.
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)
_CHUNK = 1 << 20


Kind = Literal["file", "folder", "link", "hard link", "device"]
"""Of a member. A hard link in a tar names an earlier member that has the content."""


@dataclass(frozen=True, slots=True)
class Member:
    """Something in a folder or archive."""

    source: Path
    name: str
    """Path inside the source, folders separated by `/`."""
    size: int
    """In bytes, as the source says."""
    kind: Kind
    content: Callable[[], bytes]

    def read(self) -> bytes:
        """The bytes; to be asked for before the next member is.

        Raises:
            DamagedError: the source is cut short, damaged or encrypted here.
        """
        try:
            return self.content()
        except _BROKEN as error:
            raise _broken(self.source, f"cannot read {self.name!r}", error) from error


def _broken(source: Path, what: str, error: Exception) -> DamagedError:
    return DamagedError(
        f"{source}: {what}: {error or type(error).__name__}. If it is cut short or damaged, get it again"
    )


def folder_members(folder: Path, refused: Callable[[OSError], None] | None = None) -> Iterator[Member]:
    """What lies in a folder at any depth, in sorted order; links are not followed.

    Args:
        folder: that can be read.
        refused: told of each folder below that cannot, which is then passed over; without it, that is an error.
    """
    for name, entry in _walk(folder, "", refused):
        kind: Kind = "link" if entry.is_symlink() else "file" if entry.is_file() else "device"
        size = entry.stat().st_size if kind == "file" else 0
        yield Member(folder, name, size, kind, Path(entry.path).read_bytes)


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names, sizes and modification times in a folder: changes when its content does."""
    digest = hashlib.sha256()
    for name, entry in _walk(folder, "", None):
        about = entry.stat(follow_symlinks=False)
        digest.update(os.fsencode(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0"))
    return digest.hexdigest()


def _walk(
    folder: Path | str, prefix: str, refused: Callable[[OSError], None] | None
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found[:1]:
            entry.stat(follow_symlinks=False)  # a folder may be listed, and yet all in it be refused
    except OSError as error:
        if refused is None or not prefix:
            raise
        refused(OSError(error.errno, error.strerror, os.fspath(folder)))
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/", refused)
        else:
            yield prefix + entry.name, entry


def archive_members(archive: Path) -> Iterator[Member]:
    """What lies in a zip or a tar (plain, gz, bz2 or xz; told by content, not by name), in the archive's order.

    Raises:
        DamagedError: it is neither, or it is cut short or damaged; between two members too, and at the end.
    """
    with archive.open("rb") as file:
        zipped = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    place = "cannot be read"
    try:
        for member in _zip_members(archive) if zipped else _tar_members(archive):
            place = f"cannot be read beyond {member.name!r}"
            yield member
    except _BROKEN as error:
        raise _broken(archive, place, error) from error


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            link = stat.S_ISLNK(info.external_attr >> 16)  # where Unix zips keep a member's mode
            kind: Kind = "folder" if info.is_dir() else "link" if link else "file"
            yield Member(archive, _zip_name(info), info.file_size, kind, partial(file.read, info))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's name, in UTF-8 even where its flag does not say so, as Unix's zip writes it (APPNOTE, appendix D)."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename  # in the code page of DOS, as the format has it


def _tar_members(archive: Path) -> Iterator[Member]:
    with _open_tar(archive) as file:
        while (info := file.next()) is not None:
            yield Member(archive, info.name, info.size, _tar_kind(info), partial(_tar_content, file, info))
            file.members.clear()  # pyrefly: ignore[missing-attribute]  # or it would remember half a million
        # The end of a compressed tar holds its checksum, which is compared when it is read.
        assert file.fileobj is not None
        while chunk := file.fileobj.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise ReadError("more follows its end; archives put behind one another have to be packed as one")


def _open_tar(archive: Path) -> TarFile:
    try:
        return tarfile.open(archive, tarinfo=_StrictInfo)
    except ReadError as error:  # it lists what each kind of tar lacks
        raise ReadError("neither a zip nor a tar (plain, gz, bz2 or xz)") from error


def _tar_kind(info: tarfile.TarInfo) -> Kind:
    if info.isreg():
        return "file"
    if info.isdir():
        return "folder"
    return "link" if info.issym() else "hard link" if info.islnk() else "device"


def _tar_content(file: TarFile, info: tarfile.TarInfo) -> bytes:
    content = file.extractfile(info)
    assert content is not None  # a regular member has content
    return content.read()


class _StrictInfo(tarfile.TarInfo):
    """A header that only the end mark may end: tarfile takes a damaged or missing one for the end as well."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        """Read the next header."""
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(str(error)) from error
