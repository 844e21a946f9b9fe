"""The learning rate at each iteration."""

import math
from bisect import bisect_right

from pipeline.params import Cosine, Polynomial, Schedule, Steps


def learning_rate(base: float, schedule: Schedule, iteration: int) -> float:
    """The rate of an iteration, counted from 0.

    In the first `warmup` iterations it rises linearly to `base`. Then, with t the share of the others that is over,
    steps: `base`, multiplied by `factor` at each milestone (CosFace, section 4.1); cosine: base · (1 + cos πt) / 2
    (Loshchilov and Hutter, ICLR 2017, Eq. 5); polynomial: base · (1 − t)^power.
    """
    if iteration < schedule.warmup:
        return base * (iteration + 1) / schedule.warmup
    over = (iteration - schedule.warmup) / (schedule.iterations - schedule.warmup)
    match schedule:
        case Steps():
            return base * schedule.factor ** bisect_right(schedule.milestones, iteration)
        case Cosine():
            return base * (1 + math.cos(math.pi * over)) / 2
        case Polynomial():
            return base * (1 - over) ** schedule.power
