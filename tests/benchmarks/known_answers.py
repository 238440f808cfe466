"""Test whether signals reveal a planted shortcut before accuracy does, and stay quiet when nothing is wrong.

Adebayo et al. 2022 (arXiv:2212.04629) ask it of explanations. A model that knows its task is fine-tuned on images in
which a corner square, or the tint of the background, gives the label away (`planted`); or on images in which neither
says anything, in five ordinary situations (`planted_runs.CONTROLS`). Signals are in `planted_signals`.

The rules were set before the runs. For each signal, the threshold is the highest value that a control of the threshold
seeds has at any snapshot, moved up by a quarter of its size; one threshold holds for both data sets. Its alarm is the
first snapshot above the threshold. `lead` is the number of optimiser steps from the alarm to where accuracy on images
whose hints are random has lost, for good, half of what it loses in the run. A signal that never alarms is counted as
one snapshot after the end. Runs whose accuracy loses less than a tenth have no lead.

    python -m tests.benchmarks.known_answers --output runs.jsonl
    python -m tests.benchmarks.known_answers --output runs.jsonl --only 'photographs/corner/*' --seeds 0 1 2
    python -m tests.benchmarks.known_answers --from runs.jsonl

Runs that are already in the output are not repeated. Photographs need VIT_EXPLAIN_WEIGHTS (DINOv2 ViT-S/14) and
--stamps.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.crossings import alarm, bootstrap, lasting_fall, threshold, wilson
from tests.benchmarks.planted import STAMPS, Data, Photographs, ShapesData
from tests.benchmarks.planted_runs import CONTROLS, PLANS, SHORTCUTS, Row, run, started
from tests.benchmarks.planted_signals import EVERYWHERE, signals

MARGIN = 0.25
LEAST_LOSS = 0.1
THRESHOLD_SEEDS = range(100, 105)
Key = tuple[str, str]


def schedule(seed: int) -> list[str]:
    """Conditions of a seed: both shortcuts, unless it is for thresholds, and the controls in turn."""
    return [*(() if seed in THRESHOLD_SEEDS else SHORTCUTS), CONTROLS[seed % len(CONTROLS)]]


@dataclass
class Found:
    """What one signal does on the evaluation seeds.

    Attributes:
        threshold: Above it is an alarm.
        leads: By data set, one a seed.
        raised: By data set, whether it alarms at all, one a seed.
        alarms: Names of the controls in which it alarms.
    """

    threshold: float
    leads: dict[str, list[float]]
    raised: dict[str, list[bool]]
    alarms: list[str]


def judge(rows: Sequence[Row], region: str) -> tuple[dict[str, Found], int]:
    """Each signal of a region on the evaluation seeds, and the number of their controls; none without a threshold."""
    curves = [
        (row, {name: curve for (name, at), curve in signals(row).items() if at in (region, EVERYWHERE)}) for row in rows
    ]
    quiet = [(row, found) for row, found in curves if row.condition in CONTROLS]
    thresholding = [found for row, found in quiet if row.seed in THRESHOLD_SEEDS]
    evaluated = [(row, found) for row, found in quiet if row.seed not in THRESHOLD_SEEDS]
    planted = [(row, found) for row, found in curves if row.condition == region and row.seed not in THRESHOLD_SEEDS]
    judged = {}
    for name in thresholding[0] if thresholding else ():
        highest = [max((v for v in found[name] if not math.isnan(v)), default=math.nan) for found in thresholding]
        if all(map(math.isnan, highest)):
            continue
        level = threshold(highest, MARGIN)
        leads: dict[str, list[float]] = {}
        raised: dict[str, list[bool]] = {}
        for row, found in planted:
            leads.setdefault(row.data, []).append(lead(row, found[name], level))
            raised.setdefault(row.data, []).append(alarms_at_all(row, found[name], level))
        false = [(row, found) for row, found in evaluated if alarms_at_all(row, found[name], level)]
        judged[name] = Found(level, leads, raised, [f"{row.data} {row.condition} {row.seed}" for row, _ in false])
    return judged, len(evaluated)


def alarms_at_all(row: Row, curve: Sequence[float], level: float) -> bool:
    return not math.isnan(alarm(list(zip(row.steps, curve, strict=True)), level))


def lead(row: Row, curve: Sequence[float], level: float) -> float:
    """Steps from the alarm to the loss of half of what accuracy loses; NaN if it loses too little."""
    if row.accuracy[0] - row.accuracy[-1] < LEAST_LOSS:
        return math.nan
    half = lasting_fall(list(zip(row.steps, row.accuracy, strict=True)), (row.accuracy[0] + row.accuracy[-1]) / 2)
    step = alarm(list(zip(row.steps, curve, strict=True)), level)
    return half - (row.steps[-1] + row.steps[1] if math.isnan(step) else step)


def print_tables(rows: Sequence[Row], patterns: Sequence[str] = ("*",)) -> None:
    for condition in (*SHORTCUTS, *CONTROLS):
        for data in PLANS:
            some = [row for row in rows if (row.condition, row.data) == (condition, data) and row.seed < 100]
            if some:
                means = [statistics.fmean(row.accuracy[end] for row in some) for end in (0, -1)]
                print(f"{data}, {condition}: {len(some)} runs, accuracy {means[0]:.2f} → {means[1]:.2f}")
    if not any(row.seed in THRESHOLD_SEEDS and row.condition in CONTROLS for row in rows):
        print(f"\nNo tables: thresholds are made of seeds {THRESHOLD_SEEDS[0]} … {THRESHOLD_SEEDS[-1]}; run them too.")
        return
    for region in SHORTCUTS:
        judged, controls = judge(rows, region)
        names = sorted({data for found in judged.values() for data in found.leads}, reverse=True)
        print(f"\nShortcut: {region}\n")
        columns = [f"{name}: alarms · lead · ahead" for name in names]
        print(f"| signal | alarm above | {' | '.join(columns)} | false alarms |")
        print("|---|---|" + "---|" * len(names) + "---|")
        shown = {name: found for name, found in judged.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        for name, found in sorted(shown.items(), key=lambda item: _order(item[1])):
            cells = [
                f"{sum(found.raised[data])} of {len(found.raised[data])} · {lead_cell(found.leads[data])}"
                for data in names
            ]
            print(f"| {name} | {found.threshold:.3g} | {' | '.join(cells)} | {share(len(found.alarms), controls)} |")


def _order(found: Found) -> float:
    """Best first: by how many runs it is ahead of, in all."""
    return -sum(value > 0 for leads in found.leads.values() for value in leads)


def lead_cell(leads: Sequence[float]) -> str:
    """Mean lead with its interval, and in how many runs it is above 0.

    Example:
        >>> lead_cell([4.0, 4.0, math.nan])
        '4.0 (4.0 to 4.0) · 2 of 2'
    """
    known = [value for value in leads if not math.isnan(value)]
    if not known:
        return "–"
    low, high = bootstrap(known)
    return f"{statistics.fmean(known):.1f} ({low:.1f} to {high:.1f}) · {sum(v > 0 for v in known)} of {len(known)}"


def share(count: int, of: int) -> str:
    if not of:
        return "–"
    low, high = wilson(count, of)
    return f"{count} of {of} ({low:.0%} to {high:.0%})"


def read(path: Path) -> list[Row]:
    """The runs of a file of JSON lines."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def wanted(seeds: Iterable[int], patterns: Sequence[str]) -> list[tuple[str, str, int]]:
    """(data, condition, seed) of the runs to make: those of the first pattern first.

    Example:
        >>> wanted([7], ["*/corner/*", "shapes/*"])[1:]
        [('photographs', 'corner', 7), ('shapes', 'background', 7), ('shapes', 'lr decay', 7)]
    """
    every = [(data, condition, seed) for seed in seeds for data in PLANS for condition in schedule(seed)]
    ordered = [run for pattern in patterns for run in every if fnmatch.fnmatch("/".join(map(str, run)), pattern)]
    return list(dict.fromkeys(ordered))


