"""Find where curves cross a level, how far one leads another, and intervals over many runs."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise

Z_975 = 1.959964


def crossing(curve: Sequence[tuple[int, float]], level: float) -> float:
    """First step at which a curve, straight between its points, reaches a level from below; NaN if it never does.

    Example:
        >>> crossing([(0, 0.0), (10, 4.0), (20, 0.0)], 2.0)
        5.0
    """
    if curve[0][1] >= level:
        return float(curve[0][0])
    for (step, value), (later, reached) in pairwise(curve):
        if reached >= level:
            return step + (later - step) * (level - value) / (reached - value)
    return math.nan


def lasting_fall(curve: Sequence[tuple[int, float]], level: float) -> float:
    """Step from which on a curve that ends below a level stays below it.

    Example:
        >>> lasting_fall([(0, 4.0), (10, 1.0), (20, 4.0), (30, 0.0)], 2.0)
        25.0
    """
    backwards = [(-step, value) for step, value in reversed(curve)]
    return -crossing(backwards, level)


def alarm(curve: Sequence[tuple[int, float]], threshold: float) -> float:
    """Step of the first snapshot whose value is above a threshold, NaN if there is none.

    Example:
        >>> alarm([(0, 0.0), (10, math.nan), (20, 4.0)], 2.0)
        20.0
    """
    return next((float(step) for step, value in curve if value > threshold), math.nan)


def threshold(highest: Sequence[float], margin: float) -> float:
    """The smallest value that none of the highest values of quiet runs passes, moved up by a margin.

    The margin is a share of its magnitude, so that it also moves a negative value up.

    Example:
        >>> threshold([0.5, 2.0, math.nan], 0.25), threshold([-2.0], 0.25)
        (2.5, -1.5)
    """
    most = max(value for value in highest if not math.isnan(value))
    return most + margin * abs(most)


def bootstrap(values: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of a mean: percentiles over resamples, the same at every call.

    Example:
        >>> bootstrap([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    rng = random.Random(0)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927).

    Example:
        >>> [round(bound, 3) for bound in wilson(0, 20)]
        [0.0, 0.161]
    """
    share, square = count / of, Z_975**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    margin = Z_975 * math.sqrt(share * (1 - share) / of + square / (4 * of**2)) / (1 + square / of)
    return max(0.0, centre - margin), min(1.0, centre + margin)
