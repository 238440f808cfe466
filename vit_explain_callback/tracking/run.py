"""Read a saved run: its maps, scalars and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vit_explain_callback.metrics.drift import DriftMetric, resolve_metrics
from vit_explain_callback.tracking.history import History, check_alike
from vit_explain_callback.tracking.pictures import figures
from vit_explain_callback.tracking.probe import Probe
from vit_explain_callback.tracking.scalars import drift_scalars, scalars
from vit_explain_callback.tracking.snapshot import Snapshot
from vit_explain_callback.tracking.summary import summary
from vit_explain_callback.visualization.overlay import Picture


@dataclass(frozen=True)
class Run:
    """The snapshots of a run, in memory.

    Attributes:
        folder: The folder that it was read from.
        probe: Its images as pictures, with labels, regions and class names.
        snapshots: Every snapshot, baseline first.
        rows: Scalars of each snapshot, if they have been computed.
        metrics: Drift metrics besides the built-in ones.
    """

    folder: Path
    probe: Probe
    snapshots: Sequence[Snapshot]
    rows: Sequence[dict[str, float]] | None = None
    metrics: Sequence[DriftMetric] = ()

    @property
    def steps(self) -> list[int]:
        """Optimiser steps of the T snapshots."""
        return [snapshot.step for snapshot in self.snapshots]

    @property
    def maps(self) -> dict[str, Tensor]:
        """Raw maps by method name, (T, B, grid_h, grid_w)."""
        return {name: torch.stack([one.maps[name] for one in self.snapshots]) for name in self.snapshots[0].maps}

    @property
    def logits(self) -> Tensor:
        """(T, B, C)."""
        return torch.stack([snapshot.logits for snapshot in self.snapshots])

    @property
    def targets(self) -> Tensor:
        """(B,) classes that the gradients are of."""
        return self.snapshots[0].target

    @cached_property
    def scalars(self) -> list[dict[str, float]]:
        """A row for each snapshot: `step`, and every scalar by tag, as `pandas.DataFrame(run.scalars)` takes them."""
        if self.rows is not None:
            return list(self.rows)
        history = History()
        rows: list[dict[str, float]] = []
        for snapshot in self.snapshots:
            history.add(snapshot)
            row = {"step": snapshot.step, **scalars(history, self.probe)}
            for metric in self.metrics:
                row |= drift_scalars(history, self.probe, metric)
            rows.append(row)
        return rows

    @property
    def history(self) -> History:
        """The snapshots as the run itself stored them, thinned out."""
        history = History()
        for snapshot in self.snapshots:
            history.add(snapshot)
        return history

    @property
    def pictures(self) -> dict[str, Picture]:
        """The pictures of the last snapshot by tag, (H, W, 3) uint8."""
        return dict(figures(self.history, self.probe))

    @property
    def summary(self) -> str:
        """The run in words."""
        return summary(self.history, self.probe)


def load_run(folder: str | Path, metrics: Sequence[str | DriftMetric] = ()) -> Run:
    """Read the run that an `ExplanationTracker` or a `ViTExplainCallback` saved.

    Args:
        folder: Folder of the run, or the folder `explanations` in it.
        metrics: Drift metrics to compute besides the built-in ones, as for `ExplanationTracker`.

    Raises:
        FileNotFoundError: If nothing was saved there.
        TypeError: If `metrics` holds something else.
        ValueError: If a file was not written by this package or does not fit the others; if a metric is unknown.
    """
    where = Path(folder)
    if (where / "explanations").is_dir():
        where = where / "explanations"
    paths = sorted(where.glob("step_*.safetensors"))
    if not paths or not (where / "probe.safetensors").is_file():
        raise FileNotFoundError(
            f"There are no explanations in {folder}: expected step_*.safetensors and probe.safetensors, as "
            "`ViTExplainCallback(save_maps=True)` writes them to the run's folder."
        )
    probe = Probe.load(where / "probe.safetensors")
    snapshots = [Snapshot.load(path) for path in paths]
    ordered = sorted(zip(snapshots, paths, strict=True), key=lambda pair: pair[0].step)
    snapshots, paths = [snapshot for snapshot, _ in ordered], [path for _, path in ordered]
    for path, snapshot in zip(paths, snapshots, strict=True):
        _check_probe(path, snapshot, len(probe))
    check_alike(snapshots, paths)
    return Run(where, probe, snapshots, metrics=resolve_metrics(metrics))


def _check_probe(path: Path, snapshot: Snapshot, images: int) -> None:
    if len(snapshot.target) != images:
        raise ValueError(
            f"Expected {path} to hold `target` of the probe's {images} images, but got {len(snapshot.target)}."
        )
