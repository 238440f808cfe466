"""Measure where a snapshot spends its time, and its share of an epoch.

A real run with TensorBoard: the callback's own steps are timed inside it, snapshot by snapshot, and the medians over
those with a full filmstrip are printed. One training step of the same model at batch 32 is timed in a run without the
callback. Noise and faithfulness, which are not measured with every snapshot, and what is written at the end of the run,
have their own lines. The last lines are what a user waits for: the first snapshot, the second, which is the first with
faithfulness, and the end, beside a later snapshot; and all checks of the run beside all of its explaining.

    python -m tests.benchmarks.snapshot
    python -m tests.benchmarks.snapshot --model vit_base_patch16_224 --num-images 16
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.runs import Classifier, fit
from vit_explain_callback import ViTExplainCallback, tracker
from vit_explain_callback.tracker import ExplanationTracker
from vit_explain_callback.tracking import output
from vit_explain_callback.tracking.reliability import ReliabilityMeter
from vit_explain_callback.tracking.scalars import Detail
from vit_explain_callback.tracking.writers import TensorBoardWriter

EPOCH_STEPS = 500
PARTS: dict[str, tuple[Any, str]] = {
    "explain": (tracker, "explain_together"),
    "drift and scalars": (tracker, "scalars"),
    "draw": (output, "figures"),
    "encode and write": (TensorBoardWriter, "pictures"),
}
RARE: dict[str, tuple[Any, str]] = {
    "checks": (ReliabilityMeter, "of"),
    "draw animations": (output, "animations"),
    "write the end": (TensorBoardWriter, "finish"),
}
WHOLE: dict[str, tuple[Any, str]] = {
    "observe": (ExplanationTracker, "observe"),
    "finish": (ExplanationTracker, "finish"),
}


class StepTimes(pl.Callback):
    """Seconds from the start of each training step to its end, without loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


@contextmanager
def timed(parts: dict[str, tuple[Any, str]]) -> Iterator[dict[str, list[float]]]:
    """Note the seconds of every call of some functions, each given as an owner and a name; iterators are run out."""
    taken: dict[str, list[float]] = defaultdict(list)

    def noting(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            result = list(result) if isinstance(result, Iterator) else result
            taken[part].append(time.perf_counter() - begun)
            return result

        return run

    with ExitStack() as stack:
        for part, (owner, name) in parts.items():
            stack.enter_context(mock.patch.object(owner, name, noting(part, getattr(owner, name))))
        yield taken


def smooth_images(count: int, size: int) -> TensorDataset:
    """Images that compress like photographs do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic")
    images += 0.05 * torch.randn(images.shape, generator=generator)
    return TensorDataset(images, torch.arange(count) % 10)


def run(
    vit: Any, size: int, batch: int, steps: int, callbacks: Sequence[pl.Callback], explain: ViTExplainCallback | None
) -> None:
    loader = DataLoader(smooth_images(batch * steps, size), batch)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Classifier(vit, lr=1e-4)
        options: dict[str, Any] = {
            "train": loader,
            "validation": loader,
            "limit_val_batches": 0 if explain is None else 1.0,
        }
        fit(explain, Path(folder), module, max_epochs=1, more_callbacks=callbacks, **options)


def measure(
    model: str, num_images: int, snapshots: int, batch: int, detail: Detail = "brief", **shape: Any
) -> dict[str, Any]:
    """Seconds of a training step and of each part of a snapshot, snapshot by snapshot."""
    vit: Any = timm.create_model(model, pretrained=False, num_classes=10, **shape)
    size = vit.patch_embed.img_size[0]
    steps = StepTimes()
    run(vit, size, batch, 4, [steps], None)
    callback = ViTExplainCallback(every_n_steps=1, num_images=num_images, detail=detail, on_error="raise")
    with timed(PARTS | RARE | WHOLE) as taken:
        run(vit, size, 1, snapshots, [], callback)
    return {"step": statistics.median(steps.seconds[1:]), "parts": dict(taken)}


def lines(found: dict[str, Any], epoch_steps: int = EPOCH_STEPS) -> list[str]:
    """The table; parts are medians over the later half of the snapshots."""
    epoch = epoch_steps * found["step"]
    medians = {part: statistics.median(values[len(values) // 2 :]) for part, values in found["parts"].items()}
    every_time = {part: medians[part] for part in PARTS}
    rows = [
        *every_time.items(),
        ("a snapshot", sum(every_time.values())),
        *(row for row in medians.items() if row[0] in RARE),
    ]
    heading = f"one training step {found['step'] * 1000:.0f} ms; an epoch of {epoch_steps} steps {epoch:.0f} s"
    table = [f"{name:20s} {value * 1000:9.1f} ms  {value / epoch:8.4%} of an epoch" for name, value in rows]
    return [heading, *table, *_waits(found["parts"])]


def _waits(parts: dict[str, list[float]]) -> list[str]:
    first, second, *others = parts["observe"]
    later = statistics.median(others)
    waits = {"first snapshot": first, "second snapshot": second, "end": parts["finish"][0]}
    checks, explaining = sum(parts["checks"]), sum(parts["explain"])
    return [
        *(f"{name:20s} {value:9.2f} s   {value / later:5.2f} x a later one" for name, value in waits.items()),
        f"{'all checks':20s} {checks:9.2f} s   {checks / (checks + explaining):5.0%} of all explaining",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--snapshots", type=int, default=20)
    parser.add_argument("--detail", choices=["brief", "full"], default="brief", help="as of the callback")
    parser.add_argument("--batch", type=int, default=32, help="of the training step that is timed")
    args = parser.parse_args()
    print("\n".join(lines(measure(args.model, args.num_images, args.snapshots, args.batch, args.detail))))


if __name__ == "__main__":
    main()
