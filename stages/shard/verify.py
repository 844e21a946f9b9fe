"""Whether shards are what their index says: every file, every row."""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass

import simplejpeg

from pipeline.executor import run_all
from pipeline.params import Machine, shown
from pipeline.tables import EXAMPLES, TableError
from stages.shard.reader import File, Index, Place, Shards

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verified:
    """What was looked at."""

    files: int
    rows: int


def verify(location: str, machine: Machine) -> Verified:
    """Check shards against index.json: the SHA-256 and the rows of each file, the image and the label of each row, and
    the counts of labels.parquet.

    Args:
        location: a folder, or an address that fsspec knows.

    Raises:
        TableError: something is not as it should be; every fault is listed.
        InputError: no address that can be read here.
    """
    shards = Shards(location)
    place, index = shards.place, shards.index
    files = [(split, file) for split, listed in index.files.items() for file in listed]
    checked = run_all(
        _check,
        [(place, file, index) for _, file in files],
        machine=machine,
        label="verifying shards",
        unit="images",
        sizes=[file.rows for _, file in files],
    )
    faults = [fault for found, _ in checked for fault in found]
    for name, sha256 in index.tables.items():
        try:
            faults += _check_hash(place, name, place.read(name), sha256)
        except TableError as error:
            faults.append(str(error))
    try:
        unknown = place.names("*-of-*.parquet") - {file.name for _, file in files}
        faults += [f"{place.shown(name)}: not in index.json" for name in sorted(unknown)]
    except TableError as error:  # some hosts hand out files, but no list of them
        log.warning("%s; so files that are not in index.json go unnoticed", error)
    if not faults:  # otherwise the counts are wrong because of those
        for split in index.files:
            counts: Counter[int] = Counter()
            for (of, _), (_, found) in zip(files, checked, strict=True):
                if of == split:
                    counts.update(found)
            for identity in shards.identities().to_pylist():
                if identity[split] != counts[identity["label"]]:
                    faults.append(
                        f"{place.shown('labels.parquet')}: {identity['identity']} has {identity[split]} images in "
                        f"{split}, but the shards have {counts[identity['label']]}"
                    )
    if faults:
        raise TableError("\n".join([f"{shown(location)}: {len(faults)} faults", *faults]))
    return Verified(len(files), sum(file.rows for _, file in files))


def _check_hash(place: Place, name: str, content: bytes, sha256: str) -> list[str]:
    if hashlib.sha256(content).hexdigest() == sha256:
        return []
    return [f"{place.shown(name)}: its SHA-256 is not what index.json says"]


def _check(place: Place, file: File, index: Index) -> tuple[list[str], Counter[int]]:
    """The faults of a shard, and how many rows each label has."""
    name = file.name
    try:
        content = place.read(name)
        table = place.parsed(name, content, EXAMPLES)
    except TableError as error:
        return [str(error)], Counter()
    faults = _check_hash(place, name, content, file.sha256)
    if len(table) != file.rows:
        faults.append(f"{place.shown(name)}: {len(table)} rows, but index.json says {file.rows}")
    expected = index.face.size
    for row, image in enumerate(table["image"]):
        try:
            size = simplejpeg.decode_jpeg(image.as_py(), "RGB", strict=True).shape[:2]
        except (ValueError, TypeError) as error:
            faults.append(f"{place.shown(name)}: row {row}: not a readable JPEG: {error}")
        else:
            if size != expected:
                faults.append(
                    f"{place.shown(name)}: row {row}: {size[1]}×{size[0]} pixels, not {expected[1]}×{expected[0]}"
                )
    return faults, Counter(table["label"].to_pylist())
