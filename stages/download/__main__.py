"""`python -m stages.download SET`: a source → data/raw/SET."""

import argparse
from pathlib import Path

from pipeline.entry import stage
from pipeline.params import SETS, Params
from stages.download import run


def main(params: Params) -> None:
    """Download one set by params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m stages.download", description="A source → data/raw/SET.")
    parser.add_argument("set", choices=SETS)
    name: str = parser.parse_args().set
    run(name, getattr(params.download, name), Path("data/raw") / name, params.machine)


if __name__ == "__main__":
    stage(main)
