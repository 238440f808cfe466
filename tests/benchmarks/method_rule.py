"""Apply the rule for the default methods to the values per image from `methods.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from tests.benchmarks.method_values import CHANGES
from tests.benchmarks.resampling import Array, Interval, Tasks, bootstrap, compared, decide, separation
from vit_explain_callback.metrics.drift import METRICS

Runs: TypeAlias = Sequence[Mapping[str, Any]]

CLASS_FREE = ("rollout", "rollout_from{half}", "rollout_max_0.9", "attention")
FOR_A_CLASS = ("grad_rollout", "grad_rollout_max_0.9", "chefer", "gradsam", "legrad", "legrad_from-2", "grad_attention")
DEFAULTS = ("rollout", "grad_rollout")
OTHERS = ("other0", "other1")
REMOVALS = ("mean_colour", "tokens")


def tasks_of(runs: Runs) -> list[str]:
    """Names of the tasks, in order."""
    return list(dict.fromkeys(run["task"] for run in runs))


def values(runs: Runs, task: str, *path: str) -> Array:
    """What stands under a path in each run of a task, (S, …)."""
    found = []
    for run in runs:
        if run["task"] == task:
            at: Any = run
            for name in path:
                at = at[name]
            found.append(at)
    return np.array(found, dtype=np.float64)  # None, which is JSON's NaN, becomes NaN


def gains(runs: Runs, task: str, method: str) -> Array:
    """SRG by both removals, (S, I, 2)."""
    return np.stack([values(runs, task, "methods", method, f"srg_{removal}") for removal in REMOVALS], axis=-1)


def drifts(runs: Runs, task: str, method: str, metric: str, changes: Sequence[str] = CHANGES) -> Array:
    """Values of a measure of drift under changes, and from two other images, (S, I, C)."""
    found = [values(runs, task, "methods", method, "drift", metric, name) for name in (*changes, *OTHERS)]
    return np.stack(found, axis=-1)


def sign_of(metric: str) -> float:
    """1 for a measure that grows with drift, and -1 for one that falls."""
    return 1.0 if METRICS[metric].unchanged == 0 else -1.0


def separations(runs: Runs) -> dict[str, dict[str, Interval]]:
    """d' of every measure: of each default method, and the mean of both."""
    width = len(CHANGES) + len(OTHERS)
    found: dict[str, dict[str, Interval]] = {}
    for metric in METRICS:
        by_method = {method: [drifts(runs, task, method, metric) for task in tasks_of(runs)] for method in DEFAULTS}
        statistic = separation(len(CHANGES), sign_of(metric))
        found[metric] = {method: bootstrap(statistic, arrays) for method, arrays in by_method.items()}
        # Side by side, so that one draw is of the same seeds and images for both.
        both = [np.concatenate(each, axis=-1) for each in zip(*by_method.values(), strict=True)]
        found[metric]["both"] = bootstrap(partial(_mean_of_methods, statistic, width), both)
    return found


def _mean_of_methods(statistic: Callable[[Tasks], float], width: int, tasks: Tasks) -> float:
    """Mean of a statistic over methods, whose values stand side by side in the last axis, `width` of each."""
    methods = [slice(first, first + width) for first in range(0, tasks[0].shape[-1], width)]
    return float(np.mean([statistic([values[..., method] for values in tasks]) for method in methods]))


def decision(runs: Runs) -> dict[str, Any]:
    """The headline measure, how every method compares with the present default of its kind, and what the rule says."""
    by_metric = separations(runs)
    headline = max(by_metric, key=lambda metric: by_metric[metric]["both"].value)
    statistic = separation(len(CHANGES), sign_of(headline))
    found: dict[str, Any] = {
        "headline": headline,
        "separation": {
            metric: {name: asdict(each) for name, each in of_metric.items()} for metric, of_metric in by_metric.items()
        },
        "kinds": {},
    }
    for default, kind in zip(DEFAULTS, (CLASS_FREE, FOR_A_CLASS), strict=True):
        methods = [method for method in kind if all(method in run["methods"] for run in runs)]
        candidates = compared(
            {method: [gains(runs, task, method) for task in tasks_of(runs)] for method in methods},
            {method: [drifts(runs, task, method, headline) for task in tasks_of(runs)] for method in methods},
            default,
            statistic,
        )
        found["kinds"][default] = {
            "candidates": [{**asdict(each), "separates": each.separates} for each in candidates],
            "chosen": decide(candidates, default),
        }
    return found
