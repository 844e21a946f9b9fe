"""What several test folders share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.executor import cores
from pipeline.params import Params, load_params

ROOT = Path(__file__).parents[1]

# No deadline: a busy machine is no failure. HYPOTHESIS_PROFILE=random draws other examples each time.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# On a GPU results agree within rounding only. With COSFACE_GPU=1 it is seen, by the tests that are of it.
if not os.environ.get("COSFACE_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A shell's background jobs have Ctrl-C ignored, which what the tests start and interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: COSFACE_GPU=1 pytest -k on_a_gpu")
"""For tests that are of a GPU; all others are of the CPU, where results are the same to the bit."""


LONG = ("tests/test_pipeline.py", "tests/pipeline/test_flow.py", "tests/train/test_training.py")
"""Files that take minutes."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first: processes take whole files in this order, so that what a file's tests share is made once."""
    places = [str(ROOT / name) for name in LONG]
    items.sort(key=lambda item: places.index(str(item.path)) if str(item.path) in places else len(places))


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait, for servers and for minutes to begin."""
    return cores() + 1


@pytest.fixture
def params() -> Params:
    """The repository's own params.yaml, tracking off."""
    loaded = load_params(ROOT / "params.yaml")
    return loaded.model_copy(update={"tracking": loaded.tracking.model_copy(update={"enabled": False})})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch: on a busy machine, threads wait for each other longer than small work takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
