"""The download stage as a function of a source and a folder."""

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from pathlib import Path

import pyarrow as pa

from pipeline import tables
from pipeline.executor import run_all
from pipeline.params import PAIRED, Absent, Archive, Given, Local, Machine, Synthetic, local_path, shown
from pipeline.progress import progress
from stages.download import synthetic
from stages.download.archives import Kind, Member, archive_members, folder_digest, folder_members
from stages.download.errors import SourceError
from stages.download.fetch import Obtained, Wanted, obtain
from stages.download.layouts import EXPECTED, HARMLESS, Ids, above, alike, ids, why_skipped, within
from stages.download.protocols import Pair, check_pairs, pairs_table, read_pairs

log = logging.getLogger(__name__)

CODE = Path(__file__).parent
PASSED_OVER = "passed_over.csv"
_TOLD = 3
"""So many cases of similar names."""
_NO_FILES: dict[Kind, str] = {"link": "links, which are not followed", "device": "devices"}


@dataclass
class Contents:
    """What a source turned out to hold: names only, so that it stays small for half a million images."""

    paths: dict[str, str] = field(default_factory=dict)
    """Where each image lies in the source, by image_id."""
    identities: dict[str, str] = field(default_factory=dict)
    """Where the first image of each lies."""
    videos: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    """How many members were passed over, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first of them for each reason, as Python writes it: an archive may name what is none of ours as it likes."""
    lost: list[tuple[str, str]] = field(default_factory=list)
    """Name, written so, and reason of each of them that may have been a photograph."""

    def add(self, found: Ids, path: str) -> None:
        """Take note of an image."""
        self.paths[found.image_id] = path
        self.identities.setdefault(found.identity, path)
        if found.video is not None:
            self.videos.add(found.video)

    def skip(self, reason: str, name: str) -> None:
        """Take note of a member that is passed over."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, repr(name))
        if reason not in HARMLESS:
            self.lost.append((repr(name), reason))


def run(
    set_name: str,
    source: Given | Absent,
    out: Path,
    machine: Machine,
    downloads: Path = Path("data/downloads"),
) -> None:
    """Write `part-NNNNN.parquet` and, for lfw and ytf, `pairs.parquet`; `passed_over.csv` where photographs were.

    The same source gives the same bytes, on any number of workers; a killed run goes on with the first missing part.
    What `out` held before stays until the new set is complete.

    Args:
        set_name: one of pipeline.params.SETS.
        source: the set's section of params.yaml.
        out: folder of the raw set.
        machine: section machine of params.yaml.
        downloads: where files lie while they are fetched and read; they are removed when the set is complete.

    Raises:
        SourceError: the source is absent, damaged, of another layout, or does not fit its pair list.
        InputError: `out` is a link.
    """
    tables.check_replaceable(out)
    if isinstance(source, Absent):
        with tables.resumable(out, tables.fingerprint(set_name, code=(CODE,))) as unfinished:
            tables.write_table(tables.part_path(unfinished, 0), tables.RAW.empty_table(), tables.RAW)
    elif isinstance(source, Synthetic):
        _run_synthetic(set_name, source, out, machine)
    else:
        with tables.locked(out):  # from the first byte: who waits must not count on a file that is then discarded
            _run_photographs(set_name, source, out, downloads)


def _run_synthetic(set_name: str, params: Synthetic, out: Path, machine: Machine) -> None:
    """Render the parts, each in some worker process."""
    contents, photographs = Contents(), synthetic.photographs(params, set_name)
    pairs = synthetic.protocol(params, set_name) if set_name in PAIRED else None
    for photograph in photographs:
        contents.add(_ids(photograph), photograph.image_id)
    key = tables.fingerprint(set_name, params.model_dump(exclude={"watch"}), code=(CODE,))
    with tables.resumable(out, key) as unfinished:
        tasks = [
            (path.resolve(), params, photographs[start : start + tables.PART_ROWS])
            for index, start in enumerate(range(0, len(photographs), tables.PART_ROWS))
            if not (path := tables.part_path(unfinished, index)).exists()
        ]
        run_all(
            _render_part,
            tasks,
            machine=machine,
            label=f"{set_name}: rendering",
            unit="images",
            sizes=[len(task[2]) for task in tasks],
        )
        if pairs is not None:
            tables.write_table(unfinished / "pairs.parquet", pairs, tables.PAIRS)
    _report(set_name, contents, params.folds * params.pairs)


def _render_part(path: Path, params: Synthetic, photographs: list[synthetic.Photograph]) -> None:
    images = synthetic.render_part(params, photographs)
    _write_part(path, [(_ids(photograph), image) for photograph, image in zip(photographs, images, strict=True)])


def _ids(photograph: synthetic.Photograph) -> Ids:
    return Ids(photograph.image_id, photograph.identity, photograph.video, photograph.frame)


def _run_photographs(set_name: str, source: Local | Archive, out: Path, downloads: Path) -> None:
    """Read a folder or an archive, once its pair list is known to be well-formed."""
    obtained: list[Obtained] = []
    pairs: list[Pair] = []
    key = f"download.{set_name}"
    if source.pairs is not None:
        file = obtain(Wanted(source.pairs, source.pairs_sha256, f"{key}.pairs", f"{key}.pairs_sha256"), downloads)
        obtained.append(file)
        with file.used():
            pairs = read_pairs(set_name, file.path, shown(source.pairs))
    if isinstance(source, Archive):
        file = obtain(Wanted(source.location, source.sha256, f"{key}.location", f"{key}.sha256"), downloads)
        obtained.append(file)
        with file.used():
            contents = _write_set(set_name, source, out, pairs, file.sha256, archive_members(file.path))
    else:
        folder = local_path(source.location)
        if not folder.is_dir():
            if folder.exists():
                raise SourceError(f"{folder}: a file, not a folder; for an archive, set {key}.source to archive")
            raise SourceError(f"{folder}: no such folder; set {key}.location in params.yaml to where it is")
        contents = _write_set(set_name, source, out, pairs, folder_digest(folder), folder_members(folder))
    for file in obtained:
        file.discard()
    _report(set_name, contents, len(pairs))
    if contents.lost:
        log.warning("%s: %s lists what was passed over", set_name, out / PASSED_OVER)


def _write_set(
    set_name: str, source: Local | Archive, out: Path, pairs: list[Pair], content: str, members: Iterator[Member]
) -> Contents:
    """Write the parts and the pairs of a set; `content` is the hash of what `members` come from."""
    contents = Contents()
    with tables.resumable(out, tables.fingerprint(set_name, content, code=(CODE,))) as unfinished:
        _write_parts(set_name, unfinished, _photographs(set_name, members, contents))
        _check(set_name, source, contents)
        if source.pairs is not None:
            known = contents.videos if set_name == "ytf" else contents.paths
            check_pairs(pairs, known, shown(source.pairs), shown(source.location))
            tables.write_table(unfinished / "pairs.parquet", pairs_table(pairs), tables.PAIRS)
        if contents.lost:
            with tables.atomic(unfinished / PASSED_OVER) as path, path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([("name", "reason"), *contents.lost])
    return contents


def _photographs(set_name: str, members: Iterable[Member], contents: Contents) -> Iterator[tuple[Ids, Member]]:
    """The photographs among the members, with their ids; all that is met goes into `contents`."""
    for member in members:
        if member.kind == "folder":
            continue
        reason = _why_passed_over(set_name, member)
        if reason is None:
            found = ids(set_name, member.name)
            _check_folder(set_name, found.identity, member, contents.identities.get(found.identity, member.name))
            if found.image_id not in contents.paths:
                contents.add(found, member.name)
                yield found, member
                continue
            reason = "photographs whose image id (folder and name without extension) is that of an earlier one"
        contents.skip(reason, member.name)


def _why_passed_over(set_name: str, member: Member) -> str | None:
    """Why a file is none of the set's photographs; None if it is one."""
    reason = _NO_FILES.get(member.kind) or why_skipped(set_name, member.name)
    if reason is not None:
        return reason
    if member.kind == "hard link":
        return "hard links to other members, which are not read (`tar --hard-dereference` packs the photographs)"
    if member.size > tables.PART_BYTES:  # a part must hold it
        return f"files of more than {tables.PART_BYTES >> 20} MiB, which are no photographs"
    return None


