"""Features of aligned faces, once for all that is measured: data/aligned/<set> → data/embedded/<set>.

A part for each aligned part, a row for each row. What becomes of mirror images, means and thresholds is for those to
say who use them.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline import tables
from pipeline.executor import cores, enough_gpu_memory
from pipeline.progress import bar
from pipeline.tracking import MODEL_TAG
from stages.evaluate.models import Embedder
from stages.evaluate.verification import EvaluationError
from stages.train.faces import FaceError, decode_face

KEYS = ["image_id", "identity", "video", "status"]


@dataclass(frozen=True)
class Frames:
    """Which rows of an aligned or embedded table make up which template."""

    names: list[str]
    """T image ids or videos."""
    template: list[NDArray[np.int64]]
    """For each part, for each row: which template it belongs to, or -1 when it is not used."""
    detected: NDArray[np.bool_]
    """T flags: at least one frame has a detected face."""


@dataclass(frozen=True)
class Block:
    """Features of some faces."""

    emb: NDArray[np.float32]
    """N×D, not normalised."""
    flip: NDArray[np.float32] | None
    """N×D, of the mirror images."""
    template: NDArray[np.int64]
    """N, which template a face belongs to."""


def embed_set(aligned: Path, model: Embedder, out: Path, *, batch: int, flip: bool) -> None:
    """Embed every face of a set. A run that was interrupted goes on from the parts that are missing.

    Args:
        aligned: folder of the aligned set.
        model: any model.
        out: folder of the embedded set.
        batch: images at a time.
        flip: whether mirror images are embedded, too.

    Raises:
        TableError: the aligned set is absent or incomplete.
        EvaluationError: an image cannot be decoded, or features are not finite numbers.
    """
    sources = tables.parts(aligned)
    digests = [tables.sha256_file(path) for path in sources]
    key = tables.fingerprint(model.digest, flip, batch, digests, code=(Path(__file__),))
    with (
        tables.resumable(out, key) as unfinished,
        ThreadPoolExecutor(cores()) as decoders,
        ThreadPoolExecutor(1) as reader,
        bar(total=sum(map(tables.rows, sources)), label=f"{aligned.name}: embedding", unit="images") as shown,
    ):
        left = [path for path in sources if not (unfinished / path.name).exists()]
        shown.update(sum(tables.rows(path) for path in sources if path not in left))
        # The faces of the next part are decoded while the network looks at those of this one.
        coming: Future[_Part] | None = reader.submit(_read, left[0], model.width, decoders) if left else None
        for i, path in enumerate(left):
            assert coming is not None
            part = coming.result()
            coming = reader.submit(_read, left[i + 1], model.width, decoders) if i + 1 < len(left) else None
            found = [np.empty((0, 1 + flip, model.length), np.float32)]
            for start in range(0, len(part.faces), batch):
                faces = [_face(face, path, aligned) for face in part.faces[start : start + batch]]
                found.append(embed(model, np.stack(faces), flip=flip))
                shown.update(len(faces))
            _write(unfinished / path.name, part.table, np.concatenate(found), model.digest)


def embed(model: Embedder, faces: NDArray[np.uint8], *, flip: bool = True) -> NDArray[np.float32]:
    """Features of faces and, behind them, of their mirror images, which the flip-test uses (CosFace, section 4.1).

    Args:
        model: any model.
        faces: N×112×width×3 uint8, RGB.
        flip: whether mirror images are wanted.

    Returns:
        N×1×D or N×2×D float32, not normalised.

    Raises:
        EvaluationError: they are not finite numbers.
        InputError: the GPU's memory is too small for so many faces.
    """
    images = torch.from_numpy(np.ascontiguousarray(faces)).permute(0, 3, 1, 2)
    seen = [images, images.flip(3)] if flip else [images]
    with enough_gpu_memory("lower evaluate.batch, or set machine.device to cpu"):
        both = torch.stack([model(each) for each in seen], dim=1).cpu().numpy()
    if not np.isfinite(both).all():
        raise EvaluationError(f"{model.name}: its features are not finite numbers: its training has diverged")
    return both


def choose_frames(
    folder: Path, names: list[str], schema: pa.Schema = tables.ALIGNED, *, by_image: bool = False
) -> Frames:
    """Find the frames of each named template: those with a detected face, or, where there is none, the centre crops.

    Args:
        folder: of an aligned or embedded table.
        names: image ids (stills) or videos, each once.
        schema: of the table.
        by_image: names are image ids even where there are videos.

    Raises:
        EvaluationError: a name is not in the table.
        TableError: the table cannot be read.
    """
    wanted = pa.array(names, pa.string())
    template, status = [], []
    for path in tables.parts(folder):
        part = tables.read_table(path, schema, KEYS)
        key = part["image_id"] if by_image else pc.coalesce(part["video"], part["image_id"])
        index = pc.index_in(key, value_set=wanted)
        template.append(index.fill_null(-1).to_numpy().astype(np.int64))
        status.append(np.asarray(part["status"].to_pylist(), object))

    def having(condition: str) -> NDArray[np.bool_]:
        flags = np.zeros(len(names) + 1, bool)  # the last stands for -1
        for index, of_row in zip(template, status, strict=True):
            flags[index[of_row == condition]] = True
        return flags[:-1]

    present = np.zeros(len(names), bool)
    for index in template:
        present[index[index >= 0]] = True
    if not present.all():
        absent = [name for name, there in zip(names, present, strict=True) if not there]
        raise EvaluationError(f"{folder}: {len(absent)} images or videos of the pairs are not there, as {absent[0]!r}")

    detected, fallback = having("detected"), having("fallback")
    use_fallback = np.append(fallback & ~detected, False)
    for index, of_row in zip(template, status, strict=True):
        used = (of_row == "detected") | ((of_row == "fallback") & use_fallback[index])
        index[~used] = -1
    return Frames(names, template, detected)


def blocks(embedded: Path, frames: Frames) -> Iterator[Block]:
    """The features of the frames, a part at a time."""
    for path, template in zip(tables.parts(embedded), frames.template, strict=True):
        rows = np.flatnonzero(template >= 0)
        if len(rows):
            table = tables.read_table(path, tables.EMBEDDED, ["emb", "flip"]).take(pa.array(rows))
            flip = matrix(table["flip"]) if table["flip"].null_count == 0 else None
            yield Block(matrix(table["emb"]), flip, template[rows])


def matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Lists of equal lengths, N×D; without nulls."""
    values = column.combine_chunks().drop_null()
    return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)


