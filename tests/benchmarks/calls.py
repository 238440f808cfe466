"""Count how often the callback runs the user's code: the step, the `forward`, the records.

    python -m tests.benchmarks.calls

Counts calls on copies, beyond the trainer's own, for several kinds of projects, and times a fit of a module that holds
300,000 records.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import CLASSES
from tests.runs import fit
from tests.situations.project import Project, loader, pictures
from vit_explain_callback import ViTExplainCallback

CALLS: Counter[str] = Counter()
RECORDS = 300_000


class Plain(Project):
    """`forward` is the ViT."""

    def forward(self, images: Tensor) -> Any:
        CALLS["forward"] += 1
        return self.logits(images)

    def logits(self, images: Tensor) -> Any:
        return self.vit(images)

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return F.cross_entropy(self(batch[0]), batch[1])


class Headed(Plain):
    """A head beside the ViT, both called in `forward`."""

    def __init__(self) -> None:
        super().__init__(num_classes=0)
        self.head = nn.Linear(48, CLASSES)

    def logits(self, images: Tensor) -> Any:
        return self.head(self.vit(images))


class Scaled(Headed):
    """`forward` does something of its own in between."""

    def logits(self, images: Tensor) -> Any:
        return self.head(0.5 * self.vit(images))


class Normalising(Headed):
    """The step normalises the images."""

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return F.cross_entropy(self((batch[0] - 0.1) / 1.1), batch[1])


class InStep(Headed):
    """Only the step has the logits."""

    forward = pl.LightningModule.forward

    def step(self, batch: Any) -> Tensor:
        CALLS["step"] += 1
        return F.cross_entropy(self.head(0.5 * self.vit(batch[0])), batch[1])


PROJECTS: dict[str, type[Plain]] = {
    "forward is the ViT": Plain,
    "forward is ViT and head": Headed,
    "forward does more": Scaled,
    "the step normalises": Normalising,
    "only the step has the logits": InStep,
}


def calls(project: Callable[[], Any], callback: Any) -> tuple[Counter[str], int]:
    """Calls in a fit of two epochs, and the snapshots of it."""
    CALLS.clear()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 2, "limit_val_batches": 2}
        fit(callback, folder, project(), loader(), loader(pictures(6)), **options)
    return Counter(CALLS), 0 if callback is None else callback.tracker.history.count


def seconds(callback: Any, records: int) -> float:
    """A fit of a module that holds records, and has a forward that is more than its parts."""

    def project() -> Any:
        module: Any = Scaled()
        module.records = [{"step": index, "loss": 0.1} for index in range(records)]
        return module

    start = time.perf_counter()
    calls(project, callback)
    return time.perf_counter() - start


def main() -> None:
    print("| project | step: baseline and 2 snapshots | forward | one checked snapshot more: step | forward |")
    print("|---|---|---|---|---|")
    for name, project in PROJECTS.items():
        without, _ = calls(project, None)
        row = []
        for every in (None, 1):
            options: dict[str, Any] = {"num_images": 8, "checks": every}
            found, snapshots = calls(project, ViTExplainCallback(**options))
            assert snapshots == 3
            row.append([found[key] - without[key] for key in ("step", "forward")])
        checked = [(more - plain) / 3 for more, plain in zip(row[1], row[0], strict=True)]
        print(f"| {name} | {row[0][0]} | {row[0][1]} | {checked[0]:.0f} | {checked[1]:.0f} |")
    for records in (0, RECORDS):
        with_it = seconds(ViTExplainCallback(num_images=8), records)
        print(f"\n{records:,} records: {seconds(None, records):.1f} s without the callback, {with_it:.1f} s with it")


if __name__ == "__main__":
    main()
