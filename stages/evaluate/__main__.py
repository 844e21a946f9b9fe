"""`python -m stages.evaluate {lfw|ytf}`: data/aligned/<set> and models → reports/<set>."""

import argparse
from pathlib import Path

from pipeline import tracking
from pipeline.entry import stage
from pipeline.params import SETS, Params
from stages.evaluate import run


def main(params: Params) -> None:
    """Evaluate the model on one set of pairs."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description="Verification on one set of pairs.")
    parser.add_argument("set", choices=[name for name in SETS if name != "train"])
    name = parser.parse_args().set
    models = Path("models")
    with tracking.training_run_of(models, params) as tracker:
        run(
            Path("data/raw") / name,
            Path("data/aligned") / name,
            models,
            Path("reports") / name,
            params.evaluate,
            params.machine,
            tracker,
        )


if __name__ == "__main__":
    stage(main)
