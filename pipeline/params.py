"""params.yaml as frozen, validated models.

Every key is required and no other key is admitted: what the file says is the whole truth of what runs. Each
stage reads its own section and nothing else, so DVC's `params:` entries say exactly what a stage depends on.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import ruamel.yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml.error import YAMLError

from pipeline.errors import InputError

SETS = ("train", "lfw", "ytf", "probes", "distractors")
"""The training set; LFW and YouTube Faces; and MegaFace's two: FaceScrub's photographs and those of strangers."""
PAIRED = ("lfw", "ytf")
"""Those that come with a list of pairs."""

NOTHING_LOCAL = "stages/download"
"""Stands in `watch` where a set has no file on this machine that DVC could watch."""

IMAGES_BYTES = 2**31 - 1
"""A file's images, at most: Arrow counts the bytes of such a column by 32 bits."""
JPEG_BYTES = 2.5
"""An aligned face's, for each of its pixels, at most: pure noise takes 2.4 at quality 100, a face a fifth of that."""
_SHOWN = 60
"""Characters of a wrong value that a message repeats."""

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
_LIST = Field(strict=False)
"""YAML has no tuples."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ParamsError(InputError):
    """params.yaml cannot be used; the message names the file, the key and what would be right."""


class Section(BaseModel):
    """A section of params.yaml: frozen, complete, without unknown keys, and numbers are not written as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Synthetic(Section):
    """Procedural faces, rendered by stages/download/synthetic.py."""

    source: Literal["synthetic"]
    watch: list[str]
    seed: Seed
    identities: Annotated[int, Field(ge=2)]
    images: Count
    """Photographs of an identity; frames of a video (ytf)."""
    videos: Count
    """Videos of an identity (ytf); 1 elsewhere."""
    folds: Annotated[int, Field(ge=0)]
    """Folds of the protocol's pairs; 0 for sets without."""
    pairs: Annotated[int, Field(ge=0)]
    """Pairs in a fold, half of them of the same person."""
    size: Annotated[int, Field(ge=64, le=1024)]
    """Side of a photograph in pixels."""


class Local(Section):
    """Photographs in a folder: `<identity>/<image>`, or `<identity>/<video>/<frame>` for ytf."""

    source: Literal["folder"]
    watch: list[str]
    location: str
    pairs: str | None
    """pairs.txt (lfw) or splits.txt (ytf): a path or an address; null for the others."""
    pairs_sha256: Sha256 | None


class Archive(Section):
    """The same tree inside a zip, tar or tar.gz, on this machine or behind an address."""

    source: Literal["archive"]
    watch: list[str]
    location: str
    sha256: Sha256 | None
    pairs: str | None
    pairs_sha256: Sha256 | None


class Absent(Section):
    """No photographs, and so no identification."""

    source: Literal["none"]
    watch: list[str]


Given = Synthetic | Local | Archive
Source = Annotated[Given, Field(discriminator="source")]
Optional = Annotated[Given | Absent, Field(discriminator="source")]


def is_remote(location: str) -> bool:
    """Whether a location is an http(s) address rather than something on this machine."""
    return location.startswith(("http://", "https://"))


def local_path(location: str) -> Path:
    """The path of a location on this machine, given as a path or as a file:// address."""
    return Path(location.removeprefix("file://"))


