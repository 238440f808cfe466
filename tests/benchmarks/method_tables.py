"""Format the values from `methods.py` as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import kendalltau, rankdata

from tests.benchmarks.method_rule import (
    DEFAULTS,
    REMOVALS,
    Runs,
    drifts,
    gains,
    sign_of,
    tasks_of,
    values,
)
from tests.benchmarks.method_values import CHANGES, RANDOM
from tests.benchmarks.resampling import Array, Interval, bootstrap, mean, separation
from vit_explain_callback.metrics.drift import METRICS

Row = Sequence[object]


def lines(runs: Runs, decided: Mapping[str, Any]) -> list[str]:
    """Everything, as it is printed."""
    found: list[str] = []
    for task in tasks_of(runs):
        of_task = [run for run in runs if run["task"] == task]
        images = values(runs, task, "changes", "mirror", "same").shape[1]
        accuracy = ", ".join(f"{run['accuracy']:.2f}" for run in of_task)
        seeds = ", ".join(str(run["seed"]) for run in of_task)
        found += [f"\n## {task}: {images} images, seeds {seeds}, accuracy {accuracy}"]
        for part in (faithfulness, separation_by_method, separation_by_metric, predictions, agreement, removals):
            found += part(runs, task)
    return found + decision_lines(decided)


def table(title: str, head: Row, rows: Sequence[Row]) -> list[str]:
    """A table with its title, and its first column in code.

    Example:
        >>> table("Lift", ["method", "lift"], [["rollout", 2.5]])
        ['', '### Lift', '', '| method | lift |', '|---|---|', '| `rollout` | 2.5 |']
    """
    body = [f"| `{name}` | {' | '.join(str(cell) for cell in cells)} |" for name, *cells in rows]
    return ["", f"### {title}", "", f"| {' | '.join(map(str, head))} |", "|" + "---|" * len(head), *body]


def faithfulness(runs: Runs, task: str) -> list[str]:
    def cell(method: str, name: str) -> str:
        return str(bootstrap(mean, [values(runs, task, "methods", method, name)]))

    columns = ["srg_mean_colour", "srg_tokens", "insertion", "deletion", "lift"]
    rows = []
    for method in sorted(_methods(runs), key=lambda each: -mean([gains(runs, task, each)])):
        scaled = "" if method == RANDOM else f"{mean([values(runs, task, 'methods', method, 'scaled')]):.2f}"
        rows.append([method, *(cell(method, name) for name in columns), scaled])
    head = ["method", "SRG, mean colour", "SRG, tokens dropped", "insertion ↑", "deletion ↓", "lift", "ρ, logits × 10"]
    return table("Faithfulness", head, rows)


def separation_by_method(runs: Runs, task: str) -> list[str]:
    """d' of every method by every measure, all changes together."""
    rows = [
        [method, *(_d_prime(runs, task, method, metric, CHANGES) for metric in METRICS)]
        for method in _methods(runs)
        if method != RANDOM
    ]
    return table("d', all changes together", ["method", *METRICS], rows)


def separation_by_metric(runs: Runs, task: str) -> list[str]:
    """d' by kind of change: the mean over methods of each measure."""
    methods = [method for method in _methods(runs) if method != RANDOM]
    rows = []
    for metric in METRICS:
        cells = []
        for change in CHANGES:
            statistic = separation(1, sign_of(metric))
            each = [statistic([drifts(runs, task, method, metric, [change])]) for method in methods]
            cells.append(f"{statistics.mean(each):.2f}")
        rows.append([metric, *cells])
    return table("d' by kind of change, mean over methods", ["measure", *CHANGES], rows)


def predictions(runs: Runs, task: str) -> list[str]:
    """What becomes of predictions under each change, and of maps where they hold and where they do not."""
    defaults = [method for method in DEFAULTS if method in _methods(runs)]
    rows = []
    for change in CHANGES:
        same = values(runs, task, "changes", change, "same")
        moved = values(runs, task, "changes", change, "probability")
        cells: list[object] = [bootstrap(mean, [same]), bootstrap(mean, [moved])]
        for method in defaults:
            rho = values(runs, task, "methods", method, "drift", "spearman", change)
            held, lost = (mean([np.where(same == each, rho, np.nan)]) for each in (1, 0))
            cells.append(f"{held:.2f} / {lost:.2f}")
        rows.append([change, *cells])
    head = ["change", "predictions that hold", "mean change of the label's probability"]
    head += [f"`{method}`, ρ where it holds / not" for method in defaults]
    return table("Does the prediction hold?", head, rows)


