from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.params import Backbone
from stages.train.backbones import (
    BACKBONES,
    Bottleneck,
    ImprovedUnit,
    SphereUnit,
    SqueezeExcitation,
    forward_flops,
    improved_residual,
)
from stages.train.model import FaceModel, build_model


def params(name: str, width: int = 112, embedding: int = 32) -> Backbone:
    return Backbone.model_validate({"name": name, "width": width, "embedding": embedding})


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


@pytest.mark.parametrize(("name", "width"), [*((name, 112) for name in BACKBONES), ("sphere20", 96), ("small", 96)])
def test_shape_and_gradient(name: str, width: int) -> None:
    model = build_model(params(name, width)).eval()
    features = model(torch.randint(0, 256, (1, 3, 112, width), dtype=torch.uint8))
    assert features.shape == (1, 32)
    assert features.dtype == torch.float32
    features.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", ["small", "sphere20", "irse50", "mobilefacenet"])
def test_weights_follow_from_the_seed(name: str) -> None:
    """One network of each family."""
    images = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = build_model(params(name)).eval()
        with torch.inference_mode():
            found.append(model(images))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("name", "units", "layers"),
    [("sphere20", (1, 2, 4, 1), 20), ("sphere36", (2, 4, 8, 2), 36), ("sphere64", (3, 8, 16, 3), 64)],
)
def test_spheres_are_the_published_networks(name: str, units: tuple[int, ...], layers: int) -> None:
    """SphereFace, Table 2: so many layers are convolutions, but for the 20 that count the FC, too."""
    with torch.device("meta"):
        network = BACKBONES[name](512, 112)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == layers
    assert sum(p.numel() for p in network.parameters()) == sphere_parameters(units, 512)


def test_a_sphere_begins_as_its_authors_networks_do() -> None:
    """By Caffe's xavier, uniform with a variance of 1 / fan-in, and biases of 0 (their sphereface_model.prototxt)."""
    torch.manual_seed(0)
    network = BACKBONES["sphere20"](512, 96)
    layers = [m for m in network.children() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 5
    for layer in layers:
        assert layer.bias is not None
        assert not layer.bias.any()
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().var()) == pytest.approx(1 / fan_in, rel=0.08)
        assert float(layer.weight.detach().abs().max()) == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)


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
    section = params(name, width, embedding)
    with torch.device("meta"):
        model = build_model(section)
    counted = sum(p.numel() for p in model.parameters())
    folded = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d))
    assert counted - folded == pytest.approx(parameters * 1e6, rel=0.0005)
    assert forward_flops(section) == pytest.approx(flops * 1e9, rel=0.025)


@pytest.mark.parametrize(
    ("name", "giga", "within"),
    [
        # As the README of InsightFace's arcface_torch has them, table "ViT For Face Recognition"
        ("iresnet18", 2.6, 0.05),
        ("iresnet50", 6.3, 0.05),
        ("iresnet100", 12.1, 0.05),
        # "Resnet50-ir" of FaceX-Zoo's training_mode/README.md, of 43.57 million parameters; with those of normalisation
        ("ir50", 6.31, 0.02),
    ],
)
def test_multiplications_are_as_published(name: str, giga: float, within: float) -> None:
    section = params(name, embedding=512)
    assert forward_flops(section) / 2e9 == pytest.approx(giga, abs=within)


@pytest.mark.parametrize(("name", "more"), [("sphere36", 8), ("sphere64", 22)])
def test_a_sphere_has_operations_by_its_units(name: str, more: int) -> None:
    """Two 3×3 convolutions each, alike in every stage: twice the channels on half the side. sphere20 has 8 units."""
    section, longer = params("sphere20", embedding=512), params(name, embedding=512)
    assert forward_flops(longer) - forward_flops(section) == more * 2 * 2 * 9 * 64**2 * 56**2


