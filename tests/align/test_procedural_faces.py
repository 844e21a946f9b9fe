"""The default data are faces to the detector that the whole field uses."""

from pathlib import Path

from pipeline.params import Synthetic, load_params
from stages.align.decode import decode
from stages.align.mtcnn import Detector
from stages.download import synthetic

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def test_mtcnn_finds_at_least_98_percent() -> None:
    source = PARAMS.download.lfw
    assert isinstance(source, Synthetic)
    chosen = synthetic.photographs(source, "lfw")[::10]
    assert len(chosen) == 120
    detector = Detector(PARAMS.align.detector, "cpu")
    found = 0
    for first in range(0, len(chosen), 50):
        images = [decode(image) for image in synthetic.render_part(source, chosen[first : first + 50])]
        found += sum(len(faces.scores) > 0 for faces in detector.detect(images))
    assert found >= 0.98 * len(chosen)
