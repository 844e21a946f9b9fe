"""Reading shards: any rows of a split, from a folder or any address that fsspec knows, by whole row groups."""

import glob
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import InputError
from pipeline.params import Face, shown
from pipeline.tables import EXAMPLES, LABELS, VAL_PAIRS, TableError

FORMAT = 1
"""Of the shards; a reader refuses others."""
_OPEN = 32
"""Files that are kept open; of one at an address, pyarrow keeps the row group that it read last."""


class File(BaseModel):
    """A shard in the index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int
    sha256: str


class Index(BaseModel):
    """index.json: what the shards of a folder are. Written last, so that a folder without it is not whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    face: Face
    """What align made of each face; all have this size."""
    photographs: str | None = None
    """SHA-256 of the lines `<SHA-256>  <image_id>` of the training set's photographs, in order; shards of before it was
    kept have None."""
    row_group_rows: int
    files: dict[str, list[File]]
    """Of the splits train and val."""
    tables: dict[str, str]
    """SHA-256 of the other files."""


@dataclass(frozen=True)
class Place:
    """A folder on this machine or elsewhere."""

    filesystem: Any
    path: str

    @classmethod
    def of(cls, location: str) -> "Place":
        """From a path or an address such as `s3://bucket/shards`.

        Raises:
            InputError: fsspec does not know such addresses, or lacks the package for them.
        """
        try:
            filesystem, path = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{shown(location)}: not an address that can be read here ({error}); train.data is a folder, or an "
                "address that fsspec knows and whose package is installed, as s3fs for s3://"
            ) from error
        return cls(filesystem, path)

    def address(self, name: str) -> str:
        """Of a file in it, as its filesystem has it."""
        return f"{self.path.rstrip('/')}/{name}"

    def shown(self, name: str) -> str:
        """The same for a person."""
        return shown(self.address(name))

    @contextmanager
    def reading(self, name: str, part: str = "") -> Iterator[None]:
        """Name the file, and the part of it, in what goes wrong when it is read: a filesystem's own errors may be of
        any kind and name nothing.

        Raises:
            TableError: it is not there, or not readable.
        """
        try:
            yield
        except FileNotFoundError as error:
            raise TableError(f"{self.shown(name)}: no such file; `dvc repro shard` makes the shards") from error
        except Exception as error:
            problem = f"{part}cannot be read: {type(error).__name__}: {error}"
            raise TableError(f"{self.shown(name)}: {problem}") from error

    def open(self, name: str) -> pq.ParquetFile:
        """A Parquet file in it: mapped into memory where it lies on this machine.

        Raises:
            TableError: it is not there, or not readable.
        """
        with self.reading(name):
            if isinstance(self.filesystem, LocalFileSystem):
                return pq.ParquetFile(self.address(name), memory_map=True)
            return pq.ParquetFile(self._opened(name))

    def _opened(self, name: str) -> Any:
        """A file elsewhere: what is asked for and no more, for row groups are read in any order."""
        try:
            return self.filesystem.open(self.address(name), "rb", cache_type="none")
        except TypeError:  # a filesystem whose files do not read ahead, or that has a cache of its own
            return self.filesystem.open(self.address(name), "rb")

    def read(self, name: str) -> bytes:
        """A whole file in it.

        Raises:
            TableError: it is not there, or not readable.
        """
        with self.reading(name):
            content: bytes = self.filesystem.cat_file(self.address(name))
        return content

    def names(self, pattern: str) -> set[str]:
        """Of the files in it that are so called.

        Raises:
            TableError: it cannot be listed.
        """
        with self.reading(pattern):
            found = self.filesystem.glob(f"{glob.escape(self.path.rstrip('/'))}/{pattern}")
        return {address.rpartition("/")[2] for address in found}

    def table(self, name: str, schema: pa.Schema) -> pa.Table:
        """The whole of a small table in it.

        Raises:
            TableError: it is not there, not readable, or not of `schema`.
        """
        return self.parsed(name, self.read(name), schema)

    def parsed(self, name: str, content: bytes, schema: pa.Schema) -> pa.Table:
        """The table that the content of a file in it is.

        Raises:
            TableError: it is not readable, or not of `schema`.
        """
        with self.reading(name):
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        if not table.schema.equals(schema):
            raise TableError(f"{self.shown(name)}: has columns {table.column_names}, expected {schema.names}")
        return table


