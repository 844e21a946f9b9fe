import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import ruamel.yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.params import ParamsError, flatten, load_params, shown, without_secrets

ROOT = Path(__file__).parents[2]


def default() -> dict[str, Any]:
    content: dict[str, Any] = ruamel.yaml.YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    return content


def put(content: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        content = content[name]
    content[last] = value


def load(tmp_path: Path, content: dict[str, Any]) -> Any:
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        ruamel.yaml.YAML(typ="safe").dump(content, file)
    return load_params(path)


def test_flatten_gives_every_value_by_its_dotted_name() -> None:
    flat = flatten(load_params(ROOT / "params.yaml"))
    assert flat["train.head.scale"] == 64.0
    assert flat["train.head.margin"] == 0.35
    assert flat["align.detector.thresholds"] == [0.6, 0.7, 0.7]
    assert flat["download.lfw.folds"] == 10


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://host/a.zip", "https://host/a.zip"),
        ("https://me:secret@host:80/a@b.zip?X-Signature=s&b=/", "https://host:80/a@b.zip"),
        ("postgresql://me:s@cret@host/runs", "postgresql://host/runs"),
        ("sqlite:////work/mlflow.db", "sqlite:////work/mlflow.db"),
        ("mysql+pymysql://me:a/b?c#d@host:3306/runs?charset=utf8", "mysql+pymysql://host:3306/runs"),
        ("postgresql://me@host:5432/runs", "postgresql://host:5432/runs"),
        ("postgresql://host/runs?password=secret", "postgresql://host/runs"),
        ("http://me:a/b@host:5000", "http://host:5000"),
        ("http://[::1]:5000/a@b.zip", "http://[::1]:5000/a@b.zip"),
        ("https://host:80/a@b.zip?mail=me@home", "https://host:80/a@b.zip"),
        ("s3://bucket/faces@2/shards", "s3://bucket/faces@2/shards"),
        ("../faces/me@home?.zip", "../faces/me@home?.zip"),
    ],
)
def test_addresses_are_shown_without_secrets(address: str, expected: str) -> None:
    assert shown(address) == expected


