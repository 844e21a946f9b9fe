"""Models of any kind behind one interface: aligned faces in, features out.

A folder as training leaves it, or an ONNX file as `cosface export` writes it. (pipeline/registry.py brings models out
of MLflow.) Whatever the form, it is the same model if its digest is the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.tracking import MODEL_TAG, model_digest
from stages.train.faces import HEIGHT
from stages.train.model import ModelError, load_model

_WIDTHS = (112, 96)


@dataclass(frozen=True)
class Embedder:
    """A model ready to be used."""

    name: str
    """For people: where it came from."""
    digest: str
    """SHA-256 of its backbone.safetensors, in whatever form it came."""
    width: int
    """Of the faces it sees, pixels; the height is 112."""
    length: int
    """Of its features: D."""
    features: Callable[[Tensor], Tensor]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """N×D float32 features, not normalised, of N×3×112×width uint8 RGB faces, which may lie on any device."""
        return self.features(images)


def load_embedder(path: Path, device: torch.device, name: str | None = None) -> Embedder:
    """The model of a folder or an ONNX file. Nothing is unpickled.

    Args:
        path: a folder with model.json and backbone.safetensors, or a file that `cosface export` wrote.
        device: where it runs.
        name: what people know it by; the path by default.

    Raises:
        ModelError: it is neither, or does not belong to this code, or onnxruntime is not installed.
    """
    # cuDNN's convolutions would use TF32 unasked; and after a training, try all algorithms for each size of batch
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    if path.is_dir():
        width, digest, features = _folder(path, device)
    elif path.suffix == ".onnx" and path.is_file():
        width, digest, features = _onnx(path, device)
    else:
        problem = "not a model" if path.exists() else "no such model"
        raise ModelError(
            f"{path}: {problem}: needs a folder such as models, or an ONNX file that `cosface export` wrote"
        )
    with torch.inference_mode():
        length = features(torch.zeros(1, 3, HEIGHT, width, dtype=torch.uint8)).shape[1]
    return Embedder(name or str(path), digest, width, length, features)


def _folder(path: Path, device: torch.device) -> tuple[int, str, Callable[[Tensor], Tensor]]:
    """Width, digest and features of a folder's model."""
    model = load_model(path, device)

    def features(images: Tensor) -> Tensor:
        return model(images.to(device))

    return model.width, model_digest(path), features


def _onnx(path: Path, device: torch.device) -> tuple[int, str, Callable[[Tensor], Tensor]]:
    """Width, digest and features of an ONNX file."""
    session = _session(path, device)
    given = [(each.name, each.type, each.shape[1:]) for each in session.get_inputs()]
    made = [each.name for each in session.get_outputs()]
    digest = session.get_modelmeta().custom_metadata_map.get(MODEL_TAG)
    accepted = [[("images", "tensor(uint8)", [3, HEIGHT, width])] for width in _WIDTHS]
    if given not in accepted or made != ["embeddings", "norms"] or digest is None:
        raise ModelError(f"{path}: not written by `cosface export` of this version: {given} to {made}; export it again")

    def features(images: Tensor) -> Tensor:
        embeddings, norms = session.run(None, {"images": images.contiguous().cpu().numpy()})
        return torch.from_numpy(embeddings * norms[:, None])

    return given[0][2][2], digest, features


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{path}: an ONNX file needs onnxruntime, which is not installed: `pip install onnxruntime`"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its errors have no common class
        if type(error).__module__.startswith("onnxruntime."):
            raise ModelError(f"{path}: not a readable ONNX file: {error}") from error
        raise
