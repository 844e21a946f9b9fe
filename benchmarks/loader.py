"""Shards and their loader beside peers: `python -m benchmarks.loader`, or some sections by `--only reading,augmenting`.

Aligns real photographs (`--faces`: CASIA-WebFace.zip) or takes a folder of the aligned table (`--aligned`), sets up
the peers in an environment of their own (`--peers`, made on first use), and lets contestants take turns, so that all
see the same noise: ratios are those of a round. The result goes to benchmarks/results/loader.json, section by section.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import simplejpeg
import torch
from numpy.typing import NDArray

from benchmarks.machine import RESULTS, hardware
from pipeline import tables
from pipeline.executor import keep_memory
from pipeline.params import Params, Shard, Train, load_params
from stages.shard import hashes, writer
from stages.shard import run as shard
from stages.shard.reader import Shards
from stages.train.faces import unaligned
from stages.train.loader import Loader
from stages.train.sampling import Uniform

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "loader.json"
PEERS = ["folder", "RecordIO", "webdataset", "datasets", "mosaicml-streaming"]
PINNED = [
    "torch==2.13.0",
    "simplejpeg==1.9.0",
    "numpy",
    "opencv-python-headless>=4.11,<5",
    "webdataset==1.0.2",
    "datasets==5.2.0",
]
STREAMING = "mosaicml-streaming==0.13.0"
"""Installed without what it asks for: an older torch, and torchvision, whose build does not go with the CPU's torch."""
STREAMING_NEEDS = ["transformers", "brotli", "python-snappy", "zstd", "pillow", "catalogue", "pyyaml", "xxhash<4"]
PACKAGES = ("torch", "numpy", "simplejpeg", "pyarrow")
FACES, BATCH, ROUNDS = 20_000, 128, 5
CASIA_IMAGES, CASIA_IDENTITIES = 494_414, 10_575
NEAR = 24
"""Bits of 256, as the recipes have it."""
WARM_UP, TIMED, TURNS = 20, 120, 15


def section(params: Params) -> Shard:
    """The default recipe's, without cleaning or validation: repeated faces are all duplicates."""
    clean = params.shard.clean.model_copy(update={"min_images": 1, "duplicates": False, "same_names": False})
    validation = params.shard.validation.model_copy(update={"share": 0.0})
    return params.shard.model_copy(update={"clean": clean, "validation": validation})


def write_aligned(folder: Path, faces: Sequence[bytes], labels: Sequence[int]) -> None:
    for part, start in enumerate(range(0, len(labels), tables.PART_ROWS)):
        rows = [
            {
                "image_id": f"{label:05d}/{start + i:06d}",
                "identity": f"{label:05d}",
                "status": "detected",
                "sha256": f"{start + i:064x}",
                "image": faces[(start + i) % len(faces)],
                "box": [0.0, 0.0, 80.0, 80.0],
            }
            for i, label in enumerate(labels[start : start + tables.PART_ROWS])
        ]
        table = pa.Table.from_pylist(rows, tables.ALIGNED)
        tables.write_table(tables.part_path(folder, part), table, tables.ALIGNED)


def real_faces(aligned: Path) -> tuple[list[bytes], list[str]]:
    """The aligned faces of a table, and whose they are."""
    table = tables.read_parts(aligned, tables.ALIGNED, ["image", "identity"])
    table = table.filter(table["image"].is_valid())
    return table["image"].to_pylist(), table["identity"].to_pylist()


def write_shards(faces: list[bytes], people: list[str], work: Path, rows: int = FACES) -> tuple[list[bytes], list[int]]:
    """Shards of so many rows; the faces, sorted by person, and the label of each row."""
    number = {name: i for i, name in enumerate(sorted(set(people)))}
    labels = sorted(number[name] for name in islice(cycle(people), rows))
    by_person = [face for _, face in sorted(zip(people, faces, strict=True), key=lambda item: item[0])]
    write_aligned(work / "aligned", by_person, labels)
    params = load_params(ROOT / "params.yaml")
    out = work / "shards"
    shutil.rmtree(out, ignore_errors=True)
    shard.run(work / "aligned", {}, out, work / "report", section(params), params.align.face, params.machine)
    return by_person, labels