@given(password=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_no_password_of_a_database_is_shown(password: str) -> None:
    assert shown(f"postgresql+psycopg2://me:{password}@host:5432/runs") == "postgresql+psycopg2://host:5432/runs"
    assert shown(f"postgresql://me:{password}@host/runs?sslmode=require") == "postgresql://host/runs"


def test_an_address_that_another_begins_with_gives_nothing_away(tmp_path: Path) -> None:
    content = default()
    local = ["stages/download", "stages/download"]
    short, long = "https://host/lfw.tgz?key=SEC", "https://host/lfw.tgz?key=SECRET"
    content["download"]["lfw"] = archive(short, long, local)
    params = load(tmp_path, content)
    assert without_secrets(f"{short} {long}", params) == "https://host/lfw.tgz https://host/lfw.tgz"


def test_secrets_of_addresses_are_not_recorded(tmp_path: Path) -> None:
    content = default()
    local = ["stages/download", "stages/download"]
    content["download"]["lfw"] = archive("https://host/lfw.tgz?key=SECRET", "https://me:SECRET@host/pairs.txt", local)
    params = load(tmp_path, content)
    assert flatten(params)["download.lfw.location"] == "https://host/lfw.tgz"
    assert flatten(params)["download.lfw.pairs"] == "https://host/pairs.txt"
    text = (tmp_path / "params.yaml").read_text()
    assert without_secrets(text, params) == text.replace("?key=SECRET", "").replace("me:SECRET@", "")
    assert "SECRET" not in without_secrets(text, params)


WRONG: list[tuple[str, Any, str]] = [
    ("train.head.margin", -1, r"train\.head\.margin: .*greater than or equal to 0, not -1"),
    ("train.head.scale", "64", r"train\.head\.scale: .*valid number, not '64'"),
    ("train.batch", 16.0, r"train\.batch: .*valid integer, not 16\.0"),
    ("train.batch", True, r"train\.batch: .*valid integer, not True"),
    ("train.compile", 1, r"train\.compile: .*valid boolean, not 1"),
    ("align.detector.thresholds", [0.6, "0.7", 0.7], r"align\.detector\.thresholds\.1: .*valid number, not '0\.7'"),
    ("train.head.margn", 0.35, r"train\.head\.margn: unknown key \(its value is 0\.35\)"),
    ("train.backbone.name", "vgg", r"train\.backbone\.name: .*'mobilefacenet' or 'small', not 'vgg'"),
    ("train.schedule.milestones", [300, 200], r"^  train\.schedule\.milestones: must increase, not \[300, 200\]$"),
    ("train.schedule.milestones", [480], r"^  train\.schedule\.milestones: must lie before iterations"),
    ("train.schedule.warmup", 480, r"^  train\.schedule\.warmup: must be less than iterations = 480, not 480$"),
    ("train.micro_batches", 3, r"^  train\.micro_batches: 3 equal parts, two images at least, of 128\?$"),
    ("train.micro_batches", 128, r"^  train\.micro_batches: 128 equal parts, two images at least, of 128\?$"),
    ("shard.validation.share", 1, r"shard\.validation\.share: .*less than 1"),
    ("shard.validation.pairs", 100, r"^  shard\.validation\.pairs: 0 where validation is by image, not 100"),
    ("shard.validation.by", "identity", r"^  shard\.validation\.by: identity needs .* an even number of pairs"),
    ("shard.clean.near_duplicates", 33, r"shard\.clean\.near_duplicates: .*less than or equal to 32, not 33"),
    ("shard.clean.lists", ["lfw"], r"shard\.clean\.lists\.0: .*'casia-webface-lfw' or .*, not 'lfw'"),
    (
        "shard.shard_rows",
        70_000,
        r"^  shard\.shard_rows: at most 68478, not 70000: more faces of 112×112 pixels .* 2 GiB",
    ),
    ("train.sampling.name", "best", r"^  train\.sampling\.name: must be one of 'uniform', 'balanced', not 'best'$"),
    ("train.sampling.images", 4, r"train\.sampling\.images: unknown key"),
    (
        "train.sampling",
        {"name": "balanced", "identities": 10, "images": 4},
        r"^  train\.sampling: 10 identities, 4 images each: no batch of 128",
    ),
    ("train.sampling", {"name": "balanced", "identities": 32, "images": 4}, r"set machine\.cache to host or device"),
    ("train.augment.shift", -1, r"train\.augment\.shift: .*greater than or equal to 0"),
    (
        "align.face.width",
        96,
        r"train\.backbone\.width: 112, but align keeps 96 pixels: lower it, or raise align\.face\.",
    ),
    ("train.augment.shift", 2, r"2 pixels around the 112×112 that the network sees are more than align keeps, 0"),
    ("train.optimizer.learning_rate", math.inf, r"train\.optimizer\.learning_rate: .*finite number"),
    ("align.detector.factor", 0.99, r"align\.detector\.factor: .*less than or equal to 0\.95"),
    ("machine.loaders", -1, r"machine\.loaders: .*greater than or equal to 0"),
    ("machine.cache", "disk", r"machine\.cache: .*'none', 'host' or 'device', not 'disk'"),
    ("align.detector.thresholds", [0.6, 0.7], r"align\.detector\.thresholds"),
    ("align.detector.min_face_share", 1.5, r"align\.detector\.min_face_share: .*less than or equal to 1"),
    ("align.looks", ["sideways"], r"align\.looks\.0: .*'smaller', 'rotated' or 'equalised', not 'sideways'"),
    ("align.looks", ["smaller", "smaller"], r"^  align\.looks: each at most once"),
    ("align.choose", "best", r"align\.choose: .*'centre', 'largest' or 'weighted', not 'best'"),
    ("align.face.width", 100, r"align\.face\.width: .*112 or 96, not 100"),
    ("machine.executor", "cluster", r"machine\.executor: .*not 'cluster'"),
    ("machine.memory", 0, r"machine\.memory: .*greater than 0, not 0"),
    (
        "download.train.source",
        "ftp",
        r"^  download\.train\.source: must be one of 'synthetic', 'folder', 'archive', not 'ftp'$",
    ),
    ("download.lfw", "lfw.tgz", r"^  download\.lfw: must be a section with keys of its own, not 'lfw\.tgz'$"),
    ("align", None, r"^  align: must be a section with keys of its own, not None$"),
    ("trian", {"seed": 1, "data": "data/shards"}, r"^  trian: unknown section$"),
    ("tracking.experiment", ["face"] * 99, r"^  tracking\.experiment: .*valid string, not \['face', .{51}…$"),
    ("train.recompute", "maybe", r"^  train\.recompute: .*valid boolean.*, not 'maybe'$"),
    ("download.train.folds", 10, r"^  download\.train\.folds: lfw and ytf need at least 2, the others have none"),
    ("download.lfw.pairs", 7, r"^  download\.lfw: needs folds >= 2 and an even number of pairs"),
    ("download.lfw.imagse", 7, r"download\.lfw\.imagse: unknown key"),
    (
        "evaluate.megaface.distractors",
        [10, 2000],
        r"distractors: 2000, but download\.distractors renders 1000 photograp",
    ),
    ("evaluate.megaface.fars", [], r"evaluate\.megaface\.fars: .*at least 1 item"),
    ("evaluate.megaface.noise", None, r"evaluate\.megaface\.noise: .*valid string, not None"),
    ("nonsense", 1, r"nonsense: unknown key"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[key for key, _, _ in WRONG])
def test_a_wrong_value_is_named_and_explained(tmp_path: Path, key: str, value: Any, message: str) -> None:
    content = default()
    put(content, key, value)
    with pytest.raises(ParamsError) as error:
        load(tmp_path, content)
    assert str(tmp_path / "params.yaml") in str(error.value)
    assert re.search(message, str(error.value), re.MULTILINE)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "train.augment.blur",
            0.1,
            r"^  machine\.cache: device allows a flip and a shift alone; the rest",
        ),
        ("machine.loaders", 2, r"^  machine\.loaders: with machine\.cache: device the GPU makes batches itself"),
    ],
    ids=["augment", "loaders"],
)
def test_what_a_cache_on_the_gpu_excludes(tmp_path: Path, key: str, value: Any, message: str) -> None:
    content = default()
    put(content, "machine.cache", "device")
    assert load(tmp_path, content)
    put(content, key, value)
    with pytest.raises(ParamsError, match=f"(?m){message}"):
        load(tmp_path, content)
    put(content, "machine.cache", "host")
    assert load(tmp_path, content)


