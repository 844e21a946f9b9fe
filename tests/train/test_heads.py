import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline import params
from pipeline.errors import InputError
from stages.train import heads
from stages.train.heads import (
    AdaFace,
    ArcFace,
    ASoftmax,
    CosFace,
    Head,
    Softmax,
    margin_upper_bound,
    scale_lower_bound,
    similarities,
)
from stages.train.ranks import Ranks

MAKE: dict[str, Callable[[int, int], Head]] = {
    "softmax": Softmax,
    "nsl": lambda c, d: CosFace(c, d, 16.0, 0.0),
    "a-softmax": lambda c, d: ASoftmax(c, d, 4, 10.0, 5.0, 0.12),
    "a-softmax of 3": lambda c, d: ASoftmax(c, d, 3, 0.0, 0.0, 0.0),
    "cosface": lambda c, d: CosFace(c, d, 64.0, 0.35),
    "arcface": lambda c, d: ArcFace(c, d, 64.0, 0.5, easy=False),
    "arcface, easy": lambda c, d: ArcFace(c, d, 64.0, 0.5, easy=True),
    "adaface": lambda c, d: AdaFace(c, d, 64.0, 0.4, 0.333, 0.01),
}


JUMPS: dict[str, tuple[float, ...]] = {
    "arcface": (math.cos(math.pi - 0.5),),
    "arcface, easy": (0.0,),
    "adaface": (-1 + 1e-3, 1 - 1e-3),
}
"""Cosines at which what a head makes of them, or its gradient, jumps."""


def angle_to_target(name: str, theta: Tensor, norms: Tensor) -> Tensor:
    """What a head makes of the own class's angle, from the published formulas; cosines, but for nothing else."""
    if name in ("softmax", "nsl"):
        return theta.cos()
    if name.startswith("a-softmax"):
        m, least = (4, 10.0) if name == "a-softmax" else (3, 0.0)
        k = (m * theta.detach() / math.pi).floor()
        return (least * theta.cos() + (-1.0) ** k * (m * theta).cos() - 2 * k) / (1 + least)
    if name == "cosface":
        return theta.cos() - 0.35
    if name == "arcface":
        return torch.where(theta + 0.5 < math.pi, (theta + 0.5).cos(), theta.cos() - 0.5 * math.sin(0.5))
    if name == "arcface, easy":
        return torch.where(theta < math.pi / 2, (theta + 0.5).cos(), theta.cos())
    if len(norms) > 1:
        mean, deviation = 0.99 * 20 + 0.01 * norms.mean(), 0.99 * 100 + 0.01 * norms.std()
    else:
        mean, deviation = torch.tensor(20.0), torch.tensor(100.0)
    limit = math.acos(1 - 1e-3)  # the authors' code keeps away from where the arc cosine is steep
    theta = theta.clamp(limit, math.pi - limit)
    score = ((norms - mean) / (deviation + 1e-3) * 0.333).clamp(-1, 1)
    return (theta - 0.4 * score).clamp(1e-3, math.pi - 1e-3).cos() - (0.4 + 0.4 * score)


