"""`python -m stages.shard`: data/aligned/* → data/shards, reports/shard."""

from pathlib import Path

from pipeline.entry import stage
from pipeline.params import PAIRED, Params
from stages.shard.run import run

ALIGNED = Path("data/aligned")


def main(params: Params) -> None:
    """Shard the aligned training set."""
    evaluation = {name: ALIGNED / name for name in (*PAIRED, "probes")}
    out, report = Path("data/shards"), Path("reports/shard")
    run(ALIGNED / "train", evaluation, out, report, params.shard, params.align.face, params.machine)


if __name__ == "__main__":
    stage(main)
