"""A published model through our scoring: `python benchmarks/published.py [--faces FOLDER] [--jitters 10]`.

dlib's face-recognition ResNet (weights from face_recognition_models, run by dlib-bin in an environment of its own, made
on first use) on the LFW pairs of `--faces` (lfw.tgz, pairs.txt), with faces cut by dlib or by our own alignment, scored
by stages/evaluate. Its authors report 0.9938 on all ten folds (standard deviation 0.0027; davisking/dlib-models,
README) with the descriptor averaged over 100 jittered copies of each face, 0.993 over 10, and 0.9913 without (dlib,
python_examples/face_recognition.py). Embeddings are left in `--work`, in the form that `cosface score` reads; an
interrupted run goes on from there (delete it to begin anew). The result goes to benchmarks/results/published.json.
"""

import argparse
import itertools
import json
import platform
import subprocess
import tempfile
import venv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import tables
from pipeline.params import Archive, Params, load_params
from pipeline.progress import configure_logging
from stages import align, download
from stages.align.decode import decode
from stages.align.warp import similarity
from stages.evaluate.verification import Metrics, evaluate

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "published.json"
PEER = ROOT / "benchmarks" / "published_peer.py"
PINNED = ["dlib-bin==20.0.1.post1", "face_recognition_models==0.3.0", "numpy"]

CHIP, PADDING = 150, 0.25
_POINTS = np.array(
    [[0.2254918, 0.2159903], [0.754761, 0.2159903], [0.490127, 0.515625], [0.254149, 0.780233], [0.726104, 0.780233]]
)
CHIP_TEMPLATE = (PADDING + _POINTS) / (1 + 2 * PADDING) * CHIP
"""(5, 2) x, y of our five landmarks in dlib's chip, pixels. dlib lays 68 landmarks on a mean face whose shape it has as
constants (get_face_chip_details); of these, each eye is the mean of six (36–41, 42–47), the nose is 30, the corners of
the mouth are 48 and 54."""
AUTHORS_THRESHOLD = 0.6
"""Below this Euclidean distance dlib's authors call two faces the same person's."""

TWO, PERHAPS, OTHER, HIDDEN = (
    "to our eyes two people: a wrong label",
    "to our eyes perhaps two people",
    "dlib's detector found only somebody else",
    "eyes or mouth are covered, by glasses, a hand or a microphone",
)
SEEN = {
    ("Janica_Kostelic/Janica_Kostelic_0001", "Janica_Kostelic/Janica_Kostelic_0002"): TWO,
    ("Cristina_Fernandez/Cristina_Fernandez_0001", "Cristina_Fernandez/Cristina_Fernandez_0002"): TWO,
    ("Elisabeth_Schumacher/Elisabeth_Schumacher_0001", "Elisabeth_Schumacher/Elisabeth_Schumacher_0002"): TWO,
    ("Jim_OBrien/Jim_OBrien_0001", "Jim_OBrien/Jim_OBrien_0002"): TWO,
    ("Jim_OBrien/Jim_OBrien_0001", "Jim_OBrien/Jim_OBrien_0003"): TWO,
    ("Nora_Bendijo/Nora_Bendijo_0001", "Nora_Bendijo/Nora_Bendijo_0002"): TWO,
    ("Claudia_Pechstein/Claudia_Pechstein_0003", "Claudia_Pechstein/Claudia_Pechstein_0004"): PERHAPS,
    ("Claudia_Pechstein/Claudia_Pechstein_0004", "Claudia_Pechstein/Claudia_Pechstein_0005"): PERHAPS,
    ("Patrick_McEnroe/Patrick_McEnroe_0001", "Patrick_McEnroe/Patrick_McEnroe_0002"): PERHAPS,
    ("Tung_Chee-hwa/Tung_Chee-hwa_0001", "Tung_Chee-hwa/Tung_Chee-hwa_0002"): OTHER,
    ("Tung_Chee-hwa/Tung_Chee-hwa_0001", "Tung_Chee-hwa/Tung_Chee-hwa_0008"): OTHER,
    ("Celine_Dion/Celine_Dion_0003", "Celine_Dion/Celine_Dion_0008"): HIDDEN,
    ("Fernando_Vargas/Fernando_Vargas_0001", "Fernando_Vargas/Fernando_Vargas_0002"): HIDDEN,
    ("Fernando_Vargas/Fernando_Vargas_0001", "Fernando_Vargas/Fernando_Vargas_0004"): HIDDEN,
    ("Hootie_Johnson/Hootie_Johnson_0001", "Hootie_Johnson/Hootie_Johnson_0002"): HIDDEN,
    ("Bono/Bono_0001", "Bono/Bono_0003"): HIDDEN,
    ("Damon_Dash/Damon_Dash_0001", "Henry_Suazo/Henry_Suazo_0001"): HIDDEN,
    ("Ernie_Grunfeld/Ernie_Grunfeld_0001", "Frank_Coraci/Frank_Coraci_0001"): HIDDEN,
}
"""What is wrong with pairs, as we saw in their photographs, among those that are decided wrongly."""

