"""`python -m stages.align SET`: data/raw/SET → data/aligned/SET."""

import argparse
from pathlib import Path

from pipeline.entry import stage
from pipeline.params import SETS, Params
from stages.align import run


def main(params: Params) -> None:
    """Align one set by params.yaml."""
    parser = argparse.ArgumentParser(prog="python -m stages.align", description="data/raw/SET → data/aligned/SET.")
    parser.add_argument("set", choices=SETS)
    name: str = parser.parse_args().set
    run(
        Path("data/raw") / name,
        Path("data/aligned") / name,
        params.align,
        params.machine,
        evaluation=name != "train",
        report=Path("reports/align") / name,
    )


if __name__ == "__main__":
    stage(main)