@dataclass(frozen=True)
class _Part:
    table: pa.Table
    faces: "list[Future[NDArray[np.uint8]]]"
    """Of the rows that have an image, in order."""


def _read(path: Path, width: int, decoders: ThreadPoolExecutor) -> _Part:
    table = tables.read_table(path, tables.ALIGNED, [*KEYS, "image"])
    images = table["image"].combine_chunks().drop_null().to_pylist()
    return _Part(table, [decoders.submit(decode_face, image, width) for image in images])


def _face(coming: "Future[NDArray[np.uint8]]", path: Path, aligned: Path) -> NDArray[np.uint8]:
    try:
        return coming.result()
    except FaceError as error:
        raise EvaluationError(f"{path}: {error}; delete {aligned} and run `dvc repro`") from error


def columns(found: NDArray[np.float32], there: NDArray[np.bool_]) -> list[pa.Array]:
    """`emb` and `flip` of a table: features as `embed` gives them, and which rows they are of; null for the others."""
    offsets = pa.array(np.append(0, np.cumsum(there) * found.shape[2]).astype(np.int32))

    def lists(side: int) -> pa.Array:
        if side >= found.shape[1]:
            return pa.nulls(len(there), tables.EMBEDDED.field("flip").type)
        values = pa.array(np.ascontiguousarray(found[:, side]).ravel())
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(~there))

    return [lists(0), lists(1)]


def _write(path: Path, part: pa.Table, found: NDArray[np.float32], digest: str) -> None:
    whole = [*(part[name] for name in KEYS), *columns(found, part["image"].is_valid().to_numpy())]
    table = pa.table(whole, names=tables.EMBEDDED.names)
    tables.write_table(path, table, tables.EMBEDDED, metadata={MODEL_TAG: digest})
