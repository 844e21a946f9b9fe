"""Models in every form that a person may name; what ONNX files compute is in tests/train/test_export.py."""

import builtins
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from pipeline.tracking import model_digest
from stages.evaluate.models import load_embedder
from stages.train.model import ModelError, load_model
from tests.evaluate.conftest import BACKBONE, Workspace

CPU = torch.device("cpu")


def test_a_folder_is_its_model(workspace: Workspace) -> None:
    found = load_embedder(workspace.models, CPU)
    assert (found.name, found.width, found.length) == (str(workspace.models), 112, BACKBONE.embedding)
    assert found.digest == model_digest(workspace.models)
    images = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    with torch.inference_mode():
        expected = load_model(workspace.models, CPU)(images)
    made = found(images)
    assert torch.equal(made, expected)
    assert made.dtype == torch.float32
    assert load_embedder(workspace.models, CPU, "the champion").name == "the champion"


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nosuch: no such model: needs a folder such as models, or an ONNX file"):
        load_embedder(tmp_path / "nosuch", CPU)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"photo\.jpg: not a model"):
        load_embedder(tmp_path / "photo.jpg", CPU)
    with pytest.raises(ModelError, match=r"model\.json: no such file"):
        load_embedder(tmp_path, CPU)
    (tmp_path / "broken.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"broken\.onnx: not a readable ONNX file"):
        load_embedder(tmp_path / "broken.onnx", CPU)


def test_an_onnx_file_of_another_contract_is_refused(tmp_path: Path) -> None:
    """Such as one that wants pixels already scaled, which would embed wrongly without a word."""
    given, made = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3, 112, 112])
        for name in ("images", "embeddings")
    )
    node = onnx.helper.make_node("Identity", ["images"], ["embeddings"])
    graph = onnx.helper.make_graph([node], "graph", [given], [made])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"other\.onnx: not written by `cosface export` of this version.*float"):
        load_embedder(tmp_path / "other.onnx", CPU)


def test_without_onnxruntime_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r"model\.onnx: .*`pip install onnxruntime`"):
        load_embedder(tmp_path / "model.onnx", CPU)
