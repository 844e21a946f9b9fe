"""`cosface score`: embeddings of any model, scored as our own are."""

import csv
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.params import Evaluate
from stages.download.protocols import Pair, read_pairs
from stages.evaluate import scoring, uncertainty
from stages.evaluate.features import Block
from stages.evaluate.verification import EvaluationError, Flags

Protocol = Literal["lfw", "ytf", "csv"]
_NAMED = 10
"""Keys that a message names."""
_FOLDS = 10
_FOLD_DIGITS = 9
"""Of a fold's number, so that tables can hold it."""


class Embeddings:
    """The arrays of an .npz: `keys` (N strings), `emb` (N×D), and perhaps `flip` (N×D, of the mirror images)."""

    def __init__(self, path: Path) -> None:
        """Read and check them; nothing is unpickled.

        Raises:
            EvaluationError: the file is no .npz, an array is absent or of another form, or a key is there twice.
            OSError: there is no such file.
        """
        arrays = _arrays(path)
        lacking = sorted({"keys", "emb"} - arrays.keys())
        if lacking:
            raise EvaluationError(f"{path}: lacks {' and '.join(lacking)}; it has {', '.join(sorted(arrays))}")
        keys, self.emb, self.flip = arrays["keys"], arrays["emb"], arrays.get("flip")
        if keys.ndim != 1 or keys.dtype.kind != "U":
            raise EvaluationError(
                f"{path}: keys must be N strings, not {keys.dtype} of shape {keys.shape}; "
                "np.array([...], dtype=str) makes them"
            )
        for name, array in (("emb", self.emb), ("flip", self.flip)):
            if array is None:
                continue
            if array.dtype.kind not in "fiu" or array.ndim != 2 or len(array) != len(keys) or not array.shape[1]:
                raise EvaluationError(
                    f"{path}: {name} must be {len(keys)}×D numbers, a row for each key, not {array.dtype} of shape "
                    f"{array.shape}"
                )
            bad = keys[~np.isfinite(array).all(axis=1) | ~array.any(axis=1)].tolist()
            if bad:
                raise EvaluationError(f"{path}: {name} is not finite, or all zero, for {_some(bad)}")
        if self.flip is not None and self.flip.shape != self.emb.shape:
            raise EvaluationError(f"{path}: flip is {self.flip.shape}, emb {self.emb.shape}: they must be alike")
        self.keys: list[str] = keys.tolist()
        names, times = np.unique(keys, return_counts=True)
        if (times > 1).any():
            raise EvaluationError(f"{path}: keys are there more than once: {_some(names[times > 1].tolist())}")
        self.path = path


def score(
    protocol: Protocol,
    embeddings: Path,
    pairs: Sequence[Path],
    flip: scoring.Flip | None,
    centre: bool,
    params: Evaluate,
) -> dict[str, Any]:
    """Score foreign embeddings: what metrics.json would hold.

    Args:
        protocol: lfw (`pairs` is pairs.txt), ytf (splits.txt; a video's template is made of all keys
            `<person>/<video>/<frame>`, or is the key `<person>/<video>`), or csv (`read_csv`).
        embeddings: an .npz, see `Embeddings`; of any scale.
        pairs: the pair list; or several, whose folds are counted on: LFW's view 1 is pairsDevTrain.txt and
            pairsDevTest.txt, and its figure the accuracy of the second fold.
        flip: what becomes of the mirror images' embeddings; where None, they are concatenated if there are any.
        centre: as in `scoring.Options`.
        params: section evaluate of params.yaml, for false accept rates and the bootstrap.

    Raises:
        EvaluationError: the embeddings are unusable, or lack some that the pairs name; or a pair is there again, with
            another truth or in another fold.
        SourceError: the pair list is malformed.
        OSError: a file is absent.
    """
    listed: list[Pair] = []
    places: list[str] = []
    for path in pairs:
        folds = 1 + max((pair.fold for pair in listed), default=-1)
        some = read_csv(path) if protocol == "csv" else read_pairs(protocol, path, str(path))
        listed += [pair._replace(fold=pair.fold + folds) for pair in some]
        places += [f"{path}:{pair.line}" for pair in some]
    _check_repeated(listed, places)
    given = Embeddings(embeddings)
    options = scoring.Options(flip or ("none" if given.flip is None else "concatenate"), centre)
    scored = score_pairs(given, listed, options)
    verification = scored.verification(params.fars)
    intervals = uncertainty.intervals(verification, scored.people, replicates=params.replicates, seed=params.seed)
    return scoring.summary(verification.measure(), intervals, options, undetected=None)


def text(found: dict[str, Any]) -> str:
    """The summary for people, in per cent."""
    values = {name: found[name] for name in ("accuracy", "auc", "eer")}
    values |= {f"tar_at_far_{far}": tar for far, tar in found["tar_at_far"].items()}
    lines = []
    for name, value in values.items():
        bounds, why = found["intervals"][name], found["unresolved"].get(name)
        shown = "none" if value is None else f"{value:.2%}"
        around = f"95% interval {bounds[0]:.2%} to {bounds[1]:.2%}" if bounds else f"({why})"
        lines.append(f"{name:<18} {shown:>8}   {around}")
    lines[0] += f"   ± {found['accuracy_se']:.2%} standard error over folds"
    return "\n".join(
        [
            *lines,
            f"by fold: {', '.join(f'{share:.2%}' for share in found['fold_accuracy'])}",
            f"{found['pairs']:,} pairs, mean threshold {found['threshold']:.4f}, bootstrap over "
            f"{found['bootstrap_over']}, flip: {found['flip']}, centre: {str(found['centre']).lower()}",
        ]
    )


