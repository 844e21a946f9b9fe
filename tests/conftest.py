"""What several test folders share."""

from pathlib import Path

import pytest

from pipeline.params import Params, load_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def params() -> Params:
    """The repository's own params.yaml, tracking off."""
    loaded = load_params(ROOT / "params.yaml")
    return loaded.model_copy(update={"tracking": loaded.tracking.model_copy(update={"enabled": False})})
