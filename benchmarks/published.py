"""A published model through our scoring: `python -m benchmarks.published [--faces FOLDER] [--jitters 10]`.

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
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import RESULTS
from pipeline import tables
from pipeline.params import Archive, Params, load_params
from pipeline.progress import configure_logging
from stages.align import run as align
from stages.align.decode import decode
from stages.align.warp import similarity
from stages.download import run as download
from stages.download.protocols import read_pairs
from stages.evaluate import comparison, foreign, scoring, uncertainty
from stages.evaluate.verification import Metrics, Verification

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "published.json"
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

FLIPS: tuple[scoring.Flip, ...] = ("none", "concatenate")


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


@dataclass(frozen=True)
class Way:
    """The pairs as one way of cutting faces, of using mirror images, and of comparing descriptors sees them."""

    faces: str
    distance: str
    options: scoring.Options
    scored: scoring.Scored
    pairs: Verification
    metrics: Metrics

    @property
    def name(self) -> str:
        return f"{self.faces}, {self.distance}, flip: {self.options.flip}"

    @property
    def right(self) -> NDArray[np.bool_]:
        return self.pairs.decided(self.metrics)


def ways(variants: dict[str, Path], pairs: Path, fars: Sequence[float]) -> Iterator[Way]:
    """Each variant's embeddings by cosine and by Euclidean distance, without and with the mirror images."""
    listed = read_pairs("lfw", pairs, str(pairs))
    for faces, path in variants.items():
        given = foreign.Embeddings(path)
        for flip in FLIPS if given.flip is not None else FLIPS[:1]:
            options = scoring.Options(flip)
            cosines = foreign.score_pairs(given, listed, options)
            distances = replace(cosines, scores=nearness(given, cosines, flip))
            for distance, scored in (("cosine", cosines), ("Euclidean", distances)):
                verification = scored.verification(fars)
                yield Way(faces, distance, options, scored, verification, verification.measure())


def nearness(given: foreign.Embeddings, scored: scoring.Scored, flip: scoring.Flip) -> NDArray[np.float32]:
    """Euclidean distances turned round, so that higher is more alike; dlib's descriptors are not of length 1."""
    parts = [given.emb] if flip == "none" or given.flip is None else [given.emb, given.flip]
    row = {key: index for index, key in enumerate(given.keys)}
    left, right = ([row[name] for name in side] for side in (scored.left, scored.right))
    return -np.linalg.norm(np.hstack([part[left] - part[right] for part in parts]), axis=1).astype(np.float32)


def summary(way: Way, undetected: int) -> dict[str, Any]:
    """What metrics.json would hold, by fold too, and the pairs that are decided wrongly."""
    intervals = uncertainty.intervals(way.pairs, way.scored.people)
    wrong = np.flatnonzero(~way.right)
    kinds = Counter("same" if way.scored.same[i] else "different" for i in wrong)
    seen = Counter(SEEN[pair] for i in wrong if (pair := (way.scored.left[i], way.scored.right[i])) in SEEN)
    result: dict[str, Any] = {"faces": way.faces, "distance": way.distance}
    result |= scoring.summary(way.metrics, intervals, way.options, undetected)
    result |= {"accuracy_by_fold": [scoring.rounded(accuracy) for accuracy in way.metrics.fold_accuracy]}
    if way.distance == "Euclidean" and way.options.flip == "none":
        accepted = way.scored.scores > -AUTHORS_THRESHOLD
        result |= {"accuracy_at_0.6": scoring.rounded(np.mean(accepted == way.scored.same))}
    return result | {"wrong": dict(kinds), "seen_in_wrong": dict(seen)}


def wrong_pairs(found: list[Way]) -> list[dict[str, Any]]:
    """The pairs that some way decides wrongly, and what was seen in them; those that most decide wrongly come first."""
    pairs = found[0].scored
    right = {way.name: way.right for way in found}
    by = [[name for name, flags in right.items() if not flags[i]] for i in range(len(pairs.left))]
    return [
        {"left": pairs.left[i], "right": pairs.right[i], "same": bool(pairs.same[i]), "fold": int(pairs.fold[i])}
        | {"seen": SEEN.get((pairs.left[i], pairs.right[i])), "wrong_by": by[i]}
        for i in sorted(range(len(by)), key=lambda i: (-len(by[i]), i))
        if by[i]
    ]


def ours_less_dlib(found: list[Way]) -> dict[str, Any]:
    """The two alignments compared on the same pairs, all else being equal: A is dlib's, B is ours."""
    result = {}
    for a, b in itertools.product(found, found):
        if (a.faces, b.faces) == ("dlib", "ours") and (a.distance, a.options) == (b.distance, b.options):
            compared = uncertainty.compare(a.pairs, b.pairs, a.scored.people)
            result[f"{a.distance}, flip: {a.options.flip}"] = comparison.summary("lfw", compared)
    return result


def measure(
    variants: dict[str, Path], without: dict[str, set[str]], pairs: Path, fars: Sequence[float]
) -> dict[str, Any]:
    """All of the result that is about pairs; `without` has the photographs in which no face was found."""
    found, rows = [], []
    for way in ways(variants, pairs, fars):
        missed, both = without[way.faces], zip(way.scored.left, way.scored.right, strict=True)
        rows.append(summary(way, sum(left in missed or right in missed for left, right in both)))
        found.append(way)
        print(f"{way.name:50}{100 * way.metrics.accuracy:.2f} ± {100 * way.metrics.accuracy_se:.2f} %", flush=True)
    return {"lfw": rows, "ours_less_dlib": ours_less_dlib(found), "wrong": wrong_pairs(found)}


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
    found: dict[str, NDArray[np.int64]] = {}
    variants: dict[str, Path] = {}
    for faces, make in chips.items():
        cut = work / "chips" / f"{faces}.npy"
        found[faces] = np.array(made(cut, make)["faces"])
        variants[faces] = embedded(peer, cut, names, 0)
    if options.jitters:
        name = f"dlib, {options.jitters} jitters"
        found[name] = found["dlib"]
        variants[name] = embedded(peer, work / "chips" / "dlib.npy", names, options.jitters)

    result = {
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "torch", "opencv-python-headless")}
        | peer.versions(),
        "photographs_by_faces_found": {
            faces: {"none": int((n == 0).sum()), "one": int((n == 1).sum()), "several": int((n > 1).sum())}
            for faces, n in found.items()
        },
    }
    without = {faces: set(np.array(json.loads(names.read_text()))[n == 0].tolist()) for faces, n in found.items()}
    result |= measure(variants, without, options.faces / "pairs.txt", params.evaluate.fars)
    with tables.atomic(RESULT) as path:
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
