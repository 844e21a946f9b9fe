"""A path inside a source becomes ids, by the layouts in which face sets are handed round.

    train   CASIA-WebFace/0000045/001.jpg                                  image 0000045/001
    lfw     lfw/Abel_Pacheco/Abel_Pacheco_0001.jpg                         image Abel_Pacheco/Abel_Pacheco_0001
    ytf     YouTubeFaces/frame_images_DB/Abel_Pacheco/0/0.15.jpg           image Abel_Pacheco/0/0.15, video
                                                                           Abel_Pacheco/0, frame 15

The last folders count, whatever is above them; but a person has one folder, see `above`.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from posixpath import splitext
from typing import NamedTuple

EXPECTED = {
    "train": "<identity>/<image>.jpg",
    "lfw": "<identity>/<identity>_0001.jpg",
    "ytf": "<identity>/<video>/<frame number>.jpg",
    "probes": "<identity>/<image>.jpg",
    "distractors": "<folder>/<image>.jpg",
}
"""What the paths of each set end in."""

IMAGES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
)
"""What the decoder reads (stages/align/decode.py)."""
UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw"})
"""Photographs all the same."""
HARMLESS = frozenset({"hidden files", "files that are no images", "aligned copies of frames"})
"""Reasons to pass over a file by which no photograph is lost."""

_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What acts on a terminal or a page instead of being seen: control characters, line breaks, turns of direction."""
_DEPTH = {"train": 2, "lfw": 2, "ytf": 3, "probes": 2, "distractors": 2}
_FRAME = re.compile(r"\d+$", re.ASCII)
_SHARES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
"""Folders that hold a share of a set each, of the same people or of others."""


class Ids(NamedTuple):
    """The first columns of a raw row."""

    image_id: str
    identity: str
    video: str | None
    frame: int | None


def why_no_photograph(name: str) -> str | None:
    """Why a file is no photograph, by its name; None if it is one."""
    parts = _parts(name)
    if any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in parts):
        return "hidden files"
    extension = splitext(parts[-1])[1].lower() if parts else ""
    if extension in UNREAD:
        return f"photographs of a kind that is not read ({extension})"
    return None if extension in IMAGES else "files that are no images"


def why_skipped(set_name: str, name: str) -> str | None:
    """Why a file is none of the set's photographs; None if it is one."""
    if (reason := why_no_photograph(name)) is not None:
        return reason
    parts = _parts(name)
    if set_name == "ytf" and "aligned_images_DB" in parts:  # the full YouTubeFaces.tar.gz has every frame twice
        return "aligned copies of frames"
    if len(parts) < _DEPTH[set_name]:
        return f"images outside {EXPECTED[set_name]}"
    if name.startswith("/") or ".." in parts:
        return "photographs at absolute paths or ones with `..`"
    if not _is_text(name):
        return "photographs whose names are not UTF-8"
    if _UNSHOWABLE.search(name):
        return "photographs whose names have control characters"
    if set_name == "ytf" and _frame(name) is None:
        return "frames whose names do not end in a number below 2^31, such as 0.15.jpg"
    return None


def ids(set_name: str, name: str) -> Ids:
    """The ids of a photograph of the set, one that is not skipped, by its path inside the source."""
    *folders, file = _parts(name)[-_DEPTH[set_name] :]
    group = "/".join(folders)
    video, frame = (group, _frame(name)) if set_name == "ytf" else (None, None)
    return Ids(f"{group}/{splitext(file)[0]}", folders[0], video, frame)


def above(set_name: str, name: str) -> list[str]:
    """The folders above a person's: the same for all photographs of a person, or two people have folders of one name.

    Folders that only share a set out, such as train and val, do not count.
    """
    return [part for part in _parts(name)[: -_DEPTH[set_name]] if part.lower() not in _SHARES]


def within(set_name: str, paths: Iterable[str]) -> tuple[str, str] | None:
    """Two photographs of two people, the second's folder within the first's; None if there are none such.

    Args:
        paths: a photograph of each person.
    """
    folders = {tuple(_parts(path)[: 1 - _DEPTH[set_name]]): path for path in paths}
    for folder, path in folders.items():
        for depth in range(1, len(folder)):
            if folder[:depth] in folders:
                return folders[folder[:depth]], path
    return None


def alike(identities: Iterable[str]) -> list[list[str]]:
    """Identities, two or more each time, that differ only in case, in spaces, or in how Unicode composes letters."""
    groups = defaultdict(list)
    for identity in sorted(identities):
        groups[" ".join(unicodedata.normalize("NFKC", identity).casefold().split())].append(identity)
    return [group for group in groups.values() if len(group) > 1]


def _frame(name: str) -> int | None:
    """The number of a frame; None where its name ends in none that a column holds."""
    number = _FRAME.search(splitext(name)[0])
    return int(number[0]) if number and int(number[0]) < 2**31 else None


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _is_text(name: str) -> bool:
    """Whether a name was decoded without loss (what was not is kept by Python as lone surrogates)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