def shown(address: str) -> str:
    """An address as messages and records may have it: without user, password, and the query that may sign it.

    In doubt something too much is left out. A password may contain anything in a database's address; elsewhere what
    precedes the first slash may be a host and port, and an `@` after it part of the path.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    web = scheme.lower() in ("http", "https")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if web and "@" in authority:
        rest = authority.rpartition("@")[2] + rest.removeprefix(authority)
    elif not re.fullmatch(r"(\[.*\]|[^:@]*)" + (r"(:\d*)?" if web else ""), authority):
        rest = rest.rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0]}"


class Download(Section):
    """Where each set comes from."""

    train: Source
    lfw: Source
    ytf: Source
    probes: Optional
    distractors: Optional

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in SETS:
            source: Given | Absent = getattr(self, name)
            if isinstance(source, Synthetic):
                self._check_synthetic(name, source)
            elif not isinstance(source, Absent) and (name in PAIRED) == (source.pairs is None):
                raise ValueError(f"{name}.pairs: the path or address of the pair list for lfw and ytf; null for others")
            if source.watch != watched(source):
                raise ValueError(
                    f"{name}.watch: must name what lies on this machine, so that DVC notices when it changes: "
                    f"{watched(source)}, not {source.watch}"
                )
        return self

    @staticmethod
    def _check_synthetic(name: str, source: Synthetic) -> None:
        if (name in PAIRED) == (source.folds == 0):
            raise ValueError(f"{name}.folds: lfw and ytf need at least 2, the others have none (0)")
        if name in PAIRED and (source.folds == 1 or source.pairs < 2 or source.pairs % 2):
            raise ValueError(f"{name}: needs folds >= 2 and an even number of pairs in a fold, at least 2")


def watched(source: Given | Absent) -> list[str]:
    """What `watch` must say: the paths of the photographs and of the pair list, as DVC is to hash them.

    Where there is no such file on this machine, the download stage's own code stands in, which DVC hashes anyway:
    dvc.yaml can name only a fixed number of paths.
    """
    places = (None, None) if isinstance(source, Synthetic | Absent) else (source.location, source.pairs)
    return [NOTHING_LOCAL if place is None or is_remote(place) else str(local_path(place)) for place in places]


class Detector(Section):
    """MTCNN's cascade (Zhang et al., 2016), by default with the numbers of its authors' release but for `min_face`.

    The networks were trained with the rest, which is no parameter (stages/align/mtcnn.py): P-Net's cells of 12 pixels,
    2 apart; crops of 24 and 48 pixels, of squares on whole pixels that are as long as a box's longer side, black beyond
    the photograph; boxes moved by offsets in widths and heights that count the last pixel, but for P-Net's; suppression
    by score, the best first.
    """

    min_face: Annotated[int, Field(ge=12)]
    """Smallest face looked for, in pixels of the photograph."""
    min_face_share: Share
    """The same as a share of the photograph's shorter side; the larger of both holds."""
    factor: Annotated[float, Field(gt=0, le=0.95)]
    """Ratio of neighbouring pyramid scales."""
    thresholds: Annotated[tuple[Share, Share, Share], _LIST]
    """Face probability above which P-, R- and O-Net keep a candidate."""
    overlaps: Annotated[tuple[Share, Share, Share, Share], _LIST]
    """Largest overlap that non-maximum suppression leaves: within a scale, between scales and after R-Net as
    intersection over union, after O-Net as intersection over the smaller area."""
    max_side: Annotated[int, Field(ge=112)]
    """Photographs with a longer side than this, in pixels, are reduced for detection (never for the warp)."""


class Face(Section):
    """The aligned face."""

    width: Literal[112, 96]
    """Pixels; the height is 112. 96 is the paper's: 8 less on either side."""
    margin: Annotated[int, Field(ge=0, le=56)]
    """Pixels kept around it on each side."""
    quality: Annotated[int, Field(ge=50, le=100)]
    """Of the JPEG."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, with the margin."""
        return 112 + 2 * self.margin, self.width + 2 * self.margin


Look = Literal["smaller", "rotated", "equalised"]


class Align(Section):
    """MTCNN detection and the warp to the template."""

    detector: Detector
    looks: list[Look]
    """What is tried, in this order, for a photograph in which no face was found: half the smallest face, turned by 90°
    either way, the histogram of its luminance equalised."""
    choose: Literal["centre", "largest", "weighted"]
    """Of several faces: the one nearest to the photograph's centre, the largest, or that of the largest area − 2 d², d
    being the distance between both centres in pixels."""
    face: Face

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.looks)) < len(self.looks):
            raise ValueError(f"looks: each at most once, not {self.looks}")
        return self


