"""`python -m stages.evaluate.embed SET`: data/aligned/SET and models → data/embedded/SET."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.executor import choose_device, keep_memory
from pipeline.params import SETS, Params
from stages.evaluate.features import embed_set
from stages.evaluate.models import load_embedder


def main(params: Params, name: str) -> None:
    """Embed one set by the model of this folder."""
    keep_memory()
    model = load_embedder(Path("models"), choose_device(params.machine.device))
    # of the training set, the audit alone makes use, without mirror images
    flip = name != "train"
    embed_set(Path("data/aligned") / name, model, Path("data/embedded") / name, batch=params.evaluate.batch, flip=flip)


if __name__ == "__main__":
    stage(main, SETS)
