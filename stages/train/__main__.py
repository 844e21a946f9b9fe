"""`python -m stages.train`: the shards of train.data → models."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import Params
from stages.train.launch import launch, processes, started_by_torchrun, tell_launcher
from stages.train.run import run


def main(params: Params) -> None:
    """Train by params.yaml, by as many processes as `machine.processes` says."""
    arguments = (Path("models"), Path("checkpoints"), params)
    if started_by_torchrun():
        tell_launcher(run, *arguments)
    elif (count := processes(params.machine)) > 1:
        launch(count, "stages.train")
    else:
        run(*arguments)


if __name__ == "__main__":
    stage(main)
