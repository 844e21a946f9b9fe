"""Training by several processes, on the CPU by gloo: the same loss, gradients and checkpoints as by one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from pipeline.params import Params
from stages.train import backbones, checkpoint, heads, loop
from stages.train import run as train
from stages.train.ranks import Ranks
from tests.conftest import ROOT
from tests.samples import mean_colours, shard_section, write_shards
from tests.train.copies import Copies, start
from tests.train.test_heads import MAKE

EMBEDDING, CLASSES, BATCH = 8, 11, 12


def finish(copies: Copies) -> str:
    assert copies.wait() == 0, copies.said()
    return copies.said()


def example(name: str) -> tuple[heads.Head, torch.Tensor, torch.Tensor]:
    """A head, embeddings and labels: the same in every process."""
    torch.manual_seed(7)
    head = MAKE[name](CLASSES, EMBEDDING)
    return head.train(), 3 * torch.randn(BATCH, EMBEDDING), torch.randint(CLASSES, (BATCH,))


def divide(head: heads.Head, ranks: Ranks) -> None:
    mine = ranks.share(CLASSES)
    head.hold(head.weight.detach()[mine.start : mine.stop].clone(), CLASSES, ranks)


HEADS_SCRIPT = """
import sys
from pathlib import Path
import torch
from stages.train.ranks import together, collected, summed
from tests.train.test_distributed import divide, example
from tests.train.test_heads import MAKE

found = {}
with together(torch.device("cpu")) as (ranks, _):
    for name in MAKE:
        head, embeddings, labels = example(name)
        divide(head, ranks)
        mine = ranks.share(len(labels))
        own = embeddings[mine.start : mine.stop].clone().requires_grad_()
        judged = head(own, labels[mine.start : mine.stop])
        judged.loss.backward()
        gradient = collected(own.grad, ranks)
        of_centres = collected(head.weight.grad, ranks)
        again = example(name)[0]
        divide(again, ranks)
        with torch.no_grad():
            evaluated = again.eval()(embeddings, labels)
        found[name] = (judged.loss.detach(), judged.own, judged.nearest, gradient, of_centres, evaluated.loss,
                       evaluated.correct)
    if ranks.first:
        torch.save(found, sys.argv[1])
"""


def test_every_head_on_three_ranks_has_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    """11 classes: slices of 3, 4 and 4. 12 examples: 4 of each rank."""
    finish(start(HEADS_SCRIPT, tmp_path / "found.pt", ranks=3))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == MAKE.keys()
    for name, (loss, own, nearest, gradient, of_centres, evaluated, correct) in found.items():
        head, embeddings, labels = example(name)
        alone = embeddings.requires_grad_()
        judged = head(alone, labels)
        judged.loss.backward()
        torch.testing.assert_close(loss, judged.loss.detach(), rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(own, judged.own, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(nearest, judged.nearest, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(gradient, alone.grad, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(of_centres, head.weight.grad, rtol=1e-5, atol=1e-5, msg=name)
        still = example(name)[0].eval()
        with torch.no_grad():
            judged = still(embeddings, labels)
        torch.testing.assert_close(evaluated, judged.loss, rtol=1e-5, atol=1e-5, msg=name)
        assert torch.equal(correct, judged.correct)


def sampled_example() -> tuple[heads.CosFace, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return heads.CosFace(40, EMBEDDING, 16.0, 0.35), torch.randn(6, EMBEDDING), torch.tensor([1, 1, 5, 9, 30, 39])


def test_sampled_centres_are_those_of_the_labels_and_others_by_chance() -> None:
    head, _, labels = sampled_example()
    seen = torch.zeros(40)
    for seed in range(300):
        rows = head.choose(labels, 0.25, torch.Generator().manual_seed(seed))
        assert len(rows) == 10
        assert torch.equal(rows, rows.unique())  # sorted, each once
        assert torch.isin(labels, rows).all()
        seen[rows] += 1
    others = seen[~one_hot(labels, 40).sum(dim=0).bool()]
    assert len(others) == 35
    # each of 35 with probability 5/35 in 300 draws: 42.9 on average, 6.1 the standard deviation
    assert others.mean() == pytest.approx(300 * 5 / 35)
    assert others.min() > 42.9 - 5 * 6.1
    assert others.max() < 42.9 + 5 * 6.1
    assert len(head.choose(labels, 0.01, torch.Generator())) == 5  # the labels' own, however low the rate


def test_the_loss_of_sampled_centres_is_that_of_a_head_that_has_no_others() -> None:
    head, embeddings, labels = sampled_example()
    rows = head.choose(labels, 0.25, torch.Generator().manual_seed(1))
    only = heads.CosFace(len(rows), EMBEDDING, 16.0, 0.35)
    only.weight.data = head.weight.detach()[rows]
    expected = only(embeddings, torch.searchsorted(rows, labels))
    head.weight, head.rows = torch.nn.Parameter(head.weight.detach()[rows]), rows
    judged = head(embeddings, labels)
    assert torch.equal(judged.loss, expected.loss)
    assert torch.equal(judged.nearest, expected.nearest)


@pytest.fixture
def sampling(params: Params) -> Params:
    section = params.train.model_dump()
    section |= {"sample_rate": 0.2, "batch": 8}
    section["backbone"] |= {"embedding": EMBEDDING}
    return params.model_copy(update={"train": type(params.train).model_validate(section)})


def test_only_sampled_centres_move_with_their_momentum(sampling: Params) -> None:
    section = sampling.train
    training = loop.begin(section, 50, torch.device("cpu"))
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    labels = torch.arange(8)
    for iteration in (30, 31):
        before = training.head.weight.detach().clone()
        memory = training.momentum["momentum_buffer"].clone()
        loop.step(training, section, iteration, images, labels)
        moved = (training.head.weight != before).any(dim=1)
        assert moved[:8].all()
        assert moved.sum() == 10
        assert torch.equal((training.momentum["momentum_buffer"] != memory).any(dim=1), moved)
        # stochastic gradient descent, written out, with the momentum that was remembered
        rate = training.optimizer.param_groups[0]["lr"]
        step = before - training.head.weight.detach()
        torch.testing.assert_close(step, rate * training.momentum["momentum_buffer"] * moved[:, None])
    assert training.head.rows is None
    assert training.optimizer.param_groups[0]["params"][-1] is training.head.weight


@pytest.fixture
def tiny(params: Params, tmp_path: Path) -> Params:
    """A network without batch normalisation, which each process would compute over its own images."""
    write_shards(tmp_path, [10] * 6, shard_section(validation={"by": "image", "share": 0.1, "pairs": 0}))
    section = params.train.model_dump()
    section |= {"data": str(tmp_path / "shards"), "batch": 12, "log_every": 1, "checkpoint_every": 4}
    section["backbone"] |= {"embedding": 16}
    section["schedule"] = {"name": "steps", "iterations": 5, "warmup": 2, "milestones": [4], "factor": 0.1}
    section["optimizer"] |= {"learning_rate": 0.001}  # small, so that rounding does not grow
    section |= {"micro_batches": 2, "average": 0.7}
    quick = params.machine.model_copy(update={"checkpoint_minutes": 0.0001, "device": "cpu"})
    made = {"train": type(params.train).model_validate(section), "machine": quick}
    return params.model_copy(update=made)


TRAIN_SCRIPT = """
import logging, os, signal, sys
from pathlib import Path
from pipeline.params import Params
from stages.train import run as train
from stages.train import backbones, loop
from tests.samples import mean_colours