def read_index(location: str) -> tuple[Place, Index]:
    """Where shards are, and what they are.

    Raises:
        TableError: there is no index.json, it cannot be read, or it is of another format.
        InputError: no address that can be read here.
    """
    place = Place.of(location)
    where = place.shown("index.json")
    try:
        index = Index.model_validate_json(place.read("index.json"))
    except ValidationError as error:
        raise TableError(f"{where}: not the index of shards: {error}") from error
    if index.format != FORMAT:
        raise TableError(f"{where}: format {index.format}, but this code reads {FORMAT}: `dvc repro shard` writes anew")
    return place, index


class Shards:
    """The shards of a folder or an address."""

    def __init__(self, location: str) -> None:
        """Open them; only the index is read.

        Raises:
            TableError: it is not there or of another format.
            InputError: no address that can be read here.
        """
        self.place, self.index = read_index(location)

    def identities(self) -> pa.Table:
        """Schema tables.LABELS."""
        return self.place.table("labels.parquet", LABELS)

    def val_pairs(self) -> pa.Table | None:
        """Schema tables.VAL_PAIRS; None where validation is by image."""
        return self.place.table("val_pairs.parquet", VAL_PAIRS) if "val_pairs.parquet" in self.index.tables else None

    def split(self, name: str) -> "Split":
        """The examples of `train` or `val`."""
        return Split(self.place, self.index.files[name], self.index.row_group_rows)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, as the index has them."""
        return self.index.tables | {file.name: file.sha256 for files in self.index.files.values() for file in files}


class Split:
    """The examples of a split, numbered in the order of the files, read by row groups. Threads may share it."""

    def __init__(self, place: Place, files: Sequence[File], row_group_rows: int) -> None:
        self._place, self._files, self._row_group_rows = place, files, row_group_rows
        self.hashes = {file.name: file.sha256 for file in files}
        """SHA-256 of each file, as the index has them."""
        self._groups: list[tuple[str, int]] = []
        sizes = []
        for file in files:
            for index, start in enumerate(range(0, file.rows, row_group_rows)):
                self._groups.append((file.name, index))
                sizes.append(min(row_group_rows, file.rows - start))
        self.starts: NDArray[np.int64] = np.cumsum([0, *sizes], dtype=np.int64)
        """(groups + 1,): the first row of each group, and the number of all."""
        self._files_open: dict[str, pq.ParquetFile] = {}
        """The one used last comes last."""
        self._reading = Lock()
        """pyarrow's files serve one thread at a time."""

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which opens the files for itself."""
        return Split, (self._place, self._files, self._row_group_rows)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def groups(self) -> int:
        """How many row groups there are."""
        return len(self._groups)

    def read(self, group: int) -> pa.Table:
        """The rows of a group, schema tables.EXAMPLES.

        Damage that leaves them readable goes unnoticed here, where checksums would be computed in every epoch;
        `cosface shards verify` finds it.

        Raises:
            TableError: the file is not there, not readable, or not what the index says.
        """
        with self._reading:
            return self._read(*self._groups[group], int(self.starts[group + 1] - self.starts[group]))

    def _read(self, name: str, index: int, expected: int) -> pa.Table:
        file = self._opened(name)
        if index >= file.num_row_groups or file.metadata.row_group(index).num_rows != expected:
            raise TableError(f"{self._place.shown(name)}: row group {index} has not the {expected} rows it should have")
        with self._place.reading(name, f"row group {index} "):
            return file.read_row_group(index, use_threads=False)

    def _opened(self, name: str) -> pq.ParquetFile:
        """A file, opened unless it is one of those used last."""
        file = self._files_open.pop(name, None) or self._place.open(name)
        self._files_open[name] = file
        if len(self._files_open) > _OPEN:
            self._files_open.pop(next(iter(self._files_open))).close(force=True)
        if not file.schema_arrow.equals(EXAMPLES):
            raise TableError(f"{self._place.shown(name)}: has columns {file.schema_arrow.names}, not {EXAMPLES.names}")
        return file

    def name(self, row: int) -> str:
        """Where a row is, for a person: `train-00003-of-00121.parquet, row 17`."""
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, index = self._groups[group]
        return f"{self._place.shown(file)}, row {row - int(self.starts[group - index])}"

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(rows,), read without the images.

        Raises:
            TableError: a file is not there or not readable.
        """
        columns = [np.empty(0, np.int32)]
        for name in dict.fromkeys(name for name, _ in self._groups):
            with self._reading:
                file = self._opened(name)
                with self._place.reading(name, "labels "):
                    columns.append(file.read(columns=["label"], use_threads=False)["label"].to_numpy())
        return np.concatenate(columns)


