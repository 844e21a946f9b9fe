"""The training step beside a reference: `python benchmarks/train.py`.

Images/s, memory and, on a GPU, utilisation of its peak (MFU), of iresnet50 and sphere64 with LMCL over 10,575 classes:
our step in several precisions, eager and compiled, and a reference step as public repositories write it: the same
network in torch's default memory format, float images from the host, margin subtracted from the logits, cross_entropy,
clipped gradients, the loss read every step; in fp32 and by autocast. Random images of CASIA-WebFace's shape, already on
the device for ours. Contestants take turns, each in a process of its own; ratios are those of a round. The result goes
to benchmarks/results/train-<cpu or the GPU's name>.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from pipeline import tables
from pipeline.executor import choose_device, cores, keep_memory
from pipeline.params import Train, load_params
from stages.train import loop
from stages.train.backbones import build_backbone, forward_flops
from stages.train.meter import peak_teraflops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLASSES = 10_575
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Step = Callable[[], None]


def section(backbone: str, batch: int, precision: str, compiled: bool) -> Train:
    """The paper's recipe with another network."""
    train = load_params(ROOT / "pipeline" / "recipes" / "cosface-casia.yaml").train
    network = train.backbone.model_copy(update={"name": backbone})
    sgd = train.optimizer.model_copy(update={"clip_norm": 5.0})
    return train.model_copy(
        update={
            "backbone": network,
            "optimizer": sgd,
            "batch": batch,
            "precision": precision,
            "compile": compiled,
        }
    )


def ours(train: Train, device: torch.device) -> Step:
    training = loop.begin(train, CLASSES, device)
    images = torch.randint(0, 256, (train.batch, 3, 112, 112), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (train.batch,), device=device)
    return lambda: loop.step(training, train, 20_000, images, labels)


def reference(train: Train, device: torch.device) -> Step:
    network = build_backbone(train.backbone).to(device).train()
    centres = nn.Parameter(0.01 * torch.randn(CLASSES, train.backbone.embedding, device=device))
    parameters = [*network.parameters(), centres]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(train.batch, 3, 112, 112, pin_memory=device.type == "cuda")
    labels = torch.randint(CLASSES, (train.batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, AUTOCAST.get(train.precision), train.precision in AUTOCAST):
            features = network(images.to(device, non_blocking=True))
        logits = normalize(features.float()) @ normalize(centres).T
        rows = torch.arange(len(labels), device=device)
        logits[rows, labels] -= 0.35
        loss = cross_entropy(64 * logits, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        loss.item()

    return step


def measure(
    name: str, backbone: str, batch: int, precision: str, compiled: bool, steps: int
) -> dict[str, float | None]:
    """One contestant, in a process of its own."""
    keep_memory()
    device = choose_device("auto")
    train = section(backbone, batch, precision, compiled)
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    step = (ours if name == "ours" else reference)(train, device)
    for _ in range(3 if device.type == "cuda" else 1):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = steps * batch / (time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss
    teraflops = 3 * forward_flops(train.backbone) * rate / 1e12
    peak = peak_teraflops(device, precision)
    return {
        "images_per_second": rate,
        "teraflops": teraflops,
        "mfu": None if peak is None else teraflops / peak,
        "memory_gib": memory / 2**30,
    }


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


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        name, backbone, batch, precision, compiled, steps = sys.argv[2:8]
        print(json.dumps(measure(name, backbone, int(batch), precision, compiled == "compiled", int(steps))))
        return
    device = choose_device("auto")
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512, 1024] if gpu else [16])
    parser.add_argument("--backbones", nargs="+", default=["iresnet50", "sphere64"])
    kind = torch.cuda.get_device_name().lower().replace(" ", "-") if gpu else "cpu"
    parser.add_argument("--out", type=Path, default=RESULTS / f"train-{kind}.json")
    arguments = parser.parse_args()
    contestants = [("reference", "fp32", ""), ("reference", "bf16", "")]
    contestants += [("ours", "fp32", ""), ("ours", "bf16", ""), ("ours", "bf16", "compiled")]
    if gpu:
        contestants += [("reference", "fp16", ""), ("ours", "tf32", "")]
    result: dict[str, Any] = {
        "machine": {
            "cores": cores(),
            "processor": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "versions": {"torch": torch.__version__},
        "rows": [],
    }
    for backbone in arguments.backbones:
        for batch in arguments.batches:
            rounds: dict[str, list[dict[str, Any] | None]] = {}
            for _ in range(arguments.rounds):
                for contestant in contestants:
                    name, precision, compiled = contestant
                    command = [sys.executable, __file__, "--measure", name, backbone, str(batch), precision, compiled]
                    done = subprocess.run(
                        [*command, str(arguments.steps)],
                        capture_output=True,
                        text=True,
                        env=os.environ | {"PYTHONPATH": str(ROOT)},
                    )
                    fits = "OutOfMemoryError" not in done.stderr
                    if done.returncode and fits:
                        raise RuntimeError(done.stderr)
                    key = " ".join(word for word in contestant if word)
                    rounds.setdefault(key, []).append(json.loads(done.stdout.splitlines()[-1]) if fits else None)
            for key, own in rounds.items():
                row = {"backbone": backbone, "batch": batch, "step": key} | summary(own, rounds)
                result["rows"].append(row)
                print(json.dumps(row), flush=True)
            with tables.atomic(arguments.out) as path:
                path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
