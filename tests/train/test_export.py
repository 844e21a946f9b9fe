import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn.functional import normalize

from pipeline.params import Backbone
from stages.train.backbones import BACKBONES
from stages.train.export import export
from stages.train.model import build_model

FAMILIES = ("iresnet18", "mobilefacenet", "small")
NAMES = tuple(BACKBONES) if os.environ.get("COSFACE_EVERY_BACKBONE") else FAMILIES
"""The largest take half a minute each, so by default there is one of each family (sphere20: at 96 pixels)."""


@pytest.mark.parametrize(("name", "width"), [*((name, 112) for name in NAMES), ("sphere20", 96)])
def test_onnxruntime_agrees(name: str, width: int, tmp_path: Path) -> None:
    """For several sizes of batch, to 1e-4; statistics of batch normalisation are as after some training."""
    torch.manual_seed(0)
    model = build_model(Backbone(name=name, width=width, embedding=64))  # type: ignore[arg-type]
    images = torch.randint(0, 256, (5, 3, 112, width), dtype=torch.uint8)
    model.train()(images)
    model.eval()
    export(model, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # weights and all
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 112, width])
    assert (made.name, made.type, made.shape[1:]) == ("embeddings", "tensor(float)", [64])
    for count in (1, 2, 5):
        with torch.inference_mode():
            expected = normalize(model(images[:count])).numpy()
        (embeddings,) = session.run(None, {"images": images[:count].numpy()})
        assert np.abs(embeddings - expected).max() < 1e-4
        assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(count), abs=1e-5)
