import pytest
import torch
from torch import nn

from pipeline.params import Backbone
from stages.train.backbones import BACKBONES
from stages.train.model import FaceModel, build_model


def conv(before: int, after: int, side: int, bias: bool) -> int:
    return before * after * side * side + (after if bias else 0)


def sphere_parameters(units: tuple[int, ...], embedding: int) -> int:
    """Weights of SphereFace's Table 2, counted by hand: convolutions, PReLU slopes, FC."""
    total, before = 0, 3
    for channels, count in zip((64, 128, 256, 512), units, strict=True):
        total += conv(before, channels, 3, True) + channels
        total += count * 2 * (conv(channels, channels, 3, False) + channels)
        before = channels
    return total + 512 * 7 * 7 * embedding + embedding


@pytest.mark.parametrize(("name", "width"), [*((name, 112) for name in BACKBONES), ("sphere64", 96), ("small", 96)])
def test_shape_gradient_and_determinism(name: str, width: int) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build_model(Backbone(name=name, width=width, embedding=32)))  # type: ignore[arg-type]
    images = torch.randint(0, 256, (2, 3, 112, width), dtype=torch.uint8)
    features = models[0].eval()(images)
    assert features.shape == (2, 32)
    assert features.dtype == torch.float32
    assert torch.equal(features, models[1].eval()(images))
    features.square().sum().backward()
    gradients = [p.grad for p in models[0].parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_sphere64_is_the_published_network() -> None:
    network = BACKBONES["sphere64"](512, 112)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 64
    assert sum(p.numel() for p in network.parameters()) == sphere_parameters((3, 8, 16, 3), 512)


def test_ir50_has_the_published_layers() -> None:
    """50 layers: stem, 24 units of 2 convolutions, FC; shortcuts not counted."""
    network = BACKBONES["ir50"](512, 112)
    large = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(large) + 1 == 50
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(43.6e6, rel=0.01)


def test_normalisation_is_inside() -> None:
    """(x − 127.5) / 128, in float64 by hand, on every value a pixel can have."""
    model = FaceModel(nn.Identity())
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (values.double() - 127.5) / 128
    torch.testing.assert_close(model(values).double(), expected, rtol=0, atol=1e-7)