class Clean(Section):
    """What is left out of the training set. Every image and identity left out is a row with its reason."""

    min_images: Count
    """Identities with fewer images, after all else, are left out."""
    duplicates: bool
    """Whether copies of a photograph are left out: all but one in an identity; all where identities disagree, and all
    that LFW, YTF or the probes have too; in an identity, all of one that is excluded."""
    near_duplicates: Annotated[int, Field(ge=0, le=32)] | None
    """The same for faces whose perceptual hashes differ in at most so many of 256 bits; null: not looked for."""
    same_names: bool
    """Whether identities that bear a name of an evaluation set are left out."""
    names: Annotated[str, Field(min_length=1)]
    """A file of lines `<identity> <name>`, where identities are numbers; others are their own names, if they have a
    letter."""
    lists: list[Literal["casia-webface-lfw", "casia-webface-facescrub"]]
    """Published lists of identities that a training set shares with an evaluation set."""
    exclude: Annotated[str, Field(min_length=1)]
    """A file with columns image_id, identity, reason: what people have decided to leave out."""


class Validation(Section):
    """What is kept back to choose models by."""

    by: Literal["image", "identity"]
    """image: some of the images of each identity, whose share that is classified rightly counts; identity: some
    identities, unknown to the model, of whom verification pairs are drawn."""
    share: Annotated[float, Field(ge=0, lt=1)]
    """Of each identity's images, or of the identities; rounded down."""
    pairs: Annotated[int, Field(ge=0)]
    """Verification pairs, half of them of the same person; 0 by image."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.by == "image" and self.pairs:
            raise ValueError(f"pairs: 0 where validation is by image, not {self.pairs}")
        if self.by == "identity" and (self.pairs < 2 or self.pairs % 2 or not self.share):
            raise ValueError("by: identity needs a share above 0 and an even number of pairs, at least 2")
        return self


class Shard(Section):
    """Cleaning, labels, split and the one global shuffle."""

    seed: Seed
    clean: Clean
    validation: Validation
    shard_rows: Count
    """Examples in a file. When it is written, they are in memory together."""
    row_group_rows: Count
    """Examples that are read at a time."""


class Backbone(Section):
    """The network from an aligned face to an embedding."""

    name: Literal[
        "sphere20",
        "sphere36",
        "sphere64",
        "ir50",
        "irse50",
        "iresnet18",
        "iresnet18-quarter",
        "iresnet34",
        "iresnet50",
        "iresnet100",
        "mobilefacenet",
        "small",
    ]
    width: Literal[112, 96]
    """Of the faces it sees, pixels; the height is 112. Of wider ones, or with a margin, it sees the middle."""
    embedding: Annotated[int, Field(ge=2)]
    """Length of the embedding."""


class HeadSection(Section):
    """What heads have in common."""

    title: ClassVar[str]

    @property
    def summary(self) -> str:
        """As people name it: CosFace (s = 64, m = 0.35)."""
        symbols = {"scale": "s", "margin": "m", "concentration": "h"}
        values = [f"{symbols[key]} = {value:g}" for key, value in self.model_dump().items() if key in symbols]
        return f"{self.title} ({', '.join(values)})" if values else self.title


class Softmax(HeadSection):
    """Softmax cross-entropy without bias: the baseline."""

    title = "softmax"
    name: Literal["softmax"]


class NSL(HeadSection):
    """Normalised softmax: CosFace without its margin."""

    title = "NSL"
    name: Literal["nsl"]
    scale: Annotated[float, Field(gt=0)]


class ASoftmax(HeadSection):
    """SphereFace's loss, annealed: λ = max(least, first / (1 + rate · step))."""

    title = "A-Softmax"
    name: Literal["a-softmax"]
    margin: Annotated[int, Field(ge=1, le=8)]
    """By which the angle is multiplied."""
    first: Annotated[float, Field(ge=0)]
    least: Annotated[float, Field(ge=0)]
    rate: Annotated[float, Field(ge=0)]


