import pytest

from pipeline.params import Schedule
from stages.train.schedule import learning_rate


def test_the_papers_schedule() -> None:
    """CosFace, section 4.1: 0.1, divided by 10 at 16K, 24K and 28K, ends at 30K."""
    schedule = Schedule(iterations=30_000, warmup=0, milestones=[16_000, 24_000, 28_000], factor=0.1)
    at = {0: 0.1, 15_999: 0.1, 16_000: 0.01, 23_999: 0.01, 24_000: 0.001, 28_000: 0.0001, 29_999: 0.0001}
    for iteration, rate in at.items():
        assert learning_rate(0.1, schedule, iteration) == pytest.approx(rate)


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    schedule = Schedule(iterations=100, warmup=4, milestones=[50], factor=0.5)
    rates = [learning_rate(0.2, schedule, i) for i in range(6)]
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
