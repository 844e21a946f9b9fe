"""`python -m stages.train`: the shards of train.data → models."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import Params
from stages.train import run


def main(params: Params) -> None:
    """Train by params.yaml."""
    run(Path("models"), Path("checkpoints"), params)


if __name__ == "__main__":
    stage(main)
