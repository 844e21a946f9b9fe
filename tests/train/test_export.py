import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from pipeline.params import Backbone
from stages.evaluate.models import load_embedder
from stages.train.backbones import BACKBONES, improved_residual, sphere
from stages.train.export import export
from stages.train.model import build_model, save_model

EVERY = [*((name, 112) for name in BACKBONES), ("sphere20", 96), ("small", 96)]
QUICK = [("mobilefacenet", 112), ("small", 96)]
slow = pytest.mark.skipif(
    not os.environ.get("COSFACE_EVERY_BACKBONE"), reason="up to half a minute each: set COSFACE_EVERY_BACKBONE=1"
)
NARROW = {
    "sphere20": partial(sphere, (1, 0, 0, 0)),
    "irse50": partial(
        improved_residual,
        (1, 1),
        channels=(16, 16),
        strides=(2, 2),
        stem=((16, 1),),
        dropout=0.4,
        early=True,
        squeeze=True,
    ),
}
"""Of the families that are not among the quick ones."""


@pytest.mark.parametrize(
    ("name", "width", "network"),
    [
        *(pytest.param(*each, BACKBONES[each[0]], marks=[] if each in QUICK else slow) for each in EVERY),
        *((name, 112, network) for name, network in NARROW.items()),
    ],
    ids=[*(f"{name}-{width}" for name, width in EVERY), *(f"{name}-narrow" for name in NARROW)],
)
def test_onnxruntime_agrees(
    name: str, width: int, network: Callable[[int, int], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For several sizes of batch, to 1e-4; statistics of batch normalisation are as after some training."""
    monkeypatch.setitem(BACKBONES, name, network)
    torch.manual_seed(0)
    backbone = Backbone.model_validate({"name": name, "width": width, "embedding": 64})
    model = build_model(backbone)
    images = torch.randint(0, 256, (3, 3, 112, width), dtype=torch.uint8)
    model.train()(images)
    save_model(tmp_path / "models", model.eval(), nn.Linear(2, 2), {"backbone": backbone.model_dump()})
    export(tmp_path / "models", tmp_path / "out" / "model.onnx")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]  # weights and all
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (made, norm) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 112, width])
    assert (made.name, made.type, made.shape[1:]) == ("embeddings", "tensor(float)", [64])
    assert (norm.name, norm.type, norm.shape[1:]) == ("norms", "tensor(float)", [])
    with torch.inference_mode():
        features = model(images).numpy()
    lengths = np.linalg.norm(features, axis=1)
    for count in (1, 2, 3):
        embeddings, norms = session.run(None, {"images": images[:count].numpy()})
        assert np.abs(embeddings - features[:count] / lengths[:count, None]).max() < 1e-4
        assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.ones(count), abs=1e-5)
        np.testing.assert_allclose(norms, lengths[:count], rtol=1e-4)

    folder, file = (load_embedder(tmp_path / place, torch.device("cpu")) for place in ("models", "out/model.onnx"))
    assert (folder.width, folder.length) == (file.width, file.length) == (width, 64)
    weights = (tmp_path / "models" / "backbone.safetensors").read_bytes()
    assert folder.digest == file.digest == hashlib.sha256(weights).hexdigest()
    np.testing.assert_allclose(file(images), folder(images), rtol=1e-4, atol=1e-4 * lengths.min())
