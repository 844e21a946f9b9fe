import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.params import Backbone
from stages.train.faces import FaceError, decode_face
from stages.train.heads import CosFace
from stages.train.model import ModelError, build_model, load_model, save_model
from tests.samples import jpeg

CPU = torch.device("cpu")


def test_saved_and_loaded_models_agree_to_the_bit(tmp_path: Path) -> None:
    backbone = Backbone(name="small", width=112, embedding=16)
    model = build_model(backbone)
    model.train()(torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8))  # moves the running statistics
    save_model(tmp_path, model, CosFace(3, 16, 64.0, 0.35), {"backbone": backbone.model_dump()})
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path, CPU)(images), model.eval()(images))


class Unwritable(CosFace):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left")


def test_files_of_two_models_never_pass_for_one(tmp_path: Path) -> None:
    backbone = Backbone(name="small", width=112, embedding=16)
    description = {"backbone": backbone.model_dump()}
    save_model(tmp_path, build_model(backbone), CosFace(3, 16, 64.0, 0.35), description)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path, build_model(backbone), Unwritable(3, 16, 64.0, 0.35), description)
    with pytest.raises(ModelError, match=r"model\.json: no such file"):
        load_model(tmp_path, CPU)


def test_what_is_wrong_with_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.json: no such file; `dvc repro train` makes it"):
        load_model(tmp_path, CPU)
    backbone = Backbone(name="small", width=112, embedding=16)
    save_model(tmp_path, build_model(backbone), CosFace(3, 16, 64.0, 0.35), {"backbone": backbone.model_dump()})
    weights = tmp_path / "backbone.safetensors"
    # the last layer's weights and biases, and the four of the normalisation after it that are of the embedding's length
    (tmp_path / "model.json").write_text(json.dumps({"backbone": {"name": "small", "width": 112, "embedding": 32}}))
    with pytest.raises(ModelError, match=rf"^{weights}: not the weights of small with an embedding of 32.*: 6 of "):
        load_model(tmp_path, CPU)
    (tmp_path / "model.json").write_text(json.dumps({"backbone": {"name": "smell", "width": 112, "embedding": 16}}))
    with pytest.raises(ModelError, match=r"not a model of this pipeline: (.|\n)*smell"):
        load_model(tmp_path, CPU)
    (tmp_path / "model.json").write_text(json.dumps({"backbone": {"name": "sphere20", "width": 112, "embedding": 16}}))
    with pytest.raises(ModelError, match="not the weights of sphere20"):
        load_model(tmp_path, CPU)
    weights.write_bytes(b"not weights")
    with pytest.raises(ModelError, match="not a model of this pipeline"):
        load_model(tmp_path, CPU)
    weights.unlink()
    with pytest.raises(ModelError, match=rf"^{weights}: no such file; `dvc repro train` makes it"):
        load_model(tmp_path, CPU)
    weights.mkdir()  # as one without permission, which root has, nothing that can be opened
    with pytest.raises(IsADirectoryError, match=str(weights)):
        load_model(tmp_path, CPU)


def test_a_face_is_seen_in_rgb() -> None:
    pixels = np.zeros((112, 112, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 200, 50  # red and some blue
    np.testing.assert_allclose(decode_face(jpeg(pixels), 112).mean((0, 1)), [200, 0, 50], atol=2)


@pytest.mark.parametrize(("width", "margin"), [(112, 0), (112, 10), (96, 0), (96, 10)])
def test_of_a_larger_face_the_middle_is_seen(width: int, margin: int) -> None:
    """A margin is left away, and of a face 112 wide the paper's 96 are the middle."""
    y, x = np.mgrid[: 112 + 2 * margin, : 112 + 2 * margin].astype(np.uint8)
    pixels = decode_face(jpeg(np.stack([x, y, x], axis=2)), width)
    assert pixels.shape == (112, width, 3)
    left = margin + (112 - width) // 2
    assert abs(int(pixels[50, 0, 0]) - left) <= 2
    assert abs(int(pixels[0, 50, 1]) - margin) <= 2
    assert abs(int(pixels[50, -1, 0]) - (left + width - 1)) <= 2


def test_bytes_that_are_no_face_are_refused() -> None:
    with pytest.raises(FaceError, match="no JPEG"):
        decode_face(b"nothing", 112)
    with pytest.raises(FaceError, match=r"112×96 pixels is too small for a network of 112×112: train\.backbone\.width"):
        decode_face(jpeg(np.zeros((112, 96, 3), np.uint8)), 112)
