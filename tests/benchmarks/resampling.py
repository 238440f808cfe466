"""Compute bootstrap intervals over seeds and images, the separation d', and the rule for the default methods.

Values are one array a task, (S, I, …): S seeds, each of which explains the same I images. A statistic is one number of
such arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Tasks: TypeAlias = Sequence[Array]
DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval.

    Example:
        >>> print(Interval(0.5, 0.25, 0.75))
        0.50 (0.25 to 0.75)
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    @property
    def has_zero(self) -> bool:
        """Whether nothing is a possible value."""
        return self.low <= 0 <= self.high


def bootstrap(statistic: Callable[[Tasks], float], tasks: Tasks) -> Interval:
    """A statistic and its 95 % percentile interval.

    In each draw seeds are drawn with replacement, and images, the same ones for all of those seeds: what is particular
    to an image is so at every seed. Tasks are drawn independently. The draws are the same in every call, so that two
    statistics of the same images are compared on the same draws.
    """
    rng = np.random.default_rng(0)
    found = [statistic([_drawn(values, rng) for values in tasks]) for _ in range(DRAWS)]
    low, high = np.nanpercentile(found, (2.5, 97.5)) if not np.isnan(found).all() else (math.nan, math.nan)
    return Interval(statistic(tasks), float(low), float(high))


def _drawn(values: Array, rng: np.random.Generator) -> Array:
    seeds, images = values.shape[:2]
    drawn: Array = values[rng.integers(seeds, size=seeds)][:, rng.integers(images, size=images)]
    return drawn


def mean(tasks: Tasks) -> float:
    """Mean over tasks of the mean over what is known of each: a task of few images counts as much as one of many.

    Example:
        >>> mean([np.array([[1.0, 3.0]]), np.array([[10.0, np.nan]])])
        6.0
    """
    return float(np.mean([np.nanmean(values) if np.isfinite(values).any() else math.nan for values in tasks]))


def d_prime(same: Array, other: Array) -> float:
    """Distance of two means in units of the root of the mean variance; above 0 where `other` is greater.

    Example:
        >>> d_prime(np.array([0.0, 2.0]), np.array([4.0, 6.0, np.nan]))
        4.0
    """
    same, other = same[np.isfinite(same)], other[np.isfinite(other)]
    spread = math.sqrt((same.var() + other.var()) / 2) if same.size and other.size else 0.0
    return float(other.mean() - same.mean()) / spread if spread > 0 else math.nan


def separation(columns: int, sign: float) -> Callable[[Tasks], float]:
    """The statistic d', mean over tasks, of arrays (S, I, C) whose first `columns` are of changes to be ignored.

    `sign` is 1 for a metric that grows with drift, and -1 for one that falls.
    """

    def statistic(tasks: Tasks) -> float:
        return float(np.mean([sign * d_prime(values[..., :columns], values[..., columns:]) for values in tasks]))

    return statistic


def difference(statistic: Callable[[Tasks], float]) -> Callable[[Tasks], float]:
    """The statistic of the first half of the last axis, minus that of the second: of a method and the one beside it."""

    def paired(tasks: Tasks) -> float:
        halves = [np.split(values, 2, axis=-1) for values in tasks]
        return statistic([half[0] for half in halves]) - statistic([half[1] for half in halves])

    return paired


@dataclass(frozen=True)
class Candidate:
    """How a method compares with the present default.

    Attributes:
        gain: Its SRG.
        more_gain: Its SRG minus the default's, paired by image.
        more_separation: The same of d'.
    """

    method: str
    gain: Interval
    more_gain: Interval
    more_separation: Interval

    @property
    def separates(self) -> bool:
        """Whether its d' is not worse: the interval of the difference is not wholly below 0."""
        return not self.more_separation.high < 0


def decide(candidates: Sequence[Candidate], default: str) -> str:
    """The default method by the rule in `methods.py`, of candidates among which is the present `default`.

    Example:
        >>> nothing = Interval(0.0, 0.0, 0.0)
        >>> now = Candidate("now", Interval(0.4, 0.3, 0.5), nothing, nothing)
        >>> new = Candidate("new", Interval(0.6, 0.5, 0.7), Interval(0.2, 0.1, 0.3), Interval(0.1, -0.2, 0.4))
        >>> decide([now, new], "now")
        'new'
    """
    best = max((each for each in candidates if each.separates), key=lambda each: each.gain.value)
    return default if best.more_gain.has_zero else best.method


def compared(
    gains: Mapping[str, Tasks], drift: Mapping[str, Tasks], default: str, statistic: Callable[[Tasks], float]
) -> list[Candidate]:
    """Every method beside the default.

    Args:
        gains: SRG by method, (S, I) or (S, I, C) of each task.
        drift: Values of the headline metric by method, (S, I, C).
        default: The present one.
        statistic: The separation of such values.
    """

    def beside(values: Mapping[str, Tasks], method: str) -> Tasks:
        pairs = zip(values[method], values[default], strict=True)
        return [np.concatenate([one, other], axis=-1) for one, other in pairs]

    return [
        Candidate(
            method,
            bootstrap(mean, gains[method]),
            bootstrap(difference(mean), beside(gains, method)),
            bootstrap(difference(statistic), beside(drift, method)),
        )
        for method in gains
    ]
