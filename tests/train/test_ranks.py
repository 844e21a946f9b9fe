"""Steps of several processes, on the CPU by gloo: what goes on after a checkpoint, and what fp16 leaves out."""

from pathlib import Path

import torch

from tests.train.copies import start
from tests.train.test_distributed import finish

SCRIPT = """
import sys
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
    """With batch normalisation, and a batch in parts; gradients overflow in fp16 on all ranks, or in one's centres."""
    finish(start(SCRIPT, tmp_path / "state", tmp_path / "found", ranks=3))
    found = torch.load(tmp_path / "found", weights_only=True)
    assert found == dict.fromkeys(("goes on", "alike", "statistics", "backbone", "centres of one"), True)
