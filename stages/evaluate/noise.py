"""Photographs that MegaFace's refined protocol leaves out, by lists as they were published.

A line is an image's id, or a path, of which the last folder and the file's name count; or, of a probe, the name alone,
as in InsightFace's facescrub_noises.txt. Extensions and what is left of a tab do not count; # begins a comment.
"""

from pathlib import Path
from posixpath import splitext

import pyarrow as pa
import pyarrow.compute as pc

from stages.download.layouts import IMAGES
from stages.evaluate.verification import EvaluationError


def without_noise(probes: pa.Table, distractors: pa.Table, path: Path) -> tuple[pa.Table, pa.Table, dict[str, int]]:
    """The rows of both sets that a list does not name, and how many photographs are `listed` and `found` there.

    Args:
        probes: rows with an image_id.
        distractors: the same.
        path: of the list; without a line that counts, all rows are left.

    Raises:
        EvaluationError: the list is absent or no text, or names no photograph of the sets, or all probes.
    """
    names = pa.array(_read(path), pa.string())
    ids = [table["image_id"].combine_chunks() for table in (probes, distractors)]
    files = pc.replace_substring_regex(ids[0], "^.*/", "")
    found = pc.sum(pc.is_in(names, pa.concat_arrays([*ids, files]))).as_py() or 0
    if len(names) and not found:
        raise EvaluationError(
            f"{path}: none of its {len(names):,} lines names a photograph of probes or distractors: the first has "
            f"{names[0]}, where an id is {ids[0][0]}"
        )
    named = pc.or_(pc.is_in(ids[0], names), pc.is_in(files, names)), pc.is_in(ids[1], names)
    probes, distractors = (
        table.filter(pc.invert(rows)) for table, rows in zip((probes, distractors), named, strict=True)
    )
    if not len(probes):
        raise EvaluationError(f"{path}: names every photograph of the probes")
    return probes, distractors, {"listed": len(names), "found": found}


def _read(path: Path) -> list[str]:
    """The photographs of a list, each once: `<folder>/<photo>`, or `<photo>` where there is no folder."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without the mark that Windows puts first
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{path}: no such file, though evaluate.megaface.noise in params.yaml names it"
        ) from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not text in UTF-8: {error}") from error
    return list(dict.fromkeys(_name(line) for line in lines if line.strip() and not line.startswith("#")))


def _name(line: str) -> str:
    name = "/".join(line.strip().rpartition("\t")[2].split("/")[-2:])
    stem, extension = splitext(name)
    return stem if extension.lower() in IMAGES else name