class CosFace(HeadSection):
    """The Large Margin Cosine Loss, CosFace Eq. 4."""

    title = "CosFace"
    name: Literal["cosface"]
    scale: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0, lt=2)]
    """Of the cosine."""


class ArcFace(HeadSection):
    """The additive angular margin loss, ArcFace Eq. 3."""

    title = "ArcFace"
    name: Literal["arcface"]
    scale: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0, lt=1.5)]
    """Of the angle, radians."""
    easy: bool
    """Leave examples alone that are more than 90° from their centre."""


class AdaFace(HeadSection):
    """A margin by the image's quality."""

    title = "AdaFace"
    name: Literal["adaface"]
    scale: Annotated[float, Field(gt=0)]
    margin: Annotated[float, Field(ge=0, lt=1)]
    concentration: Annotated[float, Field(gt=0)]
    """h: how far quality moves the margin."""
    momentum: Annotated[float, Field(gt=0, le=1)]
    """How much of the running mean and deviation of lengths a batch replaces."""


Head = Softmax | NSL | ASoftmax | CosFace | ArcFace | AdaFace


class Optimizer(Section):
    """Stochastic gradient descent."""

    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)] | None
    """Largest gradient norm; null for no limit, as in the paper."""


class ScheduleSection(Section):
    """What schedules of the learning rate have in common."""

    iterations: Count
    warmup: Annotated[int, Field(ge=0)]
    """Iterations over which the rate rises linearly from zero."""

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup >= self.iterations:
            raise ValueError(f"warmup: must be less than iterations = {self.iterations}, not {self.warmup}")
        return self


class Steps(ScheduleSection):
    """The paper's form: a rate divided at fixed iterations."""

    name: Literal["steps"]
    milestones: list[Count]
    """Iterations after which the rate is multiplied by `factor`."""
    factor: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: must increase, not {list(self.milestones)}")
        if self.milestones and self.milestones[-1] >= self.iterations:
            raise ValueError(f"milestones: must lie before iterations = {self.iterations}, not {list(self.milestones)}")
        return self


class Cosine(ScheduleSection):
    """Half a cosine's period from the full rate to zero."""

    name: Literal["cosine"]


class Polynomial(ScheduleSection):
    """The full rate times a power of the share of iterations left."""

    name: Literal["polynomial"]
    power: Annotated[float, Field(gt=0)]


Schedule = Steps | Cosine | Polynomial


class UniformSampling(Section):
    """Every image once an epoch."""

    name: Literal["uniform"]


class BalancedSampling(Section):
    """Every identity equally often: each batch has so many, and so many images of each. Needs machine.cache."""

    name: Literal["balanced"]
    identities: Count
    images: Count


class Augment(Section):
    """What happens to a training image before the network sees it, and how often. Strengths are in train/augment.py."""

    horizontal_flip: Share
    shift: Annotated[int, Field(ge=0, le=56)]
    """Pixels by which what the network sees is off the middle, at most; align.face.margin must be as large."""
    crop: Share
    low_resolution: Share
    colour: Share
    blur: Share
    jpeg: Share

    @property
    def by_image(self) -> bool:
        """Whether more is asked for than a flip and a shift, which are done to whole batches."""
        return any((self.crop, self.low_resolution, self.colour, self.blur, self.jpeg))


