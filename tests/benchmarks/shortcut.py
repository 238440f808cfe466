"""Test whether the lift of the shortcut's region reveals it before accuracy does.

Fine-tunes the example on images whose corner square gives the label away, once a seed, and reads the curves that the
callback logged. `lead` is the number of optimiser steps by which the square's lift first reaches 2 before accuracy
without the hint has lost, for good, half of what it loses in the run. The control is a new classifier on the model that
fine-tuning starts from, with nothing learnt: it moves maps too, but not to the square.

    python -m tests.benchmarks.shortcut --seeds 5
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from example_data import shapes
from pretrain import WEIGHTS, small_vit
from shapes import FINETUNE_CLASSES
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from tests.benchmarks.crossings import crossing, lasting_fall
from vit_explain_callback import explain
from vit_explain_callback.cli.weights import Weights
from vit_explain_callback.metrics.drift import spearman
from vit_explain_callback.metrics.localisation import region_statistics
from vit_explain_callback.metrics.margin import margin

ROOT = Path(__file__).parents[2]
LIFT = 2.0


def fine_tune(seed: int, every: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples/finetune.py"), "--cpu", "--output", str(folder)]
    options = ["--seed", str(seed), "--every-n-steps", str(every)]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    table = [line.split("|") for line in done.stdout.splitlines() if re.match(r"\s*\d+ \|", line)]
    accuracy = [(int(cells[0]), float(cells[2])) for cells in table]  # step, accuracy without the hint
    board = EventAccumulator(str(folder / "version_0"), {"scalars": 0})
    board.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(tag)]

    found: dict[str, float] = {"accuracy before": accuracy[0][1], "accuracy after": accuracy[-1][1]}
    half = lasting_fall(accuracy, (accuracy[0][1] + accuracy[-1][1]) / 2)
    for method in ("rollout", "grad_rollout"):
        lift = curve(f"explain/lift/square/{method}")
        found |= {f"{method} lift before": lift[0][1], f"{method} lift after": lift[-1][1]}
        found[f"{method} lead"] = half - crossing(lift, LIFT)
        found[f"{method} drift after"] = 1 - curve(f"explain/drift/baseline_rank_correlation/{method}")[-1][1]
    return found | {"half of the loss at step": half}


def new_head(seed: int) -> dict[str, float]:
    """The control: drift and lift when only the classifier is replaced."""
    probe = shapes(8, 32, seed, shortcut=True).probe
    torch.manual_seed(seed)
    model: Any = small_vit(len(FINETUNE_CLASSES))
    Weights.read(WEIGHTS).load_into(model)
    before = explain(model, probe.images, target=probe.labels).maps
    torch.nn.init.trunc_normal_(model.head.weight, std=model.head.weight.std().item())
    after = explain(model, probe.images, target=probe.labels).maps
    found: dict[str, float] = {}
    for method, maps in after.items():
        found[f"{method} drift, new head"] = 1 - spearman(maps, before[method]).nanmean().item()
        found[f"{method} lift, new head"] = region_statistics(maps, probe.regions["square"])["lift"].nanmean().item()
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t) of a value by seed; how many are known, if not all."""
    known = [value for value in values if math.isfinite(value)]
    error = margin(torch.tensor(known))
    if error is None:
        return "not known"
    missing = "" if len(known) == len(values) else f" ({len(known)} of {len(values)})"
    return f"{statistics.mean(known):.3g} ± {error:.2g}{missing}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every-n-steps", type=int, default=6)
    parser.add_argument("--output", type=Path, help="JSON file of the values by seed")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(args.seeds), unit="seed"):
            rows.append(fine_tune(seed, args.every_n_steps, Path(folder, str(seed))) | new_head(seed))
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:28s} {interval(values):24s} {', '.join(f'{value:.3g}' for value in values)}")
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
