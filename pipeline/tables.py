"""The tables that pass between stages: schemas, atomic part files, and going on after an interruption.

A table is a folder of `part-NNNNN.parquet`. A part appears under its name only when it is whole (written to a
temporary name, then renamed), so that no reader ever sees half a file, and a killed stage goes on from the first
missing part.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import InputError

log = logging.getLogger(__name__)

RAW = pa.schema(
    [
        ("image_id", pa.string()),  # unique in its set: path inside the source without top folder and extension
        ("identity", pa.string()),
        ("video", pa.string()),  # `<identity>/<video>`; null for stills
        ("frame", pa.int32()),  # null for stills
        ("image", pa.binary()),  # the encoded bytes, untouched
        ("sha256", pa.string()),  # of `image`
    ]
)
PAIRS = pa.schema(
    [
        ("fold", pa.int32()),  # from 0
        ("left", pa.string()),  # an image_id, or a video for ytf
        ("right", pa.string()),
        ("same", pa.bool_()),
    ]
)
ALIGNED = pa.schema(
    [
        ("image_id", pa.string()),
        ("identity", pa.string()),
        ("video", pa.string()),
        ("frame", pa.int32()),
        ("sha256", pa.string()),  # of the source image
        ("status", pa.string()),  # detected | fallback | no_face | unreadable
        ("image", pa.binary()),  # the aligned face, an RGB JPEG; null for no_face and unreadable
        ("box", pa.list_(pa.float32())),  # left, top, right, bottom in source pixels; null unless detected
        ("landmarks", pa.list_(pa.float32())),  # x, y of the five points in source pixels; null unless detected
        ("score", pa.float32()),  # O-Net face probability; null unless detected
        ("look", pa.string()),  # first | smaller | rotated | equalised: which look found it; null unless detected
        ("faces", pa.int32()),  # how many faces were found in the photograph; null for unreadable
        ("others", pa.list_(pa.float32())),  # the boxes of those not chosen, four numbers each; null unless detected
        ("detail", pa.string()),  # why an image is unreadable; null otherwise
    ]
)
EMBEDDED = pa.schema(
    [
        ("image_id", pa.string()),
        ("identity", pa.string()),
        ("video", pa.string()),
        ("status", pa.string()),  # as in the aligned table
        ("emb", pa.list_(pa.float32())),  # features, D, not normalised; null where there is no image
        ("flip", pa.list_(pa.float32())),  # of the mirror image; null for the training set, too
    ]
)
EXAMPLES = pa.schema([("image", pa.binary()), ("label", pa.int32())])
LABELS = pa.schema(
    [
        ("label", pa.int32()),  # from 0; of identities that are only validated, beyond those; null for a dropped one
        ("identity", pa.string()),
        ("images", pa.int32()),  # in the aligned table, faces only
        ("train", pa.int32()),
        ("val", pa.int32()),
        ("dropped", pa.string()),  # why; null for a kept identity
    ]
)
DROPPED = pa.schema(
    [
        ("image_id", pa.string()),
        ("identity", pa.string()),
        ("reason", pa.string()),  # stages/shard/clean.py has them
        ("of", pa.string()),  # the image or identity that it repeats; null where there is none
        ("distance", pa.int32()),  # of the perceptual hashes, bits of 256; null where none counts
    ]
)
VAL_PAIRS = pa.schema(
    [
        ("left", pa.int32()),  # row of the validation shards
        ("right", pa.int32()),
        ("same", pa.bool_()),
    ]
)

PART_ROWS = 500
"""Rows of a part: the unit of work, of progress, and of what an interruption can cost."""
PART_BYTES = 256 << 20
"""A part closes earlier once its images reach this size, so that memory stays bounded for large photographs."""

OUTPUTS = ("data", "models", "reports")
"""The folders of a project that the graph writes, and so the only ones where what is lost can be made anew."""
MADE_BY = "made_by"
_PART = re.compile(r"part-(\d{5,})\.parquet")


class TableError(InputError):
    """A table on disk is absent, incomplete or of another schema; the message names the file and what to do."""


def output_folder(path: Path) -> str | None:
    """Which of `OUTPUTS`, of the project in the current folder, a path lies in, or is; None for a path of one's own."""
    return next((name for name in OUTPUTS if path.resolve().is_relative_to(Path(name).resolve())), None)


def part_path(folder: Path, index: int) -> Path:
    """Where part `index` of a table lies."""
    return folder / f"part-{index:05d}.parquet"


