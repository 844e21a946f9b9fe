"""The model as one ONNX file, for whatever runs it elsewhere."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.tables import atomic
from stages.train.faces import HEIGHT
from stages.train.model import FaceModel

OPSET = 20


class _Normalised(nn.Module):
    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return normalize(self.model(images))


def export(model: FaceModel, out: Path) -> None:
    """Write a model, in evaluation mode and on the CPU, as ONNX.

    Its input `images` is N×3×112×width uint8, RGB, aligned, for any N ≥ 1; its output `embeddings` N×D float32 of
    length 1, of the images alone (the flip-test is the caller's).

    Args:
        model: as load_model gives it.
        out: the file, written atomically.
    """
    example = torch.zeros(2, 3, HEIGHT, model.width, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that would only make it faster
    program = torch.onnx.export(
        _Normalised(model.eval()),
        (example,),
        input_names=["images"],
        output_names=["embeddings"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    with atomic(out) as path:
        program.save(path)
