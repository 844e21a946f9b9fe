"""The model: a backbone that takes pixels as they are, and its files.

The input contract is uint8 RGB, 112×112 (or 112×96), aligned. `(x − 127.5) / 128` happens here and nowhere else, so
training, evaluation and serving cannot differ.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import InputError
from pipeline.params import Backbone
from pipeline.tables import atomic
from stages.train.backbones import build_backbone
from stages.train.faces import HEIGHT


def input_contract(width: int) -> dict[str, Any]:
    """What model.json says of the images a model takes."""
    return {
        "shape": [3, HEIGHT, width],
        "dtype": "uint8",
        "colour": "RGB",
        "normalisation": "inside: (x - 127.5) / 128",
    }


class ModelError(InputError):
    """A model folder that cannot be used; the message names the file."""


class FaceModel(nn.Module):
    """Backbone behind the input contract, for faces `width` pixels wide."""

    def __init__(self, backbone: nn.Module, width: int = HEIGHT) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.recompute = False
        """Whether training computes activations again for the gradient (Chen et al., arXiv 1604.06174)."""
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def compile_training(self, *, replayed: bool = False) -> None:
        """Let torch.compile make the code of forward and backward, for training alone; of all as one graph.

        By `backbone.compile()` it would be one for each unit, and none for the layers around them: torch does not look
        into the forward of its own nn.Sequential.

        Args:
            replayed: on a GPU, launch the kernels of forward and of backward all at once, recorded in the first steps
                (CUDA graphs), instead of one by one from Python, which is slower than many of them are. What a pass
                returns, gradients too, is overwritten by the next one.
        """
        mode = "reduce-overhead" if replayed else None
        self._compiled = torch.compile(self._features, fullgraph=True, dynamic=False, mode=mode)

    def forward(self, images: Tensor) -> Tensor:
        """Features of faces.

        Args:
            images: N×3×112×width uint8, RGB, aligned.

        Returns:
            N×D float32 features, not normalised (flip-test concatenates before normalising).
        """
        if self.training and self.recompute:
            return self._features_twice(images)
        return (self._compiled if self.training and self._compiled else self._features)(images)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.backbone(_normalised(images))
        return features.float()

    def _features_twice(self, images: Tensor) -> Tensor:
        assert isinstance(self.backbone, nn.Sequential)
        maps = _normalised(images)
        for layer in self.backbone:
            contexts = partial(_first_and_second, layer)
            maps = checkpoint(layer, maps, use_reentrant=False, context_fn=contexts)
        return maps.float()


def _normalised(images: Tensor) -> Tensor:
    return (images.float() - 127.5) / 128


def _first_and_second(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _again(layer)


@contextmanager
def _again(layer: nn.Module) -> Iterator[None]:
    """While activations are computed for the second time: running statistics have seen the batch already."""
    normalisations = [m for m in layer.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    before = [(each.momentum, cast(Tensor, each.num_batches_tracked).clone()) for each in normalisations]
    for each in normalisations:
        each.momentum = 0.0
    try:
        yield
    finally:  # torch stops by an exception once it has what it needs
        for each, (momentum, batches) in zip(normalisations, before, strict=True):
            each.momentum = momentum
            cast(Tensor, each.num_batches_tracked).copy_(batches)


def build_model(params: Backbone) -> FaceModel:
    """A freshly initialised model; its weights follow from torch's global random state."""
    return FaceModel(build_backbone(params), params.width)


def save_model(folder: Path, model: FaceModel, head: nn.Module, description: dict[str, Any]) -> None:
    """Write backbone.safetensors, head.safetensors and model.json, each atomically.

    The description comes last, and an earlier one goes first: files of two models never pass for one.
    """
    (folder / "model.json").unlink(missing_ok=True)
    for name, module in (("backbone", model.backbone), ("head", head)):
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        with atomic(folder / f"{name}.safetensors") as path:
            save_file(tensors, path)
    with atomic(folder / "model.json") as path:
        path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def load_model(folder: Path, device: torch.device) -> FaceModel:
    """The trained model of a folder, in evaluation mode.

    Raises:
        ModelError: model.json or backbone.safetensors is absent, is none, or has not the weights of the network that
            it names.
        OSError: one of them may not be read.
    """
    try:
        description = json.loads((folder / "model.json").read_text())
        params = Backbone.model_validate(description["backbone"])
        weights = folder / "backbone.safetensors"
        weights.open("rb").close()  # safetensors calls any file absent that it cannot open, and does not name it
        tensors = load_file(weights)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename}: no such file; `dvc repro train` makes it") from error
    except (ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder}: not a model of this pipeline: {error}") from error
    model = build_model(params)
    found, wanted = (
        {name: tuple(tensor.shape) for name, tensor in each.items()} for each in (tensors, model.backbone.state_dict())
    )
    unlike = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if unlike:
        raise ModelError(
            f"{weights}: not the weights of {params.name} with an embedding of {params.embedding}, as model.json has "
            f"it: {len(unlike)} of {len(found | wanted)} tensors are absent, unknown or of another shape, {unlike[0]} "
            "among them. Where the network has changed since, `dvc repro train` trains anew"
        )
    model.backbone.load_state_dict(tensors)
    return model.to(device).eval()