def agreement(runs: Runs, task: str) -> list[str]:
    names = _methods(runs)
    matrix = np.nanmean(values(runs, task, "agreement"), axis=(0, 3))
    rows = [[name, *(f"{each:.2f}" for each in row)] for name, row in zip(names, matrix, strict=True)]
    return table("Rank correlation between methods", ["", *names], rows)


def removals(runs: Runs, task: str) -> list[str]:
    """How well SRG with tokens dropped agrees with that by mean colour, and how much sooner it is there."""
    methods = [method for method in _methods(runs) if method != RANDOM]
    both = np.stack([gains(runs, task, method) for method in methods])  # (methods, S, I, 2)
    means = np.nanmean(both, axis=(1, 2))
    tau = kendalltau(means[:, 0], means[:, 1]).statistic
    over_methods = rank_correlations(both[..., 0].reshape(len(methods), -1), both[..., 1].reshape(len(methods), -1))
    over_images = [
        float(np.nanmean(rank_correlations(both[:, seed, :, 0].T, both[:, seed, :, 1].T)))
        for seed in range(both.shape[1])
    ]
    ratios = [
        run["methods"][method]["seconds_mean_colour"][0] / run["methods"][method]["seconds_tokens"][0]
        for run in runs
        if run["task"] == task
        for method in methods
    ]
    pairs = list(combinations(methods, 2))
    same = sum(_same_verdict(runs, task, *pair) for pair in pairs)
    return [
        "",
        "### Tokens dropped, beside the mean colour",
        "",
        f"- order of methods by their mean SRG: Kendall's τ {tau:.2f}",
        f"- order of methods on one image: ρ {np.nanmean(over_methods):.2f}; of images by one method: "
        f"ρ {statistics.mean(over_images):.2f}",
        f"- pairs of methods that neither or both tell apart, with the same sign: {same} of {len(pairs)}",
        f"- CPU time: {statistics.median(ratios):.2f} × less ({min(ratios):.2f}–{max(ratios):.2f})",
    ]


def rank_correlations(one: Array, other: Array) -> Array:
    """Spearman's rank correlation of each column; NaN where one has no ranking.

    Example:
        >>> rank_correlations(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 9], [6.0, 8], [9.0, 7]]))
        array([ 1., -1.])
    """
    first, second = (rankdata(each, axis=0) for each in (one, other))
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    size = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    found: Array = (first * second).sum(axis=0) / np.where(size > 0, size, np.nan)
    return found


def _same_verdict(runs: Runs, task: str, one: str, other: str) -> bool:
    gap = gains(runs, task, one) - gains(runs, task, other)
    found = [bootstrap(mean, [gap[..., place]]) for place in range(len(REMOVALS))]
    verdicts = {0 if each.has_zero else np.sign(each.value) for each in found}
    return len(verdicts) == 1


def decision_lines(decided: Mapping[str, Any]) -> list[str]:
    def interval(of: Mapping[str, float]) -> Interval:
        return Interval(**of)

    rows: list[Row] = [
        [metric, *(interval(each) for each in by_method.values())]
        for metric, by_method in decided["separation"].items()
    ]
    heads = next(iter(decided["separation"].values()))
    found = ["\n## The rule", *table("Headline measure: d' of the default methods", ["measure", *heads], rows)]
    found += ["", f"The headline measure is `{decided['headline']}`."]
    for default, kind in decided["kinds"].items():
        rows = [
            [
                each["method"],
                *(interval(each[name]) for name in ("gain", "more_gain", "more_separation")),
                "yes" if each["separates"] else "no",
            ]
            for each in sorted(kind["candidates"], key=lambda each: -each["gain"]["value"])
        ]
        head = ["method", "SRG", "SRG, above the default", "d', above the default", "d' not worse"]
        found += table(f"Beside `{default}`", head, rows)
        chosen = kind["chosen"]
        verdict = "stays" if chosen == default else f"gives way to `{chosen}`"
        found += ["", f"By the rule, `{default}` {verdict}."]
    return found


def _methods(runs: Runs) -> list[str]:
    """The methods of all runs, in the order of the first."""
    return [name for name in runs[0]["methods"] if all(name in run["methods"] for run in runs)]


def _d_prime(runs: Runs, task: str, method: str, metric: str, changes: Sequence[str]) -> Interval:
    statistic: Callable[..., float] = separation(len(changes), sign_of(metric))
    return bootstrap(statistic, [drifts(runs, task, method, metric, changes)])