Floats = NDArray[np.float64]


class Peer:
    """dlib in an environment of its own, made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._python = folder / "bin" / "python"
        if not (folder / "complete").exists():
            venv.create(folder, clear=True, with_pip=True)
            subprocess.run([self._python, "-m", "pip", "install", "--quiet", *PINNED], check=True)
            (folder / "complete").touch()

    def do(self, *command: str | Path) -> dict[str, Any]:
        done = subprocess.run([self._python, PEER, *command], check=True, stdout=subprocess.PIPE, text=True)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def versions(self) -> dict[str, str]:
        return {f"dlib's {name}" if name == "numpy" else name: number for name, number in self.do("versions").items()}


def settings(faces: Path) -> Params:
    """The default recipe on the LFW photographs."""
    params = load_params(ROOT / "params.yaml")
    lfw = Archive(
        source="archive",
        watch=[],
        location=str((faces / "lfw.tgz").resolve()),
        sha256=None,
        pairs=str((faces / "pairs.txt").resolve()),
        pairs_sha256=None,
    )
    return params.model_copy(update={"download": params.download.model_copy(update={"lfw": lfw})})


def photographs(raw: Path) -> Iterator[tuple[str, bytes]]:
    """Image ids and encoded bytes, in the table's order."""
    for path in tables.parts(raw):
        part = tables.read_table(path, tables.RAW, ["image_id", "image"])
        yield from zip(part["image_id"].to_pylist(), part["image"].to_pylist(), strict=True)


def as_files(raw: Path, folder: Path) -> Path:
    """The photographs as files for dlib to read; a list of their ids."""
    names = []
    for name, content in photographs(raw):
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        names.append(name)
    listed = folder / "names.json"
    listed.write_text(json.dumps(names))
    return listed


def our_chips(raw: Path, aligned: Path, out: Path) -> dict[str, Any]:
    """dlib's chips by our alignment: one warp, from the photograph to our aligned face and on to the chip.

    The second step is the same similarity for all faces: the least-squares one between our template and where the same
    landmarks lie in dlib's chip. A photograph without a face goes the same way from its centre crop.
    """
    onwards = np.vstack([cv2.invertAffineTransform(similarity(CHIP_TEMPLATE[None])[0]), [0, 0, 1]])
    rows = tables.read_parts(aligned, tables.ALIGNED, ["status", "landmarks", "image", "faces"]).to_pylist()
    chips = np.lib.format.open_memmap(out, "w+", np.uint8, (len(rows), CHIP, CHIP, 3))
    for i, ((_, content), row) in enumerate(zip(photographs(raw), rows, strict=True)):
        if row["status"] == "detected":
            matrix = onwards @ np.vstack([similarity(np.reshape(row["landmarks"], (1, 5, 2)))[0], [0, 0, 1]])
            chips[i] = cv2.warpAffine(decode(content), matrix[:2], (CHIP, CHIP), flags=cv2.INTER_LINEAR)
        else:
            chips[i] = cv2.warpAffine(decode(row["image"]), onwards[:2], (CHIP, CHIP), flags=cv2.INTER_LINEAR)
    chips.flush()
    return {"faces": [row["faces"] for row in rows]}


