"""The align stage as a function of its folders and parameters; and of photographs that are no set."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from pipeline import tables
from pipeline.errors import InputError
from pipeline.executor import choose_device, enough_gpu_memory, run_all
from pipeline.params import Align, Machine
from stages.align import kernels
from stages.align.decode import UnreadableImage, decode_reduced
from stages.align.earlier import COPIED, Rows, is_done, set_aside
from stages.align.faces import Found, choose, find, scaled
from stages.align.page import write_page
from stages.align.warp import SIDE, centre_crop, similarity, warp

log = logging.getLogger(__name__)

_ASIDE = {"__init__", "__main__", "earlier", "page"}
"""Modules of this folder that do not decide what becomes of a photograph."""
CODE = tuple(
    path
    for path in sorted(Path(__file__).parent.iterdir())
    if path.suffix in {".py", ".cpp"} and path.stem not in _ASIDE
)
"""What does: a row that other code has made is made again."""
_MADE = pa.schema([field for field in tables.ALIGNED if field.name not in COPIED])
"""The columns that alignment makes."""
_BATCH_IMAGES, _BATCH_PIXELS = 64, 1 << 24
"""A batch closes at either: memory stays bounded however large the photographs are."""
_GPU_WORKERS = 8
"""Most processes that share a GPU: each holds some 500 MB of it."""


class _Photograph(NamedTuple):
    """A decoded photograph, (height, width, 3) uint8 RGB, and by how much the decoder has reduced it."""

    pixels: NDArray[np.uint8]
    reduction: int


def run(raw: Path, out: Path, params: Align, machine: Machine, *, evaluation: bool, report: Path) -> dict[str, Any]:
    """Align every photograph of a set; a part for each part, a row for each row, in the same order.

    Only photographs that are new, or that were not aligned by these parameters and this code, are looked at. A run that
    was interrupted goes on from the parts that are missing.

    Args:
        raw: folder of the raw table.
        out: folder of the aligned table.
        evaluation: whether a photograph without a face is centre-cropped (`fallback`), so that every pair of a
            protocol is compared, instead of left without an image (`no_face`).
        report: folder of metrics.json, rejected.csv (what has no aligned image) and index.html (a page to look at).

    Returns:
        The content of metrics.json.

    Raises:
        TableError: the raw table is absent or incomplete.
        InputError: a GPU was asked for and is not there, or the workers cannot be had.
    """
    local = machine.executor == "local"
    device = choose_device(machine.device).type if local else machine.device  # each worker knows its own
    why = kernels.missing()
    if why is not None:
        log.warning("%s: alignment by a CPU takes two to three times as long as it could: %s", raw.name, why)
    sources = tables.parts(raw)
    targets = [out / source.name for source in sources]
    made_by = tables.fingerprint(params.model_dump(), evaluation, code=CODE)
    aside = out.with_name(f".{out.name}.earlier").resolve()  # as the rest of what workers are told, wherever they are
    with tables.locked(out):
        done = {target for source, target in zip(sources, targets, strict=True) if is_done(source, target, made_by)}
        earlier = set_aside(out, aside, done, made_by)
        left = [(source, target) for source, target in zip(sources, targets, strict=True) if target not in done]
        tasks = [
            (source.resolve(), target.resolve(), params, evaluation, device, why is None, made_by, reused)
            for (source, target), reused in zip(left, earlier.of([source for source, _ in left]), strict=True)
        ]
        run_all(
            _align_part,
            tasks,
            machine=machine,
            label=f"align {raw.name}",
            unit="images",
            sizes=[tables.rows(task[0]) for task in tasks],
            most=most_workers(device),
        )
        tables.remove_leftovers(out)  # of workers that were killed
        rmtree(aside)
    return write_page(raw, out, report, params, evaluation=evaluation)


def most_workers(device: str) -> int | None:
    """How many processes of this machine may align on `device`, "cpu" or "cuda"; None for as many as there are."""
    if device != "cuda":
        return None
    import torch

    return _GPU_WORKERS * torch.cuda.device_count()


def own_device(device: str) -> str:
    """The device, cpu or cuda, of a worker that is told that or auto. Importing torch takes seconds: not for a CPU."""
    return device if device == "cpu" else choose_device(device).type


def _align_part(
    source: Path,
    target: Path,
    params: Align,
    evaluation: bool,
    device: str,
    compiled: bool,
    made_by: str,
    reused: Rows,
) -> None:
    """One part of the raw table to one of the aligned table.

    Raises:
        InputError: kernels.cpp is compiled here and not on the machine that asks, or the other way around.
    """
    why = kernels.missing()
    if (why is None) != compiled:
        this, that = (f"has none ({why})", "has them") if why else ("has them", "has none")
        raise InputError(
            f"faces would differ in their last bits: of kernels.cpp's compiled functions, a worker's machine {this}, "
            f"and the one that asks {that}; install the project on both with a C++ compiler, or on both without"
        )
    raw = tables.read_table(source, tables.RAW)
    device = own_device(device)
    rows: list[dict[str, Any] | None] = [None] * len(raw)
    for path, places in reused.items():
        there = tables.read_table(path, tables.ALIGNED, _MADE.names).take([earlier for _, earlier in places])
        for (row, _), content in zip(places, there.to_pylist(), strict=True):
            rows[row] = content
    left = [i for i, row in enumerate(rows) if row is None]
    contents = (raw["image"][i].as_py() for i in left)
    for i, columns in zip(left, align_images(contents, params, evaluation, device), strict=True):
        rows[i] = columns
    found = pa.Table.from_pylist(rows, _MADE)
    whole = [(raw if name in COPIED else found)[name] for name in tables.ALIGNED.names]
    tables.write_table(
        target, pa.table(whole, schema=tables.ALIGNED), tables.ALIGNED, metadata={tables.MADE_BY: made_by}
    )


def align_images(contents: Iterable[bytes], params: Align, evaluation: bool, device: str) -> Iterator[dict[str, Any]]:
    """For each encoded photograph, the columns of the aligned table that alignment makes.

    The next batch is decoded while the faces of the last one are looked for.
    """
    batches = _batches(contents, params)
    with ThreadPoolExecutor(1, "decode") as decoder:
        coming = decoder.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = decoder.submit(next, batches, None)
            with enough_gpu_memory("end what else uses it, or set machine.device to cpu"):
                rows = list(_rows(batch, params, evaluation, device))
            yield from rows


def _batches(contents: Iterable[bytes], params: Align) -> Iterator[list[_Photograph | str]]:
    """Decoded photographs in batches, with a reason for each that cannot be decoded."""
    batch: list[_Photograph | str] = []
    pixels = 0
    for content in contents:
        try:
            image = _decode(content, params)
            batch.append(image)
            pixels += image.pixels.shape[0] * image.pixels.shape[1]
        except UnreadableImage as error:
            batch.append(str(error))
        if len(batch) == _BATCH_IMAGES or pixels >= _BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    yield batch


def _decode(content: bytes, params: Align) -> _Photograph:
    return _Photograph(*decode_reduced(content, lambda height, width: reduction(height, width, params)))


def reduction(height: int, width: int, params: Align) -> int:
    """By how much the decoder may reduce a photograph of that size: 1, 2, 4 or 8.

    So that detection still gets all the pixels it looks at, and the smallest face it can find still has as many as an
    aligned face.
    """
    detector = params.detector
    enlarged = max(1.0, max(height, width) / detector.max_side)
    smallest = max(detector.min_face * enlarged, detector.min_face_share * min(height, width))
    if "smaller" in params.looks:
        smallest /= 2
    return max(by for by in (1, 2, 4, 8) if by == 1 or (smallest / by >= SIDE and enlarged >= by))


def _rows(batch: list[_Photograph | str], params: Align, evaluation: bool, device: str) -> Iterator[dict[str, Any]]:
    photographs = [item.pixels for item in batch if not isinstance(item, str)]
    found = iter(find(photographs, params, device))
    for item in batch:
        if isinstance(item, str):
            yield {"status": "unreadable", "detail": item}
        else:
            yield _row(item, next(found), params, evaluation)


def _row(photograph: _Photograph, found: Found, params: Align, evaluation: bool) -> dict[str, Any]:
    """The columns of a readable photograph."""
    pixels, faces = photograph.pixels, found.faces
    if not len(faces.scores):
        if not evaluation:
            return {"status": "no_face", "faces": 0}
        return {"status": "fallback", "faces": 0, "image": _jpeg(centre_crop(pixels, params.face), params.face.quality)}
    chosen = choose(faces.boxes, pixels.shape[0], pixels.shape[1], params.choose)
    matrix = similarity(faces.landmarks[chosen : chosen + 1])[0]
    whole = scaled(faces, np.array([photograph.reduction] * 2)) if photograph.reduction > 1 else faces
    return {
        "status": "detected",
        "image": _jpeg(warp(pixels, matrix, params.face), params.face.quality),
        "box": whole.boxes[chosen],
        "landmarks": whole.landmarks[chosen].ravel(),
        "score": faces.scores[chosen],
        "look": found.look,
        "faces": len(faces.scores),
        "others": np.delete(whole.boxes, chosen, axis=0).ravel(),
    }


def _jpeg(face: NDArray[np.uint8], quality: int) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(face, quality, "RGB", "420")
    return encoded
