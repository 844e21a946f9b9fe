"""What a benchmark runs on, and where it keeps what it finds."""

import platform
import re
from pathlib import Path
from typing import Any

import torch

from pipeline.executor import cores

RESULTS = Path(__file__).parent / "results"
GPU = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def hardware() -> dict[str, Any]:
    """Cores that may be used, their kind, and the GPU."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {"cores": cores(), "processor": model[1] if model else platform.machine(), "gpu": GPU}


def result_of(benchmark: str) -> Path:
    """The file of a benchmark that runs on CPUs and on GPUs alike: <benchmark>-<cpu or the GPU's name>.json."""
    return RESULTS / f"{benchmark}-{GPU.lower().replace(' ', '-') if GPU else 'cpu'}.json"
