"""Backbones: from a normalised face of 112×112 (or 112×96) to an embedding.

Each takes float N×3×112×width in about [−1, 1] and returns float N×D features, not normalised.
"""

from collections.abc import Callable

from torch import Tensor, nn

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
        nn.init.xavier_uniform_(down.weight)
        nn.init.zeros_(down.bias)  # type: ignore[arg-type]
        layers += [down, nn.PReLU(channels), *(SphereUnit(channels) for _ in range(count))]
        before = channels
    last = nn.Linear(512 * 7 * width // 16, embedding)
    nn.init.xavier_uniform_(last.weight)
    return nn.Sequential(*layers, nn.Flatten(), last)


class ImprovedUnit(nn.Module):
    """Residual unit of ArcFace's IR networks: BN, conv, BN, PReLU, conv (of the stride), BN; no ReLU after the sum."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×C'×H/stride×W/stride."""
        return self.body(x) + self.shortcut(x)


def improved_residual(
    units: tuple[int, ...], channels: tuple[int, ...], embedding: int, width: int, *, stem_stride: int, dropout: float
) -> nn.Module:
    """IR networks (Deng et al., ArcFace, CVPR 2019, section 3.1, "L-ResNet50E-IR"): stem, units, BN-dropout-FC-BN.

    Args:
        units: residual units of each stage; the first unit of a stage halves the resolution.
        channels: of the stem, then of each stage.
        width: of the faces, pixels: 112 or 96.
        stem_stride: 1 as published; 2 quarters the arithmetic, for CPUs.
        dropout: before the fully connected layer.
    """
    stem, *rest = channels
    layers: list[nn.Module] = [
        nn.Conv2d(3, stem, 3, stride=stem_stride, padding=1, bias=False),
        nn.BatchNorm2d(stem),
        nn.PReLU(stem),
    ]
    before = stem
    for count, after in zip(units, rest, strict=True):
        layers += [ImprovedUnit(before, after, 2), *(ImprovedUnit(after, after, 1) for _ in range(count - 1))]
        before = after
    reduced = stem_stride * 2 ** len(units)
    features = before * (112 // reduced) * (width // reduced)
    layers += [nn.BatchNorm2d(before), nn.Dropout(dropout), nn.Flatten(), nn.Linear(features, embedding)]
    layers.append(nn.BatchNorm1d(embedding))
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


BACKBONES: dict[str, Callable[[int, int], nn.Module]] = {
    # CosFace, section 4.1: the 64-layer CNN of SphereFace
    "sphere64": lambda embedding, width: sphere((3, 8, 16, 3), embedding, width),
    "ir50": lambda embedding, width: improved_residual(
        (3, 4, 14, 3), (64, 64, 128, 256, 512), embedding, width, stem_stride=1, dropout=0.4
    ),
    # our own, for CPUs: three stages of an IR network behind a stem of stride 2
    "small": lambda embedding, width: improved_residual(
        (2, 2, 2), (24, 32, 64, 128), embedding, width, stem_stride=2, dropout=0.0
    ),
}


def build_backbone(params: Backbone) -> nn.Module:
    """A freshly initialised backbone; its weights follow from torch's global random state."""
    return BACKBONES[params.name](params.embedding, params.width)
