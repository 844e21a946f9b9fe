"""`python -m stages.evaluate.extra`: each NAME.bin and NAME.csv of `evaluate.extra` → reports/extra/NAME.

A .bin is a set of the InsightFace zoo (lfw, cfp_fp, agedb_30, calfw, cplfw): aligned faces, two and two a pair, in ten
folds. A .csv is pairs of one's own photographs (`left`, `right`, `same`, perhaps `fold`), named by paths from where it
lies; they are aligned as those of the other sets are.
"""

import hashlib
import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.entry import stage
from pipeline.executor import choose_device, keep_memory
from pipeline.params import Evaluate, Params
from pipeline.tables import atomic
from stages.align.decode import UnreadableImage, decode
from stages.download.protocols import Pair
from stages.evaluate import scoring, uncertainty
from stages.evaluate.embed import embed
from stages.evaluate.features import Block
from stages.evaluate.foreign import read_csv
from stages.evaluate.leaks import Trained, check_leaks
from stages.evaluate.models import Embedder, load_embedder
from stages.evaluate.photographs import align_files
from stages.evaluate.run import measure
from stages.evaluate.scoring import EXTRA, FIGURES, FILES, Options, Scored
from stages.evaluate.verification import EvaluationError
from stages.train.faces import FaceError, middle

log = logging.getLogger(__name__)

SUFFIXES = (".bin", ".csv")
"""Of sets, in any case."""
FOLDS = 10
"""Of a .bin: equal parts, in order."""
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,  # a length that is none
    OverflowError,
    TypeError,
    ValueError,
)
"""What unpickling a file ends in that is no pickle, or no longer one."""


def run(folder: Path, model: Embedder, trained: Trained | None, out: Path, params: Params) -> None:
    """Evaluate a model on every set of a folder, each as `stages.evaluate.run` does.

    Args:
        folder: of NAME.bin and NAME.csv; other files are passed over.
        model: any model.
        trained: for the check that no person is in both sets, where folders of photographs are named after people (a
            .bin has no names); None where it cannot be known.
        out: folder of the results; earlier ones are removed, and nothing else.
        params: sections align, evaluate and machine.

    Raises:
        EvaluationError: there is no such folder, a file is not what it should be, or people are in both sets and
            `evaluate.leaks` refuses that; the message names the file.
    """
    for path in _begin(folder, out):
        try:
            _evaluate(path, model, trained, out / path.stem, params)
        except EvaluationError as error:
            if str(error).startswith(str(path)):
                raise
            raise EvaluationError(f"{path}: {error}") from error


def _begin(folder: Path, out: Path) -> list[Path]:
    """The sets, after telling of other files and removing the results of earlier sets."""
    files = find_sets(folder)
    others = [path for path in folder.glob("*") if path.is_file() and path not in files and path.name != "README.md"]
    if others:
        kinds = Counter(path.suffix or path.name for path in others)
        log.info("%s: passed over %s", folder, ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common()))
    if not files:
        log.info("%s: no sets there", folder)
    out.mkdir(parents=True, exist_ok=True)
    _clear(out)
    return files


def _evaluate(path: Path, model: Embedder, trained: Trained | None, out: Path, params: Params) -> None:
    undetected, leaked = None, None
    if path.suffix.lower() == ".bin":
        scored = _bin(path, model, params)
    else:
        pairs = read_csv(path)
        leaked = _leaked(path, pairs, trained, params)
        scored, undetected = _csv(path, pairs, model, params)
    options, name = Options(params.evaluate.flip, params.evaluate.centre), EXTRA.format(path.stem)
    measure(scored, options, model.digest, out, params.evaluate, name, undetected, leaked)


def _leaked(path: Path, pairs: list[Pair], trained: Trained | None, params: Params) -> int | None:
    """How many of the people are trained on; None where that or the people are not known."""
    left, right, same = zip(*((pair.left, pair.right, pair.same) for pair in pairs), strict=True)
    people = uncertainty.people(left, right, np.array(same))
    if trained is None:
        return None
    if people is None:
        log.warning("%s: people who are trained on are not looked for, as folders do not tell who is on what", path)
        return None
    # whichever folder is the person's: below it there may be one for each session, say
    names = [part for name in people.names for part in PurePath(name).parts]
    return check_leaks(str(path), names, trained, params.evaluate.leaks)


def find_sets(folder: Path) -> list[Path]:
    """The sets of a folder, by name.

    Raises:
        EvaluationError: there is no such folder, or two sets of one name are in it.
    """
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder, though evaluate.extra in params.yaml names it")
    files = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES)
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        raise EvaluationError(f"{folder}: two sets of one name among {', '.join(path.name for path in files)}")
    return files