class _Group:
    """A row group at hand: its images are slices of one buffer."""

    def __init__(self, table: pa.Table) -> None:
        images = table["image"]
        images = images.chunk(0) if images.num_chunks == 1 else images.combine_chunks()
        _, offsets, data = images.buffers()
        starts = np.frombuffer(offsets, np.int32)[images.offset : images.offset + len(images) + 1]
        self.data, self.starts = memoryview(data).cast("B"), starts
        self.labels: NDArray[np.int32] = table["label"].to_numpy()


@dataclass(frozen=True)
class Encoded:
    """Encoded images where they lie: each becomes a view only when its turn comes, for thousands of views kept at hand
    would keep Python's garbage collector busy.
    """

    groups: list[memoryview]
    """The images of some row groups."""
    group: NDArray[np.intp]
    """(images,): in which of them each lies."""
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    """(images,): where in it, bytes."""

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, some: slice) -> "Encoded":
        return Encoded(self.groups, self.group[some], self.begin[some], self.end[some])

    def __iter__(self) -> Iterator[memoryview]:
        for group, begin, end in zip(self.group.tolist(), self.begin.tolist(), self.end.tolist(), strict=True):
            yield self.groups[group][begin:end]


class Rows:
    """Any rows of a split, with the row groups read lately or expected soon at hand; for one thread."""

    def __init__(self, split: Split, groups: int) -> None:
        """At most so many groups are held, more only while one call needs them."""
        self._split, self._most = split, groups
        self._loads: OrderedDict[int, Future[_Group]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "reader")

    def expect(self, groups: Iterable[int]) -> dict[int, Future[_Group]]:
        """Begin to read row groups that will be wanted, those at hand excepted."""
        loads = {}
        for group in groups:
            if group not in self._loads:
                self._loads[group] = self._reader.submit(self._load, group)
            self._loads.move_to_end(group)
            loads[group] = self._loads[group]
        while len(self._loads) > max(len(loads), self._most):
            self._loads.popitem(last=False)
        return loads

    def _load(self, group: int) -> _Group:
        return _Group(self._split.read(group))

    def read(self, rows: NDArray[np.int64]) -> tuple[Encoded, NDArray[np.int32]]:
        """The encoded images, where they were read to, and the labels of some rows."""
        numbers, group = np.unique(np.searchsorted(self._split.starts, rows, side="right") - 1, return_inverse=True)
        groups = [load.result() for load in self.expect(numbers.tolist()).values()]
        begin, end, labels = np.empty_like(rows), np.empty_like(rows), np.empty(len(rows), np.int32)
        for i, (number, at_hand) in enumerate(zip(numbers.tolist(), groups, strict=True)):
            places = np.flatnonzero(group == i)
            within = rows[places] - self._split.starts[number]
            begin[places], end[places] = at_hand.starts[within], at_hand.starts[within + 1]
            labels[places] = at_hand.labels[within]
        return Encoded([at_hand.data for at_hand in groups], group, begin, end), labels
