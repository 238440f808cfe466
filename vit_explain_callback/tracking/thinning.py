"""Thin out the snapshots of a run evenly in the logarithm of the step."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def thinned(steps: Sequence[int], count: int, last: int = 1) -> list[int]:
    """Indices of `count` ascending steps: the first, the `last` ones, and others evenly spaced in the logarithm.

    The step whose neighbours lie closest in log(1 + steps since the first) is dropped, again and again.

    Args:
        steps: Ascending.
        count: How many to keep; all of them if there are fewer. The first and the `last` ones always stay.
        last: How many of the last steps always stay.

    Example:
        >>> thinned([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 6)
        [0, 1, 2, 3, 5, 9]
    """
    place = [math.log1p(step - steps[0]) for step in steps]
    end = len(steps) - last
    before, after = [index - 1 for index in range(len(steps))], [index + 1 for index in range(len(steps))]
    gaps = [(place[after[index]] - place[before[index]], index) for index in range(1, end)]
    heapq.heapify(gaps)
    dropped: set[int] = set()
    while gaps and len(steps) - len(dropped) > count:
        gap, index = heapq.heappop(gaps)
        left, right = before[index], after[index]
        if index in dropped or gap != place[right] - place[left]:
            continue  # outdated: a neighbour was dropped since
        dropped.add(index)
        after[left], before[right] = right, left
        for neighbour in (left, right):
            if 0 < neighbour < end:
                heapq.heappush(gaps, (place[after[neighbour]] - place[before[neighbour]], neighbour))
    return [index for index in range(len(steps)) if index not in dropped]
