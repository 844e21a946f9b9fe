"""Where a training step's time goes on a GPU: `python -m benchmarks.kernels --step "ours bf16 compiled"`.

A step of benchmarks/train.py, by torch's profiler: milliseconds of its kernels by kind and by name, how many are
launched, and the rate without the profiler; what the GPU does at most: a matrix product in bf16, and a copy within its
memory; and how much batch normalisation moves in bf16. The result goes to benchmarks/results/kernels-<GPU>.json, under
the backbone, the batch and the step.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import result_of
from benchmarks.train import Contestant
from pipeline import tables
from pipeline.executor import keep_memory
from pipeline.params import Backbone
from stages.train.backbones import build_backbone

STEPS = 3
KINDS = {
    "convolutions and matrix products": ("xmma", "conv", "gemm", "cutlass", "nvjet", "wgrad", "dgrad", "fprop"),
    "compiled reductions": ("triton_red", "triton_per"),
    "compiled pointwise": ("triton_poi",),
}


def kind(name: str) -> str:
    """Of a kernel, by its name; Triton's first, since they name what they are fused of."""
    low = name.lower()
    if low.startswith("triton"):
        return next(key for key, words in reversed(KINDS.items()) if low.startswith(words))
    return next((key for key, words in KINDS.items() if any(word in low for word in words)), "others")


def limits() -> dict[str, float]:
    """Of a product of random 8192×8192 matrices, and of copying 8 GB (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**33, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def seconds(work: Callable[[], object]) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / 10

    product, copy = seconds(lambda: a @ b), seconds(lambda: target.copy_(source))
    return {
        "product_teraflops": round(2 * 8192**3 / product / 1e12),
        "copy_terabytes_per_second": round(2 * 2**33 / copy / 1e12, 2),
    }


def normalised_gigabytes(params: Backbone, batch: int) -> float:
    """What batch normalisation reads and writes in a step, in 2 bytes a number: forward each of its maps twice (for the
    mean and variance, and to normalise), its output once; backward map and gradient twice, the new gradient once.
    """
    numbers = 0

    def count(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal numbers
        numbers += inputs[0].numel()

    with torch.device("meta"):
        network = build_backbone(params).eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_pre_hook(count)
        network(torch.empty(batch, 3, 112, params.width))
    return round(8 * 2 * numbers / 1e9, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="iresnet50")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--step", default="ours bf16 compiled")
    arguments = parser.parse_args()
    keep_memory()
    contestant = Contestant(arguments.step, arguments.backbone, arguments.batch, torch.device("cuda"))
    turn = contestant.turn()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        contestant.steps = STEPS
        contestant.turn()
    each = STEPS + 1  # a turn begins with a step that it does not count
    time: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for event in trace.events() or []:
        if event.device_time_total:
            time[event.name] += event.device_time_total / 1000 / each
            kinds[kind(event.name)] += event.device_time_total / 1000 / each
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "limits": limits(),
        "batch_normalisation_gigabytes": normalised_gigabytes(contestant.backbone, arguments.batch),
        "images_per_second": round(turn["images_per_second"] or 0),
        "ms_of_a_step": round(1000 * arguments.batch / (turn["images_per_second"] or 1), 2),
        "ms_of_kernels": {name: round(ms, 2) for name, ms in kinds.most_common()},
        "longest": {name[:120]: round(ms, 3) for name, ms in time.most_common(25)},
    }
    print(json.dumps(found, indent=1))
    path = result_of("kernels")
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[f"{arguments.backbone}, batch {arguments.batch}, {arguments.step}"] = found
    with tables.atomic(path) as temporary:
        temporary.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
