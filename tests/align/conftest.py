"""Settings of all tests of the align stage."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """As in the stage's workers."""
