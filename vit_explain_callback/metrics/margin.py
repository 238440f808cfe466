"""Margin of error of a mean over few values, by Student's t."""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

LEVEL = 0.95
"""Of every interval that this package states, two-sided."""


def margin(values: Tensor, level: float = LEVEL) -> float | None:
    """Half the width of the confidence interval of the mean of the finite values; None for fewer than two of them.

    Args:
        values: Of any shape; independent, and about normally distributed.
        level: Probability that the interval holds the true mean.

    Example:
        >>> import torch
        >>> round(margin(torch.tensor([1.0, 2.0, 3.0])), 3)
        2.484
    """
    finite = values[values.isfinite()].double()
    if len(finite) < 2:
        return None
    return student_quantile(level, len(finite) - 1) * finite.std().item() / math.sqrt(len(finite))


@lru_cache(maxsize=256)
def student_quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = `level` for Student's distribution.

    Bisects the closed form of the probability in θ = arctan(t / √freedom), which is bounded where t is not.

    Args:
        level: In (0, 1).
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(student_quantile(0.95, 7), 4)
        2.3646
    """
    if not 0 < level < 1 or freedom < 1:
        raise ValueError(
            f"Expected `level` in (0, 1) and `freedom` of at least 1, but got {level!r:.80} and {freedom!r:.80}."
        )
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _probability(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| < √freedom · tan(angle)) for whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):  # of the cosine
        total += term
        term *= (power + 1) / (power + 2) * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