class Layers:
    """Layers as functions in float64, each with the next of a module's weights."""

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict().items()
        self._weights = [value.double() for name, value in state if not name.endswith("num_batches_tracked")]

    def _next(self) -> Tensor:
        return self._weights.pop(0)

    def conv(self, x: Tensor, stride: int = 1, groups: int = 1, bias: bool = False) -> Tensor:
        """Padded so that the middle of each filter meets every pixel."""
        weight = self._next()
        padding = weight.shape[2] // 2
        return F.conv2d(x, weight, self._next() if bias else None, stride, padding, groups=groups)

    def norm(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (self._next() for _ in range(4))
        return F.batch_norm(x, mean, variance, weight, bias)

    def prelu(self, x: Tensor) -> Tensor:
        return F.prelu(x, self._next())

    def over_all(self, x: Tensor) -> Tensor:
        """Each channel's own weighted sum over the whole map, N×C."""
        return (x * self._next()[:, 0]).sum(dim=(2, 3))

    def linear(self, x: Tensor, bias: bool = True) -> Tensor:
        weight = self._next()
        return F.linear(x, weight, self._next() if bias else None)

    def check_all_used(self) -> None:
        assert not self._weights


def sphere_unit(layers: Layers, x: Tensor) -> Tensor:
    """SphereFace, Table 2: two convolutions, each with its PReLU, and x is added to what they make of it."""
    return x + layers.prelu(layers.conv(layers.prelu(layers.conv(x))))


def squeezed(layers: Layers, x: Tensor) -> Tensor:
    """Hu et al., Eq. 2 to 4."""
    return x * layers.conv(layers.conv(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()


def improved_unit(
    layers: Layers,
    x: Tensor,
    channels: int,
    stride: int,
    early: bool = False,
    squeeze: bool = False,
    stride_first: bool = False,
) -> Tensor:
    """ArcFace, section 3.1: BN-Conv-BN-PReLU-Conv-BN, and the public PyTorch networks without the BN in the middle."""
    inner = layers.conv(layers.norm(x), stride if stride_first else 1)
    inner = layers.prelu(inner if early else layers.norm(inner))
    inner = layers.norm(layers.conv(inner, 1 if stride_first else stride))
    if squeeze:
        inner = squeezed(layers, inner)
    if x.shape[1] != channels or (stride != 1 and not early):
        return inner + layers.norm(layers.conv(x, stride))
    return inner + x[..., ::stride, ::stride]


def bottleneck(layers: Layers, x: Tensor, channels: int, stride: int) -> Tensor:
    """MobileFaceNet, Table 1, as in MobileNetV2, Table 1: 1×1, 3×3 by channel, 1×1 without PReLU."""
    inner = layers.prelu(layers.norm(layers.conv(x)))
    inner = layers.prelu(layers.norm(layers.conv(inner, stride, groups=inner.shape[1])))
    inner = layers.norm(layers.conv(inner))
    return x + inner if stride == 1 and x.shape[1] == channels else inner


def sphere_network(layers: Layers, x: Tensor, units: tuple[int, ...]) -> Tensor:
    for count in units:
        x = layers.prelu(layers.conv(x, 2, bias=True))
        for _ in range(count):
            x = sphere_unit(layers, x)
    return layers.linear(x.flatten(1))


def improved_network(
    layers: Layers,
    x: Tensor,
    units: tuple[int, ...],
    early: bool = False,
    squeeze: bool = False,
) -> Tensor:
    """ArcFace, section 3.1: stem Conv-BN-PReLU, stages whose first unit has stride 2, BN-Dropout-FC-BN."""
    x = layers.prelu(layers.norm(layers.conv(x)))
    for count, channels in zip(units, (64, 128, 256, 512), strict=True):
        for i in range(count):
            x = improved_unit(layers, x, channels, 1 if i else 2, early, squeeze)
    return layers.norm(layers.linear(layers.norm(x).flatten(1)))


def small_network(layers: Layers, x: Tensor) -> Tensor:
    """Two convolutions to 28×28; units whose first convolution has the stride."""
    for _ in range(2):
        x = layers.prelu(layers.norm(layers.conv(x, 2)))
    for channels, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        x = improved_unit(layers, x, channels, stride, stride_first=True)
    return layers.norm(layers.linear(layers.norm(x).flatten(1)))


def mobile_network(layers: Layers, x: Tensor) -> Tensor:
    """MobileFaceNet, Table 1."""
    x = layers.prelu(layers.norm(layers.conv(x, 2)))
    x = layers.prelu(layers.norm(layers.conv(x, groups=64)))
    for channels, count, stride in ((64, 5, 2), (128, 1, 2), (128, 6, 1), (128, 1, 2), (128, 2, 1)):
        for i in range(count):
            x = bottleneck(layers, x, channels, 1 if i else stride)
    x = layers.prelu(layers.norm(layers.conv(x)))
    return layers.norm(layers.linear(layers.norm(layers.over_all(x)), bias=False))


Forward = Callable[[Layers, Tensor], Tensor]

UNITS: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
    "sphere": (partial(SphereUnit, 16), sphere_unit),
    "squeeze": (partial(SqueezeExcitation, 16), squeezed),
    **{
        f"improved {before}-{after}, stride {stride}{', early' * early}{', squeezed' * squeeze}": (
            partial(ImprovedUnit, before, after, stride, early=early, squeeze=squeeze),
            partial(improved_unit, channels=after, stride=stride, early=early, squeeze=squeeze),
        )
        for before, after, stride in ((16, 16, 1), (16, 16, 2), (16, 32, 2))
        for early, squeeze in ((False, False), (True, False), (True, True))
    },
    **{
        f"improved {before}-{after}, stride {stride} first": (
            partial(ImprovedUnit, before, after, stride, stride_first=True),
            partial(improved_unit, channels=after, stride=stride, stride_first=True),
        )
        for before, after, stride in ((16, 16, 1), (16, 32, 2))
    },
    **{
        f"bottleneck {before}-{after}, stride {stride}": (
            partial(Bottleneck, before, after, stride, 2),
            partial(bottleneck, channels=after, stride=stride),
        )
        for before, after, stride in ((16, 16, 1), (16, 16, 2), (16, 32, 1), (16, 32, 2))
    },
}

NETWORKS: dict[str, Forward] = {
    "sphere20": partial(sphere_network, units=(1, 2, 4, 1)),
    "ir50": partial(improved_network, units=(3, 4, 14, 3), early=True),
    "irse50": partial(improved_network, units=(3, 4, 14, 3), early=True, squeeze=True),
    "iresnet18": partial(improved_network, units=(2, 2, 2, 2)),
    "mobilefacenet": mobile_network,
    "small": small_network,
}


@torch.no_grad()
def at_random(module: nn.Module) -> nn.Module:
    """In float64 and evaluation mode; slopes, offsets and running statistics differ from channel to channel."""
    for layer in module.double().modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
        elif isinstance(layer, nn.PReLU):
            layer.weight.uniform_(0.1, 0.5)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_(0, layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                layer.bias.normal_()
    return module.eval()


@torch.no_grad()
def assert_computes(module: nn.Module, forward: Forward, x: Tensor) -> None:
    layers = Layers(at_random(module))
    expected = forward(layers, x)
    layers.check_all_used()
    torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("name", UNITS)
def test_units_compute_what_is_published(name: str) -> None:
    make, forward = UNITS[name]
    torch.manual_seed(0)
    assert_computes(make(), forward, torch.randn(2, 16, 10, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_is_published(name: str) -> None:
    """Layer by layer, on strips 16 pixels wide, which leave a map of 7×1."""
    torch.manual_seed(0)
    assert_computes(BACKBONES[name](8, 16), NETWORKS[name], torch.randn(1, 3, 112, 16, dtype=torch.float64))


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
    with torch.device("meta"):
        network = BACKBONES[name](512, 112)
    large = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(large) + 1 == 50
    assert sum(p.numel() for p in network.parameters()) == ir_parameters((3, 4, 14, 3), squeeze)


def test_operations_of_a_convolution_by_hand() -> None:
    """small: its first layer has 56·56 outputs of 24 channels, each of 27 products; twice that are its operations."""
    section = Backbone(name="small", width=112, embedding=256)
    stem = 2 * (56 * 56 * 24 * 27 + 28 * 28 * 32 * 9 * 24)
    units = 2 * 9 * 2 * 32**2 * 28**2
    for before, channels, side in ((32, 64, 14), (64, 128, 7)):
        units += 2 * 9 * (before * channels + 3 * channels**2) * side**2
        units += 2 * before * channels * side**2
    assert forward_flops(section) == stem + units + 2 * 128 * 7 * 7 * 256


def test_recomputing_activations_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and running statistics to the bit, dropout included; of a narrow IR network."""
    narrow = partial(
        improved_residual,
        (1, 2, 1),
        channels=(16, 32, 32),
        strides=(2, 2, 2),
        stem=((16, 2),),
        dropout=0.4,
        early=True,
        squeeze=True,
    )
    monkeypatch.setitem(BACKBONES, "small", narrow)
    images = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8)
    outcomes = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(Backbone(name="small", width=112, embedding=16)).train()
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
