"""Steps of several processes, on the CPU by gloo: what goes on after a checkpoint, and what fp16 leaves out. And which
GPU each takes.
"""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.params import Params
from stages.train.ranks import take_gpu
from tests.train.copies import start
from tests.train.test_distributed import finish

SCRIPT = """
import sys
from itertools import combinations
from pathlib import Path
import torch
from pipeline.params import load_params
from stages.train import backbones, loop
from stages.train.checkpoint import Checkpoints
from stages.train.ranks import agreed, gathered, together
from tests.samples import NARROW

backbones.BACKBONES["small"] = NARROW

def section(**changes):
    train = load_params(Path("params.yaml")).train
    content = train.model_dump() | {"batch": 12, "micro_batches": 2} | changes
    content["backbone"]["embedding"] = 32
    content["optimizer"]["learning_rate"] = 0.01
    return type(train).model_validate(content)

def step(training, params, i):
    generator = torch.Generator().manual_seed(100 * i + training.ranks.rank)
    images = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8, generator=generator)
    loop.step(training, params, 30 + i, images, torch.randint(0, 20, (4,), generator=generator))

def state(training):
    tensors = training.model.state_dict() | {"centres": training.head.weight, **training.momentum}
    return {name: value.detach().clone() for name, value in tensors.items()}

def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)

with together(torch.device("cpu")) as (ranks, device):
    found = {}
    params = section()
    training = loop.begin(params, 20, device, ranks)
    checkpoints = Checkpoints(Path(sys.argv[1]), {"seed": 1}, 2, ranks)
    for i in range(4):
        if i == 2:
            checkpoints.save(i, training.common(), training.own())
        step(training, params, i)
    whole = state(training)
    again = loop.begin(params, 20, device, ranks)
    again.restore(checkpoints.newest())
    for i in range(2, 4):
        step(again, params, i)
    found["goes on"] = same(whole, state(again))
    model = torch.cat([value.double().flatten() for value in training.model.state_dict().values()])
    found["alike"] = bool((gathered(model[None]) == model).all())

    training, means = loop.begin(params, 20, device, ranks), []
    norm = next(module for module in training.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    step(training, params, 0)
    own = 0.9 * 0.1 * means[0] + 0.1 * means[1]  # of the batch's two parts, one after the other
    found["statistics"] = torch.allclose(norm.running_mean, gathered(own[None]).mean(0), rtol=1e-5, atol=1e-7)

    for name, share in (("same without dropout", 0.0), ("dropped by each", 0.5)):
        training = loop.begin(section(dropout=share), 20, device, ranks)
        images = torch.randint(0, 256, (4, 3, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        drawn = gathered(training.model(images)[None])
        found[name] = all(torch.equal(one, other) == (share == 0) for one, other in combinations(drawn, 2))

    params = section(precision="fp16")
    training = loop.begin(params, 20, device, ranks)
    for where in ("backbone", "centres of one"):
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40 if where == "backbone" else 1.0)
        if where != "backbone" and ranks.rank == 1:
            training.head.weight.register_hook(lambda gradient: gradient + torch.inf)
        before, scale = state(training), training.scaler.get_scale()
        step(training, params, 0)
        after = state(training)
        learnt = [name for name, _ in training.model.named_parameters()] + ["centres", "momentum_buffer"]
        unmoved = all(torch.equal(before[name], after[name]) for name in learnt)
        found[where] = unmoved and training.scaler.get_scale() == scale / 2
    found = {name: not agreed(ranks, int(not true))[0] for name, true in found.items()}  # on all ranks
    if ranks.first:
        torch.save(found, sys.argv[2])
"""


def test_three_ranks_go_on_to_the_same_bits_and_leave_out_the_same_steps(tmp_path: Path) -> None:
    """With batch normalisation, and a batch in parts; gradients overflow in fp16 on all ranks, or in one's centres.
    Dropout is another on each.
    """
    finish(start(SCRIPT, tmp_path / "state", tmp_path / "found", ranks=3))
    found = torch.load(tmp_path / "found", weights_only=True)
    dropout = ("same without dropout", "dropped by each")
    assert found == dict.fromkeys(("goes on", "alike", "statistics", *dropout, "backbone", "centres of one"), True)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On this machine, or the two that the environment makes visible, for the second of two processes; and what is
    chosen among them.
    """
    chosen: list[int] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is put right in the end
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    visible = partial(os.environ.get, "CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible().split(",")))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(("visible", "place", "own"), [(None, 1, "1"), ("4,6", 1, "6"), ("4,6", 0, "4")])
def test_a_process_sees_no_gpu_but_its_own(
    params: Params, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, visible: str | None, place: int, own: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(place))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    take_gpu(params.machine)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert two_gpus == []


def test_where_gpus_have_been_counted_a_process_chooses_its_own(
    params: Params, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    take_gpu(params.machine)
    assert two_gpus == [1]


def test_more_processes_than_gpus_are_refused(
    params: Params, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="there are 2 GPUs on this machine, and more processes"):
        take_gpu(params.machine)


@pytest.mark.parametrize("why", ["alone", "cpu", "no gpus"])
def test_who_needs_no_gpu_of_its_own_takes_none(
    params: Params, two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "alone":
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    if why == "no gpus":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    take_gpu(params.machine.model_copy(update={"device": "cpu" if why == "cpu" else "auto"}))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert two_gpus == []
