"""Measure what many snapshots leave (memory, handles, threads, bytes on disk), and whether later ones cost more.

python -m tests.benchmarks.leak
python -m tests.benchmarks.leak --snapshots 300 --num-images 64 --model vit_tiny_patch16_224
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytorch_lightning as pl
import timm
import torch

from tests.benchmarks.measure import in_new_process, live_bytes
from tests.benchmarks.snapshot import smooth_images
from tests.runs import Classifier, Pictures, fit, loader
from vit_explain_callback import ViTExplainCallback


@dataclass
class Usage(pl.Callback):
    """What is in use after every step.

    Python's collector runs first, since reference cycles are neither in use nor freed until then. Objects from before
    the first step are frozen: collecting them would take half a second each time.

    Attributes:
        folder: Of the run.
        series: A value after every step by name: `live`, `resident` and `cuda` memory in kB, `objects` of Python,
            `handles` that are open, `threads`, on the disk the bytes of `events` and `maps` and the number of
            `pictures`, which are files, and the `milliseconds` since the step before.
    """

    folder: Path
    _kept: dict[str, array[float]] = field(default_factory=dict)  # an array: a list of floats would itself be growth
    _before: float = field(default_factory=time.perf_counter)

    @property
    def series(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in self._kept.items()}

    def on_train_start(self, *_: object) -> None:
        gc.collect()
        gc.freeze()

    def teardown(self, *_: object, **__: object) -> None:
        gc.unfreeze()

    def on_train_batch_end(self, *_: object) -> None:
        milliseconds = 1000 * (time.perf_counter() - self._before)
        process = psutil.Process()
        handles = process.num_handles() if hasattr(process, "num_handles") else process.num_fds()
        gc.collect()
        now = {
            "milliseconds": milliseconds,
            "live": (live_bytes() or 0) / 1024,
            "objects": len(gc.get_objects()),
            "resident": process.memory_info().rss / 1024,
            "cuda": torch.cuda.memory_allocated() / 1024 if torch.cuda.is_initialized() else 0.0,
            "handles": handles,
            "threads": process.num_threads(),
            "events": _bytes(self.folder, "events.out*"),
            "maps": _bytes(self.folder, "step_*.safetensors"),
            "pictures": len(list(self.folder.rglob("*.png"))),
        }
        for name, value in now.items():
            self._kept.setdefault(name, array("d")).append(float(value))
        self._before = time.perf_counter()


def _bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern))


class Short(pl.Callback):
    """Fills the history of a callback after a few snapshots."""

    def __init__(self, callback: ViTExplainCallback, capacity: int) -> None:
        self.callback, self.capacity = callback, capacity

    def on_train_start(self, *_: object) -> None:
        assert self.callback.tracker is not None
        self.callback.tracker.history.capacity = self.capacity


def measure(
    snapshots: int,
    accelerator: str = "cpu",
    with_callback: bool = True,
    num_images: int = 8,
    model: str | None = None,
    check_every: int = 20,
    capacity: int = 48,
) -> dict[str, list[float]]:
    """Train with a snapshot after every step; a tiny ViT of 32 x 32 pixels, or one of timm's."""
    callback = ViTExplainCallback(
        every_n_steps=1, num_images=num_images, num_shown=1, checks=check_every, on_error="raise"
    )
    vit: Any = None if model is None else timm.create_model(model, num_classes=10)
    data = Pictures() if vit is None else smooth_images(16, vit.patch_embed.img_size[0])
    validation = Pictures(num_images) if vit is None else smooth_images(num_images, vit.patch_embed.img_size[0])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usage = Usage(Path(folder))
        fit(
            callback if with_callback else None,
            Path(folder),
            Classifier(vit),
            train=loader(data, 16),
            validation=loader(validation, 16),
            max_epochs=snapshots,
            accelerator=accelerator,
            more_callbacks=[*([Short(callback, capacity)] if with_callback else []), usage],
        )
    return usage.series


def slope(values: list[float], warm_up: int, period: int = 1) -> float:
    """Growth a snapshot, leaving out the first `warm_up`: the median over pairs of snapshots (Theil and Sen).

    Unlike least squares, it ignores what comes and goes, or comes once. Pairs are a multiple of `period`
    apart, so that what returns after so many snapshots is compared with itself.
    """
    rest = np.asarray(values[warm_up:])
    early, late = np.triu_indices(len(rest), period)
    early, late = early[(late - early) % period == 0], late[(late - early) % period == 0]
    return float(np.median((rest[late] - rest[early]) / (late - early)))


def growth(snapshots: int = 45, warm_up: int = 20, check_every: int = 5) -> dict[str, float]:
    """Growth of each series a snapshot, in a process where Python allocates as torch does: one count has all."""
    options = (snapshots, "cpu", True, 8, None, check_every, 6)
    series = in_new_process(measure, *options, environment={"PYTHONMALLOC": "malloc"})
    return {name: slope(values, warm_up, check_every) for name, values in series.items()}


def lines(series: dict[str, list[float]], warm_up: int) -> list[str]:
    """A line for each series: where it ends, and how it grows."""
    units = {"live": "kB", "resident": "kB", "cuda": "kB", "events": "bytes", "maps": "bytes"}
    times = series["milliseconds"][warm_up:]
    part = max(1, len(times) // 4)
    early, late = statistics.median(times[:part]), statistics.median(times[-part:])
    return [
        f"a step takes {early:.0f} ms in the first quarter after the warm-up and {late:.0f} ms in the last (medians)",
        *(
            f"{name:9} {values[-1]:12,.0f} {units.get(name, ''):5} {slope(values, warm_up):+12,.2f} a step"
            for name, values in series.items()
            if name != "milliseconds"
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snapshots", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=100, help="first snapshots, left out of the slope")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--model", help="of timm; default: a tiny ViT of 32 x 32 pixels")
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    for title, with_callback in (("with", True), ("without", False)):
        found = measure(
            arguments.snapshots, arguments.accelerator, with_callback, arguments.num_images, arguments.model
        )
        print(f"{title} the callback", *lines(found, arguments.warm_up), sep="\n")