def write_table(
    path: Path,
    table: pa.Table,
    schema: pa.Schema,
    row_group_rows: int = PART_ROWS,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a whole Parquet file atomically; the same table gives the same bytes.

    Image columns hold compressed JPEG and stay as they are; the others are compressed by zstd. Of the metadata,
    `MADE_BY` is the fingerprint of what decides the rows.
    """
    with atomic(path) as temporary:
        compression = {name: "NONE" if name == "image" else "ZSTD" for name in schema.names}
        pq.write_table(
            table.cast(schema).replace_schema_metadata(dict(metadata) if metadata else None),
            temporary,
            row_group_size=row_group_rows,
            compression=compression,
            use_dictionary=[name for name in schema.names if name in ("identity", "video", "status")],
            write_statistics=[name for name in schema.names if name != "image"],
        )


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; renamed to it when the block ends well, removed when it does not.

    Raises:
        OSError: the system refuses, for want of space for one; names `path` where the system names no file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that writers who were killed have left in a folder and those below."""
    for left in folder.rglob(".*.tmp"):
        left.unlink()


def parts(folder: Path) -> list[Path]:
    """The parts of a table, in order.

    Raises:
        TableError: there are none, or one is missing in between.
    """
    numbered = {int(match[1]): path for path in folder.glob("part-*") if (match := _PART.fullmatch(path.name))}
    found = [numbered[number] for number in sorted(numbered)]
    if not found:
        raise TableError(f"{folder}: no part-*.parquet; run `dvc repro` to make them")
    for index, path in enumerate(found):
        if path != part_path(folder, index):
            raise TableError(f"{part_path(folder, index)}: missing, though {found[-1].name} is there; delete {folder}")
    return found


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, all columns or some.

    Raises:
        TableError: the file is absent, unreadable, or not of `schema`.
    """
    with _opened(path) as file:
        if not file.schema_arrow.equals(schema):
            raise TableError(f"{path}: has columns {file.schema_arrow.names}, expected {schema.names}")
        # Not by Arrow's threads: a process that ends soon afterwards now and then died of them, with SIGABRT
        return file.read(columns=columns, use_threads=False)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file, to be read within the block.

    Raises:
        TableError: it is absent, cut short or damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError as error:
        hint = "; run `dvc repro` to make it" if output_folder(path) else ""
        raise TableError(f"{path}: no such file{hint}") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's refusal, not what is in the file
            raise
        hint = "; delete it and run `dvc repro`" if output_folder(path) else ""
        raise TableError(f"{path}: not a readable Parquet file: {error}{hint}") from error


def read_parts(folder: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a whole table, all columns or some: for columns that fit into memory at any size of the set."""
    return pa.concat_tables([read_table(path, schema, columns) for path in parts(folder)])


def read_images(folder: Path, schema: pa.Schema, numbers: Sequence[int] | NDArray[np.intp]) -> dict[int, bytes]:
    """The encoded images of some rows of a table, reading no part that has none of them."""
    wanted = np.asarray(numbers, np.intp)
    paths = parts(folder)
    ends = np.cumsum([rows(path) for path in paths])
    part_of = np.searchsorted(ends, wanted, side="right")
    found: dict[int, bytes] = {}
    for part in np.unique(part_of).tolist():
        images = read_table(paths[part], schema, ["image"])["image"]
        start = int(ends[part - 1]) if part else 0
        found |= {row: images[row - start].as_py() for row in wanted[part_of == part].tolist()}
    return found


def rows(path: Path) -> int:
    """How many rows a Parquet file has.

    Raises:
        TableError: the file is absent or unreadable.
    """
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def made_by(path: Path) -> str | None:
    """The fingerprint that a Parquet file was written with; None without one.

    Raises:
        TableError: the file is absent or unreadable.
    """
    return metadata(path, MADE_BY)


def metadata(path: Path, key: str) -> str | None:
    """What a Parquet file's metadata says; None where it says nothing.

    Raises:
        TableError: the file is absent or unreadable.
    """
    with _opened(path) as file:
        value: bytes | None = (file.metadata.metadata or {}).get(key.encode())
    return value.decode() if value else None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*content: Any, code: tuple[Path, ...] = ()) -> str:
    """SHA-256 of JSON-serialisable values and of the Python files in `code` (folders or files)."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for root in code:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for one writer; another live one is waited for.

    Who holds it may hold it again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.warning("%s: another process is writing here; waiting for it to end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check_replaceable(folder: Path) -> None:
    """Refuse, before any work is done, a folder that `resumable` could not replace.

    Raises:
        InputError: it is a link.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder}: is a symbolic link, of which a finished folder cannot take the place; put a folder there, or "
            "link one further up"
        )


@contextmanager
def resumable(folder: Path, key: str) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when the block ends well.

    What an interrupted run with the same key has written is in it already; what one with another key has, is removed.
    It lies beside `folder`, where DVC does not look: whatever version of `folder` is checked out meanwhile, parts of
    two versions never meet. Another live writer of the same folder is waited for.

    Args:
        folder: what is to be made; as it was until then.
        key: a fingerprint of all that decides its content.

    Raises:
        InputError: `folder` is a link.
    """
    check_replaceable(folder)
    begun = folder.with_name(f".{folder.name}.unfinished")
    unfinished = begun / key
    with locked(folder):
        if unfinished.exists():
            log.info("%s: going on after an interrupted run", folder)
            remove_leftovers(unfinished)
        elif begun.exists():
            shutil.rmtree(begun)
        unfinished.mkdir(parents=True, exist_ok=True)
        yield unfinished
        remove_leftovers(unfinished)  # of workers, where one was lost
        shutil.rmtree(folder)
        unfinished.replace(folder)
        begun.rmdir()
