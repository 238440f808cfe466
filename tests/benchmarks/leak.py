"""What many snapshots leave: memory, handles, threads and bytes on the disk: `python -m tests.benchmarks.leak`."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytorch_lightning as pl
import torch

from tests.runs import Pictures, fit, loader
from vit_explain_callback import ViTExplainCallback


@dataclass
class Usage(pl.Callback):
    """What is in use after every step.

    Attributes:
        folder: Of the run.
        series: A value after every step by name: `resident` and `cuda` memory in kB, `handles` that are open,
            `threads`, and on the disk the bytes of `events` and `maps` and the number of `pictures`, which are files.
    """

    folder: Path
    series: dict[str, list[float]] = field(default_factory=dict)

    def on_train_batch_end(self, *_: object) -> None:
        process = psutil.Process()
        handles = process.num_handles() if hasattr(process, "num_handles") else process.num_fds()
        now = {
            "resident": process.memory_info().rss / 1024,
            "cuda": torch.cuda.memory_allocated() / 1024 if torch.cuda.is_initialized() else 0.0,
            "handles": handles,
            "threads": process.num_threads(),
            "events": _bytes(self.folder, "events.out*"),
            "maps": _bytes(self.folder, "step_*.safetensors"),
            "pictures": len(list(self.folder.rglob("*.png"))),
        }
        for name, value in now.items():
            self.series.setdefault(name, []).append(float(value))


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


def measure(snapshots: int, accelerator: str = "cpu", with_callback: bool = True) -> dict[str, list[float]]:
    """Train with a snapshot after every step."""
    callback = ViTExplainCallback(every_n_steps=1, num_images=8, num_shown=1, on_error="raise")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usage = Usage(Path(folder))
        fit(
            callback if with_callback else None,
            Path(folder),
            train=loader(Pictures(), 16),
            max_epochs=snapshots,
            accelerator=accelerator,
            more_callbacks=[usage],
        )
    return usage.series


def slope(values: list[float], warm_up: int) -> float:
    """Least-squares slope a snapshot, leaving out the first `warm_up`."""
    rest = values[warm_up:]
    return float(np.polyfit(np.arange(len(rest)), rest, 1)[0])


def resident_memory_slope(snapshots: int, warm_up: int) -> float:
    """Growth of the resident set in kB a snapshot, once the history has its full length."""
    return slope(measure(snapshots)["resident"], warm_up)


def lines(series: dict[str, list[float]], warm_up: int) -> list[str]:
    """A line for each series: where it ends, and how it grows."""
    units = {"resident": "kB", "cuda": "kB", "events": "bytes", "maps": "bytes"}
    return [
        f"{name:9} {values[-1]:12,.0f} {units.get(name, ''):5} {slope(values, warm_up):+12,.2f} a step"
        for name, values in series.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshots", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100, help="first snapshots, left out of the slope")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    for title, with_callback in (("with", True), ("without", False)):
        found = measure(arguments.snapshots, arguments.accelerator, with_callback)
        print(f"{title} the callback", *lines(found, arguments.warm_up), sep="\n")
