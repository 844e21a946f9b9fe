"""shard: aligned faces become labelled training examples, shuffled once, in a few large files."""

import logging
from pathlib import Path

import numpy as np

from pipeline.params import Shard
from pipeline.tables import ALIGNED, LABELS, fingerprint, parts, read_parts, resumable, sha256_file, write_table
from stages.shard.split import ShardError, make_plan, shuffled
from stages.shard.writer import write_shards

__all__ = ["ShardError", "run"]

log = logging.getLogger(__name__)


def run(aligned: Path, out: Path, params: Shard) -> None:
    """Write `train-*`, `val-*` and `labels.parquet` from the detected faces of an aligned table.

    The same faces and parameters give the same bytes.

    Args:
        aligned: folder of the aligned training set.
        out: folder of the shards.
        params: section shard of params.yaml.

    Raises:
        ShardError: fewer than two identities remain.
        TableError: the aligned table is absent or incomplete.
    """
    names = read_parts(aligned, ALIGNED, ["identity", "status"])
    usable = names["status"].to_numpy() == "detected"
    plan = make_plan(names["identity"].to_numpy(), usable, params)
    inputs = [sha256_file(path) for path in parts(aligned)]
    with resumable(out, fingerprint(params.model_dump(), inputs, code=(Path(__file__).parent,))):
        for number, (split, chosen) in enumerate((("train", ~plan.val), ("val", plan.val))):
            rows = shuffled(np.flatnonzero((plan.label >= 0) & chosen), params.seed + number)
            write_shards(aligned, out, split, rows, plan.label, params.shard_rows, params.row_group_rows)
        write_table(out / "labels.parquet", plan.labels, LABELS)
    kept = int((plan.label >= 0).sum())
    dropped = plan.labels["dropped"].drop_null()
    log.info(
        "%d faces of %d identities: %d to train, %d to validate; dropped: %d images without a face, %d identities",
        kept,
        len(plan.labels) - len(dropped),
        int(plan.labels["train"].to_numpy().sum()),
        int(plan.labels["val"].to_numpy().sum()),
        int((~usable).sum()),
        len(dropped),
    )
