"""Whether shards are what their index says: every file, every row."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import simplejpeg

from pipeline import tables
from pipeline.executor import run_all
from pipeline.params import Machine
from stages.shard.reader import File, Index, Shards


@dataclass(frozen=True)
class Verified:
    """What was looked at."""

    files: int
    rows: int


def verify(folder: Path, machine: Machine) -> Verified:
    """Check shards against index.json: the SHA-256 and the rows of each file, the image and the label of each row, and
    the counts of labels.parquet.

    Raises:
        TableError: something is not as it should be; every fault is listed.
    """
    shards = Shards(str(folder))
    index = shards.index
    files = [(split, file) for split, listed in index.files.items() for file in listed]
    checked = run_all(
        _check,
        [(folder.resolve(), file, index) for _, file in files],
        machine=machine,
        label="verifying shards",
        unit="images",
        sizes=[file.rows for _, file in files],
    )
    faults = [fault for found, _ in checked for fault in found]
    for name, sha256 in index.tables.items():
        if not (folder / name).exists():
            faults.append(f"{folder / name}: missing")
        elif tables.sha256_file(folder / name) != sha256:
            faults.append(f"{folder / name}: its SHA-256 is not what index.json says")
    unknown = {path.name for path in folder.glob("*-of-*.parquet")} - {file.name for _, file in files}
    faults += [f"{folder / name}: not in index.json" for name in sorted(unknown)]
    if not faults:  # otherwise the counts are wrong because of those
        for split in index.files:
            counts = sum((found for (of, _), (_, found) in zip(files, checked, strict=True) if of == split), Counter())
            for identity in shards.identities().to_pylist():
                if identity[split] != counts[identity["label"]]:
                    faults.append(
                        f"{folder / 'labels.parquet'}: {identity['identity']} has {identity[split]} images in {split}, "
                        f"but the shards have {counts[identity['label']]}"
                    )
    if faults:
        raise tables.TableError("\n".join([f"{folder}: {len(faults)} faults", *faults]))
    return Verified(len(files), sum(file.rows for _, file in files))


def _check(folder: Path, file: File, index: Index) -> tuple[list[str], Counter[int]]:
    """The faults of a shard, and how many rows each label has."""
    path = folder / file.name
    try:
        table = tables.read_table(path, tables.EXAMPLES)
    except tables.TableError as error:
        return [str(error)], Counter()
    faults = []
    if len(table) != file.rows:
        faults.append(f"{path}: {len(table)} rows, but index.json says {file.rows}")
    if tables.sha256_file(path) != file.sha256:
        faults.append(f"{path}: its SHA-256 is not what index.json says")
    expected = index.face.size
    for row, image in enumerate(table["image"]):
        try:
            size = simplejpeg.decode_jpeg(image.as_py(), "RGB", strict=True).shape[:2]
        except (ValueError, TypeError) as error:
            faults.append(f"{path}: row {row}: not a readable JPEG: {error}")
        else:
            if size != expected:
                faults.append(f"{path}: row {row}: {size[1]}×{size[0]} pixels, not {expected[1]}×{expected[0]}")
    return faults, Counter(table["label"].to_pylist())
