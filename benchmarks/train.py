"""The training step beside a reference: `python -m benchmarks.train`.

Images/s, memory and, on a GPU, utilisation of its peak (MFU), of iresnet50 and sphere64 with LMCL over 10,575 classes:
our step in several precisions, eager and compiled, and a reference step as public repositories write it: the same
network in torch's default memory format, float images, margin subtracted from the logits, cross_entropy, gradients
clipped, the loss read every step; in fp32 and by autocast, in fp16 with a scaled loss. Random images of
CASIA-WebFace's shape, already on the device for both; cuDNN tries its algorithms for both in half precision alone, as
training has it. Contestants take turns, on a GPU in one process, on a CPU each in one of its own; ratios
are those of a round. The result goes to benchmarks/results/train-<cpu or the GPU's name>.json, in place of what is
there of the same steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from benchmarks.machine import hardware, result_of
from pipeline import tables
from pipeline.executor import choose_device, keep_memory
from pipeline.params import Train, load_params
from stages.train import loop
from stages.train.backbones import build_backbone, forward_flops
from stages.train.meter import peak_teraflops

ROOT = Path(__file__).parents[1]
CLASSES = 10_575
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
ON_CPU = ["reference fp32", "reference bf16", "ours fp32", "ours fp32 compiled", "ours bf16", "ours bf16 compiled"]
HALVES = ["reference fp16", "reference bf16", "ours bf16", "ours bf16 compiled", "ours bf16 compiled, not replayed"]
WHOLES = ["reference fp32", "ours fp32", "ours tf32"]
"""On a GPU; these at the paper's batch alone, and last."""
TURN = 0.7
"""Seconds of a GPU that a turn lasts, about."""
Step = Callable[[], None]
Found = dict[str, float | None]


def section(backbone: str, batch: int, precision: str, compiled: bool) -> Train:
    """The paper's recipe with another network."""
    train = load_params(ROOT / "pipeline" / "recipes" / "cosface-casia.yaml").train
    network = train.backbone.model_copy(update={"name": backbone})
    changes = {"backbone": network, "batch": batch, "precision": precision, "compile": compiled}
    return train.model_copy(update=changes)


def ours(train: Train, device: torch.device, *, replayed: bool = True) -> Step:
    training = loop.begin(train, CLASSES, device)
    if not replayed:
        training.model.compile_training()
    images = torch.randint(0, 256, (train.batch, 3, 112, 112), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (train.batch,), device=device)
    return lambda: loop.step(training, train, 20_000, images, labels)