def _clear(out: Path) -> None:
    """Remove the results of earlier sets, which may not be there any more."""
    for folder in [file.parent for file in out.glob("*/metrics.json")]:
        for name in (*FILES, *FIGURES):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def read_bin(path: Path) -> tuple[list[bytes], list[bool]]:
    """The encoded images of a .bin, two for each pair, and which pairs show one person.

    A pickle that holds anything but lists, tuples, strings, numbers and truth values is refused unread.

    Raises:
        EvaluationError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            content = _Plain(file, encoding="bytes").load()
    except _DAMAGE as error:
        raise EvaluationError(f"{path}: not a .bin of images and pairs: {error}") from error
    if not (isinstance(content, tuple | list) and len(content) == 2 and all(isinstance(c, list) for c in content)):
        raise EvaluationError(f"{path}: holds no list of images beside a list of pairs")
    images, same = content
    if not all(isinstance(image, bytes) for image in images) or not all(truth in (True, False) for truth in same):
        raise EvaluationError(f"{path}: expected encoded images and truth values")
    if len(images) != 2 * len(same) or not same:
        raise EvaluationError(f"{path}: {len(images)} images for {len(same)} pairs, which need two each")
    return images, [bool(truth) for truth in same]


class _Plain(pickle.Unpickler):
    """Of plain values alone: nothing is imported, nothing called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return _latin
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no need of")


def _latin(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _bin(path: Path, model: Embedder, params: Params) -> Scored:
    images, same = read_bin(path)

    def faces() -> Iterator[NDArray[np.uint8]]:
        for number, image in enumerate(images):
            try:
                yield middle(decode(image), model.width)
            except (UnreadableImage, FaceError) as error:
                raise EvaluationError(f"{path}: image {number}: {error}") from error

    found = _features(faces(), model, params.evaluate)
    place = np.arange(len(images))
    # by their content, too, or any two sets of so many pairs would pass for the same
    names = [f"{number}-{hashlib.sha256(image).hexdigest()[:12]}" for number, image in enumerate(images)]
    fold = (np.arange(len(same)) * FOLDS // len(same)).astype(np.int32)
    block = Block(found[:, 0], found[:, 1], place)
    scored = _score(block, place[::2], place[1::2], fold, len(images), params.evaluate)
    return Scored(names[::2], names[1::2], np.array(same), fold, scored)


def _csv(path: Path, pairs: list[Pair], model: Embedder, params: Params) -> tuple[Scored, int]:
    left, right = [pair.left for pair in pairs], [pair.right for pair in pairs]
    number = {name: i for i, name in enumerate(dict.fromkeys([*left, *right]))}
    absent = [name for name in number if not (path.parent / name).is_file()]
    if absent:
        raise EvaluationError(f"{path}: {len(absent)} photographs are not there, as {path.parent / absent[0]}")
    device = choose_device(params.machine.device).type
    rows = align_files([path.parent / name for name in number], params.align, fallback=True, device=device)
    template: list[int] = []
    detected = np.zeros(len(number), bool)

    def faces() -> Iterator[NDArray[np.uint8]]:
        for i, row in enumerate(rows):
            detected[i] = row["status"] == "detected"
            if row.get("image") is not None:
                template.append(i)
                yield middle(decode(row["image"]), model.width)

    found = _features(faces(), model, params.evaluate)
    one, other = (np.array([number[name] for name in side]) for side in (left, right))
    fold = np.array([pair.fold for pair in pairs], np.int32)
    block = Block(found[:, 0], found[:, 1], np.array(template, np.int64))
    scores = _score(block, one, other, fold, len(number), params.evaluate)
    scored = Scored(left, right, np.array([pair.same for pair in pairs]), fold, scores)
    return scored, int((~(detected[one] & detected[other])).sum())


def _features(faces: Iterator[NDArray[np.uint8]], model: Embedder, params: Evaluate) -> NDArray[np.float32]:
    found = [np.empty((0, 2, model.length), np.float32)]
    while some := list(islice(faces, params.batch)):
        found.append(embed(model, np.stack(some)))
    return np.concatenate(found)


def _score(
    block: Block,
    left: NDArray[np.intp],
    right: NDArray[np.intp],
    fold: NDArray[np.int32],
    count: int,
    params: Evaluate,
) -> NDArray[np.float32]:
    vectors, usable = scoring.templates([block], params.flip, count)
    return scoring.score(vectors, usable, left, right, fold, params.centre)


def main(params: Params) -> None:
    """Evaluate the model of this folder on what people have put into evaluate.extra."""
    folder, out = Path(params.evaluate.extra), Path("reports/extra")
    files = find_sets(folder)
    if files:
        keep_memory()
        models = Path("models")
        model = load_embedder(models, choose_device(params.machine.device))
        run(folder, model, Trained.read(models, params), out, params)
    else:  # the usual, which takes no model
        _begin(folder, out)
    with atomic(out / "sets.txt") as path:  # there at any rate, for of an empty folder DVC warns
        path.write_text("".join(f"{file}\n" for file in files) or f"{folder}: no sets there\n", encoding="utf-8")


if __name__ == "__main__":
    stage(main)
