"""Alignment on a GPU: `python -m benchmarks.align_gpu [--faces ../shared/faces]`.

Whether a GPU finds the same faces as the CPU; how many photographs a second one process aligns on either, and what the
GPU's process spends its time on; and the whole stage, with several workers that share the GPU and with one on each
core. Photographs are those of lfw.tgz, repeated as needed. The result goes to benchmarks/results/align-<GPU>.json.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.align import aligned, compared, first, lfw_photographs, machine, nearest_faces, settings, write_raw
from benchmarks.machine import hardware, result_of
from pipeline import tables
from pipeline.executor import cores, prepare_worker
from stages.align import mtcnn
from stages.align import run as align
from stages.align.decode import decode

ROOT = Path(__file__).parents[1]


def agreement(contents: list[bytes]) -> dict[str, Any]:
    """The GPU's faces beside the CPU's."""
    names = [str(i) for i in range(len(contents))]
    on = {device: nearest_faces(mtcnn.Detector(settings().detector, device), contents) for device in ("cpu", "cuda")}
    return compared(first(on["cuda"], None), first(on["cpu"], None), names)


def one_process(contents: Sequence[bytes], device: str, rounds: int) -> dict[str, float]:
    """Photographs a second from encoded bytes to aligned JPEGs."""
    list(align.align_images(contents[:256], settings(), True, device))
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        list(align.align_images(contents, settings(), True, device))
        rates.append(len(contents) / (time.perf_counter() - started))
    return {"median": round(statistics.median(rates)), "least": round(min(rates)), "most": round(max(rates))}


def shares(contents: Sequence[bytes]) -> dict[str, float]:
    """Of one process on the GPU: how much of its time the GPU works, and what decoding and detection alone take."""
    detector = mtcnn.Detector(settings().detector, "cuda")
    images = [decode(content) for content in contents]
    batches = [images[i : i + 64] for i in range(0, len(images), 64)]
    detector.detect(batches[0])
    started = time.perf_counter()
    for content in contents:
        decode(content)
    decoding = time.perf_counter() - started
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for batch in batches:
            detector.detect(batch)
        torch.cuda.synchronize()
    detecting = time.perf_counter() - started
    busy = sum(event.device_time_total for event in trace.events() or []) / 1e6
    each = 1e6 / len(images)
    return {
        "decoding_us": round(decoding * each),
        "detection_us": round(detecting * each),
        "of_that_the_gpu_works_us": round(busy * each),
    }


def stage(raw: Path, count: int, device: str, workers: int, folder: Path) -> dict[str, Any]:
    """The whole stage, start and report included."""
    where = machine(workers).model_copy(update={"device": device})
    out = folder / "out"
    seconds = aligned(raw, out, where)
    shutil.rmtree(out)
    return {"device": device, "workers": workers, "seconds": round(seconds, 1), "per_second": round(count / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--images", type=int, default=1024, help="photographs for one process")
    parser.add_argument("--stage", type=int, default=20_000, help="photographs for the whole stage")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="that share the GPU")
    arguments = parser.parse_args()
    prepare_worker(1)
    result: dict[str, Any] = {
        "machine": hardware(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    photographs = list(lfw_photographs(arguments.faces / "lfw.tgz").values())
    contents = [photographs[i % len(photographs)] for i in range(arguments.images)]
    path = result_of("align")

    def keep(key: str, value: Any) -> None:
        result[key] = value
        print(key, json.dumps(value), flush=True)
        with tables.atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")

    keep("agreement_with_cpu", agreement(contents[:256]))
    keep(
        "one_process_per_second",
        {"cuda": one_process(contents, "cuda", 3), "cpu": one_process(contents[:256], "cpu", 3)},
    )
    keep("one_process_spends", shares(contents))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        raw = write_raw(folder / "raw", photographs, arguments.stage)
        rows = [stage(raw, arguments.stage, "cpu", cores(), folder)]
        rows += [stage(raw, arguments.stage, "cuda", workers, folder) for workers in arguments.workers]
        keep("stage", {"photographs": arguments.stage, "rows": rows})


if __name__ == "__main__":
    main()
