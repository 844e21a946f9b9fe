"""Any photographs to embeddings: a folder of them, of any size, to one file.

Photographs are aligned as those of the sets are, by the same workers; the aligned faces lie in a folder beside the
output until they are embedded. At no time are more than a part's faces in memory.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import tables
from pipeline.errors import InputError, said
from pipeline.executor import choose_device, cores, run_all
from pipeline.params import Align, Params
from pipeline.progress import bar
from pipeline.tracking import MODEL_TAG
from stages.align.decode import UnreadableImage, decode
from stages.align.run import align_images, most_workers, own_device
from stages.download.archives import folder_members
from stages.download.layouts import why_no_photograph
from stages.evaluate.embed import columns, embed
from stages.evaluate.models import Embedder
from stages.train.faces import FaceError, middle

log = logging.getLogger(__name__)

FORMS = (".parquet", ".npz")
_FOUND = pa.schema([tables.ALIGNED.field(name) for name in ("status", "box", "image", "detail")])
"""What of an aligned row is passed on."""
SCHEMA = pa.schema(
    [
        *(tables.EMBEDDED.field(name) for name in ("image_id", "identity", "status")),
        *(tables.ALIGNED.field(name) for name in ("box", "detail")),
        *(tables.EMBEDDED.field(name) for name in ("emb", "flip")),
    ]
)
"""Of a .parquet file."""


class PhotographsError(InputError):
    """Photographs cannot be embedded; the message names the folder or file."""


@dataclass(frozen=True)
class Photograph:
    """A file that should hold a face."""

    image_id: str
    """Path inside the folder, without extension."""
    identity: str | None
    """The folder it lies in; None for one that lies in the folder itself."""
    path: Path


@dataclass(frozen=True)
class Embedded:
    """What became of a folder."""

    statuses: Counter[str]
    """How many photographs, by status."""
    embedded: int


class _Writer(Protocol):
    def write(self, rows: list[dict[str, Any]], features: NDArray[np.float32]) -> None: ...
    def close(self) -> None: ...


def embed_folder(
    folder: Path, out: Path, model: Embedder, params: Params, *, aligned: bool = False, fallback: bool = False
) -> Embedded:
    """Embed all photographs of a folder, at any depth, into a Parquet or .npz file, which appears when it is whole.

    A .parquet file has a row a photograph: image_id, identity, status, box, detail, and the features of the face and of
    its mirror image, `emb` and `flip` (D float32 each, not normalised; null where there is no face). A .npz file has
    `keys`, `emb` and `flip` of the faces alone. Each photograph without a face is logged with the reason.

    Args:
        folder: its files that are no photographs are passed over.
        out: what it is called decides its form.
        params: sections align, evaluate (batch) and machine.
        aligned: the photographs are aligned faces, of which the middle is taken.
        fallback: crop the centre where no face is found, as evaluation does.

    Raises:
        PhotographsError: there is no such folder, not one face in it, two photographs of one name, or what `check_out`
            refuses.
    """
    check_out(out)
    photographs = find_photographs(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    embedded = 0
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        parts = list(_parts(photographs))
        found = _aligned(parts) if aligned else _align(parts, Path(scratch), params, fallback)
        writer: _Writer
        with tables.atomic(out) as temporary, bar(total=len(photographs), label="embedding", unit="images") as shown:
            if out.suffix == ".npz":
                writer = _Npz(temporary, Path(scratch), len(photographs), model)
            else:
                writer = _Parquet(temporary, model)
            for rows in found:
                features = _features(model, rows, params.evaluate.batch)
                counts.update(row["status"] for row in rows)
                embedded += len(features)
                for row in rows:
                    if row["status"] in ("no_face", "unreadable"):
                        log.warning("%s: %s", row["path"], row["detail"] or "no face found")
                writer.write(rows, features)
                shown.update(len(rows))
            if not embedded:
                raise PhotographsError(f"{folder}: not one face in {len(photographs):,} photographs")
            writer.close()
    return Embedded(counts, embedded)


def check_out(out: Path) -> None:
    """Whether `embed_folder` can write a file of that name.

    Raises:
        PhotographsError: its ending tells no form of `FORMS`, or it lies where the graph writes.
    """
    if out.suffix not in FORMS:
        raise PhotographsError(f"--out: {out}: must end in {' or '.join(FORMS)}")
    if name := tables.output_folder(out):
        raise PhotographsError(f"--out: {out} lies in {name}, which is the pipeline's; take a folder of your own")


def find_photographs(folder: Path) -> list[Photograph]:
    """The photographs of a folder at any depth, in order of their names; links are not followed.

    A folder below that cannot be read is logged with the reason.

    Raises:
        PhotographsError: there is no such folder, none in it, or two of one name.
    """
    if not folder.is_dir():
        raise PhotographsError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found: dict[str, Photograph] = {}
    skipped: Counter[str] = Counter()
    for member in folder_members(folder, lambda error: log.warning("%s", said(error))):
        reason = why_no_photograph(member.name) if member.kind == "file" else "links and devices"
        if reason is not None:
            skipped[reason] += 1
            continue
        image_id = splitext(member.name)[0]
        path = folder / member.name
        if image_id in found:
            raise PhotographsError(f"{found[image_id].path} and {path} would both be {image_id}; keep one of them")
        identity = image_id.rpartition("/")[0].rpartition("/")[2] or None
        found[image_id] = Photograph(image_id, identity, path)
    if skipped:
        log.info("%s: passed over %s", folder, ", ".join(f"{n:,} {why}" for why, n in skipped.most_common()))
    if not found:
        raise PhotographsError(f"{folder}: no photographs in it")
    return list(found.values())


def align_files(paths: Iterable[Path], params: Align, *, fallback: bool, device: str) -> Iterator[dict[str, Any]]:
    """For each file, the columns of the aligned table that alignment makes; one that cannot be read is `unreadable`."""
    failures: dict[int, str] = {}

    def contents() -> Iterator[bytes]:
        for i, path in enumerate(paths):
            try:
                if (size := path.stat().st_size) > tables.PART_BYTES:
                    raise OSError(0, f"no photograph: {size:,} bytes")
                yield path.read_bytes()
            except OSError as error:
                failures[i] = str(error.strerror)
                yield b""

    for i, row in enumerate(align_images(contents(), params, fallback, device)):
        yield {"status": "unreadable", "detail": failures[i]} if i in failures else row


def _parts(photographs: Sequence[Photograph]) -> Iterator[list[Photograph]]:
    for start in range(0, len(photographs), tables.PART_ROWS):
        yield list(photographs[start : start + tables.PART_ROWS])


def _align(
    parts: list[list[Photograph]], scratch: Path, params: Params, fallback: bool
) -> Iterator[list[dict[str, Any]]]:
    """Align all parts, by the workers, and hand them out one by one."""
    device = choose_device(params.machine.device).type if params.machine.executor == "local" else params.machine.device
    targets = [tables.part_path(scratch.resolve(), index) for index in range(len(parts))]
    run_all(
        _align_part,
        [
            ([photograph.path.resolve() for photograph in part], target, params.align, fallback, device)
            for part, target in zip(parts, targets, strict=True)
        ],
        machine=params.machine,
        label="aligning",
        unit="images",
        sizes=[len(part) for part in parts],
        most=most_workers(device),
    )
    return (
        [_identified(photograph) | row for photograph, row in zip(part, _rows(target), strict=True)]
        for part, target in zip(parts, targets, strict=True)
    )


def _rows(part: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_table(part, _FOUND).to_pylist()
    return rows


def _align_part(paths: list[Path], target: Path, params: Align, fallback: bool, device: str) -> None:
    rows = list(align_files(paths, params, fallback=fallback, device=own_device(device)))
    if target.parent.exists():  # or the run was interrupted meanwhile, and has cleared up
        tables.write_table(target, pa.Table.from_pylist(rows, _FOUND), _FOUND)


def _aligned(parts: list[list[Photograph]]) -> Iterator[list[dict[str, Any]]]:
    """Files that are aligned faces, read part by part."""
    for part in parts:
        rows = []
        for photograph in part:
            try:
                row = {"status": "aligned", "box": None, "image": photograph.path.read_bytes(), "detail": None}
            except OSError as error:
                row = {"status": "unreadable", "box": None, "image": None, "detail": error.strerror}
            rows.append(_identified(photograph) | row)
        yield rows


def _identified(photograph: Photograph) -> dict[str, Any]:
    return {"image_id": photograph.image_id, "identity": photograph.identity, "path": photograph.path}


def _features(model: Embedder, rows: list[dict[str, Any]], batch: int) -> NDArray[np.float32]:
    """Features of the rows that have a face, N×2×D; what turns out to be no face becomes `unreadable`."""

    def pixels(row: dict[str, Any]) -> NDArray[np.uint8] | None:
        if row["image"] is None:
            return None
        try:
            return middle(decode(row["image"]), model.width)
        except (UnreadableImage, FaceError) as error:
            row |= {"status": "unreadable", "image": None, "detail": str(error)}
            return None

    with ThreadPoolExecutor(cores()) as threads:
        faces = [face for face in threads.map(pixels, rows) if face is not None]
    if not faces:
        return np.empty((0, 2, model.length), np.float32)
    starts = range(0, len(faces), batch)
    return np.concatenate([embed(model, np.stack(faces[start : start + batch])) for start in starts])


class _Parquet:
    """A row a photograph, a row group a part."""

    def __init__(self, path: Path, model: Embedder) -> None:
        self._schema = SCHEMA.with_metadata({MODEL_TAG: model.digest})
        self._writer = pq.ParquetWriter(path, self._schema, compression="ZSTD", use_dictionary=["identity", "status"])

    def write(self, rows: list[dict[str, Any]], features: NDArray[np.float32]) -> None:
        made = [pa.array([row[field.name] for row in rows], field.type) for field in list(self._schema)[:-2]]
        made += columns(features, np.array([row["image"] is not None for row in rows]))
        self._writer.write_table(pa.Table.from_arrays(made, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class _Npz:
    """keys, emb and flip of the faces alone; they gather in files, so that memory stays bounded."""

    def __init__(self, path: Path, scratch: Path, most: int, model: Embedder) -> None:
        self._path = path
        self._keys: list[str] = []
        self._sides = [
            np.lib.format.open_memmap(scratch / f"{side}.npy", "w+", np.float32, (most, model.length))
            for side in ("emb", "flip")
        ]

    def write(self, rows: list[dict[str, Any]], features: NDArray[np.float32]) -> None:
        done = len(self._keys)
        self._keys += [row["image_id"] for row in rows if row["image"] is not None]
        for side, vectors in zip(self._sides, features.transpose(1, 0, 2), strict=True):
            side[done : len(self._keys)] = vectors

    def close(self) -> None:
        emb, flip = (side[: len(self._keys)] for side in self._sides)
        with self._path.open("wb") as file:
            np.savez(file, keys=np.array(self._keys), emb=emb, flip=flip)
