"""One look at the model: a snapshot, its file, and the history of snapshots that the pictures are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """What the model looked at after some optimiser steps; tensors on the CPU.

    Attributes:
        step: Optimiser steps taken before it.
        maps: Raw maps by method name, (B, grid_h, grid_w).
        logits: (B, C).
        target: (B,) classes that the gradients are of.
    """

    step: int
    maps: dict[str, Tensor]
    logits: Tensor
    target: Tensor

    @property
    def prediction(self) -> Tensor:
        """(B,) predicted classes."""
        return self.logits.argmax(dim=1)

    @property
    def target_probability(self) -> Tensor:
        """(B,) probability of the target class, in [0, 1]."""
        return self.logits.double().softmax(dim=1).gather(1, self.target[:, None])[:, 0]

    def save(self, path: Path) -> None:
        """Write a safetensors file: `map/{method}`, `logits`, `target`, and `step` in its metadata.

        The file appears whole or not at all, also if the process is killed.
        """
        tensors = {f"map/{name}": maps.contiguous() for name, maps in self.maps.items()}
        tensors |= {"logits": self.logits.contiguous(), "target": self.target.contiguous()}
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file(tensors, partial, metadata={"step": str(self.step)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(file.metadata()["step"])
        maps = {name.removeprefix("map/"): value for name, value in tensors.items() if name.startswith("map/")}
        return cls(step, maps, tensors["logits"], tensors["target"])

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint that loads with `weights_only=True`."""
        return {"step": self.step, "maps": self.maps, "logits": self.logits, "target": self.target}


@dataclass
class History:
    """The snapshots of a run, baseline first; thinned out as it grows, evenly in the logarithm of the step.

    Attributes:
        capacity: Snapshots kept at most. The baseline and the latest two are always among them.
        snapshots: Those kept, oldest first.
        count: Snapshots taken, kept or not.
    """

    capacity: int = 48
    snapshots: list[Snapshot] = field(default_factory=list)
    count: int = 0

    @property
    def baseline(self) -> Snapshot:
        """The first snapshot."""
        return self.snapshots[0]

    def add(self, snapshot: Snapshot) -> None:
        """Append the latest snapshot, and let go of the most crowded old one if there are too many."""
        self.snapshots.append(snapshot)
        self.count += 1
        if len(self.snapshots) > self.capacity:
            # The one before the latest is what the next drift is measured against.
            del self.snapshots[_most_crowded(self.snapshots[:-1])]

    def columns(self, count: int) -> list[Snapshot]:
        """At most `count` snapshots to show: baseline, some between it and now, spaced by the log of the step, now."""
        shown = list(self.snapshots)
        while len(shown) > max(2, count):
            del shown[_most_crowded(shown)]
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"count": self.count, "snapshots": [snapshot.state_dict() for snapshot in self.snapshots]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.count = state["count"]
        self.snapshots = [Snapshot(**snapshot) for snapshot in state["snapshots"]]


def _most_crowded(snapshots: Sequence[Snapshot]) -> int:
    """Index of the snapshot, neither first nor last, whose neighbours lie closest in log(1 + steps since the first)."""
    place = [math.log1p(snapshot.step - snapshots[0].step) for snapshot in snapshots]
    return min(range(1, len(place) - 1), key=lambda index: place[index + 1] - place[index - 1])
