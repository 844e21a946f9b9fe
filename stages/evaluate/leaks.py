"""People of the training set in an evaluation set: what makes a figure worthless."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.errors import InputError
from pipeline.params import Params
from stages.evaluate.verification import EvaluationError
from stages.shard.names import name_of, read_names, spellings
from stages.shard.reader import Place

log = logging.getLogger(__name__)

_TOLD = 10
_LABELS = "labels.parquet"


@dataclass(frozen=True)
class Trained:
    """Whom a model has learnt from."""

    labels: pa.Table
    """Of its shards, schema tables.LABELS."""
    names: Path
    """shard.clean.names, for identities that are numbers."""

    @classmethod
    def read(cls, models: Path, params: Params) -> "Trained | None":
        """Of the model of a folder; None, with a warning, where its shards are no longer there.

        Args:
            models: the folder; model.json has the SHA-256 of what the model was trained on.
            params: train.data and shard.clean.names.

        Raises:
            TableError: labels.parquet is the model's, but not readable.
            OSError: there is no model.json.
        """
        unknown = "whether people of the test sets are trained on cannot be told"
        try:
            place = Place.of(params.train.data)
            content = place.read(_LABELS)
        except InputError as error:
            log.warning("%s; %s", error, unknown)
            return None
        trained_on = json.loads((models / "model.json").read_text()).get("data", {}).get(_LABELS)
        if hashlib.sha256(content).hexdigest() != trained_on:
            log.warning(
                "%s: of other shards than the model in %s was trained on; %s until `dvc repro train` is done",
                *(place.shown(_LABELS), models, unknown),
            )
            return None
        return cls(place.parsed(_LABELS, content, tables.LABELS), Path(params.shard.clean.names))


def check_leaks(
    name: str, identities: Iterable[str], trained: Trained, leaks: Literal["refuse", "report"]
) -> int | None:
    """How many people of an evaluation set are trained on, by their names, compared as shard.clean.same_names does;
    None, with a warning, where nobody who is trained on has a name.

    Args:
        name: of the evaluation set.
        identities: its people.
        trained: whom the model has learnt from.
        leaks: what happens where there are any.

    Raises:
        EvaluationError: there are, and `leaks` is to refuse.
        ShardError: the file of names is absent or malformed.
    """
    learnt = trained.labels.filter(pc.greater(trained.labels["train"], 0))["identity"].to_pylist()
    called = read_names(trained.names)
    known = {spelling: identity for identity in learnt for spelling in name_of(identity, called)}
    if not known:
        log.warning(
            "%s: whether its people are trained on cannot be told: the %d identities that are trained on are numbers "
            "without a name in %s",
            *(name, len(set(learnt)), trained.names),
        )
        return None
    found = []
    for each in sorted(set(identities)):
        same = [known[spelling] for spelling in spellings(each) if spelling in known]
        if same:
            found.append((same[0], each))
    if found:
        told = ", ".join(own if own == each else f"{each} ({own})" for own, each in found[:_TOLD])
        told += f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        text = f"{name}: {len(found)} of its people are trained on: {told}"
        if leaks == "refuse":
            raise EvaluationError(
                f"{text}. Leave them out (shard.clean.same_names: true, or shard.clean.exclude) and train again, or "
                "set evaluate.leaks: report"
            )
        log.warning("%s", text)
    return len(found)
