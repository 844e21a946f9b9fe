"""`python -m stages.evaluate {lfw|ytf}`: the pairs of data/raw/<set> and data/embedded/<set> → reports/<set>."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import PAIRED, Params
from stages.evaluate.leaks import Trained
from stages.evaluate.run import run


def main(params: Params, name: str) -> None:
    """Evaluate the model on one set of pairs."""
    trained = Trained.read(Path("models"), params)
    run(Path("data/raw") / name, Path("data/embedded") / name, trained, Path("reports") / name, params.evaluate)


if __name__ == "__main__":
    stage(main, PAIRED)
