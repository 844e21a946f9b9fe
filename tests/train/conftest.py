"""Settings of all tests of training."""

import pytest

from stages.train import loader


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many images are made together as short trainings use: the others would be made in vain. test_loader.py proves
    that it changes no batch.
    """
    monkeypatch.setattr(loader, "_TOGETHER", 32)