def made(path: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` answers, and the file that it writes; both are kept, so that an interrupted run goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    answer = path.with_suffix(".json")
    if not answer.exists():
        answer.write_text(json.dumps(make(path)))
    kept: dict[str, Any] = json.loads(answer.read_text())
    return kept


def embedded(peer: Peer, chips: Path, names: Path, jitters: int) -> Path:
    """Descriptors of chips as `cosface score` reads them; the mirror images, too, where copies are not jittered.

    Half of the jittered copies are mirrored anyway.
    """
    suffix, flip = (f"-{jitters}-jitters", "no") if jitters else ("", "flip")
    path = chips.parents[1] / "embeddings" / f"{chips.stem}{suffix}.npz"
    made(path, lambda out: peer.do("embed", chips, names, out, str(jitters), flip))
    return path


# ---------------------------------------------------------------------------------------------------------------------


def cosine(left: Floats, right: Floats) -> Floats:
    units = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (left, right)]
    return np.einsum("nd,nd->n", *units)


def nearness(left: Floats, right: Floats) -> Floats:
    """Euclidean distance turned round, so that higher is more alike; dlib's descriptors are not of length 1."""
    return -np.linalg.norm(left - right, axis=1)


DISTANCES = {"cosine": cosine, "Euclidean": nearness}


@dataclass(frozen=True)
class Scored:
    """The pairs as one way of embedding and comparing sees them."""

    scores: Floats
    metrics: Metrics
    right: NDArray[np.bool_]
    """Whether each pair is decided rightly, by its fold's threshold."""


def measure(variants: dict[str, Path], pairs: pa.Table, fars: Sequence[float]) -> dict[str, Any]:
    """Every variant by each distance, with and without the mirror image, and the pairs that are decided wrongly."""
    rows, decided = [], {}
    for variant, path in variants.items():
        with np.load(path) as file:
            emb, names = file["emb"], pa.array(file["keys"].tolist())
            ways = {"": emb} | ({", flip": np.hstack([emb, file["flip"]])} if "flip" in file else {})
        left, right = (pc.index_in(pairs[side], value_set=names).to_numpy() for side in ("left", "right"))
        for (flip, vectors), (distance, of) in itertools.product(ways.items(), DISTANCES.items()):
            scored = score(pairs, of(vectors[left], vectors[right]), fars)
            way = f"{variant}{flip}, {distance}"
            decided[way] = scored
            rows.append({"way": way} | summary(pairs, scored))
            if distance == "Euclidean" and not flip:
                accepted = scored.scores > -AUTHORS_THRESHOLD
                rows[-1]["accuracy_at_0.6"] = round(float((accepted == pairs["same"].to_numpy()).mean()), 6)
            print(f"{way:50}{100 * scored.metrics.accuracy:.2f} ± {100 * scored.metrics.accuracy_se:.2f} %", flush=True)
    return {"lfw": rows, "wrong": wrong(pairs, decided)}


def score(pairs: pa.Table, scores: Floats, fars: Sequence[float]) -> Scored:
    same, fold = pairs["same"].to_numpy(), pairs["fold"].to_numpy()
    metrics = evaluate(scores, same, fold, fars)
    threshold = np.array(metrics.fold_threshold)[np.searchsorted(metrics.folds, fold)]
    return Scored(scores, metrics, (scores >= threshold) == same)


def summary(pairs: pa.Table, scored: Scored) -> dict[str, Any]:
    metrics, mistaken = scored.metrics, pairs.filter(pa.array(~scored.right)).to_pylist()
    figures = ("accuracy", "accuracy_se", "accuracy_std", "threshold", "auc", "eer")
    return {name: round(getattr(metrics, name), 6) for name in figures} | {
        "tar_at_far": {far: tar if tar is None else round(tar, 6) for far, tar in metrics.tar_at_far.items()},
        "accuracy_by_fold": [round(accuracy, 6) for accuracy in metrics.fold_accuracy],
        "wrong": dict(Counter("same" if row["same"] else "different" for row in mistaken)),
        "seen_in_them": dict(Counter(seen for row in mistaken if (seen := SEEN.get((row["left"], row["right"]))))),
    }


def wrong(pairs: pa.Table, decided: dict[str, Scored]) -> list[dict[str, Any]]:
    """The pairs that some way decides wrongly, which ways, and what is wrong with their photographs.

    Those that most ways decide wrongly come first.
    """
    ways = {i: [way for way, scored in decided.items() if not scored.right[i]] for i in range(len(pairs))}
    order = sorted((i for i in ways if ways[i]), key=lambda i: (-len(ways[i]), i))
    rows: list[dict[str, Any]] = pairs.take(order).to_pylist()
    return [
        row | {"seen": SEEN.get((row["left"], row["right"])), "wrong_by": ways[i]}
        for i, row in zip(order, rows, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=Path, default=ROOT.parent / "shared" / "faces")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "cosface-dlib")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cosface-published")
    parser.add_argument(
        "--jitters", type=int, default=0, help="also with so many copies averaged; takes so much longer"
    )
    options = parser.parse_args()
    configure_logging()
    peer, params, work = Peer(options.peers), settings(options.faces), options.work
    raw, aligned = work / "raw" / "lfw", work / "aligned" / "lfw"
    download.run("lfw", params.download.lfw, raw, params.machine, work / "downloads")
    align.run(raw, aligned, params.align, params.machine, evaluation=True, report=work / "reports")
    names = as_files(raw, work / "photographs")

    chips: dict[str, Callable[[Path], dict[str, Any]]] = {
        "dlib": lambda out: peer.do("align", names.parent, names, out),
        "ours": lambda out: our_chips(raw, aligned, out),
    }
    counts, variants = {}, {}
    for faces, make in chips.items():
        cut = work / "chips" / f"{faces}.npy"
        found = np.array(made(cut, make)["faces"])
        counts[faces] = {
            "one": int((found == 1).sum()),
            "several": int((found > 1).sum()),
            "none": int((found == 0).sum()),
        }
        variants[faces] = embedded(peer, cut, names, 0)
    if options.jitters:
        variants[f"dlib, {options.jitters} jitters"] = embedded(
            peer, work / "chips" / "dlib.npy", names, options.jitters
        )

    pairs = tables.read_table(raw / "pairs.parquet", tables.PAIRS)
    result = {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "torch", "opencv-python-headless")}
        | peer.versions(),
        "pairs": len(pairs),
        "faces_found": counts,
    } | measure(variants, pairs, params.evaluate.fars)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