def reading(faces: list[bytes], people: list[str], peers: Path, work: Path) -> dict[str, Any]:
    """Images/s to shuffled, flipped uint8 batches, on one core and on two."""
    by_person, labels = write_shards(faces, people, work)
    for i, label in enumerate(labels):
        path = work / "folder" / f"{label:05d}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(by_person[i % len(by_person)])
    python = peers / "bin" / "python"
    script = str(ROOT / "benchmarks" / "loader_peers.py")
    for name in PEERS[1:]:
        subprocess.run([python, script, "write", name, str(work)], check=True, stdout=subprocess.DEVNULL)
    ours = ["decode", "ours", "ours, host cache", "ours, device cache (the CPU)"]
    versions: dict[str, str] = {}
    result: dict[str, Any] = {"faces": FACES, "batch": BATCH, "bytes_per_face": round(np.mean([*map(len, faces)]))}
    for count in (1, 2):
        rates: dict[str, list[float]] = {name: [] for name in [*ours, *PEERS]}
        for turn in range(ROUNDS):
            for name in rates:
                command = [sys.executable, __file__, "--read", name] if name in ours else [python, script, "read", name]
                command += [str(work), str(count), str(BATCH)]
                answer = json.loads(on_cores(count, command).splitlines()[-1])
                rates[name].append(answer["rate"])
                versions |= {name: answer["version"]} if name in PEERS else {}
            print(f"  {count} cores, round {turn}: { ({n: round(r[-1]) for n, r in rates.items()}) }", flush=True)
        rounds = {name: np.asarray(values) for name, values in rates.items()}
        best = np.max([rounds[name] for name in PEERS], axis=0)
        result[f"{count}_cores"] = {
            "images_per_second": {name: round(float(np.median(values))) for name, values in rounds.items()},
            "share_of_decode_alone": {name: spread(rounds[name] / rounds["decode"]) for name in rounds},
            "ours_times_as_fast_as": {name: spread(rounds["ours"] / rounds[name]) for name in PEERS}
            | {"the fastest peer of each round": spread(rounds["ours"] / best)},
        }
    return result | {"peers": versions}


def by_turns(faces: list[bytes], people: list[str], work: Path) -> dict[str, Any]:
    """Ours and decoding alone by turns in one process, after the first epoch; more shards than the loader holds."""
    write_shards(faces, people, work, 2 * FACES)
    result: dict[str, Any] = {"faces": 2 * FACES, "rounds": TURNS}
    for batch in (128, 512):
        for count in (1, 2):
            command = [sys.executable, __file__, "--read", "by turns", work, count, batch]
            rates = json.loads(on_cores(count, command).splitlines()[-1])["rates"]
            ours, decode = np.asarray(rates).T
            result[f"batch {batch}, {count} cores"] = {
                "images_per_second": {"decode": round(float(np.median(decode))), "ours": round(float(np.median(ours)))},
                "share_of_decode_alone": spread(ours / decode)
                | {"quartiles": np.percentile(ours / decode, (25, 75)).round(3).tolist()},
            }
    return result


