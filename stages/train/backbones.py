"""Backbones: from a normalised face of 112×112 (or 112×96) to an embedding.

Each takes float N×3×112×width in about [−1, 1] and returns float N×D features, not normalised.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.params import Backbone


class SphereUnit(nn.Module):
    """Residual unit of SphereFace: x + PReLU(conv(PReLU(conv(x)))), no batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.PReLU(channels),
        )
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to the same shape."""
        return x + self.body(x)


def sphere(units: tuple[int, int, int, int], embedding: int, width: int) -> nn.Module:
    """The residual CNN of SphereFace (Liu et al., CVPR 2017, Table 2), which CosFace uses with 64 layers.

    Four stages of 64, 128, 256 and 512 channels; each begins with a 3×3 convolution of stride 2, followed by
    `units` residual units. (3, 8, 16, 3) has 64 convolutions.
    """
    layers: list[nn.Module] = []
    before = 3
    for channels, count in zip((64, 128, 256, 512), units, strict=True):
        down = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        _xavier(down)
        layers += [down, nn.PReLU(channels), *(SphereUnit(channels) for _ in range(count))]
        before = channels
    last = nn.Linear(512 * 7 * width // 16, embedding)
    _xavier(last)
    return nn.Sequential(*layers, nn.Flatten(), last)


def _xavier(layer: nn.Conv2d | nn.Linear) -> None:
    """As SphereFace's authors begin it: by Caffe's xavier, whose bound only knows what comes in; biases of 0."""
    bound = math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class SqueezeExcitation(nn.Module):
    """Channels weighed by what the whole map holds (Hu et al., CVPR 2018), reduced by 16, without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 16, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 16, channels, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to the same shape."""
        return x * self.weigh(x)


class ImprovedUnit(nn.Module):
    """Residual unit of the IR networks; no ReLU after the sum.

    As published by ArcFace's authors: BN, conv, BN, PReLU, conv (of the stride), BN. `early` is the variant of public
    PyTorch code that calls itself IR-50 and IR-SE-50: no BN between conv and PReLU, and a shortcut that only takes
    every so many pixels where the channels stay. With `stride_first` the first convolution has the stride, and so a
    quarter of the arithmetic.
    """

    def __init__(
        self,
        before: int,
        channels: int,
        stride: int,
        *,
        early: bool = False,
        squeeze: bool = False,
        stride_first: bool = False,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_first else (1, stride)
        layers: list[nn.Module] = [nn.BatchNorm2d(before), nn.Conv2d(before, channels, 3, first, 1, bias=False)]
        if not early:
            layers.append(nn.BatchNorm2d(channels))
        layers += [
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, second, 1, bias=False),
            nn.BatchNorm2d(channels),
        ]
        if squeeze:
            layers.append(SqueezeExcitation(channels))
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if before == channels and early:
            self.shortcut = nn.MaxPool2d(1, stride)
        elif before != channels or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×C'×H/stride×W/stride."""
        return self.body(x) + self.shortcut(x)


