"""How fast training is, and what share of the hardware's peak that is."""

import time
from dataclasses import dataclass

import psutil
import torch

from pipeline.params import Train
from stages.train.backbones import forward_flops
from stages.train.loader import Loader

_PEAKS: dict[str, dict[str, float]] = {
    # Dense, without sparsity, in TFLOP/s, as NVIDIA's data sheets have them; longer names first
    "H200 NVL": {"fp32": 60, "tf32": 418, "bf16": 835, "fp16": 835},
    "H100 NVL": {"fp32": 60, "tf32": 418, "bf16": 835, "fp16": 835},
    "H100 PCIe": {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756},
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989, "fp16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362},
    "L4": {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121},
    "V100": {"fp32": 15.7, "fp16": 125},
    "T4": {"fp32": 8.1, "fp16": 65},
}


@dataclass(frozen=True)
class Speed:
    """Of the iterations since the row before."""

    images_per_second: float
    data_wait: float
    """Share of the time in which training waited for a batch."""
    memory_gib: float
    """What the process holds; of a GPU's memory the most that it held."""
    teraflops: float
    """Forward and backward (three times forward) of the backbone, a second; what is computed again does not count."""
    utilisation: float | None
    """That as a share of the GPUs' peak (MFU); null where the peak is not known."""


class Meter:
    """Measures from one reset to the next; images and operations are those of all ranks."""

    def __init__(self, params: Train, loader: Loader, device: torch.device, done: int, ranks: int = 1) -> None:
        self._ranks = ranks
        self._params, self._loader, self._device = params, loader, device
        self._flops = 3 * forward_flops(params.backbone) * params.batch
        self.reset(done)

    def reset(self, done: int) -> None:
        """Begin anew after `done` iterations."""
        self._started, self._since, self._waited = time.perf_counter(), done, self._loader.waited
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self, done: int) -> Speed:
        """Of the iterations since the reset; waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            # not what is allocated: of the memory in which recorded kernels work, that knows nothing
            memory = torch.cuda.max_memory_reserved(self._device)
        else:
            memory = psutil.Process().memory_info().rss
        seconds = time.perf_counter() - self._started
        iterations = done - self._since
        teraflops = iterations * self._flops / seconds / 1e12
        peak = peak_teraflops(self._device, self._params.precision)
        return Speed(
            images_per_second=iterations * self._params.batch / seconds,
            data_wait=(self._loader.waited - self._waited) / seconds,
            memory_gib=memory / 2**30,
            teraflops=teraflops,
            utilisation=None if peak is None else teraflops / (peak * self._ranks),
        )


def peak_teraflops(device: torch.device, precision: str) -> float | None:
    """What the GPU could do at best; None on a CPU and on GPUs whose data sheet is not in the table."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    return next((peaks.get(precision) for name, peaks in _PEAKS.items() if words.issuperset(name.split())), None)
