"""`python -m stages.train`: the shards of train.data → models."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import Params
from stages.train import run
from stages.train.ranks import spread


def main(params: Params) -> None:
    """Train by params.yaml, by as many processes as `machine.processes` says."""
    spread(params.machine, "stages.train")
    run(Path("models"), Path("checkpoints"), params)


if __name__ == "__main__":
    stage(main)