backbones.BACKBONES["small"] = mean_colours
params = Params.model_validate_json(Path(sys.argv[3]).read_text())
ending, rank, at = sys.argv[4], int(os.environ.get("RANK", 0)), 3
step = loop.step

def watched(training, params, iteration, *rest):
    if iteration == at and rank == 1 and ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    step(training, params, iteration, *rest)

loop.step = watched
logging.basicConfig(level=logging.INFO)
train.run(Path(sys.argv[1]), Path(sys.argv[2]), params)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def losses(models: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (models / "history.csv").read_text().splitlines()[1:]]


def test_two_processes_train_as_one_and_lose_nothing(
    tmp_path: Path, tiny: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backbones.BACKBONES, "small", mean_colours)
    section = tmp_path / "params.json"
    section.write_text(tiny.model_dump_json())

    def begin(name: str, ending: str = "-") -> Copies:
        return start(TRAIN_SCRIPT, tmp_path / name, tmp_path / f"{name}-state", section, ending, ranks=2)

    train.run(tmp_path / "alone", tmp_path / "alone-state", tiny)
    finish(begin("two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    alone, both = (load_file(tmp_path / name / "head.safetensors") for name in ("alone", "two"))
    torch.testing.assert_close(both["weight"], alone["weight"], rtol=1e-3, atol=1e-5)

    copies = begin("killed", "killed")
    assert copies.wait() != 0, copies.said()
    assert not (tmp_path / "killed").exists()
    saved = sorted(path.name for path in (tmp_path / "killed-state").rglob("*.pt"))
    assert saved[-3:] == [f"iteration-00000003{part}.pt" for part in ("", ".rank-00-of-02", ".rank-01-of-02")], (
        copies.said()
    )
    shutil.copytree(tmp_path / "killed-state", tmp_path / "one-state")
    finish(begin("killed"))
    assert files(tmp_path / "killed") == files(tmp_path / "two")
    train.run(tmp_path / "again", tmp_path / "killed-state", tiny)  # what has ended, one process can write again
    assert files(tmp_path / "again") == files(tmp_path / "two")

    # A checkpoint of two serves one
    train.run(tmp_path / "one", tmp_path / "one-state", tiny)
    assert losses(tmp_path / "one")[:3] == losses(tmp_path / "two")[:3]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


SHARED_SCRIPT = """
import sys
from pathlib import Path
import torch
from pipeline.errors import InputError, said
from stages.train.checkpoint import Checkpoints
from stages.train.ranks import together
from tests.pipeline.test_tables import little_space

here = Path(sys.argv[1])
with together(torch.device("cpu")) as (ranks, _):
    def told(root, act, kept=2):
        checkpoints = Checkpoints(here / root, {"seed": 1}, kept, ranks)
        try:
            found = act(checkpoints)
        except (InputError, OSError) as error:
            found = said(error)
        (here / "said" / f"{len(list((here / 'said').glob(f'*.{ranks.rank}')))}.{ranks.rank}").write_text(str(found))

    def save(iteration, size=1):
        return lambda checkpoints: checkpoints.save(iteration, {}, {"mine": torch.zeros(size)})

    def newest(checkpoints):
        found = checkpoints.newest()
        return found and (found.iteration, len(found.own))

    told("shared", save(1))
    told("shared", newest)
    told(f"own-{ranks.rank}", save(1))
    told("shared" if ranks.first else "own-1", newest)
    with little_space(100_000):
        told("shared", save(2, 100_000 if ranks.rank else 1))
    told("shared", newest)
    if ranks.first:
        for path in (here / "shared").rglob("*.pt"):
            path.write_bytes(b"damaged")
    told("shared", newest)
"""


def test_ranks_agree_on_a_checkpoint_and_fail_together(tmp_path: Path) -> None:
    """What one of two cannot do, the other is told, and waits for nobody. By torchrun itself."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED_SCRIPT)
    (tmp_path / "said").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=180,
    )
    said = [[(tmp_path / "said" / f"{i}.{rank}").read_text() for rank in (0, 1)] for i in range(7)]
    assert said[0] == ["None", "None"]
    assert said[1] == ["(1, 2)", "(1, 2)"]
    share = "all processes of a training, on whatever machine, must see the same folder of checkpoints"
    for i, root, file in ((2, "own-0", "0001.rank-01-of-02.pt"), (3, "own-1", "0001.pt")):
        assert said[i][0] == said[i][1]
        assert said[i][0].startswith(str(tmp_path / root))
        assert f"{file}: not here, where " in said[i][0]
        assert share in said[i][0]
    assert said[4][0] == said[4][1]
    assert re.search(r"shared/.*00002\.rank-01-of-02\.pt: File too large$", said[4][0])
    assert said[5] == ["(1, 2)", "(1, 2)"]
    assert said[6][0] == said[6][1]
    assert "none of its checkpoints can be used" in said[6][0]


SAMPLED_SCRIPT = """
import sys
from pathlib import Path
import torch
from pipeline.params import Params
from stages.train import loop
from stages.train.checkpoint import Checkpoints
from stages.train.ranks import collected, together
from tests.train.test_distributed import CLASSES, sampled_batch

here = Path(sys.argv[1])
params = Params.model_validate_json((here / "params.json").read_text()).train
cpu = torch.device("cpu")
with together(cpu) as (ranks, _):
    training = loop.begin(params, CLASSES, cpu, ranks)
    training.restore(Checkpoints(here, {}, 2, ranks).newest())
    images, labels = (part.chunk(2)[ranks.rank] for part in sampled_batch())
    kept = [collected(training.head.weight, ranks), collected(training.momentum["momentum_buffer"], ranks)]
    loop.step(training, params, 30, images, labels)
    kept += [collected(training.head.weight, ranks), collected(training.momentum["momentum_buffer"], ranks)]
    model = [value.double().sum() for value in training.model.state_dict().values()]
    both = collected(torch.stack(model)[None], ranks)
    if ranks.first:
        torch.save([*kept, both], here / "found.pt")
"""


def sampled_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([0, 0, 1, 10, 10, 1, 0, 1])


def test_a_checkpoint_of_one_serves_two_which_sample_their_centres(tmp_path: Path, sampling: Params) -> None:
    """11 classes: slices of 5 and 6, of which two centres each move, those of all labels among them."""
    cpu = torch.device("cpu")
    training = loop.begin(sampling.train, CLASSES, cpu)
    loop.step(training, sampling.train, 25, *sampled_batch())
    checkpoint.Checkpoints(tmp_path, {}, 2).save(26, training.common(), training.own())
    (tmp_path / "params.json").write_text(sampling.model_dump_json())
    finish(start(SAMPLED_SCRIPT, tmp_path, ranks=2))
    weight, momentum, moved_weight, moved_momentum, both = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.equal(weight, training.head.weight)
    assert torch.equal(momentum, training.momentum["momentum_buffer"])
    moved = (moved_weight != weight).any(dim=1)
    assert moved[[0, 1, 10]].all()
    assert moved[:5].sum() == moved[5:].sum() == 2
    assert torch.equal((moved_momentum != momentum).any(dim=1), moved)
    assert torch.equal(both[0], both[1])


@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 5))
def test_rows_of_any_number_of_ranks_serve_any_other(count: int, before: int, after: int) -> None:
    rows = torch.arange(count)
    shares = [Ranks(rank, before).share(count) for rank in range(before)]
    parts = [rows[share.start : share.stop] for share in shares]
    assert torch.equal(torch.cat(parts), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank in range(after):
        mine = Ranks(rank, after).share(count)
        assert loop._rows(parts, mine).tolist() == list(mine)
