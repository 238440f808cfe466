"""Resident memory over many snapshots: `python -m tests.benchmarks.leak`."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytorch_lightning as pl
import torch

from tests.runs import Pictures, fit, loader
from vit_explain_callback import ViTExplainCallback


class _Meter(pl.Callback):
    """Notes memory in use after every step, in kB."""

    def __init__(self) -> None:
        self.resident: list[float] = []
        self.cuda: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.resident.append(psutil.Process().memory_info().rss / 1024)
        self.cuda.append(torch.cuda.memory_allocated() / 1024 if torch.cuda.is_initialized() else 0.0)


def measure(snapshots: int, accelerator: str = "cpu", with_callback: bool = True) -> _Meter:
    """Train with a snapshot after every step."""
    meter = _Meter()
    callback = ViTExplainCallback(every_n_steps=1, num_images=8, num_shown=1, on_error="raise")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            callback if with_callback else None,
            Path(folder),
            train=loader(Pictures(), 16),
            max_epochs=snapshots,
            accelerator=accelerator,
            more_callbacks=[meter],
        )
    return meter


def slope(kilobytes: list[float], warm_up: int) -> float:
    """Least-squares slope in kB a snapshot, leaving out the first `warm_up`."""
    rest = kilobytes[warm_up:]
    return float(np.polyfit(np.arange(len(rest)), rest, 1)[0])


def resident_memory_slope(snapshots: int, warm_up: int) -> float:
    """Growth of the resident set in kB a snapshot, once the history has its full length."""
    return slope(measure(snapshots).resident, warm_up)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshots", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=100, help="first snapshots, left out of the slope")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    for name, with_callback in (("with", True), ("without", False)):
        meter = measure(arguments.snapshots, arguments.accelerator, with_callback)
        print(
            f"{name} the callback: resident {meter.resident[-1] / 1024:.0f} MB, "
            f"{slope(meter.resident, arguments.warm_up):+.2f} kB a step; "
            f"CUDA {slope(meter.cuda, arguments.warm_up):+.3f} kB a step"
        )