def augmenting(faces: list[bytes], people: list[str], work: Path) -> dict[str, Any]:
    """Images/s augmented as recipe ir50-modern has it, by threads and by a process a core."""
    write_shards(faces, people, work)
    contestants = [(kind, count) for count in (1, 2) for kind in ("threads", "processes")]
    rates: dict[str, list[float]] = {}
    for turn in range(ROUNDS):
        for kind, count in contestants:
            command = [sys.executable, __file__, "--read", f"augmented, {kind}", work, count, BATCH]
            rate = json.loads(on_cores(count, command).splitlines()[-1])["rate"]
            rates.setdefault(f"{kind}, {count} cores", []).append(rate)
        print(f"  round {turn}: { ({n: round(r[-1]) for n, r in rates.items()}) }", flush=True)
    rounds = {name: np.asarray(values) for name, values in rates.items()}
    return {
        "batch": BATCH,
        "images_per_second": {name: round(float(np.median(values))) for name, values in rounds.items()},
        "two_cores_times_one": {
            kind: spread(rounds[f"{kind}, 2 cores"] / rounds[f"{kind}, 1 cores"]) for kind in ("threads", "processes")
        },
        "processes_times_threads": {
            f"{count} cores": spread(rounds[f"processes, {count} cores"] / rounds[f"threads, {count} cores"])
            for count in (1, 2)
        },
    }


def on_cores(count: int, command: Sequence[Any]) -> str:
    chosen = sorted(os.sched_getaffinity(0))[:count]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        text=True,
        capture_output=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return {"median": round(float(middle), 3), "min": round(float(low), 3), "max": round(float(high), 3)}