def reference(train: Train, device: torch.device) -> Step:
    network = build_backbone(train.backbone).to(device).train()
    centres = nn.Parameter(0.01 * torch.randn(CLASSES, train.backbone.embedding, device=device))
    parameters = [*network.parameters(), centres]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    images = torch.randn(train.batch, 3, 112, 112, device=device)
    labels = torch.randint(CLASSES, (train.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, AUTOCAST.get(train.precision), train.precision in AUTOCAST):
            features = network(images)
        logits = normalize(features.float()) @ normalize(centres).T
        rows = torch.arange(len(labels), device=device)
        logits[rows, labels] -= 0.35
        loss = cross_entropy(64 * logits, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 5.0)
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


class Contestant:
    """One of them, ready to take its turns."""

    def __init__(self, key: str, backbone: str, batch: int, device: torch.device) -> None:
        name, precision, *compiled = key.partition(",")[0].split()
        self._train, self._device = section(backbone, batch, precision, bool(compiled)), device
        self.backbone = self._train.backbone
        self._gpu = device.type == "cuda"
        before = torch.cuda.memory_allocated() if self._gpu else 0
        make = partial(ours, replayed="not replayed" not in key) if name == "ours" else reference
        self._step = make(self._train, device)
        self._choose_arithmetic()
        self._step()
        self.steps = 1
        if self._gpu:
            # Not of the first step, in which cuDNN tries its algorithms, nor of one that is replayed, of which torch
            # tells nothing
            torch.cuda.reset_peak_memory_stats()
            self._step()
            self._memory = torch.cuda.max_memory_allocated() - before
            self._step()
            self.steps = max(3, round(TURN / self._seconds()))

    def _choose_arithmetic(self) -> None:
        torch.backends.cudnn.allow_tf32 = self._train.precision == "tf32"
        torch.backends.cudnn.benchmark = self._train.precision in AUTOCAST

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _seconds(self) -> float:
        started = self._now()
        for _ in range(self.steps):
            self._step()
        return self._now() - started

    def turn(self) -> Found:
        self._choose_arithmetic()
        if self._gpu:
            self._step()
        rate = self.steps * self._train.batch / self._seconds()
        memory = self._memory if self._gpu else psutil.Process().memory_info().rss
        teraflops = 3 * forward_flops(self.backbone) * rate / 1e12
        peak = peak_teraflops(self._device, self._train.precision)
        return {
            "images_per_second": rate,
            "teraflops": teraflops,
            "mfu": None if peak is None else teraflops / peak,
            "memory_gib": memory / 2**30,
        }


def measure(backbone: str, batch: int, steps: int, rounds: int, keys: Sequence[str]) -> dict[str, list[Found | None]]:
    """So many rounds of some contestants, in this process; None for one that memory is too small for."""
    keep_memory()
    device = choose_device("auto")
    found: dict[str, list[Found | None]] = {key: [] for key in keys}
    ready: dict[str, Contestant] = {}
    for key in keys:
        started = time.perf_counter()
        try:
            ready[key] = Contestant(key, backbone, batch, device)
            print(f"{key}: ready after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
        except torch.OutOfMemoryError:
            found[key] = [None] * rounds
        if device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            ready[key].steps = steps
    for _ in range(rounds):
        for key, contestant in ready.items():
            turn = contestant.turn()
            print(f"{key}: {turn['images_per_second']:.1f} images/s", file=sys.stderr, flush=True)
            found[key].append(turn)
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def summary(own: list[dict[str, Any] | None], rounds: dict[str, list[dict[str, Any] | None]]) -> dict[str, Any]:
    """Medians of a contestant's rounds, and ratios to the references; nothing where memory was too small for it."""
    found = [each for each in own if each is not None]
    if not found:
        return {"memory": "too small"}
    medians = {
        what: round(statistics.median(each[what] for each in found), 3) if found[0][what] is not None else None
        for what in ("images_per_second", "teraflops", "mfu", "memory_gib")
    }
    ratios = {
        other: [
            a["images_per_second"] / b["images_per_second"] for a, b in zip(own, rounds[other], strict=True) if a and b
        ]
        for other in rounds
        if other.startswith("reference")
    }
    return medians | {f"times_{other}": spread(values) for other, values in ratios.items() if values}


def in_a_process(*of: object) -> dict[str, list[dict[str, Any] | None]]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, of)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found: dict[str, list[dict[str, Any] | None]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        network, batch, steps, count = sys.argv[2:6]
        print(json.dumps(measure(network, int(batch), int(steps), int(count), sys.argv[6:])))
        return
    device = choose_device("auto")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a turn on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 1024] if gpu else [16])
    parser.add_argument(
        "--backbones", nargs="+", default=["iresnet50", "sphere64"] if gpu else ["small", "iresnet50", "sphere64"]
    )
    parser.add_argument("--steps-of", nargs="+", metavar="STEP", help="some of the steps, such as 'ours bf16 compiled'")
    parser.add_argument("--out", type=Path, default=result_of("train"))
    arguments = parser.parse_args()
    plan = [(HALVES, arguments.batches), (WHOLES, [512])] if gpu else [(ON_CPU, arguments.batches)]
    if arguments.steps_of:
        plan = [(arguments.steps_of, arguments.batches)]
    earlier = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    rows = {(row["backbone"], row["batch"], row["step"]): row for row in earlier}
    result = {
        "machine": hardware(),
        "versions": {"torch": torch.__version__},
    }
    for keys, backbone, images in (
        (keys, backbone, images) for keys, batches in plan for backbone in arguments.backbones for images in batches
    ):
        rounds: dict[str, list[dict[str, Any] | None]] = {key: [] for key in keys}
        for some in [keys] if gpu else [[key] for _ in range(arguments.rounds) for key in keys]:
            found = in_a_process(backbone, images, arguments.steps, arguments.rounds if gpu else 1, *some)
            for key, turns in found.items():
                rounds[key] += turns
        for key, own in rounds.items():
            row = {"backbone": backbone, "batch": images, "step": key, "machine": hardware()} | summary(own, rounds)
            rows[backbone, images, key] = row
            print(json.dumps(row), flush=True)
        with tables.atomic(arguments.out) as path:
            path.write_text(json.dumps(result | {"rows": list(rows.values())}, indent=2) + "\n")


if __name__ == "__main__":
    main()