def _check_folder(set_name: str, identity: str, member: Member, first: str) -> None:
    """Refuse two people whose folders bear one name; of distractors nobody asks who they are.

    Args:
        member: a photograph of the identity.
        first: path of the first one.

    Raises:
        SourceError: they lie in different folders.
    """
    if set_name != "distractors" and above(set_name, member.name) != above(set_name, first):
        raise SourceError(
            f"{member.source}: {first} and {member.name} lie in two folders called {identity}, which would be one "
            f"person. Give each person one folder, of a name that no other has: .../{EXPECTED[set_name]}"
        )


def _write_parts(set_name: str, out: Path, photographs: Iterator[tuple[Ids, Member]]) -> None:
    """Write the parts that are not there yet.

    A part ends by its own rows and bytes alone, so what an interrupted run left tells where the next one begins.
    """
    finished = _finished(out)
    done = sum(finished)
    path = tables.part_path(out, len(finished))
    rows: list[tuple[Ids, bytes]] = []
    size = 0
    remaining = islice(photographs, done, None)
    for found, member in progress(remaining, total=None, label=f"{set_name}: reading", unit="images"):
        image = member.read()
        rows.append((found, image))
        size += len(image)
        if len(rows) == tables.PART_ROWS or size >= tables.PART_BYTES:
            _write_part(path, rows)
            finished.append(len(rows))
            path, rows, size = tables.part_path(out, len(finished)), [], 0
    if rows:
        _write_part(path, rows)