def read(name: str, work: Path, count: int, batch: int) -> None:
    """One of our own contestants, in a process of its own."""
    torch.set_num_threads(1)
    keep_memory()
    if name == "decode":
        decode_alone = decoding(work, count)
        decode_alone()
        print(json.dumps({"rate": decode_alone()}))
        return
    params = load_params(ROOT / "params.yaml")
    train = Train.model_validate(params.train.model_dump() | {"batch": batch})
    if name.startswith("augmented"):
        strong = load_params(ROOT / "pipeline" / "recipes" / "ir50-modern.yaml").train.augment
        train = train.model_copy(update={"augment": strong.model_copy(update={"shift": 0})})
    processes = count if name == "augmented, processes" else 0
    shards = Shards(str(work / "shards"))
    cache: Any = {"ours, host cache": "host", "ours, device cache (the CPU)": "device"}.get(name, "none")
    loader = Loader(
        shards.split("train"),
        shards.index.face,
        train,
        torch.device("cpu"),
        cache=cache,
        processes=processes,
        cache_folder=work / "decoded",
    )
    with closing(iter(loader)) as batches:

        def rate(images: int) -> float:
            started, count = time.perf_counter(), images // batch
            for _ in range(count):
                assert len(next(batches).labels) == batch
            return count * batch / (time.perf_counter() - started)

        if name != "by turns":
            rate(WARM_UP * batch)
            print(json.dumps({"rate": rate(TIMED * batch)}))
            return
        decode_alone, rates = decoding(work, count), []
        rate(2 * FACES)
        for _ in range(TURNS):
            rate(FACES // 2)  # what was made while it was decoding's turn, and more
            rates.append((rate(FACES), decode_alone()))
        print(json.dumps({"rates": rates}))


def decoding(work: Path, count: int) -> Callable[[], float]:
    """The ceiling, images/s: JPEGs in memory to a buffer for a batch, the fastest way we know, a thread a core."""
    images = tables.read_parts(work / "aligned", tables.ALIGNED, ["image"])["image"].to_pylist()
    buffer = unaligned((count, BATCH, 112, 112, 3))

    def decode(thread: int) -> None:
        for i, image in enumerate(images[thread::count]):
            simplejpeg.decode_jpeg(image, "RGB", buffer=buffer[thread, i % BATCH])

    pool = ThreadPoolExecutor(count)

    def rate() -> float:
        time.sleep(0.5)  # a loader beside it makes batches ahead, and then waits
        started = time.perf_counter()
        list(pool.map(decode, range(count)))
        return len(images) / (time.perf_counter() - started)

    return rate


def mixing(work: Path) -> dict[str, Any]:
    """Distinct identities in a batch of 256, from data of CASIA's shape sorted by identity, against the ideal."""
    rng = np.random.default_rng(0)
    labels = casia_labels(rng)
    write_aligned(work / "sorted", [b"x"], labels.tolist())
    params = load_params(ROOT / "params.yaml")
    made = section(params)
    shard.run(work / "sorted", {}, work / "mixed", work / "report", made, params.align.face, params.machine)
    split = Shards(str(work / "mixed")).split("train")
    batches = 400
    ideal = [len(np.unique(rng.choice(labels, 256, replace=False))) for _ in range(batches)]
    found = {}
    for epoch in (0, 1):
        rows, _ = Uniform(split.starts, 1).rows(epoch * len(split) + np.arange(256 * batches))
        found[epoch] = np.mean([len(np.unique(split.labels[some])) for some in np.split(rows, batches)])
    return {
        "images": CASIA_IMAGES,
        "identities": CASIA_IDENTITIES,
        "batches": batches,
        "distinct_in_256": {"ideal": round(float(np.mean(ideal)), 2)}
        | {f"epoch {epoch}": round(float(mean), 2) for epoch, mean in found.items()},
        "share_of_ideal": {f"epoch {epoch}": round(float(mean / np.mean(ideal)), 4) for epoch, mean in found.items()},
    }


def casia_labels(rng: np.random.Generator) -> np.ndarray:
    """As many images of as many people as CASIA-WebFace has, sorted; some have many, most have few."""
    weights = rng.lognormal(0, 0.8, CASIA_IDENTITIES)
    counts = 2 + rng.multinomial(CASIA_IMAGES - 2 * CASIA_IDENTITIES, weights / weights.sum())
    return np.repeat(np.arange(CASIA_IDENTITIES), counts)


def writing(faces: list[bytes], work: Path) -> dict[str, Any]:
    """CASIA's shape: the two passes against a plain copy of the bytes; memory of each process."""
    labels = casia_labels(np.random.default_rng(0))
    write_aligned(work / "casia", faces, labels.tolist())
    params = load_params(ROOT / "params.yaml")
    size = sum(path.stat().st_size for path in (work / "casia").iterdir())
    order = np.random.default_rng(1).permutation(len(labels))
    rounds = []
    for turn in range(3):
        flush()
        copied = timed(lambda: shutil.copytree(work / "casia", work / "copy"))
        shutil.rmtree(work / "copy")
        files = writer.shard_files("train", len(order), 0, 16_384, {})
        out = work / "out"
        out.mkdir()
        flush()
        watch = Peak()
        args = (work / "casia", out, files, order, labels.astype(np.int32), params.shard.row_group_rows, params.machine)
        written = timed(lambda args=args: writer.write_shards(*args))
        rounds.append({"copy_s": round(copied, 1), "write_s": round(written, 1), "peak_mib": watch.stop()})
        rounds[-1]["times_a_copy"] = round(written / copied, 2)
        shutil.rmtree(out)
        print(f"  {turn}: {rounds[-1]}", flush=True)
    return {"images": len(labels), "gigabytes": round(size / 1e9, 2), "rounds": rounds}


def flush() -> None:
    os.sync()


def timed(function: Callable[[], Any]) -> float:
    """Seconds until it is done and on the disk."""
    started = time.perf_counter()
    function()
    flush()
    return time.perf_counter() - started


class Peak:
    """The largest sum over this process and its descendants of what each has to itself, MiB."""

    def __init__(self) -> None:
        import threading

        self._peak, self._ended = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:  # ended between the listing and the look
                    continue
            self._peak = max(self._peak, total)

    def stop(self) -> int:
        self._ended.set()
        self._watcher.join()
        return round(self._peak / 2**20)


def copies(aligned: Path) -> dict[str, Any]:
    """What near duplicates there are among real faces, and how many of them are mirrored."""
    found = hashed(aligned)
    batches = hashes.near_pairs(found, np.arange(len(found)), NEAR)
    one, other = np.unique(np.concatenate(list(batches), axis=1), axis=1)
    unmirrored = np.bitwise_count(found[one] ^ found[other]).sum(axis=2).min(axis=1) <= NEAR
    return {"faces": len(found), "near_pairs": len(one), "mirrored": int((~unmirrored).sum())}


def hashed(aligned: Path) -> NDArray[np.uint64]:
    """The hashes of all faces that there are."""
    found = np.concatenate([hashes.hash_part(path) for path in tables.parts(aligned)])
    return found[found.any(axis=(1, 2))]


def cleaning(aligned: Path) -> dict[str, Any]:
    """Hashing, and finding near duplicates among as many faces as CASIA-WebFace has, and more."""
    started = time.perf_counter()
    found = hashed(aligned)
    hashing = (time.perf_counter() - started) / len(found)
    rng = np.random.default_rng(0)
    rows = []
    for count in (len(found), 100_000, CASIA_IMAGES, 1_000_000):
        # real hashes, each with 40 of its bits changed: as uneven as real ones, but no near duplicates of each other
        some = found[np.arange(count) % len(found)].copy()
        if count > len(found):
            for each in some.reshape(-1, hashes.WORDS):
                flips = np.zeros(hashes.BITS, np.uint8)
                flips[rng.permutation(hashes.BITS)[:40]] = 1
                each ^= np.packbits(flips).view(np.uint64)
        for sets in (hashes._EQUAL, (1,)) if count == CASIA_IMAGES else (hashes._EQUAL,):
            with patch.object(hashes, "_EQUAL", sets):
                started = time.perf_counter()
                batches = hashes.near_pairs(some, np.arange(count), NEAR)
                pairs = np.unique(np.concatenate([np.empty((2, 0), int), *batches], axis=1), axis=1)
            seconds = round(time.perf_counter() - started, 1)
            rows.append({"faces": count, "equal_sets": sets, "pairs": pairs.shape[1], "seconds": seconds})
            print(f"  {rows[-1]}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"hashing_ms_a_face": round(1000 * hashing, 3), "near_pairs": rows, "peak_mib": round(peak)}


def environment_of_peers(folder: Path) -> Path:
    if not (folder / "complete").exists():
        print(f"setting up the peers in {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
        subprocess.run([*install, *PINNED, *STREAMING_NEEDS], check=True)
        subprocess.run([*install, "--no-deps", STREAMING], check=True)
        (folder / "complete").touch()
    return folder


def main() -> None:
    if sys.argv[1:2] == ["--read"]:
        read(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="reading,by_turns,augmenting,mixing,writing,cleaning,copies")
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--aligned", type=Path, help="a folder of the aligned table, instead of --faces")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers" / "loader")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        aligned = arguments.aligned or align_training(arguments.faces, work)
        faces, people = real_faces(aligned)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "reading": lambda: reading(faces, people, environment_of_peers(arguments.peers), work),
            "by_turns": lambda: by_turns(faces, people, work),
            "augmenting": lambda: augmenting(faces, people, work),
            "mixing": lambda: mixing(work),
            "writing": lambda: writing(faces, work),
            "cleaning": lambda: cleaning(aligned),
            "copies": lambda: copies(aligned),
        }
        for wanted in arguments.only.split(","):
            print(f"{wanted} ...", flush=True)
            keep(wanted, sections[wanted]())


def align_training(faces: Path, work: Path) -> Path:
    """The aligned table of the real photographs."""
    from pipeline.params import Archive
    from stages.align import run as align
    from stages.download import run as download

    params = load_params(ROOT / "params.yaml")
    location = str(faces / "CASIA-WebFace.zip")
    source = Archive(source="archive", watch=[], location=location, sha256=None, pairs=None, pairs_sha256=None)
    download.run("train", source, work / "raw", params.machine, work / "downloads")
    align.run(work / "raw", work / "real", params.align, params.machine, evaluation=False, report=work / "report")
    return work / "real"


def keep(name: str, result: dict[str, Any]) -> None:
    content = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    content[name] = {
        "machine": hardware(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    } | result
    RESULT.write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()
