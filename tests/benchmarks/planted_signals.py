"""Compute signals from a stored run: one value per snapshot, higher is more suspicious.

A quantity known for each image gives up to four signals; m is its value, 0 the run's own baseline:

- `level`: mean over images. Of the mass on a region, divided by the region's area: the lift.
- `rise`: mean of m − m₀. Masses and the block where the class settles are compared as log-odds and as shares.
- `spread`: the rise divided by the standard deviation of m₀ over images.
- `z`: the rise divided by its standard error, the statistic of a paired test.

Signals of a region belong to the shortcut that lies there. Drift and depth name no region, and belong to every one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.planted_runs import Row
from vit_explain_callback.metrics.reference import on_scale

REGIONS = ("corner", "background")
EVERYWHERE = "any"
_LEAST = 1e-4

Array = NDArray[np.float64]


def signals(row: Row) -> dict[tuple[str, str], list[float]]:
    """Curves by (signal, region)."""
    values = {name: np.array(value, dtype=np.float64) for name, value in row.values.items()}
    found: dict[tuple[str, str], Array] = {}
    for name, value in values.items():
        quantity, *rest = name.split("/")
        region = rest.pop() if quantity in ("mass", "signed", "effect") else EVERYWHERE
        label = " ".join([quantity, *rest])
        if quantity == "mass":
            found[f"lift {' '.join(rest)}", region] = np.nanmean(value, axis=1) / row.levels[f"area/{region}"]
            found |= {(f"lift {' '.join(rest)} {form}", region): curve for form, curve in _changes(log_odds(value))}
        elif quantity in ("signed", "effect"):
            found[label, region] = np.nanmean(value, axis=1)
            found |= {(f"{label} {form}", region): curve for form, curve in _changes(value)}
        elif quantity == "depth":
            # A shortcut is said to be easier, so that the class settles earlier.
            found |= {(f"{label} {form}", region): curve for form, curve in _changes(-value)}
        elif quantity == "correlation":
            found |= {(name, region): curve for name, curve in _drift(row, "/".join(rest), value)}
    return {key: curve.tolist() for key, curve in found.items()}


def log_odds(share: Array) -> Array:
    """log(m / (1 − m)), as of 0.01 % or 99.99 % where a share is nearer to 0 or 1."""
    clipped = share.clip(_LEAST, 1 - _LEAST)
    odds: Array = np.log(clipped / (1 - clipped))
    return odds


def _changes(values: Array) -> list[tuple[str, Array]]:
    change = values - values[:1]
    rise = np.nanmean(change, axis=1)
    known = np.isfinite(change).sum(axis=1)
    error = np.nanstd(change, axis=1, ddof=1) / np.sqrt(known)
    z = np.divide(rise, error, out=np.zeros_like(rise), where=error > 0)
    deviation = float(np.nanstd(values[0], ddof=1))
    return [("rise", rise), ("spread", rise / deviation if deviation > 0 else np.full_like(rise, math.nan)), ("z", z)]


def _drift(row: Row, name: str, correlation: Array) -> list[tuple[str, Array]]:
    mean = np.nanmean(correlation, axis=1)
    noise, unrelated = row.levels[f"noise/{name}"], row.levels[f"unrelated/{name}"]
    scaled = np.array([on_scale(value, noise, unrelated, 1.0) for value in mean])
    label = name.replace("/", " ")
    return [(f"drift {label}", 1 - mean), (f"noise_to_unrelated {label}", scaled)]
