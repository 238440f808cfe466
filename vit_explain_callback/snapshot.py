"""One look at the model: a snapshot, its file, and the history of snapshots that the pictures are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
        """Write a safetensors file: `map/{method}`, `logits`, `target`, and `step` in its metadata."""
        tensors = {f"map/{name}": maps.contiguous() for name, maps in self.maps.items()}
        tensors |= {"logits": self.logits.contiguous(), "target": self.target.contiguous()}
        save_file(tensors, path, metadata={"step": str(self.step)})

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
            del self.snapshots[_most_crowded([s.step for s in self.snapshots])]

    def columns(self, count: int) -> list[Snapshot]:
        """At most `count` snapshots to show: baseline, some between it and now, spaced by the log of the step, now."""
        if len(self.snapshots) <= count:
            return list(self.snapshots)
        steps = [snapshot.step for snapshot in self.snapshots]
        return [self.snapshots[index] for index in _log_spaced(steps, count)]

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        return {"count": self.count, "snapshots": [snapshot.state_dict() for snapshot in self.snapshots]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.count = state["count"]
        self.snapshots = [Snapshot(**snapshot) for snapshot in state["snapshots"]]


def _log_spaced(steps: Sequence[int], count: int) -> list[int]:
    """Indices of `count` steps, first and last included, as evenly spaced in log(1 + elapsed) as the steps allow."""
    position = [math.log1p(step - steps[0]) for step in steps]
    chosen = {0, len(steps) - 1}
    start = position[1]
    for k in range(count - 2):
        wanted = start + (position[-1] - start) * k / max(1, count - 2)
        free = [index for index in range(len(steps)) if index not in chosen]
        chosen.add(min(free, key=lambda index: abs(position[index] - wanted)))
    return sorted(chosen)


def _most_crowded(steps: Sequence[int]) -> int:
    """Index of the step, neither first nor one of the last two, whose neighbours lie closest in log(1 + elapsed)."""
    position = torch.tensor([step - steps[0] for step in steps], dtype=torch.float64).log1p()
    gaps = position[2:-1] - position[:-3]
    return int(gaps.argmin()) + 1