def make(args: argparse.Namespace) -> None:
    """Make the runs that the output does not hold, and append each as it ends."""
    datas: dict[str, Data] = {"shapes": ShapesData(), "photographs": Photographs(args.stamps)}
    starts: dict[tuple[str, int], Any] = {}
    for name, condition, seed in wanted(args.seeds, args.only):
        if any((row.data, row.condition, row.seed) == (name, condition, seed) for row in read(args.output)):
            continue
        data, plan = datas[name], PLANS[name]
        if (name, seed // plan.shared) not in starts:
            starts[name, seed // plan.shared] = started(data, plan, seed)
        row = run(data, plan, starts[name, seed // plan.shared], condition, seed)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*THRESHOLD_SEEDS, *range(10)])
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="patterns of data/condition/seed, in order, as shapes/* or */corner/*"
    )
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of Tux Paint's stamps")
    parser.add_argument("--output", type=Path, default=Path("known_answers.jsonl"), help="a line is added for each run")
    parser.add_argument("--from", type=Path, dest="source", help="make the tables of this file, and no run")
    parser.add_argument("--signals", nargs="+", default=["*"], help="patterns of the signals to print")
    args = parser.parse_args(arguments)
    if args.source is None:
        make(args)
    print_tables(read(args.source or args.output), args.signals)


if __name__ == "__main__":
    main()