def every_key(content: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys = []
    for name, value in content.items():
        keys.append((*prefix, name))
        if isinstance(value, dict):
            keys += every_key(value, (*prefix, name))
    return keys


@pytest.mark.parametrize("key", every_key(default()), ids=".".join)
def test_every_key_is_required(tmp_path: Path, key: tuple[str, ...]) -> None:
    content = copy.deepcopy(default())
    section = content
    for name in key[:-1]:
        section = section[name]
    del section[key[-1]]
    with pytest.raises(ParamsError, match=rf"\n  {re.escape('.'.join(key))}: missing$"):
        load(tmp_path, content)


def archive(location: str, pairs: str | None, watch: list[str]) -> dict[str, Any]:
    common = {"source": "archive", "location": location, "sha256": None, "pairs": pairs, "pairs_sha256": None}
    return common | {"watch": watch}


@pytest.mark.parametrize(
    ("location", "pairs", "watch"),
    [
        ("faces/lfw.tgz", "faces/pairs.txt", ["faces/lfw.tgz", "faces/pairs.txt"]),
        ("file:///faces/lfw.tgz", "https://host/pairs.txt", ["/faces/lfw.tgz", "stages/download"]),
        ("https://host/lfw.tgz", "faces/pairs.txt", ["stages/download", "faces/pairs.txt"]),
    ],
)
def test_watch_must_name_what_is_local(tmp_path: Path, location: str, pairs: str, watch: list[str]) -> None:
    content = default()
    content["download"]["lfw"] = archive(location, pairs, watch)
    assert load(tmp_path, content).download.lfw.watch == watch
    content["download"]["lfw"]["watch"] = ["stages/download", "stages/download"][: len(watch)]
    with pytest.raises(ParamsError, match=r"\n  download\.lfw\.watch: must name what lies on this machine"):
        load(tmp_path, content)


def test_an_evaluation_set_needs_its_pairs(tmp_path: Path) -> None:
    content = default()
    content["download"]["lfw"] = archive("a.zip", None, ["a.zip", "stages/download"])
    with pytest.raises(ParamsError, match=r"\n  download\.lfw\.pairs: the path or address of the pair list"):
        load(tmp_path, content)


def test_every_recipe_has_room_in_its_files_for_the_widest_margin(tmp_path: Path) -> None:
    content = default()
    content["align"]["face"] |= {"margin": 56, "quality": 100}
    content["shard"]["shard_rows"] = 16384  # the most that a recipe has
    assert load(tmp_path, content)
    content["shard"]["shard_rows"] = 17200
    with pytest.raises(ParamsError, match=r"shard\.shard_rows: at most 17119, not 17200: more faces of 224×224 pixels"):
        load(tmp_path, content)


def test_files_that_are_no_parameters(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no such file; `cosface recipe quickstart`"):
        load_params(tmp_path / "params.yaml")
    for text in ("", "# nothing\n", "faces\n", "[1, 2]\n"):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(
            ParamsError, match=r"params\.yaml: must have the sections download, align, .*, not .*recipe"
        ):
            load_params(tmp_path / "params.yaml")
    for text in ("a: [1,\n", "a: 2024-02-30\n"):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(ParamsError, match="not valid YAML"):
            load_params(tmp_path / "params.yaml")
    for encoding in ("utf-16", "latin-1"):
        (tmp_path / "params.yaml").write_text("a: Zoë\n", encoding=encoding)
        with pytest.raises(ParamsError, match=rf"^{tmp_path}/params\.yaml: not text in UTF-8: "):
            load_params(tmp_path / "params.yaml")
