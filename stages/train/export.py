"""The model as one ONNX file, for whatever runs it elsewhere."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import normalize

from pipeline.tables import atomic
from pipeline.tracking import MODEL_TAG, model_digest
from stages.train.faces import HEIGHT
from stages.train.model import FaceModel, load_model

OPSET = 20


class _Normalised(nn.Module):
    def __init__(self, model: FaceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model(images)
        return normalize(features), vector_norm(features, dim=1)


def export(models: Path, out: Path) -> FaceModel:
    """Write the model of a folder as ONNX.

    Its input `images` is N×3×112×width uint8, RGB, aligned, for any N ≥ 1. Its outputs are of the images alone:
    `embeddings`, N×D float32 of length 1, and `norms`, N float32, what their lengths were before. The flip-test is the
    caller's, and weighs image and mirror image by their norms. The metadata `model.sha256` says which model it is.

    Args:
        models: folder of the model.
        out: the file, written atomically.

    Returns:
        The model.

    Raises:
        ModelError: there is no usable model.
    """
    model = load_model(models, torch.device("cpu"))
    example = torch.zeros(2, 3, HEIGHT, model.width, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that would only make it faster
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of what torch has deprecated and uses itself
        program = torch.onnx.export(
            _Normalised(model).eval(),
            (example,),
            input_names=["images"],
            output_names=["embeddings", "norms"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[MODEL_TAG] = model_digest(models)
    with atomic(out) as path:
        program.save(path)
    return model
