"""`python -m stages.align SET`: data/raw/SET → data/aligned/SET."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import SETS, Params
from stages.align.run import run


def main(params: Params, name: str) -> None:
    """Align one set by params.yaml."""
    run(
        Path("data/raw") / name,
        Path("data/aligned") / name,
        params.align,
        params.machine,
        evaluation=name != "train",
        report=Path("reports/align") / name,
    )


if __name__ == "__main__":
    stage(main, SETS)
