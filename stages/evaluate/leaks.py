"""People of the training set in an evaluation set: what makes a figure worthless."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc

from pipeline import tables
from stages.evaluate.verification import EvaluationError
from stages.shard.clean import name_of, normalised, read_names

log = logging.getLogger(__name__)

_TOLD = 10


def check_leaks(
    name: str, identities: Iterable[str], labels: Path, names: Path, leaks: Literal["refuse", "report"]
) -> int:
    """How many people of an evaluation set are trained on, by their names, compared as shard.clean.same_names does.

    Args:
        name: of the evaluation set.
        identities: its people.
        labels: labels.parquet of the shards that the model was trained on.
        names: shard.clean.names, for identities that are numbers.
        leaks: what happens where there are any.

    Raises:
        EvaluationError: there are, and `leaks` is to refuse.
        TableError, ShardError: a file is absent or malformed.
    """
    table = tables.read_table(labels, tables.LABELS, ["identity", "train"])
    trained = table.filter(pc.greater(table["train"], 0))["identity"].to_pylist()
    called = read_names(names)
    known = {own: identity for identity in trained if (own := name_of(identity, called))}
    found = [(known[same], each) for each in sorted(set(identities)) if (same := normalised(each)) in known]
    if found:
        told = ", ".join(trained if trained == each else f"{each} ({trained})" for trained, each in found[:_TOLD])
        told += f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        text = f"{name}: {len(found)} of its people are trained on: {told}"
        if leaks == "refuse":
            raise EvaluationError(
                f"{text}. Leave them out (shard.clean.same_names: true, or shard.clean.exclude) and train again, or "
                "set evaluate.leaks: report"
            )
        log.warning("%s", text)
    return len(found)