class Train(Section):
    """Backbone, head, and how they are trained."""

    data: Annotated[str, Field(min_length=1)]
    """Folder of the shards, or an address that fsspec knows."""
    seed: Seed
    backbone: Backbone
    head: Annotated[Head, Field(discriminator="name")]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    """Share of the class centres that an iteration compares with and moves (PartialFC); 1 is the paper's. The centres
    of the batch's own identities are always among them. Loss and accuracy of training are among those, too."""
    batch: Annotated[int, Field(ge=2)]
    """Images of an iteration, of all processes together."""
    sampling: Annotated[UniformSampling | BalancedSampling, Field(discriminator="name")]
    optimizer: Optimizer
    schedule: Annotated[Schedule, Field(discriminator="name")]
    augment: Augment
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """Share of what enters the last layer of IR networks that is left out in training; None as published: 0.4 in ir50
    and irse50, 0 in the others. Other networks have none."""
    average: Annotated[float, Field(gt=0, lt=1)] | None
    """What the running mean of weights and centres keeps of itself at each iteration: the model is that. None: it is
    what the last iteration leaves."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    """Of the backbone; the head always computes in fp32. fp16 scales the loss, so that small gradients survive."""
    compile: bool
    """Whether torch.compile makes the backbone's code: minutes at the start, a faster step from then on. On a GPU its
    kernels are launched all at once then, unless a batch is computed in parts."""
    micro_batches: Count
    """Equal parts that a batch is computed in, one after the other: less memory, and batch normalisation over each."""
    recompute: bool
    """Whether activations are computed again for the gradient instead of kept: far less memory, a third more time."""
    log_every: Count
    """Iterations between two rows of history.csv and MLflow."""
    checkpoint_every: Count
    """Iterations between two validations, each with a checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sampling = self.sampling
        if isinstance(sampling, BalancedSampling) and sampling.identities * sampling.images != self.batch:
            raise ValueError(
                f"sampling: {sampling.identities} identities, {sampling.images} images each: no batch of {self.batch}"
            )
        if self.batch % self.micro_batches or self.batch // self.micro_batches < 2:
            raise ValueError(f"micro_batches: {self.micro_batches} equal parts, two images at least, of {self.batch}?")
        if self.compile and self.recompute:
            raise ValueError("compile: true excludes recompute: true; set one of them to false")
        return self


class MegaFace(Section):
    """Identification among strangers (Kemelmacher-Shlizerman et al., CVPR 2016)."""

    distractors: Annotated[list[Count], Field(min_length=1)]
    """How many strangers there are in the gallery, in turn."""
    seed: Seed
    """Of the order in which they join it."""
    fars: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    """False accept rates at which the true accept rate is reported."""
    noise: Annotated[str, Field(min_length=1)]
    """A file of photographs of both sets, a line each, that are left out: MegaFace's refined figures."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if list(self.distractors) != sorted(set(self.distractors)):
            raise ValueError(f"distractors: must increase, not {list(self.distractors)}")
        return self


class Evaluate(Section):
    """Verification on LFW and YTF, identification as MegaFace has it."""

    batch: Count
    """Images that are embedded at a time."""
    flip: Literal["concatenate", "sum", "none"]
    """What becomes of the mirror image's features: the paper puts them behind those of the image."""
    centre: bool
    """Whether the mean of the folds that a threshold is chosen on is subtracted from features."""
    fars: list[Annotated[float, Field(gt=0, lt=1)]]
    """False accept rates at which the true accept rate is reported."""
    replicates: Annotated[int, Field(ge=100)]
    """Of the bootstrap over identities."""
    seed: Seed
    """Of the bootstrap."""
    leaks: Literal["refuse", "report"]
    """What happens where people of the training set are in the evaluation set, by name."""
    extra: Annotated[str, Field(min_length=1)]
    """A folder of more pairs: NAME.bin, NAME.csv."""
    megaface: MegaFace


class Audit(Section):
    """What the trained model suspects of its training set; listed, never acted upon."""

    label_margin: Annotated[float, Field(ge=0, le=2)]
    """An image is suspect whose cosine to another identity's centre is so much above that to its own."""
    label_least: Annotated[float, Field(ge=-1, le=1)]
    """An image is suspect whose cosine to the centre of the others of its identity is below this, whoever else it looks
    like: no face perhaps, a drawing, or a hidden one."""
    overlap: Annotated[float, Field(ge=-1, le=1)]
    """A training identity is suspect whose centre has so high a cosine to that of a person of an evaluation set."""


