import errno
import io
import itertools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import InputError
from pipeline.params import Params, Train
from pipeline.tables import TableError
from stages.shard.reader import Shards
from stages.train import loader as loading
from stages.train.faces import FaceError
from stages.train.loader import Batch, Loader, validation_batches
from stages.train.sheet import write_sheet
from tests.conftest import ROOT
from tests.samples import FACE, NO_AUGMENTATION, face_like, jpeg, shard_section, write_shards

CPU = torch.device("cpu")
TOGETHER = loading._TOGETHER
"""As it is but for conftest.py."""
STRONG = NO_AUGMENTATION | {
    "horizontal_flip": 0.5,
    "crop": 0.5,
    "low_resolution": 0.5,
    "colour": 0.5,
    "blur": 0.5,
    "jpeg": 0.5,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards(str(write_shards(tmp_path_factory.mktemp("shards"), [10, 9, 8, 7, 6], shard_section())))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Faces with a margin of 8 pixels around them."""
    face = FACE.model_copy(update={"margin": 8})
    folder = tmp_path_factory.mktemp("large")
    return Shards(str(write_shards(folder, [12, 12], shard_section(), face)))


def section(params: Params, batch: int = 8, augment: dict[str, Any] | None = None, **changes: Any) -> Train:
    content = params.train.model_dump() | {"batch": batch, "augment": NO_AUGMENTATION | (augment or {})} | changes
    return Train.model_validate(content)


def make(shards: Shards, train: Train, **options: Any) -> Loader:
    return Loader(shards.split("train"), shards.index.face, train, CPU, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def take_by(workers: int, loader: Loader, count: int) -> list[Batch]:
    """By so many processes of a DataLoader, of which each makes every so-manieth batch; 0 for by itself."""
    if not workers:
        return take(loader, count)
    shares = []
    for worker in range(workers):
        with patch.object(loading, "get_worker_info", lambda i=worker: SimpleNamespace(id=i, num_workers=workers)):
            shares.append(take(loader, math.ceil((count - worker) / workers)))
    return [shares[i % workers][i // workers] for i in range(count)]


def decoded(shards: Shards, split: str) -> NDArray[np.uint8]:
    """The aligned faces of a split, in the order of its files, as Pillow decodes them, which has the same library."""
    paths = sorted(Path(shards.place.path).glob(f"{split}-*.parquet"))
    jpegs = itertools.chain.from_iterable(pq.read_table(path)["image"].to_pylist() for path in paths)
    return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])


def pixels(batches: Iterable[Batch]) -> list[NDArray[np.uint8]]:
    """Each image of some batches, height and width first."""
    return [image.permute(1, 2, 0).contiguous().numpy() for batch in batches for image in batch.images]


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in zip(a, b, strict=True)
    )


def test_batches_hold_the_decoded_pixels_in_rgb(shards: Shards, params: Params) -> None:
    (batch,) = take(make(shards, section(params)), 1)
    assert batch.images.shape == (8, 3, 112, 112)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    known = {}
    for label, count in enumerate((10, 9, 8, 7, 6)):
        for photo in range(count):
            with Image.open(io.BytesIO(jpeg(face_like(label, photo)))) as opened:
                known[np.asarray(opened.convert("RGB")).tobytes()] = label  # Pillow decodes by the same library
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        assert known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] == label


@settings(max_examples=12)
@given(data=st.data())
def test_exactly_once_over_ranks_caches_and_interruptions(data: st.DataObject) -> None:
    """Whatever the shards, with and without a host cache, however many images are planned and made together, and by
    however many ranks, each by itself or with worker processes, before an interruption and after it: together they see
    every row exactly once an epoch, and each batch is what one alone makes of it.
    """
    from tests.conftest import load_params

    few: dict[str, Any] = {
        "_PLANNED": data.draw(st.integers(1, 40)),
        "_TOGETHER": data.draw(st.integers(1, 20)),
        "_AT_ONCE": data.draw(st.integers(1, 5)),
    }
    counts = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    worlds = data.draw(st.tuples(*2 * [st.sampled_from([1, 2, 3])]))
    batch = max(2, math.lcm(*worlds) * data.draw(st.integers(1, 4)))
    assume(sum(counts) >= batch)
    with tempfile.TemporaryDirectory() as name, patch.multiple(loading, **few):
        made = shard_section(
            validation={"by": "image", "share": 0.0, "pairs": 0},
            shard_rows=data.draw(st.integers(1, 12)),
            row_group_rows=data.draw(st.integers(1, 6)),
        )
        shards = Shards(str(write_shards(Path(name), counts, made)))
        total = len(shards.split("train"))
        assert total == sum(counts)
        train = section(load_params(ROOT / "params.yaml"), batch)
        split = shards.split("train")
        number = {image.tobytes(): row for row, image in enumerate(decoded(shards, "train"))}
        seen: list[int] = []
        iterations = 2 * total // train.batch + 1
        cut = data.draw(st.integers(0, iterations))
        for world, first, count in zip(worlds, (0, cut), (cut, iterations - cut), strict=True):
            streams = []
            for rank in range(world):
                cache = data.draw(st.sampled_from(["none", "host"]))
                options = {"cache": cache, "cache_folder": Path(name) / "decoded"}
                loader = make(shards, train, rank=rank, world=world, **options)
                loader.load_state_dict({"iteration": first})
                workers = data.draw(st.integers(0, 3))
                streams.append(take_by(workers, loader, count))
                assert loader.state_dict() == {"iteration": first if workers else first + count}
            for one in itertools.chain.from_iterable(zip(*streams, strict=True)):
                assert len(one.labels) == train.batch // world  # equal for every rank
                for image, label in zip(pixels([one]), one.labels.tolist(), strict=True):
                    row = number[image.tobytes()]
                    assert split.labels[row] == label
                    seen.append(row)
        assert seen == [number[image.tobytes()] for image in pixels(take(make(shards, train), iterations))]
        for epoch in range(len(seen) // total):
            assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))


@pytest.mark.parametrize("augment", [{"horizontal_flip": 0.5}, STRONG], ids=["flip", "strong"])
def test_the_same_batches_whatever_makes_them(
    shards: Shards, params: Params, augment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = section(params, batch=4, augment=augment)
    with monkeypatch.context() as as_it_is:
        as_it_is.setattr(loading, "_TOGETHER", TOGETHER)
        whole = take(make(shards, train), 12)
    assert equal(take(make(shards, train, cache="host", cache_folder=tmp_path), 12), whole)
    if not train.augment.by_image:
        assert equal(take(make(shards, train, cache="device"), 12), whole)
    resumed = make(shards, train)
    resumed.load_state_dict({"iteration": 7})
    assert equal(take(resumed, 5), whole[7:])
    resumed = make(shards, train, processes=2)
    resumed.load_state_dict({"iteration": 7})
    assert equal(take(resumed, 5), whole[7:])
    random = torch.get_rng_state()  # of which dropout draws
    assert equal(take(make(shards, train, processes=2, cache="host", cache_folder=tmp_path), 12), whole)
    assert torch.equal(torch.get_rng_state(), random)
    monkeypatch.setattr(loading, "MAX_THREADS", 1)
    assert equal(take(make(shards, train), 12), whole)
    for few in ({"_PLANNED": 8}, {"_PLANNED": 40, "_TOGETHER": 16}, {"_TOGETHER": 1}, {"_AT_ONCE": 3}):
        for constant, value in few.items():
            monkeypatch.setattr(loading, constant, value)
        assert equal(take(make(shards, train), 12), whole)
    monkeypatch.setattr(loading, "_PLANNED", 40)
    resumed = make(shards, train)
    resumed.load_state_dict({"iteration": 2})
    assert equal(take_by(3, resumed, 9), whole[2:11])


def test_an_epoch_and_a_seed_change_what_befalls_an_example(shards: Shards, params: Params) -> None:
    def epochs(seed: int, count: int) -> list[set[bytes]]:
        train = section(params, batch=30, augment={"horizontal_flip": 0.5}, seed=seed)
        return [{image.tobytes() for image in pixels([batch])} for batch in take(make(shards, train), count)]

    assert len(shards.split("train")) == 30
    first, second = epochs(seed=1, count=2)
    (other,) = epochs(seed=2, count=1)
    assert len(first) == len(second) == len(other) == 30
    assert 4 <= len(first & second) <= 26  # half of 30 fall the same way
    assert 4 <= len(first & other) <= 26


@pytest.mark.parametrize("sampling", [{"name": "uniform"}, {"name": "balanced", "identities": 2, "images": 4}])
def test_a_seed_changes_what_comes_first(shards: Shards, params: Params, sampling: dict[str, Any]) -> None:
    first, again, other = (
        take(make(shards, section(params, sampling=sampling, seed=seed), cache="device"), 1) for seed in (1, 1, 2)
    )
    assert equal(first, again)
    assert showings(first) != showings(other)


@pytest.mark.parametrize("cache", ["none", "host", "device"])
def test_a_shift_stays_in_the_margin(large: Shards, params: Params, cache: str, tmp_path: Path) -> None:
    train = section(params, augment={"shift": 5, "horizontal_flip": 0.5})
    batches = take(make(large, train, cache=cache, cache_folder=tmp_path), 4)
    assert all(batch.images.shape == (8, 3, 112, 112) for batch in batches)
    known = {  # every part of a face that is allowed, either way: hash to row, corner and direction
        hash(face[top : top + 112, left : left + 112][:, ::way].tobytes()): (row, top, left, way)
        for row, face in enumerate(decoded(large, "train"))
        for top, left, way in itertools.product(range(3, 14), range(3, 14), (1, -1))
    }
    rows, *drawn = zip(*(known[hash(image.tobytes())] for image in pixels(batches)), strict=True)
    assert (large.split("train").labels[list(rows)] == torch.cat([batch.labels for batch in batches]).numpy()).all()
    assert all(len(set(values)) > least for values, least in zip(drawn, (5, 5, 1), strict=True))
    with pytest.raises(InputError, match=r"train\.augment\.shift: 9 pixels around .* 112×112 .* faces of 128×128"):
        make(large, section(params, augment={"shift": 9}))


def test_balanced_batches(shards: Shards, params: Params, tmp_path: Path) -> None:
    sampling = {"name": "balanced", "identities": 2, "images": 4}
    train = section(params, sampling=sampling)
    host = take(make(shards, train, cache="host", cache_folder=tmp_path), 10)
    assert equal(take(make(shards, train, cache="device"), 10), host)
    for batch in host:
        assert sorted(np.unique(batch.labels.numpy(), return_counts=True)[1]) == [4, 4]


def showings(batches: list[Batch]) -> list[bytes]:
    """Each picture with its label, in no order."""
    return sorted(
        bytes([label]) + image.contiguous().numpy().tobytes()
        for batch in batches
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
    )


def test_balanced_sampling_shows_a_row_otherwise_each_time(large: Shards, params: Params, tmp_path: Path) -> None:
    """And the same by several ranks, from memory of either kind, and after an interruption."""
    augment = {"shift": 8, "horizontal_flip": 0.5}
    train = section(params, augment=augment, sampling={"name": "balanced", "identities": 2, "images": 4})
    host: dict[str, Any] = {"cache": "host", "cache_folder": tmp_path}
    whole = take(make(large, train, **host), 12)
    assert len(large.split("train")) == 18  # each of them is shown five times
    assert len(set(showings(whole))) == 12 * 8  # 17×17 shifts, mirrored or not: no two of five are alike but for luck
    assert equal(take(make(large, train, cache="device"), 12), whole)
    resumed = make(large, train, **host)
    resumed.load_state_dict({"iteration": 7})
    assert equal(take(resumed, 5), whole[7:])
    one, other = (take(make(large, train, rank=rank, world=2, **host), 12) for rank in (0, 1))
    for batch, *shares in zip(whole, one, other, strict=True):
        assert showings(shares) == showings([batch])


def test_a_host_cache_is_made_once_and_others_go(shards: Shards, params: Params, tmp_path: Path) -> None:
    (tmp_path / "old.uint8").write_bytes(b"of other shards")
    (tmp_path / ".old.uint8.123.tmp").write_bytes(b"what was killed leaves")
    make(shards, section(params), cache="host", cache_folder=tmp_path)
    (made,) = tmp_path.glob("*.uint8*")
    assert made.stat().st_size == 30 * 112 * 112 * 3
    before = made.stat().st_mtime_ns
    make(shards, section(params), cache="host", cache_folder=tmp_path)
    assert made.stat().st_mtime_ns == before


def test_a_cache_that_has_no_room_is_refused(shards: Shards, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.train import cache

    monkeypatch.setattr(cache, "_SHARE", 1e-9)
    with pytest.raises(InputError, match=r"machine\.cache: device needs 0\.0 GB"):
        make(shards, section(params), cache="device")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="macOS has no such call")
def test_a_host_cache_has_its_room_on_the_disk_before_it_is_written(
    shards: Shards, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a full disk would end in SIGBUS."""
    from stages.train import cache

    def look(*_: Any) -> None:
        (begun,) = tmp_path.glob("*.tmp")
        assert 512 * begun.stat().st_blocks >= 30 * 112 * 112 * 3
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_decode", look)
    with pytest.raises(KeyboardInterrupt):
        make(shards, section(params), cache="host", cache_folder=tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    told = rf"^{tmp_path}: machine\.cache: host needs 0\.0 GB here .*\(No space left on device\): make room"
    with pytest.raises(InputError, match=told):
        make(shards, section(params), cache="host", cache_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_cannot_be_is_said(shards: Shards, params: Params) -> None:
    with pytest.raises(TableError, match="30 examples, fewer than a batch of 64"):
        make(shards, section(params, batch=64))
    with pytest.raises(InputError, match="8 cannot be shared equally by 3 processes"):
        make(shards, section(params), world=3)


def test_an_image_that_is_none_is_named(tmp_path: Path, params: Params) -> None:
    import pyarrow as pa

    from pipeline.tables import EXAMPLES, write_table

    shards = Shards(str(write_shards(tmp_path, [6, 6], shard_section())))
    path = tmp_path / "shards" / "train-00000-of-00002.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[5]["image"] = b"nothing"
    write_table(path, pa.Table.from_pylist(rows, EXAMPLES), EXAMPLES, 4)
    named = r"^[^\n]*train-00000-of-00002\.parquet, row 5: 7 bytes that are no JPEG[^\n]*$"
    with pytest.raises(FaceError, match=named):
        take(make(shards, section(params)), 2)
    with pytest.raises(FaceError, match=named):
        take(make(shards, section(params), processes=2), 2)
    with pytest.raises(FaceError, match=named):
        make(shards, section(params), cache="device")


def test_a_process_that_dies_is_told_of(shards: Shards, params: Params) -> None:
    before = set(multiprocessing.active_children())
    batches = iter(make(shards, section(params), processes=2))
    next(batches)
    made = [process for process in multiprocessing.active_children() if process not in before]
    assert len(made) == 2
    made[0].kill()
    with pytest.raises(InputError, match=r"has died; where memory was short, lower machine\.loaders"):
        list(batches)
    made[1].join(10)
    assert not made[1].is_alive()


TRAINING = """
import multiprocessing, signal, sys
from pathlib import Path
import torch
from pipeline.params import Train
from stages.shard.reader import Shards
from stages.train.loader import Loader
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    shards, params = Shards(sys.argv[1]), Train.model_validate_json(Path(sys.argv[2]).read_text())
    batches = iter(Loader(shards.split("train"), shards.index.face, params, torch.device("cpu"), processes=2))
    print("begun", flush=True)
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    for _ in range(10):
        next(batches)
    print("still there", flush=True)
    sys.stdin.readline()
"""


def imports_torch(process: psutil.Process) -> bool:
    """Whether it is what processes that make batches are forked off, and has begun to load torch."""
    try:
        forks = any("multiprocessing.forkserver" in argument for argument in process.cmdline())
        return forks and any("libtorch" in each.path for each in process.memory_maps())
    except psutil.NoSuchProcess:
        return False


def test_processes_outlive_being_asked_to_end_but_not_their_training(
    shards: Shards, params: Params, tmp_path: Path
) -> None:
    """A signal to the whole process group leaves the training its batches; killed, it leaves nothing behind."""
    (tmp_path / "train.json").write_text(section(params).model_dump_json())
    (tmp_path / "training.py").write_text(TRAINING)
    command = [sys.executable, str(tmp_path / "training.py"), shards.place.path, str(tmp_path / "train.json")]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        deadline = time.monotonic() + 60
        while not any(imports_torch(child) for child in psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # while what they are forked off imports
        made = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(made) == 2
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still there\n"
        process.kill()
        _, alive = psutil.wait_procs(made, timeout=20)
        assert not alive


@pytest.mark.parametrize(
    ("device", "strong", "asked", "free_mib", "count"),
    [
        ("cpu", True, None, 1024, 0),  # threads: training takes all cores as it is
        ("cuda", False, None, 1024, 0),
        ("cuda", True, None, 1024, 6),  # a process for each core
        ("cuda", True, 0, 1024, 0),
        ("cpu", False, 3, 1024, 3),
        # 32 images of 112×112×3 bytes a batch, three batches a process: 3.4 MiB
        ("cuda", True, None, 20, 5),
        ("cuda", True, None, 3, 0),
        ("cuda", True, 6, 20, None),
    ],
)
def test_how_many_processes_make_batches(
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    strong: bool,
    asked: int | None,
    free_mib: int,
    count: int | None,
) -> None:
    monkeypatch.setattr(loading, "cores", lambda: 6)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=free_mib * 2**20))
    monkeypatch.setattr(loading, "SHARED_MEMORY", Path("/"))
    machine = params.machine.model_copy(update={"loaders": asked})
    train = section(params, batch=64, augment=STRONG if strong else {})

    def found() -> int:
        return loading.loader_processes(machine, train, torch.device(device), world=2)

    if count is None:
        with pytest.raises(InputError, match=r"machine\.loaders: / has 20 MiB free, but 6 processes need 21 to"):
            found()
    else:
        assert found() == count


@pytest.mark.parametrize(("made", "width", "sizes"), [("shards", 112, [5, 5]), ("large", 96, [5, 1])])
def test_validation_sees_every_example_once_and_unchanged(
    request: pytest.FixtureRequest, made: str, width: int, sizes: list[int]
) -> None:
    """The middle of each, as Pillow decodes it."""
    shards: Shards = request.getfixturevalue(made)
    split, faces = shards.split("val"), decoded(shards, "val")
    batches = list(validation_batches(split, shards.index.face, 5, width, CPU))
    assert [len(batch.labels) for batch in batches] == sizes
    assert (torch.cat([batch.labels for batch in batches]).numpy() == split.labels).all()
    assert all(batch.images.shape[1:] == (3, 112, width) for batch in batches)
    top, left = (faces.shape[1] - 112) // 2, (faces.shape[2] - width) // 2
    assert (np.stack(pixels(batches)) == faces[:, top : top + 112, left : left + width]).all()


@pytest.mark.parametrize(
    ("made", "augment"),
    [("shards", {"horizontal_flip": 0.5}), ("large", {"shift": 5, "horizontal_flip": 0.5}), ("shards", STRONG)],
    ids=["flip", "shift", "strong"],
)
def test_the_sheet_shows_faces_and_then_what_training_sees_of_them(
    request: pytest.FixtureRequest, params: Params, made: str, augment: dict[str, Any], tmp_path: Path
) -> None:
    """A face a row, an epoch a column: among what the loader makes in that epoch."""
    shards: Shards = request.getfixturevalue(made)
    split, faces = shards.split("train"), decoded(shards, "train")
    train = section(params, batch=len(split), augment=augment)
    write_sheet(tmp_path / "faces.png", split, shards.index.face, train)
    sheet = np.full((8 * 116, 8 * 116, 3), 255, np.uint8)
    with Image.open(tmp_path / "faces.png") as opened:
        assert (opened.size, opened.mode) == ((8 * 116 - 4, 8 * 116 - 4), "RGB")
        sheet[:-4, :-4] = np.asarray(opened)
    cells = sheet.reshape(8, 116, 8, 116, 3).swapaxes(1, 2)
    assert (cells[:, :, 112:] == 255).all()
    assert (cells[:, :, :, 112:] == 255).all()
    seen = cells[:, :, :112, :112]
    margin = (faces.shape[1] - 112) // 2
    assert (seen[:, 0] == faces[:8, margin : margin + 112, margin : margin + 112]).all()
    for epoch, batch in enumerate(take(make(shards, train), 7), 1):
        shown = {image.tobytes() for image in pixels([batch])}
        assert all(cell.tobytes() in shown for cell in seen[:, epoch])
    if augment == {"horizontal_flip": 0.5}:
        mirrored = (seen[:, 1:] == seen[:, :1, :, ::-1]).all(axis=(2, 3, 4))
        assert (mirrored != (seen[:, 1:] == seen[:, :1]).all(axis=(2, 3, 4))).all()
        assert 10 <= mirrored.sum() <= 46  # of 56 at one half: five standard deviations


def test_what_goes_to_a_gpu_is_the_pinned_tensor_itself(shards: Shards, params: Params) -> None:
    """Another tensor over the same memory would not keep torch from giving it away while the GPU still reads."""
    builder = loading._Builder(make(shards, section(params)), pin=False)
    pinned = torch.empty(2 * 8 * 112 * 112 * 3 + 1, dtype=torch.uint8)[1:].view(16, 112, 112, 3)
    batches = builder.build(next(builder.plans(0, together=2)), pinned)
    assert len(batches) == 2
    for batch in batches:
        assert batch.images.untyped_storage().data_ptr() == pinned.untyped_storage().data_ptr()
