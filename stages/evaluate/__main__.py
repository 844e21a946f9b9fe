"""`python -m stages.evaluate {lfw|ytf}`: the pairs of data/raw/<set> and data/embedded/<set> → reports/<set>."""

from pathlib import Path

from pipeline import tracking
from pipeline.entry import stage
from pipeline.params import PAIRED, Params
from stages.evaluate.run import Trained, run


def main(params: Params, name: str) -> None:
    """Evaluate the model on one set of pairs."""
    trained = Trained(Path("data/shards/labels.parquet"), Path(params.shard.clean.names))
    with tracking.training_run_of(Path("models"), params) as tracker:
        raw, embedded = Path("data/raw") / name, Path("data/embedded") / name
        run(raw, embedded, trained, Path("reports") / name, params.evaluate, tracker)


if __name__ == "__main__":
    stage(main, PAIRED)
