"""`python -m stages.evaluate.embed SET`: data/aligned/SET and models → data/embedded/SET.

Features of each face, once for all that is measured: a part for each aligned part, a row for each row. What becomes of
mirror images, means and thresholds is for those to say who use them.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline import tables
from pipeline.entry import stage
from pipeline.executor import choose_device, cores, enough_gpu_memory, keep_memory
from pipeline.params import SETS, Params
from pipeline.progress import bar
from pipeline.tracking import MODEL_TAG
from stages.evaluate.features import KEYS
from stages.evaluate.models import Embedder, load_embedder
from stages.evaluate.verification import EvaluationError
from stages.train.faces import FaceError, decode_face


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
        done = {path for path in sources if (unfinished / path.name).exists()}
        shown.update(sum(map(tables.rows, done)))
        left = [path for path in sources if path not in done]
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


def main(params: Params, name: str) -> None:
    """Embed one set by the model of this folder."""
    keep_memory()
    model = load_embedder(Path("models"), choose_device(params.machine.device))
    # of the training set, the audit alone makes use, without mirror images
    flip = name != "train"
    embed_set(Path("data/aligned") / name, model, Path("data/embedded") / name, batch=params.evaluate.batch, flip=flip)


if __name__ == "__main__":
    stage(main, SETS)
