import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.train.heads import CosFace, scale_lower_bound


def closed_form(x: np.ndarray, w: np.ndarray, y: np.ndarray, s: float, m: float) -> float:
    """Eq. 4 term by term, in float64."""
    losses = []
    for features, label in zip(x.astype(np.float64), y, strict=True):
        cosines = [float(features @ c / (np.linalg.norm(features) * np.linalg.norm(c))) for c in w.astype(np.float64)]
        exponents = [s * (cos - m) if j == label else s * cos for j, cos in enumerate(cosines)]
        top = max(exponents)
        losses.append(-(exponents[label] - top) + math.log(sum(math.exp(e - top) for e in exponents)))
    return float(np.mean(losses))


def one_hot_loss(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, s: float, m: float) -> torch.Tensor:
    """Eq. 4 the textbook way, from the definition of the cosine."""
    cosines = (x @ w.T) / (x.norm(dim=1, keepdim=True) * w.norm(dim=1))
    logits = s * (cosines - m * torch.nn.functional.one_hot(y, len(w)))
    return -logits.log_softmax(dim=1)[torch.arange(len(y)), y].mean()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    classes=st.integers(2, 12),
    dim=st.integers(2, 16),
    s=st.sampled_from([1.0, 16.0, 64.0]),
    m=st.sampled_from([0.0, 0.2, 0.35, 0.5]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_agree_with_float64(n: int, classes: int, dim: int, s: float, m: float, seed: int) -> None:
    torch.manual_seed(seed)
    head = CosFace(classes, dim, s, m)
    x = (3 * torch.randn(n, dim)).requires_grad_()
    y = torch.randint(classes, (n,))
    loss, predicted = head(x, y)
    loss.backward()
    w = head.weight.detach()
    assert loss.item() == pytest.approx(closed_form(x.detach().numpy(), w.numpy(), y.numpy(), s, m), rel=1e-5, abs=1e-5)
    x64, w64 = x.detach().double().requires_grad_(), w.double().requires_grad_()
    one_hot_loss(x64, w64, y, s, m).backward()
    assert x.grad is not None
    assert head.weight.grad is not None
    assert x64.grad is not None
    assert w64.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head.weight.grad.double(), w64.grad, rtol=1e-3, atol=1e-4)
    nearest = (torch.nn.functional.normalize(x64) @ torch.nn.functional.normalize(w64).T).argmax(dim=1)
    assert (predicted == nearest).all()


def test_hand_worked() -> None:
    """Two orthogonal centres, an example on its own: cos = (1, 0), so L = ln(1 + e^{s·0 − s(1 − m)})."""
    head = CosFace(2, 2, scale=4.0, margin=0.25)
    head.weight.data = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    loss, predicted = head(torch.tensor([[5.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-4 * 0.75)), abs=1e-6)
    assert predicted.tolist() == [0]


def test_a_margin_only_raises_the_loss_and_leaves_the_prediction() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randint(10, (32,))
    heads = [CosFace(10, 8, 64.0, m) for m in (0.0, 0.35)]
    heads[1].load_state_dict(heads[0].state_dict())
    (plain, predicted), (margined, same) = (head(x, y) for head in heads)
    assert margined > plain
    assert (predicted == same).all()


def test_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    head = CosFace(50, 32, 64.0, 0.35)
    x, y = torch.randn(16, 32), torch.randint(50, (16,))
    plain, _ = head(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = head(x, y)
    assert cast.dtype == torch.float32
    assert cast.item() == plain.item()


def test_scale_lower_bound_as_the_paper_has_it() -> None:
    bounds = [scale_lower_bound(10_575, p) for p in (0.9, 0.99, 0.999)]
    assert bounds == pytest.approx([11.5, 13.9, 16.2], abs=0.05)