def score_pairs(given: Embeddings, pairs: Sequence[Pair], options: scoring.Options) -> scoring.Scored:
    """The pairs with the cosines of their embeddings.

    Raises:
        EvaluationError: embeddings of the pairs are missing; the first ten are named.
    """
    left, right = [pair.left for pair in pairs], [pair.right for pair in pairs]
    number = {name: index for index, name in enumerate(dict.fromkeys([*left, *right]))}
    template = np.array([number.get(key, number.get(key.rpartition("/")[0], -1)) for key in given.keys], np.int64)
    absent = set(range(len(number))) - set(template.tolist())
    if absent:
        names = [name for name, index in number.items() if index in absent]
        raise EvaluationError(f"{given.path}: lacks embeddings of the pairs: {_some(names)}")
    used = np.flatnonzero(template >= 0)
    block = Block(given.emb[used], None if given.flip is None else given.flip[used], template[used])
    vectors, usable = scoring.templates([block], options.flip, len(number))
    fold = np.array([pair.fold for pair in pairs], np.int32)
    one, other = (np.array([number[name] for name in side]) for side in (left, right))
    scores = scoring.score(vectors, usable, one, other, fold, options.centre)
    return scoring.Scored(left, right, np.array([pair.same for pair in pairs]), fold, scores)


def read_csv(path: Path) -> list[Pair]:
    """Pairs of one's own: a CSV with the columns `left`, `right`, `same` (1 or 0), and perhaps `fold` (from 0).

    Without folds, ten are made in the list's order, each with a tenth of either kind.

    Raises:
        EvaluationError: a column is absent or a value is not of its form; a pair is there again, with another truth or
            in another fold; or a row contradicts the folders, where those are people. Names file and line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it by a byte order mark
            reader = csv.DictReader(file)
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"{path}: not a CSV file: {error}") from error
    lacking = [name for name in ("left", "right", "same") if name not in (reader.fieldnames or ())]
    if lacking:
        raise EvaluationError(f"{path}: lacks the columns {', '.join(lacking)}; it has {reader.fieldnames}")
    found = []
    for line, row in rows:
        if not row["left"] or not row["right"] or row["same"] not in ("0", "1"):
            raise EvaluationError(f"{path}:{line}: expected two keys and same 0 or 1, found {row}")
        fold = row.get("fold", "0")
        if fold is None or not fold.isdecimal() or len(fold) > _FOLD_DIGITS:
            raise EvaluationError(
                f"{path}:{line}: expected a fold from 0, of {_FOLD_DIGITS} digits at most, found {fold!r}"
            )
        found.append(Pair(line, int(fold), row["left"], row["right"], row["same"] == "1"))
    if not found:
        raise EvaluationError(f"{path}: holds no pairs")
    same = np.array([pair.same for pair in found], np.bool_)
    _check_folders(path, found, same)
    if "fold" not in (reader.fieldnames or ()):
        rank = np.where(same, np.cumsum(same), np.cumsum(~same)) - 1
        fold_of = rank * _FOLDS // np.maximum(np.where(same, same.sum(), (~same).sum()), 1)
        found = [pair._replace(fold=int(number)) for pair, number in zip(found, fold_of, strict=True)]
    _check_repeated(found, [f"{path}:{pair.line}" for pair in found])
    return found


def _check_folders(path: Path, pairs: Sequence[Pair], same: Flags) -> None:
    """That folders and truths agree in all rows, where they do in most of either kind: there a folder is a person.

    Raises:
        EvaluationError: a row has two images of one folder as two people, or the other way round.
    """
    folders = [[side.rpartition("/")[0] for side in (pair.left, pair.right)] for pair in pairs]
    if not all(folder for both in folders for folder in both):
        return
    wrong = np.array([one == other for one, other in folders]) != same
    if wrong.any() and all(2 * np.count_nonzero(wrong & kind) < np.count_nonzero(kind) for kind in (same, ~same)):
        pair, number = pairs[int(np.argmax(wrong))], int(np.count_nonzero(wrong))
        where = "two folders" if pair.same else "one folder"
        raise EvaluationError(
            f"{path}:{pair.line}: {pair.left} and {pair.right} lie in {where}, yet same is {int(pair.same)}; in most "
            f"rows a folder is a person, but not in {number:,} of {len(pairs):,}: correct same, or the folders"
        )


def _check_repeated(pairs: Sequence[Pair], places: Sequence[str]) -> None:
    """That no pair, either way round, has two truths, or is in a fold whose threshold is chosen on it, too.

    Args:
        places: of the pairs, as messages name them.

    Raises:
        EvaluationError: one has, or is.
    """
    first: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        one, other = sorted((pair.left, pair.right))
        before = first.setdefault((one, other), index)
        if pairs[before].same == pair.same and pairs[before].fold == pair.fold:
            continue
        differs = "in another fold" if pairs[before].same == pair.same else f"as same = {int(pairs[before].same)}"
        raise EvaluationError(
            f"{places[index]}: {pair.left} and {pair.right} are a pair in {places[before]} already, {differs}; "
            "keep one of them"
        )


def _arrays(path: Path) -> dict[str, NDArray]:
    if path.exists() and not zipfile.is_zipfile(path):
        raise EvaluationError(f"{path}: not an .npz, as np.savez(path, keys=..., emb=...) makes it")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("keys", "emb", "flip") if name in file.files}
    except (ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise EvaluationError(f"{path}: not an .npz of plain arrays (keys, emb, flip): {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy hands out the bytes of what is no .npy
            raise EvaluationError(f"{path}: {name} is no array, as np.savez(path, keys=..., emb=...) makes them")
    return arrays


def _some(names: Sequence[str]) -> str:
    """How many, and the first ten."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{len(names):,}: {', '.join(names[:_NAMED])}{more}"
