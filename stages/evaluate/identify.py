"""`python -m stages.evaluate.identify`: MegaFace's protocol, data/embedded/{probes,distractors} → reports/megaface."""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from pipeline import tables
from pipeline.entry import stage
from pipeline.executor import choose_device, enough_gpu_memory
from pipeline.pages import save_png
from pipeline.params import Evaluate, Params
from stages.evaluate import features, figures, scoring
from stages.evaluate.identification import RANKS, Identification, identify
from stages.evaluate.leaks import Trained, check_leaks
from stages.evaluate.noise import without_noise
from stages.evaluate.uncertainty import unbounded
from stages.evaluate.verification import EvaluationError

log = logging.getLogger(__name__)

_BLOCK = 8192


def run(
    probes: Path,
    distractors: Path,
    trained: Trained | None,
    out: Path,
    params: Evaluate,
    device: torch.device,
) -> dict[str, Any]:
    """Write metrics.json, cmc.csv and cmc.png.

    A photograph without a detected face is used as its centre crop and counted; one that cannot be read takes no part.
    Where there are no probes or no distractors at all, that is what metrics.json says.

    Args:
        probes: folder of the embedded probes.
        distractors: folder of the embedded distractors.
        trained: for the check that no probe's person is trained on; None where that cannot be known.
        out: folder of the results.
        params: section evaluate of params.yaml.
        device: where products are computed.

    Returns:
        The content of metrics.json.

    Raises:
        EvaluationError: there are too few distractors, no mates, or people of both sets and `leaks` refuses that; or
            the list of noise is of no use.
        TableError: a table is absent or incomplete.
    """
    known, strangers = _usable(probes), _usable(distractors)
    if not len(known) or not len(strangers):
        lacking = "probes" if not len(known) else "distractors"
        content: dict[str, Any] = {"why": f"download.{lacking} has no photographs"}
        _write(out, content, None)
        return content
    known, strangers, noise = without_noise(known, strangers, Path(params.megaface.noise))
    if (most := params.megaface.distractors[-1]) > len(strangers):
        raise EvaluationError(
            f"evaluate.megaface.distractors: {most}, but {distractors} has {len(strangers)} photographs that can be "
            f"used and are no noise; take at most {len(strangers)}"
        )
    leaked = None
    if trained is not None:
        leaked = check_leaks("probes", known["identity"].to_pylist(), trained, params.leaks)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".megaface-") as folder:
        found = identify(
            np.concatenate(list(_vectors(probes, known, params))),
            known["identity"].combine_chunks().dictionary_encode().indices.to_numpy(),
            _in_order(distractors, strangers, params, Path(folder)),
            params.megaface.distractors,
            params.megaface.fars,
            device,
        )
    undetected = sum(pc.sum(pc.equal(each["status"], "fallback")).as_py() or 0 for each in (known, strangers))
    content = summary(found, params) | {
        "leaked_identities": leaked,
        "noise": noise,
        "undetected": undetected,
    }
    _write(out, content, found)
    last = found.identified()[-1]
    log.info("megaface: rank-1 %.2f%% among %s distractors", 100 * last, f"{found.counts[-1]:,}")
    return content


def summary(found: Identification, params: Evaluate) -> dict[str, Any]:
    """What metrics.json says of it, by number of distractors."""
    first, rates = found.intervals(params.replicates, params.seed)
    identified, accepted = found.identified(), found.true_accept_rates()
    by_count: dict[str, Any] = {}
    for c, (count, impostors) in enumerate(zip(found.counts, found.impostors(), strict=True)):
        tar: dict[str, float | None] = {}
        bounds = {"rank_1": first[c]} | {f"tar_at_far_{far:g}": rates[c, f] for f, far in enumerate(found.fars)}
        intervals = {name: _known(each) for name, each in bounds.items()}
        unresolved = {name: unbounded(params.replicates) for name, each in intervals.items() if each is None}
        for f, far in enumerate(found.fars):
            resolved = not np.isnan(accepted[c, f])
            tar[f"{far:g}"] = scoring.rounded(accepted[c, f]) if resolved else None
            if not resolved:
                unresolved[f"tar_at_far_{far:g}"] = (
                    f"{impostors:,} comparisons with strangers: the least FAR above 0 that they can show is "
                    f"{1 / impostors:.2g}"
                )
        by_count[str(count)] = {
            "impostors": impostors,
            "intervals": intervals,
            "rank_1": scoring.rounded(identified[c]),
            "rank_10": scoring.rounded(found.identified(10)[c]),
            "tar_at_far": tar,
            "unresolved": unresolved,
        }
    return {
        "distractors": by_count,
        "flip": params.flip,
        "pairs": len(found.score),
        "people": len(np.unique(found.person)),
        "probes": found.probes,
    }