class Machine(Section):
    """What runs where. Changes nothing that comes out, so no stage depends on it."""

    executor: Annotated[str, Field(pattern=r"^(local|(tcp|tls|ws|wss)://.+)$")]
    """Where rendering, decoding and alignment run: local (processes on this machine), or a Dask scheduler's address."""
    workers: Count | None
    """Processes on this machine; null for one a core, as many as there is memory for."""
    threads: Count
    """Threads of each worker."""
    memory: Annotated[float, Field(gt=0)]
    """What a worker may need, GiB."""
    device: Literal["auto", "cpu", "cuda"]
    processes: Count | None
    """That train together on this machine; null for one on each GPU, or one on the CPU. Each computes batch
    normalisation over its own share of a batch; all else is the same for any number, to rounding."""
    loaders: Annotated[int, Field(ge=0)] | None
    """Processes that make batches for each that trains; 0 for threads within it; null for threads, but processes where
    a GPU would wait for augmentation image by image."""
    cache: Literal["none", "host", "device"]
    """Whether training decodes each image every time, or once: into memory, shared by all processes, or into the
    GPU's. 37 kB an image, 18.6 GB for CASIA-WebFace."""
    checkpoint_minutes: Annotated[float, Field(gt=0)]
    """Between two checkpoints of a training, at most; others are written at train.checkpoint_every."""
    checkpoints_kept: Annotated[int, Field(ge=1)]
    """The newest; more than one for the day on which the newest cannot be read."""


class Tracking(Section):
    """MLflow. Where the store is, MLFLOW_TRACKING_URI says (default: sqlite:///mlflow.db)."""

    enabled: bool
    experiment: Annotated[str, Field(min_length=1)]


