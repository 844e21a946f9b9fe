"""`python -m stages.download SET`: a source → data/raw/SET."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import SETS, Params
from stages.download.run import run


def main(params: Params, name: str) -> None:
    """Download one set by params.yaml."""
    run(name, getattr(params.download, name), Path("data/raw") / name, params.machine)


if __name__ == "__main__":
    stage(main, SETS)