def _known(values: NDArray[np.float64]) -> list[float] | None:
    """As metrics.json has them; None where they are NaN."""
    return None if np.isnan(values).any() else [scoring.rounded(value) for value in values]


def _usable(embedded: Path) -> pa.Table:
    """The rows with features: image_id, identity, status."""
    table = tables.read_parts(embedded, tables.EMBEDDED, ["image_id", "identity", "status"])
    return table.filter(pc.is_in(table["status"], pa.array(["detected", "fallback"])))


def _vectors(embedded: Path, chosen: pa.Table, params: Evaluate) -> Iterator[NDArray[np.float32]]:
    """Unit vectors of the chosen rows, a part at a time."""
    wanted = set(chosen["image_id"].to_pylist())  # pyarrow would hash all of them for each part anew
    for path in tables.parts(embedded):
        table = tables.read_table(path, tables.EMBEDDED, ["image_id", "emb", "flip"])
        table = table.filter(pa.array([image in wanted for image in table["image_id"].to_pylist()], pa.bool_()))
        if len(table):
            emb, flip = features.matrix(table["emb"]), features.matrix(table["flip"])
            yield scoring.unit(emb, flip, params.flip).astype(np.float32)


def _in_order(embedded: Path, chosen: pa.Table, params: Evaluate, folder: Path) -> Iterator[NDArray[np.float32]]:
    """Unit vectors of the chosen rows in the order of the seed, block by block; they lie in a file meanwhile."""
    place = np.random.default_rng(params.megaface.seed).permutation(len(chosen))
    file: np.memmap | None = None
    start = 0
    for vectors in _vectors(embedded, chosen, params):
        if file is None:
            shape = len(chosen), vectors.shape[1]
            file = np.lib.format.open_memmap(folder / "distractors.npy", "w+", np.float32, shape)
        file[place[start : start + len(vectors)]] = vectors
        start += len(vectors)
    assert file is not None
    for start in range(0, len(file), _BLOCK):
        yield np.array(file[start : start + _BLOCK])


def _write(out: Path, content: dict[str, Any], found: Identification | None) -> None:
    lines = ["distractors,rank,share\n"]
    curves: dict[int, list[float]] = {}
    if found is not None:
        by_rank = np.stack([found.identified(rank) for rank in range(1, RANKS + 1)], axis=1)
        curves = dict(zip(found.counts, by_rank.tolist(), strict=True))
        for count, shares in curves.items():
            lines += [f"{count},{rank},{scoring.rounded(share)}\n" for rank, share in enumerate(shares, 1)]
    with tables.atomic(out / "cmc.csv") as path:
        path.write_text("".join(lines))
    save_png(figures.cmc_figure(curves), out / "cmc.png")
    with tables.atomic(out / "metrics.json") as path:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main(params: Params) -> None:
    """Identify the probes by the model of this folder."""
    embedded, out = Path("data/embedded"), Path("reports/megaface")
    out.mkdir(parents=True, exist_ok=True)
    trained = Trained.read(Path("models"), params)
    device = choose_device(params.machine.device)
    otherwise = "end what else uses it, or set machine.device to cpu"
    with enough_gpu_memory(otherwise):
        run(embedded / "probes", embedded / "distractors", trained, out, params.evaluate, device)


if __name__ == "__main__":
    stage(main)