class Params(Section):
    """The whole of params.yaml."""

    download: Download
    align: Align
    shard: Shard
    train: Train
    evaluate: Evaluate
    audit: Audit
    machine: Machine
    tracking: Tracking

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.train.sampling, BalancedSampling) and self.machine.cache == "none":
            raise ValueError(
                "train.sampling: balanced reads images in any order, which only decoded ones allow; "
                "set machine.cache to host or device"
            )
        if self.train.augment.by_image and self.machine.cache == "device":
            raise ValueError(
                "machine.cache: device allows a flip and a shift alone; the rest of train.augment needs host or none"
            )
        height, width = self.align.face.size
        most = int(IMAGES_BYTES / (JPEG_BYTES * height * width))
        if self.shard.shard_rows > most:
            raise ValueError(
                f"shard.shard_rows: at most {most}, not {self.shard.shard_rows}: more faces of {width}×{height} pixels "
                "may exceed the 2 GiB that the images of a file can have"
            )
        strangers, asked = self.download.distractors, self.evaluate.megaface.distractors[-1]
        if isinstance(strangers, Synthetic) and asked > (there := strangers.identities * strangers.images):
            raise ValueError(
                f"evaluate.megaface.distractors: {asked}, but download.distractors renders {there} photographs; take "
                f"at most {there}, or raise its identities"
            )
        seen, shift = self.train.backbone.width, self.train.augment.shift
        if self.train.data == "data/shards" and seen > width:
            raise ValueError(
                f"train.backbone.width: {seen}, but align keeps {width} pixels: lower it, or raise align.face.width or "
                "align.face.margin"
            )
        room = min(self.align.face.margin, (self.align.face.size[1] - seen) // 2)
        if self.train.data == "data/shards" and shift > room:
            raise ValueError(
                f"train.augment.shift: {shift} pixels around the 112×{seen} that the network sees are more than align "
                f"keeps, {room}: raise align.face.margin, or lower the shift or train.backbone.width"
            )
        if self.machine.cache == "device" and self.machine.loaders:
            raise ValueError("machine.loaders: with machine.cache: device the GPU makes batches itself; set it to null")
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        ParamsError: the file is absent, is not YAML in UTF-8, or a key is missing, unknown or out of range; the message
            names the file, each offending key, and what would be right.
    """
    try:
        # YAML 1.2, as DVC reads it: the two must never see different values in one file.
        content: Any = ruamel.yaml.YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParamsError(f"{path}: no such file; `cosface recipe quickstart` writes the default one") from error
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not text in UTF-8: {error}") from error
    except (YAMLError, ValueError) as error:  # the latter for what looks like a date and is none
        raise ParamsError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ParamsError(
            f"{path}: must have the sections {', '.join(Params.model_fields)}, not {_short(content)}; "
            "`cosface recipe quickstart` writes the default one"
        )
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError(f"{path}:\n" + "\n".join(_explain(error))) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _explain(error: ValidationError) -> list[str]:
    """A line for each value that is wrong: its dotted key, what would be right, and what it is."""
    tags = {"synthetic", "folder", "archive", "none", "uniform", "balanced"}
    tags |= {"steps", "cosine", "polynomial", "softmax", "nsl", "a-softmax", "cosface", "arcface", "adaface"}
    lines = []
    for item in error.errors(include_url=False):
        parts = item["loc"]
        # pydantic puts the name of what was chosen into the path; the file has no such level
        key = ".".join(
            str(part)
            for i, part in enumerate(parts)
            if not (i == 2 and parts[0] in ("download", "train") and part in tags)
        )
        context, value = item.get("ctx", {}), item["input"]
        match item["type"]:
            case "extra_forbidden":
                problem = f"unknown {'section' if isinstance(value, dict) else f'key (its value is {_short(value)})'}"
            case "missing":
                problem = "missing"
            case "union_tag_not_found":
                key, problem = f"{key}.{context['discriminator'][1:-1]}", "missing"
            case "union_tag_invalid":
                key = f"{key}.{context['discriminator'][1:-1]}"
                problem = f"must be one of {context['expected_tags']}, not {context['tag']!r}"
            case "model_type" | "model_attributes_type":
                problem = f"must be a section with keys of its own, not {_short(value)}"
            case "value_error":  # by a check of ours, which names the key within the section
                within, _, problem = str(context["error"]).partition(": ")
                key = f"{key}.{within}" if key else within
            case _:
                problem = f"{item['msg']}, not {_short(value)}"
        lines.append(f"  {key}: {problem}")
    return lines


def absent(params: Params) -> list[str]:
    """What the parameters name on this machine and is not there: a line for each, by its key."""
    named = {
        "shard.clean.names": params.shard.clean.names,
        "shard.clean.exclude": params.shard.clean.exclude,
        "evaluate.megaface.noise": params.evaluate.megaface.noise,
        "evaluate.extra": params.evaluate.extra,
    }
    for name in SETS:
        source: Given | Absent = getattr(params.download, name)
        if isinstance(source, Local | Archive):
            named |= {f"download.{name}.location": source.location, f"download.{name}.pairs": source.pairs or ""}
    places = {key: local_path(place) for key, place in named.items() if place and not is_remote(place)}
    return [f"{key}: {place} is not there" for key, place in places.items() if not place.exists()]


def flatten(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """A section by dotted names, `{"train.head.scale": 64.0, ...}`, as MLflow and reports show them."""
    leaves = _leaves(section.model_dump(mode="json"), prefix)
    return {name: shown(value) if isinstance(value, str) else value for name, value in leaves}


def without_secrets(text: str, section: BaseModel) -> str:
    """A text that repeats values of a section, such as params.yaml or dvc.lock, with its addresses as `shown`."""
    values = {value for _, value in _leaves(section.model_dump(mode="json"), "") if isinstance(value, str)}
    for value in sorted(values, key=len, reverse=True):  # one may begin with another
        text = text.replace(value, shown(value))
    return text


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value
