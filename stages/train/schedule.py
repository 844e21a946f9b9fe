"""The learning rate at each iteration."""

from bisect import bisect_right

from pipeline.params import Schedule


def learning_rate(base: float, schedule: Schedule, iteration: int) -> float:
    """The rate of an iteration, counted from 0: the paper's form (CosFace, section 4.1), after an optional warm-up.

    `base` until the first milestone, multiplied by `factor` at each milestone; in the first `warmup` iterations a
    linear rise to `base`.
    """
    if iteration < schedule.warmup:
        return base * (iteration + 1) / schedule.warmup
    return base * schedule.factor ** bisect_right(schedule.milestones, iteration)