def _finished(out: Path) -> list[int]:
    """Rows of each part there is, up to the first missing one."""
    paths = (tables.part_path(out, index) for index in count())
    return [tables.rows(path) for path in takewhile(Path.exists, paths)]


def _write_part(path: Path, rows: list[tuple[Ids, bytes]]) -> None:
    """Write photographs as a part, each with its hash."""
    columns = zip(*((*found, image, hashlib.sha256(image).hexdigest()) for found, image in rows), strict=True)
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, tables.RAW.types, strict=True)]
    tables.write_table(path, pa.Table.from_arrays(arrays, schema=tables.RAW), tables.RAW)


def _check(set_name: str, source: Local | Archive, contents: Contents) -> None:
    """Refuse a source that holds nothing to work with."""
    if not contents.paths:
        found = "; ".join(f"{n:,} {why}, as {contents.examples[why]}" for why, n in contents.skipped.most_common())
        raise SourceError(
            f"{shown(source.location)}: no images; expected .../{EXPECTED[set_name]}, found {found or 'no files'}"
        )
    if set_name != "distractors" and (nested := within(set_name, contents.identities.values())):
        raise SourceError(
            f"{shown(source.location)}: {nested[1]} lies in a folder within that of {nested[0]}: one person or two? "
            f"Give each person one folder, and none within another: .../{EXPECTED[set_name]}"
        )
    if set_name == "train" and len(contents.identities) < 2:
        raise SourceError(
            f"{shown(source.location)}: only one identity, {min(contents.identities)}; training needs at least 2. "
            f"Expected .../{EXPECTED[set_name]}, found {next(iter(contents.paths.values()))}"
        )


def _report(set_name: str, contents: Contents, pairs: int) -> None:
    counts = [f"{len(contents.paths):,} images", f"{len(contents.identities):,} identities"]
    counts += [f"{len(contents.videos):,} videos"] if contents.videos else []
    counts += [f"{pairs:,} pairs"] if pairs else []
    log.info("%s: %s", set_name, ", ".join(counts))
    for reason, n in contents.skipped.most_common():
        level = logging.INFO if reason in HARMLESS else logging.WARNING
        log.log(level, "%s: passed over %s %s, as %s", set_name, f"{n:,}", reason, contents.examples[reason])
    similar = [] if set_name == "distractors" else alike(contents.identities)
    if similar:
        told = "; ".join(" and ".join(map(ascii, group)) for group in similar[:_TOLD])
        told += f"; and {len(similar) - _TOLD:,} more" if len(similar) > _TOLD else ""
        log.warning(
            "%s: identities that differ only in case, spaces or Unicode's forms are different people, %s times: %s. "
            "If they are the same, give them one folder",
            *(set_name, f"{len(similar):,}", told),
        )
