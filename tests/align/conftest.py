"""Settings of all tests of the align stage."""

import pytest

from stages.align import kernels
from stages.align.networks import Networks
from stages.align.networks_compiled import CompiledNetworks
from stages.align.networks_torch import TorchNetworks


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """As in the stage's workers."""


@pytest.fixture
def compiled() -> None:
    """The functions of kernels.cpp, without which there is nothing to test."""
    if why := kernels.missing():
        pytest.skip(f"nothing is compiled: {why}")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are none."""
    monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.fixture(params=["compiled", "uncompiled"])
def both(request: pytest.FixtureRequest) -> None:
    """With them and without."""
    request.getfixturevalue(request.param)


@pytest.fixture(params=["compiled", "uncompiled"])
def networks(request: pytest.FixtureRequest) -> Networks:
    """A CPU's."""
    request.getfixturevalue(request.param)
    return CompiledNetworks() if request.param == "compiled" else TorchNetworks("cpu")
