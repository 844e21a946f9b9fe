import math
from itertools import pairwise

import pytest

from pipeline.params import Cosine, Polynomial, Schedule, Steps
from stages.train.schedule import learning_rate

WARM: list[Schedule] = [
    Steps(name="steps", iterations=100, warmup=10, milestones=[50], factor=0.1),
    Cosine(name="cosine", iterations=100, warmup=10),
    Polynomial(name="polynomial", iterations=100, warmup=10, power=2),
]


def test_the_papers_schedule() -> None:
    """CosFace, section 4.1: 0.1, divided by 10 at 16K, 24K and 28K, ends at 30K."""
    schedule = Steps(name="steps", iterations=30_000, warmup=0, milestones=[16_000, 24_000, 28_000], factor=0.1)
    at = {0: 0.1, 15_999: 0.1, 16_000: 0.01, 23_999: 0.01, 24_000: 0.001, 28_000: 0.0001, 29_999: 0.0001}
    for iteration, rate in at.items():
        assert learning_rate(0.1, schedule, iteration) == pytest.approx(rate)


@pytest.mark.parametrize("schedule", WARM, ids=lambda schedule: schedule.name)
def test_warm_up_rises_linearly_and_then_no_rate_is_higher(schedule: Schedule) -> None:
    rates = [learning_rate(0.4, schedule, i) for i in range(schedule.iterations)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.4)
    assert all(a >= b > 0 for a, b in pairwise(rates[10:]))


def test_closed_forms() -> None:
    """Half way between warm-up and the end, and a tenth before the end."""
    for at, left in ((55, 1 / 2), (91, 1 / 10)):
        assert learning_rate(1.0, WARM[1], at) == pytest.approx((1 - math.cos(math.pi * left)) / 2)
        assert learning_rate(1.0, WARM[2], at) == pytest.approx(left**2)
