import pytest
import torch
from torch import nn

from pipeline.params import Backbone
from stages.train.backbones import BACKBONES, forward_flops
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


@pytest.mark.parametrize(
    ("name", "units", "layers"),
    [("sphere20", (1, 2, 4, 1), 20), ("sphere36", (2, 4, 8, 2), 36), ("sphere64", (3, 8, 16, 3), 64)],
)
def test_spheres_are_the_published_networks(name: str, units: tuple[int, ...], layers: int) -> None:
    """SphereFace, Table 2: so many layers are convolutions, but for the 20 that count the FC, too."""
    network = BACKBONES[name](512, 112)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == layers
    assert sum(p.numel() for p in network.parameters()) == sphere_parameters(units, 512)


PUBLISHED = {
    # GFLOPs and millions of parameters as Open Model Zoo's documentation (2021) lists the original models; two
    # operations for each multiplication
    ("sphere20", 512, 96): (3.504, 22.671),
    ("iresnet34", 512, 112): (8.934, 34.129),
    ("iresnet50", 512, 112): (12.637, 43.576),
    ("iresnet100", 512, 112): (24.209, 65.131),
    ("mobilefacenet", 128, 112): (0.449, 0.993),
}


@pytest.mark.parametrize(("name", "embedding", "width"), PUBLISHED)
def test_parameters_and_operations_are_as_published(name: str, embedding: int, width: int) -> None:
    """The published ones are converted for inference: of each normalised channel an offset is left, and sums and
    slopes count as operations.
    """
    flops, parameters = PUBLISHED[name, embedding, width]
    section = Backbone(name=name, width=width, embedding=embedding)  # type: ignore[arg-type]
    model = build_model(section)
    counted = sum(p.numel() for p in model.parameters())
    folded = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert counted - folded == pytest.approx(parameters * 1e6, rel=0.0005)
    assert forward_flops(section) == pytest.approx(flops * 1e9, rel=0.025)


def ir_parameters(units: tuple[int, ...], squeeze: bool) -> int:
    """Weights of the public PyTorch IR networks, counted by hand."""
    total, before = 3 * 64 * 9 + 2 * 64 + 64, 64
    for channels, count in zip((64, 128, 256, 512), units, strict=True):
        for _ in range(count):
            total += 2 * before + 9 * before * channels + channels + 9 * channels**2 + 2 * channels
            total += 2 * channels * (channels // 16) if squeeze else 0
            total += before * channels + 2 * channels if before != channels else 0
            before = channels
    return total + 2 * 512 + 512 * 49 * 512 + 512 + 2 * 512


@pytest.mark.parametrize(("name", "squeeze"), [("ir50", False), ("irse50", True)])
def test_ir50_has_the_published_layers(name: str, squeeze: bool) -> None:
    """50 layers: stem, 24 units of 2 convolutions, FC; shortcuts and squeezes not counted."""
    network = BACKBONES[name](512, 112)
    large = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(large) + 1 == 50
    assert sum(p.numel() for p in network.parameters()) == ir_parameters((3, 4, 14, 3), squeeze)


def test_operations_of_a_convolution_by_hand() -> None:
    """small: its stem has 56·56 outputs of 24 channels, each of 27 products; twice that are its operations."""
    section = Backbone(name="small", width=112, embedding=256)
    stem = 2 * 56 * 56 * 24 * 27
    units, before, side = 0, 24, 56
    for channels in (32, 64, 128):
        half = side // 2
        units += 2 * 9 * (before * channels * side**2 + channels**2 * half**2 + 2 * channels**2 * half**2)
        units += 2 * before * channels * half**2
        before, side = channels, half
    assert forward_flops(section) == stem + units + 2 * 128 * 7 * 7 * 256


def test_recomputing_activations_changes_nothing() -> None:
    """Loss, gradients and running statistics to the bit, dropout included."""
    images = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8)
    outcomes = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(Backbone(name="ir50", width=112, embedding=16)).train()
        model.recompute = recompute
        model(images).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        outcomes.append({**gradients, **dict(model.named_buffers())})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, value in outcomes[0].items():
        other = outcomes[1][name]
        assert value is not None
        assert other is not None
        assert torch.equal(value, other), name


def test_normalisation_is_inside() -> None:
    """(x − 127.5) / 128, in float64 by hand, on every value a pixel can have."""
    model = FaceModel(nn.Identity())
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = (values.double() - 127.5) / 128
    torch.testing.assert_close(model(values).double(), expected, rtol=0, atol=1e-7)