def improved_residual(
    units: tuple[int, ...],
    embedding: int,
    width: int,
    *,
    channels: tuple[int, ...] = (64, 128, 256, 512),
    strides: tuple[int, ...] = (2, 2, 2, 2),
    stem: tuple[tuple[int, int], ...] = ((64, 1),),
    dropout: float = 0.0,
    early: bool = False,
    squeeze: bool = False,
    stride_first: bool = False,
) -> nn.Module:
    """IR networks (Deng et al., ArcFace, CVPR 2019, section 3.1, "L-ResNet50E-IR"): stem, units, BN-dropout-FC-BN.

    Args:
        units: residual units of each stage.
        embedding: D.
        width: of the faces, pixels: 112 or 96.
        channels: of each stage.
        strides: of the first unit of each stage.
        stem: channels and stride of each of its convolutions.
        dropout: before the fully connected layer.
        early: the units' variant, see ImprovedUnit.
        squeeze: squeeze-and-excitation in each unit.
        stride_first: another variant of the units.
    """
    layers: list[nn.Module] = []
    before = 3
    for after, stride in stem:
        layers += _convolution(before, after, 3, stride=stride)
        before = after
    for count, after, first in zip(units, channels, strides, strict=True):
        for stride in (first, *[1] * (count - 1)):
            unit = ImprovedUnit(before, after, stride, early=early, squeeze=squeeze, stride_first=stride_first)
            layers.append(unit)
            before = after
    reduced = math.prod(strides) * math.prod(stride for _, stride in stem)
    features = before * (112 // reduced) * (width // reduced)
    layers += [nn.BatchNorm2d(before), nn.Dropout(dropout), nn.Flatten(), nn.Linear(features, embedding)]
    layers.append(nn.BatchNorm1d(embedding))
    return _initialised(nn.Sequential(*layers))


class Bottleneck(nn.Module):
    """Inverted residual bottleneck of MobileNetV2, with PReLU: 1×1 to more channels, 3×3 in each, 1×1 back, linear."""

    def __init__(self, before: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.body = nn.Sequential(
            *_convolution(before, inner, 1),
            *_convolution(inner, inner, 3, stride=stride, groups=inner),
            *_convolution(inner, channels, 1, linear=True),
        )
        self.residual = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×C'×H/stride×W/stride."""
        return x + self.body(x) if self.residual else self.body(x)


def mobile_face_net(embedding: int, width: int) -> nn.Module:
    """MobileFaceNet (Chen et al., CCBR 2018, arXiv 1804.07573, Table 1), with BN after the embedding."""
    layers = [*_convolution(3, 64, 3, stride=2), *_convolution(64, 64, 3, groups=64)]
    before = 64
    stages = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
    for expansion, channels, count, stride in stages:
        for i in range(count):
            layers.append(Bottleneck(before, channels, stride if i == 0 else 1, expansion))
            before = channels
    layers += _convolution(before, 512, 1)
    # Global depthwise convolution: over all there is, each channel by itself
    layers += [nn.Conv2d(512, 512, (7, width // 16), groups=512, bias=False), nn.BatchNorm2d(512), nn.Flatten()]
    layers += [nn.Linear(512, embedding, bias=False), nn.BatchNorm1d(embedding)]
    return _initialised(nn.Sequential(*layers))


def _convolution(
    before: int, after: int, side: int, *, stride: int = 1, groups: int = 1, linear: bool = False
) -> list[nn.Module]:
    """Convolution, BN and, unless linear, PReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, side, stride, side // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
    ]
    return layers if linear else [*layers, nn.PReLU(after)]


def _initialised(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


BACKBONES: dict[str, Callable[[int, int], nn.Module]] = {
    # SphereFace, Table 2; CosFace, section 4.1, has the one with 64 layers
    "sphere20": partial(sphere, (1, 2, 4, 1)),
    "sphere36": partial(sphere, (2, 4, 8, 2)),
    "sphere64": partial(sphere, (3, 8, 16, 3)),
    # in public PyTorch code, as ArcFace's first release had it
    "ir50": partial(improved_residual, (3, 4, 14, 3), dropout=0.4, early=True),
    "irse50": partial(improved_residual, (3, 4, 14, 3), dropout=0.4, early=True, squeeze=True),
    # ArcFace's
    "iresnet18": partial(improved_residual, (2, 2, 2, 2)),
    # ... of a quarter of its width
    "iresnet18-quarter": partial(improved_residual, (2, 2, 2, 2), channels=(16, 32, 64, 128), stem=((16, 1),)),
    "iresnet34": partial(improved_residual, (3, 4, 6, 3)),
    "iresnet50": partial(improved_residual, (3, 4, 14, 3)),
    "iresnet100": partial(improved_residual, (3, 13, 30, 3)),
    "mobilefacenet": mobile_face_net,
    # our own, for CPUs: narrow, at 28×28 pixels after the second convolution, and with less arithmetic where it halves
    "small": partial(
        improved_residual,
        (1, 2, 2),
        channels=(32, 64, 128),
        strides=(1, 2, 2),
        stem=((24, 2), (32, 2)),
        stride_first=True,
    ),
}


def build_backbone(params: Backbone) -> nn.Module:
    """A freshly initialised backbone; its weights follow from torch's global random state."""
    return BACKBONES[params.name](params.embedding, params.width)


def forward_flops(params: Backbone) -> int:
    """Floating-point operations of convolutions and matrix products for one image: two for each multiplication."""
    with torch.device("meta"):
        network = build_backbone(params).eval()
        image = torch.empty(1, 3, 112, params.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops()
