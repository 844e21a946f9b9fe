"""The peers of benchmarks/loader.py, which runs this in an environment of theirs.

`python loader_peers.py write NAME DATA` writes what a peer reads from the folder of JPEGs; `python loader_peers.py read
NAME DATA CORES BATCH` prints images/s. All do the same work: shuffled batches of contiguous uint8 RGB and labels, half
of the images flipped, each decoded by the same decoder.
"""

import io
import json
import os
import random
import struct
import sys
import tarfile
import time
import types
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import cv2
import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

WARM_UP, TIMED = 20, 120
"""Batches."""
SIDE = 112
"""Of a face, pixels."""
MAGIC = 0xCED7230A
"""Of a RecordIO record."""


def listed(data: Path) -> list[tuple[Path, int]]:
    """Every JPEG of the folder and its label."""
    people = sorted((data / "folder").iterdir())
    return [(path, label) for label, person in enumerate(people) for path in sorted(person.iterdir())]


def collate(items: list[tuple[bytes, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded where they belong, and flipped there, which takes less time than to stack them afterwards."""
    images = np.empty((len(items), SIDE, SIDE, 3), np.uint8)
    for (jpeg, _), place in zip(items, images, strict=True):
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=place)
        if random.random() < 0.5:
            cv2.flip(place, 1, dst=place)
    return torch.from_numpy(images), torch.tensor([label for _, label in items])


class Folder(Dataset[tuple[bytes, int]]):
    """A file an image."""

    def __init__(self, data: Path) -> None:
        self.items = listed(data)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        path, label = self.items[index]
        return path.read_bytes(), label


class RecordIO(Dataset[tuple[bytes, int]]):
    """MXNet's train.rec and train.idx, by random access."""

    def __init__(self, data: Path) -> None:
        self.path = data / "train.rec"
        lines = (data / "train.idx").read_text().split()
        self.offsets = list(map(int, lines[1::2]))
        self.file: Any = None

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        if self.file is None:
            self.file = self.path.open("rb")
        self.file.seek(self.offsets[index])
        magic, length = struct.unpack("<II", self.file.read(8))
        assert magic == MAGIC
        record = self.file.read(length)
        _, label = struct.unpack("<If", record[:8])
        return record[24:], int(label)


def write_recordio(data: Path) -> None:
    with (data / "train.rec").open("wb") as records, (data / "train.idx").open("w") as index:
        for number, (path, label) in enumerate(listed(data)):
            content = struct.pack("<IfQQ", 0, label, number, 0) + path.read_bytes()
            index.write(f"{number}\t{records.tell()}\n")
            records.write(struct.pack("<II", MAGIC, len(content)) + content + b"\0" * (-len(content) % 4))


def write_webdataset(data: Path) -> None:
    (data / "tars").mkdir()
    items = listed(data)
    random.Random(0).shuffle(items)  # as its own documentation advises
    for shard in range(0, len(items), 1000):
        with tarfile.open(data / "tars" / f"{shard // 1000:05d}.tar", "w") as tar:
            for number, (path, label) in enumerate(items[shard : shard + 1000], shard):
                for name, content in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:07d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def webdataset(data: Path, cores: int, batch: int) -> Iterable[Any]:
    import webdataset as wds

    urls = [str(path) for path in sorted((data / "tars").iterdir())]
    dataset = wds.WebDataset(urls, shardshuffle=100, seed=0).shuffle(1000).to_tuple("jpg", "cls").repeat()
    dataset = dataset.map(lambda item: (item[0], int(item[1]))).batched(batch, collation_fn=collate)
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers(cores))


def write_datasets(data: Path) -> None:
    import datasets

    rows = {"image": [path.read_bytes() for path, _ in listed(data)], "label": [label for _, label in listed(data)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(data / "arrow"))


def hugging_face(data: Path, cores: int, batch: int) -> Iterable[Any]:
    import datasets

    dataset = datasets.load_from_disk(str(data / "arrow"))
    return DataLoader(
        dataset,
        batch,
        shuffle=True,
        num_workers=workers(cores),
        collate_fn=lambda rows: collate([(row["image"], row["label"]) for row in rows]),
    )


def streaming() -> Any:
    """mosaicml-streaming, which imports torchvision for data sets that are not used here."""

    class Anything(types.ModuleType):
        __path__ = ()  # pyrefly: ignore[bad-assignment]

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

    for end in ("", ".transforms", ".transforms.functional", ".datasets", ".datasets.vision"):
        module = sys.modules["torchvision" + end] = Anything("torchvision" + end)
        module.__spec__ = ModuleSpec("torchvision" + end, None)
    import streaming as package

    return package


def write_streaming(data: Path) -> None:
    with streaming().MDSWriter(out=str(data / "mds"), columns={"image": "bytes", "label": "int"}) as writer:
        for path, label in listed(data):
            writer.write({"image": path.read_bytes(), "label": label})


def mosaicml(data: Path, cores: int, batch: int) -> Iterable[Any]:
    package = streaming()
    package.base.util.clean_stale_shared_memory()
    dataset = package.StreamingDataset(local=str(data / "mds"), shuffle=True, batch_size=batch)
    return DataLoader(
        dataset,
        batch,
        num_workers=workers(cores),
        collate_fn=lambda rows: collate([(row["image"], row["label"]) for row in rows]),
    )


def workers(cores: int) -> int:
    """Processes: on one core a second one only costs."""
    return cores if cores > 1 else 0


def plain(dataset: Dataset[Any]) -> Any:
    return lambda cores, batch: DataLoader(dataset, batch, True, num_workers=workers(cores), collate_fn=collate)


def main() -> None:
    what, name, data = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if what == "write":
        {
            "webdataset": write_webdataset,
            "datasets": write_datasets,
            "mosaicml-streaming": write_streaming,
            "RecordIO": write_recordio,
        }[name](data)
        return
    cores, batch = int(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(1)
    if name == "folder":
        loader: Iterable[Any] = plain(Folder(data))(cores, batch)
    elif name == "RecordIO":
        loader = plain(RecordIO(data))(cores, batch)
    else:
        makers = {"webdataset": webdataset, "datasets": hugging_face, "mosaicml-streaming": mosaicml}
        loader = makers[name](data, cores, batch)
    packages = {"folder": "torch", "RecordIO": "torch"}
    print(json.dumps({"rate": rate(loader, batch), "version": version(packages.get(name, name))}))


def rate(loader: Iterable[Any], batch: int) -> float:
    """Images/s, once it is running."""
    batches = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    started = time.perf_counter()
    for _ in range(TIMED):
        images, labels = next(batches)
        assert images.shape == (batch, 112, 112, 3)
        assert len(labels) == batch
    return TIMED * batch / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
