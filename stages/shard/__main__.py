"""`python -m stages.shard`: data/aligned/train → data/shards."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import Params
from stages.shard import run


def main(params: Params) -> None:
    """Shard the aligned training set."""
    run(Path("data/aligned/train"), Path("data/shards"), params.shard)


if __name__ == "__main__":
    stage(main)
