import json
from pathlib import Path

import pytest
import torch

from pipeline.params import Backbone
from stages.train.heads import CosFace
from stages.train.model import ModelError, build_model, load_model, save_model

CPU = torch.device("cpu")


def test_saved_and_loaded_models_agree_to_the_bit(tmp_path: Path) -> None:
    backbone = Backbone(name="small", embedding=16)
    model = build_model(backbone)
    model.train()(torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8))  # moves the running statistics
    save_model(tmp_path, model, CosFace(3, 16, 64.0, 0.35), {"backbone": backbone.model_dump()})
    images = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path, CPU)(images), model.eval()(images))


def test_what_is_wrong_with_a_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.json: no such file; `dvc repro train` makes it"):
        load_model(tmp_path, CPU)
    backbone = Backbone(name="small", embedding=16)
    save_model(tmp_path, build_model(backbone), CosFace(3, 16, 64.0, 0.35), {"backbone": backbone.model_dump()})
    (tmp_path / "model.json").write_text(json.dumps({"backbone": {"name": "small", "embedding": 32}}))
    with pytest.raises(ModelError, match="not a model of this pipeline"):
        load_model(tmp_path, CPU)
    (tmp_path / "backbone.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="not a model of this pipeline"):
        load_model(tmp_path, CPU)