def textbook(name: str, head: Head, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The loss with a one-hot matrix, all C logits and log_softmax."""
    lengths = x.norm(dim=1, keepdim=True)
    cosines = normalize(x) @ normalize(w).T
    theta = cosines.clamp(-1 + 1e-12, 1 - 1e-12).acos()
    targets = torch.stack([angle_to_target(name, column, lengths.detach()[:, 0]) for column in theta.T], dim=1)
    mixed = torch.where(one_hot(y, len(w)).bool(), targets, cosines)
    logits = mixed * (lengths if head.scale is None else head.scale)
    if name == "softmax":
        logits = logits * w.norm(dim=1)
    return -logits.log_softmax(dim=1)[torch.arange(len(y)), y].mean()


def closed_form(x: np.ndarray, w: np.ndarray, y: np.ndarray, s: float, m: float) -> float:
    """CosFace, Eq. 4, term by term, in float64."""
    losses = []
    for features, label in zip(x.astype(np.float64), y, strict=True):
        cosines = [float(features @ c / (np.linalg.norm(features) * np.linalg.norm(c))) for c in w.astype(np.float64)]
        exponents = [s * (cos - m) if j == label else s * cos for j, cos in enumerate(cosines)]
        top = max(exponents)
        losses.append(-(exponents[label] - top) + math.log(sum(math.exp(e - top) for e in exponents)))
    return float(np.mean(losses))


@settings(max_examples=40)
@given(
    n=st.integers(1, 9),
    classes=st.integers(2, 12),
    dim=st.integers(2, 16),
    s=st.sampled_from([1.0, 16.0, 64.0]),
    m=st.sampled_from([0.0, 0.2, 0.35, 0.5]),
    seed=st.integers(0, 1000),
)
def test_cosface_is_equation_4(n: int, classes: int, dim: int, s: float, m: float, seed: int) -> None:
    torch.manual_seed(seed)
    head = CosFace(classes, dim, s, m)
    x, y = 3 * torch.randn(n, dim), torch.randint(classes, (n,))
    loss = head(x, y).loss.item()
    assert loss == pytest.approx(
        closed_form(x.numpy(), head.weight.detach().numpy(), y.numpy(), s, m), rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=25)
@given(
    n=st.integers(1, 9),
    classes=st.integers(2, 12),
    dim=st.integers(2, 16),
    chunk=st.integers(1, 13),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_the_textbooks(name: str, n: int, classes: int, dim: int, chunk: int, seed: int) -> None:
    """In float64 as far as acos allows, and in fp32 as near as fp32 is, for any number of classes at a time."""
    torch.manual_seed(seed)
    x, y = 3 * torch.randn(n, dim, dtype=torch.float64), torch.randint(classes, (n,))
    w = torch.randn(classes, dim, dtype=torch.float64)
    # An angle's slope over its cosine is infinite at 0 and π: so near to them fp32 knows no gradient
    cosines = (normalize(x) * normalize(w)[y]).sum(dim=1)
    assume((cosines.abs() < 1 - 1e-4).all().item())
    # At a jump fp32, whose cosines are right to some 1e-7, may take the other side
    assume(all(((cosines - jump).abs() > 1e-5).all().item() for jump in JUMPS.get(name, ())))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-3)):
        head = MAKE[name](classes, dim).to(dtype)
        head.weight.data = w.to(dtype)
        own = x.to(dtype, copy=True).requires_grad_()
        heads_chunk, heads.CHUNK = heads.CHUNK, chunk
        try:
            judged = head(own, y)
            judged.loss.backward()
        finally:
            heads.CHUNK = heads_chunk
        x64, w64 = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = textbook(name, head, x64, w64, y)
        loss.backward()
        assert judged.loss.item() == pytest.approx(loss.item(), rel=tolerance, abs=tolerance)
        for ours, theirs in ((own.grad, x64.grad), (head.weight.grad, w64.grad)):
            assert ours is not None
            assert theirs is not None
            torch.testing.assert_close(
                ours.double(), theirs, rtol=tolerance, atol=tolerance * max(1, theirs.abs().max().item())
            )
        with torch.no_grad():
            cosines = normalize(x64) @ normalize(w64).T
            others = cosines.scatter(1, y[:, None], -torch.inf)
            torch.testing.assert_close(judged.own.double(), cosines.gather(1, y[:, None])[:, 0], atol=1e-5, rtol=0)
            if name != "softmax":  # whose likeliest class is not the one of the nearest centre
                torch.testing.assert_close(judged.nearest.double(), others.max(dim=1).values, atol=1e-5, rtol=0)
            scores = x64 @ w64.T if name == "softmax" else cosines
            assert (judged.correct == (scores.argmax(dim=1) == y)).all()


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("chunk", [3, 100])
def test_gradients_are_finite_differences(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", chunk)
    monkeypatch.setattr(heads, "_ROWS", {"cpu": 2})
    torch.manual_seed(1)
    head = MAKE[name](7, 5).double().eval()  # so that a step leaves no trace
    if isinstance(head, AdaFace):
        head.deviation.fill_(1e9)  # what the length decides has no gradient by design; so no difference either
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 6, 3, 3])
    head(x, y).loss.backward()
    for leaf in (x, head.weight):
        assert leaf.grad is not None
        for i in range(leaf.numel()):
            entry = leaf.data.view(-1)
            value, step, losses = entry[i].item(), 1e-6, []
            for moved in (value + step, value - step):
                entry[i] = moved
                losses.append(head(x, y).loss.item())
            entry[i] = value
            difference = (losses[0] - losses[1]) / (2 * step)
            assert leaf.grad.view(-1)[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-7)


def test_hand_worked() -> None:
    """Two orthogonal centres, an example on its own: cos = (1, 0), so L = ln(1 + e^{s·0 − s(1 − m)})."""
    head = CosFace(2, 2, scale=4.0, margin=0.25)
    head.weight.data = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    judged = head(torch.tensor([[5.0, 0.0]]), torch.tensor([0]))
    assert judged.loss.item() == pytest.approx(math.log(1 + math.exp(-4 * 0.75)), abs=1e-6)
    assert (judged.own.item(), judged.nearest.item()) == (1, 0)
    assert judged.correct.item()
    assert judged.beyond.item()
    near = head(torch.tensor([[1.0, 0.9]]), torch.tensor([0]))  # nearer to its own by less than the margin
    assert near.correct.item()
    assert not near.beyond.item()


def test_psi_of_a_softmax_at_the_ends_of_its_pieces() -> None:
    """SphereFace, section 3.3: ψ falls from 1 at θ = 0 to 1 − 2m at π, without a jump at any kπ/m."""
    head = ASoftmax(2, 2, 4, 0.0, 0.0, 0.0)
    angles = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    psi = head.margined(angles.cos(), torch.ones_like(angles))
    assert psi[0].item() == pytest.approx(1)
    assert psi[-1].item() == pytest.approx(1 - 2 * 4, abs=1e-5)
    assert (psi.diff() < 1e-9).all()
    assert psi.diff().abs().max() < 4 * math.pi / 4000


def test_arcface_falls_all_the_way() -> None:
    """With the guard, the own class's target falls with the angle, also where θ + m is beyond π."""
    angles = torch.linspace(0.001, math.pi - 0.001, 4001, dtype=torch.float64)
    target = ArcFace(2, 2, 64.0, 0.5, easy=False).margined(angles.cos(), torch.ones_like(angles))
    assert (target.diff() < 0).all()


def test_annealing_is_spherefaces() -> None:
    """λ = max(5, 1000 / (1 + 0.12 t)), t counting the iterations of training, in however many parts."""
    head = ASoftmax(3, 4, 4, 1000.0, 5.0, 0.12)
    x, y = torch.randn(2, 4), torch.tensor([0, 1])
    for t in range(3):
        for _ in range(4):
            head(x, y)
            assert head.annealing.item() == pytest.approx(1000 / (1 + 0.12 * t))
        head.advance()
    head.eval()
    head(x, y)
    assert head.steps.item() == 3
    head.steps.fill_(10**6)
    assert head.annealing.item() == 5


def test_adaface_keeps_running_statistics_of_lengths() -> None:
    head = AdaFace(3, 4, 64.0, 0.4, 0.333, 0.1)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    head(x, y)
    head.advance()
    norms = x.norm(dim=1)
    assert head.mean.item() == pytest.approx(0.9 * 20 + 0.1 * norms.mean().item(), rel=1e-5)
    assert head.deviation.item() == pytest.approx(0.9 * 100 + 0.1 * norms.std().item(), rel=1e-5)
    state = {name: value.clone() for name, value in head.state_dict().items()}
    head.eval()(x, y)
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


def test_adaface_counts_a_batch_in_parts_once() -> None:
    """What is remembered is as of the whole; the last part is scored as within it, and the first as by itself."""
    torch.manual_seed(0)
    norms, cosines = torch.linspace(3, 40, 12), torch.linspace(-0.5, 0.9, 12)
    whole, parted, first = (AdaFace(3, 4, 64.0, 0.4, 0.333, 0.1) for _ in range(3))
    for _ in range(3):
        targets = whole.margined(cosines, norms)
        parts = [parted.margined(*part) for part in zip(cosines.split(4), norms.split(4), strict=True)]
        assert torch.equal(parts[0], first.margined(cosines[:4], norms[:4]))
        assert torch.equal(parts[2], targets[8:])
        for head in (whole, parted):
            head.advance()
        assert torch.equal(parted.mean, whole.mean)
        assert torch.equal(parted.deviation, whole.deviation)
        first.load_state_dict(whole.state_dict())
        first._lengths.clear()


@pytest.mark.parametrize("name", MAKE)
def test_an_embedding_too_long_for_fp32_leaves_no_finite_loss(name: str) -> None:
    """Its squares overflow; divided by a length of infinity it would be 0, and the loss an ordinary number."""
    head = MAKE[name](5, 4)
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert head(x, y).loss.isfinite()
    x[1] *= 1e20
    assert x.isfinite().all()
    assert not head(x, y).loss.isfinite()


class Held(TorchDispatchMode):
    """The most bytes that tensors of at least `least` numbers, made within it, hold at a time."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least:
                self._storages.add(tensor.untyped_storage())
        self.most = max(self.most, sum(storage.nbytes() for storage in self._storages))
        return out


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("chunk", [200, 100, 40])
def test_products_are_held_once_and_of_a_chunk_alone(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 examples and 200 classes, forward and backward; a plain cross-entropy holds them several times."""
    monkeypatch.setattr(heads, "CHUNK", chunk)
    head, x, y = MAKE[name](200, 4), torch.randn(32, 4, requires_grad=True), torch.arange(32)
    with Held(least=32 * chunk) as held:
        head(x, y).loss.backward()
    assert held.most == 4 * 32 * chunk
    with Held(least=32 * 200) as plain:
        torch.nn.functional.cross_entropy(x @ head.weight.T, y).backward()
    assert plain.most >= 3 * 4 * 32 * 200


@pytest.mark.parametrize("name", MAKE)
def test_fp32_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    head = MAKE[name](50, 32).eval()
    x, y = torch.randn(16, 32), torch.randint(50, (16,))
    plain = head(x, y).loss
    plain.backward()
    assert head.weight.grad is not None
    gradient = head.weight.grad.clone()
    head.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cast = head(x, y).loss
        cast.backward()
    assert cast.dtype == torch.float32
    assert cast.item() == plain.item()
    assert torch.equal(head.weight.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_lose_nothing_more(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = CosFace(50, 32, 64.0, 0.35)
    x, y = torch.randn(16, 32).to(dtype), torch.randint(50, (16,))
    assert head(x, y).loss.item() == head(x.float(), y).loss.item()


def test_at_the_centre_and_opposite_to_it_gradients_are_finite() -> None:
    for make in MAKE.values():
        head = make(3, 4)
        x = torch.stack([head.weight[0].detach() * 7, -head.weight[1].detach(), torch.zeros(4)]).requires_grad_()
        judged = head(x, torch.tensor([0, 1, 2]))
        judged.loss.backward()
        assert judged.loss.isfinite()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert head.weight.grad is not None
        assert head.weight.grad.isfinite().all()


def test_a_gradient_is_to_be_had_once() -> None:
    head = CosFace(5, 4, 64.0, 0.35)
    loss = head(torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_similarities_of_a_class_alone_in_its_chunk() -> None:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    y = torch.tensor([0, 2, 4])
    whole, single = (similarities(x, w, y, chunk=chunk) for chunk in (5, 1))
    torch.testing.assert_close(whole.others, single.others)
    torch.testing.assert_close(whole.own, single.own)
    assert torch.equal(whole.index, single.index)


def test_bounds_as_the_paper_has_them() -> None:
    bounds = [scale_lower_bound(10_575, p) for p in (0.9, 0.99, 0.999)]
    assert bounds == pytest.approx([11.5, 13.9, 16.2], abs=0.05)
    assert margin_upper_bound(8, 2) == pytest.approx(1 - math.sqrt(0.5))
    assert margin_upper_bound(3, 512) == 1.5


def test_each_section_builds_its_head() -> None:
    sections: list[params.Head] = [
        params.Softmax(name="softmax"),
        params.NSL(name="nsl", scale=30),
        params.ASoftmax(name="a-softmax", margin=4, first=1000, least=5, rate=0.12),
        params.CosFace(name="cosface", scale=64, margin=0.35),
        params.ArcFace(name="arcface", scale=64, margin=0.5, easy=False),
        params.AdaFace(name="adaface", scale=64, margin=0.4, concentration=0.333, momentum=0.01),
    ]
    shown = [str(heads.build_head(section, 5, 4)) for section in sections]
    assert shown == [
        "Softmax(classes=5)",
        "CosFace(classes=5, scale=30, margin=0)",
        "ASoftmax(classes=5, margin=4, first=1000, least=5, rate=0.12)",
        "CosFace(classes=5, scale=64, margin=0.35)",
        "ArcFace(classes=5, scale=64, margin=0.5, easy=0)",
        "AdaFace(classes=5, scale=64, margin=0.4, concentration=0.333, momentum=0.01)",
    ]
    assert [section.summary for section in sections][3:5] == ["CosFace (s = 64, m = 0.35)", "ArcFace (s = 64, m = 0.5)"]


@pytest.mark.parametrize(("classes", "embedding"), [(10, 16), (7, 5), (3, 3), (1001, 33)])
def test_centres_are_drawn_in_stretches_as_at_once(
    classes: int, embedding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    whole = torch.nn.init.xavier_normal_(torch.empty(classes, embedding))
    after = torch.get_rng_state()
    for stretch in (16, 48, 1 << 20):
        monkeypatch.setattr(heads, "_STRETCH", stretch)
        for wanted in (range(classes), range(1, classes - 1), range(classes // 2, classes)):
            torch.manual_seed(3)
            drawn = heads.draw_centres(classes, embedding, wanted)
            assert torch.equal(drawn, whole[wanted.start : wanted.stop])
            assert torch.equal(torch.get_rng_state(), after)


def test_a_rank_builds_its_slice_of_the_head() -> None:
    section = params.AdaFace(name="adaface", scale=64, margin=0.4, concentration=0.333, momentum=0.01)
    torch.manual_seed(3)
    whole = heads.build_head(section, 11, 4)
    slices = []
    for rank in range(3):
        torch.manual_seed(3)
        slices.append(heads.build_head(section, 11, 4, Ranks(rank, 3)))
    assert torch.equal(torch.cat([head.weight for head in slices]), whole.weight)
    assert all(head.classes == 11 and head.scale == 64 for head in slices)
    with pytest.raises(InputError, match="5 identities are too few for 3 processes"):
        heads.build_head(section, 5, 4, Ranks(0, 3))
